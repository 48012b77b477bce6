"""The loss in PyTorch, block by block: memory for a few rows of full resolution, whatever the size of the labels.

Any device, float64 included.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import at_least_float32
from ..resampling import Resampling, block_numbers


def forward(logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, hits, and logsumexp of all pixels, each ``[B, H, W]``."""
    loss = torch.empty(labels.shape, dtype=at_least_float32(logits[:0]).dtype, device=logits.device)
    hits, norm = torch.empty_like(loss, dtype=torch.bool), torch.empty_like(loss)
    for block in _blocks(logits, labels, align_corners):
        here = block.images, block.rows
        label = labels[here].long()
        ignored = label == ignore_index
        scores = block.enlarge(logits)
        of_label = _at(scores, label.masked_fill(ignored, 0))
        largest, winner = scores.max(1)
        log_sum = scores.sub_(largest[:, None]).exp_().sum(1).log_()
        loss[here] = (largest - of_label + log_sum).masked_fill_(ignored, 0)
        hits[here] = (winner == label) & ~ignored
        norm[here] = largest + log_sum
    return loss, hits, norm


def backward(
    logits: Tensor, labels: Tensor, norm: Tensor, grad_loss: Tensor, ignore_index: int, align_corners: bool
) -> Tensor:
    """The gradient of the logits; makes those of a block again."""
    total = torch.zeros(logits.shape, dtype=grad_loss.dtype, device=logits.device)
    for block in _blocks(logits, labels, align_corners):
        here = block.images, block.rows
        label = labels[here].long()
        ignored = label == ignore_index
        weight = grad_loss[here].masked_fill(ignored, 0)[:, None]
        gradient = block.enlarge(logits).sub_(norm[here][:, None]).exp_().mul_(weight)
        gradient.scatter_add_(1, label.masked_fill(ignored, 0)[:, None], -weight)
        block.add_gradient(gradient, total)
    return total.to(logits.dtype)


def _at(scores: Tensor, label: Tensor) -> Tensor:
    """Each pixel's number of its label."""
    return scores.gather(1, label[:, None])[:, 0]


@dataclass(frozen=True)
class _Block:
    """Some images, and some rows of full resolution, whose neighbours are some rows of the logits: the sources."""

    images: slice
    rows: slice
    sources: slice
    weights: Tensor  # [rows, sources]
    columns: int
    align_corners: bool

    def enlarge(self, logits: Tensor) -> Tensor:
        """[B, C, h, w] to [images, C, rows, W]."""
        part = at_least_float32(logits[self.images, :, self.sources])
        part = torch.einsum("rs,bcsw->bcrw", self.weights, part)
        size = (part.shape[2], self.columns)  # of rows as many as there are, which leaves them alone
        return F.interpolate(part, size, mode="bilinear", align_corners=self.align_corners)

    def add_gradient(self, gradient: Tensor, total: Tensor) -> None:
        """Add the transposed map of [images, C, rows, W] to [B, C, h, w]."""
        B, C, rows, W = gradient.shape
        part = torch.ops.aten.upsample_bilinear2d_backward(
            gradient, (rows, W), (B, C, rows, total.shape[3]), self.align_corners
        )
        total[self.images, :, self.sources] += torch.einsum("rs,bcrw->bcsw", self.weights, part)


def _blocks(logits: Tensor, labels: Tensor, align_corners: bool) -> Iterator[_Block]:
    (B, C, h, _), (H, W) = logits.shape, labels.shape[1:]
    images = min(B, max(1, block_numbers(logits) // (C * H * W)))
    rows = min(H, max(1, block_numbers(logits) // (C * W)))
    vertical = Resampling.bilinear(h, H, align_corners)
    matrix = vertical.matrix()
    for first in range(0, H, rows):
        index = vertical.index[first : first + rows]
        sources = slice(int(index.min()), int(index.max()) + 1)
        weights = matrix[first : first + rows, sources].to(at_least_float32(logits[:0]))
        for image in range(0, B, images):
            here = slice(image, image + images), slice(first, first + rows)
            yield _Block(*here, sources, weights, W, align_corners)
