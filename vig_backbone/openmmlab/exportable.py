"""The parts of detectors and segmenters that exporters take, as functions of the images alone."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.config import Config
from torch import Tensor, nn

from ..checkpoint import CheckpointError, compare, find_weights, read_checkpoint
from ..export import ExportError
from .complexity.run import build_model


class SegmenterLogits(nn.Module):
    """Normalised images [B, 3, H, W] -> logits [B, classes, H, W] of the whole image, or with `labels` [B, H, W]."""

    def __init__(self, model: nn.Module, labels: bool = False) -> None:
        super().__init__()
        self.model = model
        self.labels = labels
        self.outputs = ("labels",) if labels else ("logits",)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        head = self.model.decode_head
        logits = head(self.model.extract_feat(images))
        logits = F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=head.align_corners)
        return (logits.argmax(1) if self.labels else logits,)


class DetectorMaps(nn.Module):
    """Normalised images [B, 3, H, W] -> maps of the neck, then objectness and box offsets of the RPN for each.

    That is where exporters stop: proposals are as many as the suppression leaves, and the heads behind it take them.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        levels = range(len(model.rpn_head.prior_generator.strides))
        self.outputs = tuple(f"{kind}_{i}" for kind in ("neck", "rpn_score", "rpn_box") for i in levels)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = self.model.extract_feat(images)
        scores, boxes = self.model.rpn_head(maps)
        return (*maps, *scores, *boxes)


class PooledByMatrices(nn.Module):
    """Adaptive average pooling as two products, whose graph is the same for every size of the map."""

    def __init__(self, output_size: int | Sequence[int]) -> None:
        super().__init__()
        self.output_size = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (self._weights(n, size, x) for n, size in zip(self.output_size, x.shape[2:]))
        return rows @ x @ columns.mT

    @staticmethod
    def _weights(bins: int, size: int, like: Tensor) -> Tensor:
        """[bins, size]: bin i is the mean from floor(i size / bins) to ceil((i + 1) size / bins), excluded."""
        i, place = torch.arange(bins, device=like.device)[:, None], torch.arange(size, device=like.device)
        is_in = (place >= i * size // bins) & (place < ((i + 1) * size + bins - 1) // bins)
        weights = is_in.to(like.dtype)
        return weights / weights.sum(1, keepdim=True)


def exportable_model(cfg: Config, checkpoint: str | None, device: str, labels: bool = False) -> nn.Module:
    """What can be exported of a config's model, with weights if `checkpoint` is given, and names of its `outputs`.

    Raises:
        CheckpointError: the checkpoint does not fit.
        ExportError: it is neither a segmenter nor a two-stage detector.
    """
    model = build_model(cfg, device)
    if checkpoint is not None:
        weights = find_weights(read_checkpoint(checkpoint), checkpoint)
        if problems := compare(model, weights):
            name = type(model).__name__
            raise CheckpointError(f"{checkpoint} does not fit the {name} of this config: {'; '.join(problems)}")
        model.load_state_dict(weights)
    if hasattr(model, "decode_head"):
        return SegmenterLogits(model, labels).eval()
    if getattr(model, "rpn_head", None) is None:
        raise ExportError(f"{type(model).__name__}: expected a segmenter, or a detector with an RPN")
    if labels:
        raise ExportError("--argmax is for segmenters")
    return DetectorMaps(model).eval()


def replace_pooling(model: nn.Module) -> nn.Module:
    """The model with adaptive average pooling by matrices, in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.AdaptiveAvgPool2d):
                setattr(module, name, PooledByMatrices(child.output_size))
    return model
