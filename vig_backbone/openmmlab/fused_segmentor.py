"""mmseg's EncoderDecoder, whose losses and label maps come from logits of the head's own resolution."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from mmengine.logging import print_log
from mmengine.structures import PixelData
from mmseg.models import EncoderDecoder
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.structures import SegDataSample
from mmseg.utils import add_prefix
from torch import Tensor, nn
from vig_kernels import Resampling, resized_argmax

from ..padding import attach_valid_sizes, attached_valid_sizes
from .fused_loss import fused_loss, reason_against
from .upload import upload

STOCK = "with keep_logits (and so with test-time augmentation), one class or a predict of the head's own it is 'mean'"
Features = tuple[Tensor, ...]
# Pixels of the windows of sliding inference that go through the model at a time: 16 windows of 512 x 512 on a GPU,
# where fewer would leave it waiting for Python (measured with 4: 41 % busy); 4 on a CPU.
WINDOW_PIXELS = {"cuda": 16 * 512**2, "cpu": 4 * 512**2}
# How much the pixels of a window count, along one side of it.
BLENDS: dict[str, Callable[[int], Tensor]] = {
    "mean": torch.ones,
    "linear": lambda size: torch.arange(1, size + 1).minimum(torch.arange(size, 0, -1)),
}


class FusedEncoderDecoder(EncoderDecoder):
    """EncoderDecoder with the same arguments, parameters, losses and label maps, in less time and memory.

    In training, resizing of logits, cross-entropy and accuracy are one operator for every head, main and auxiliary,
    that has BaseDecodeHead's loss, with CrossEntropyLoss over softmax (class weights, OHEM and several of them
    included). A head with something else computes its loss by itself, which is logged.

    In prediction, all that mmseg does to logits (resizing to the image, averaging windows, cropping padding, mirroring
    back, resizing to the original size) and argmax are one operator, and windows go through the model several at a
    time. Settings in `test_cfg` beside mmseg's own:

    - ``with_scores`` (False): add `seg_scores`, the softmax of each pixel's class, ``[1, H, W]``;
    - ``window_batch`` (as many as have together 16 x 512² pixels, 4 x 512² on a CPU): windows that go through the model
      at a time;
    - ``blend`` ("mean"): how overlapping windows are averaged; with "linear" a window counts less and less towards its
      edges, where it sees least, so that no seams show;
    - ``keep_logits`` (False): predict as mmseg does, with `seg_logits` of full resolution, as test-time augmentation
      needs them.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._plain_heads = {head for name, head in self._heads() if _logged_reason(name, head)}

    def _heads(self) -> list[tuple[str, nn.Module]]:
        heads = [("decode_head", self.decode_head)]
        if self.with_auxiliary_head:
            auxiliary = self.auxiliary_head
            heads += [("auxiliary_head", head) for head in (auxiliary if _is_list(auxiliary) else [auxiliary])]
        return heads

    # ---- training

    def _head_loss(self, head: nn.Module, features: Features, data_samples: list[SegDataSample]) -> dict[str, Tensor]:
        if head in self._plain_heads:
            return head.loss(features, data_samples, self.train_cfg)
        return fused_loss(head, features, data_samples)

    def _decode_head_forward_train(self, inputs: Features, data_samples: list[SegDataSample]) -> dict[str, Tensor]:
        return add_prefix(self._head_loss(self.decode_head, inputs, data_samples), "decode")

    def _auxiliary_head_forward_train(self, inputs: Features, data_samples: list[SegDataSample]) -> dict[str, Tensor]:
        if not _is_list(self.auxiliary_head):
            return add_prefix(self._head_loss(self.auxiliary_head, inputs, data_samples), "aux")
        losses: dict[str, Tensor] = {}
        for i, head in enumerate(self.auxiliary_head):
            losses.update(add_prefix(self._head_loss(head, inputs, data_samples), f"aux_{i}"))
        return losses

    # ---- prediction

    def predict(self, inputs: Tensor, data_samples: list[SegDataSample] | None = None) -> list[SegDataSample]:
        """Label maps of images ``[B, 3, H, W]``, each of its `ori_shape`, as `pred_sem_seg` ``[1, H, W]``, int64."""
        head = type(self.decode_head)
        resizes = head.predict is BaseDecodeHead.predict and head.predict_by_feat is BaseDecodeHead.predict_by_feat
        blend = self.test_cfg.get("blend", "mean")
        if blend not in BLENDS:
            raise ValueError(f"model.test_cfg.blend={blend!r}: expected one of {', '.join(map(repr, BLENDS))}")
        if self.test_cfg.get("keep_logits", False) or self.out_channels == 1 or not resizes:
            if blend != "mean":
                raise ValueError(f"model.test_cfg.blend={blend!r} needs label maps from low-resolution logits: {STOCK}")
            return super().predict(inputs, data_samples)
        metas = None if data_samples is None else [sample.metainfo for sample in data_samples]
        mode = self.test_cfg.get("mode", "whole")
        if mode not in ("slide", "whole"):
            raise ValueError(f"model.test_cfg.mode={mode!r}: expected 'slide' or 'whole'")
        maps = self._sliding_logits(inputs) if mode == "slide" else self._whole_logits(inputs, metas)
        samples = [SegDataSample() for _ in inputs] if data_samples is None else data_samples
        for i, sample in enumerate(samples):
            one = maps if metas is None else maps.of_image(metas[i], self.align_corners)
            classes, scores = resized_argmax(
                maps.logits[i : i + 1], one.rows, one.columns, self.test_cfg.get("with_scores", False)
            )
            sample.pred_sem_seg = PixelData(data=classes)
            if scores is not None:
                sample.set_data({"seg_scores": PixelData(data=scores)})
        return samples

    def _whole_logits(self, inputs: Tensor, metas: list[dict] | None) -> "_Maps":
        logits = self.decode_head(self.extract_feat(inputs))
        size = inputs.shape[2:] if metas is None else metas[0].get("pad_shape", metas[0]["img_shape"])[:2]
        return _Maps(logits, *self._enlarge(logits, size))

    def _sliding_logits(self, inputs: Tensor) -> "_Maps":
        """Of all windows, side by side as they lie in the image."""
        size = inputs.shape[2:]
        crop = [min(*pair) for pair in zip(self.test_cfg.crop_size, size)]
        tops, lefts = (_starts(*numbers) for numbers in zip(size, crop, self.test_cfg.stride))
        corners = [(top, left) for top in tops for left in lefts]
        windows = [image[:, top : top + crop[0], left : left + crop[1]] for top, left in corners for image in inputs]
        sizes = _window_sizes(attached_valid_sizes(inputs), corners, crop)
        batch = self.test_cfg.get("window_batch") or _windows_at_once(crop, inputs.device)
        parts = []
        for i in range(0, len(windows), batch):
            part = torch.stack(windows[i : i + batch])
            attach_valid_sizes(part, None if sizes is None else sizes[i : i + batch])
            parts.append(self.decode_head(self.extract_feat(part)))
        logits = torch.cat(parts)
        rows, columns = self._enlarge(logits, crop)
        h, w = logits.shape[2:]
        logits = logits.view(len(tops), len(lefts), len(inputs), -1, h, w)
        logits = logits.permute(2, 3, 0, 4, 1, 5).flatten(4).flatten(2, 3)  # [B, C, all h, all w]
        return _Maps(logits, self._blended(rows, tops, size[0]), self._blended(columns, lefts, size[1]))

    def _blended(self, window: Resampling, starts: list[int], target: int) -> Resampling:
        """All windows along an axis; for both axes alike, their shares in a pixel are products."""
        share = BLENDS[self.test_cfg.get("blend", "mean")](len(window))
        return Resampling.average([window] * len(starts), starts, target, [share] * len(starts))

    def _enlarge(self, logits: Tensor, size: Sequence[int]) -> list[Resampling]:
        return [Resampling.bilinear(*pair, self.align_corners) for pair in zip(logits.shape[2:], size)]


@dataclass(frozen=True)
class _Maps:
    """Logits [B, C, h, w], and what makes them as large as the images that the model saw."""

    logits: Tensor
    rows: Resampling
    columns: Resampling

    def of_image(self, meta: dict, align_corners: bool) -> "_Maps":
        """Without padding, mirrored back, as large as the original: mmseg's ``postprocess_result``."""
        left, right, top, bottom = meta.get("img_padding_size", meta.get("padding_size", [0] * 4))
        rows, columns = self.rows.crop(top, len(self.rows) - bottom), self.columns.crop(left, len(self.columns) - right)
        if meta.get("flip"):
            if meta.get("flip_direction") == "horizontal":
                columns = columns.flip()
            elif meta.get("flip_direction") == "vertical":
                rows = rows.flip()
            else:
                raise ValueError(f"flip_direction={meta.get('flip_direction')!r}: expected 'horizontal' or 'vertical'")
        H, W = meta["ori_shape"]
        rows = rows.then(Resampling.bilinear(len(rows), H, align_corners))
        return _Maps(self.logits, rows, columns.then(Resampling.bilinear(len(columns), W, align_corners)))


def _windows_at_once(crop: Sequence[int], device: torch.device) -> int:
    pixels = WINDOW_PIXELS.get(device.type, WINDOW_PIXELS["cpu"])
    return max(1, pixels // (crop[0] * crop[1]))


def _window_sizes(sizes: Tensor | None, corners: list[tuple[int, int]], crop: Sequence[int]) -> Tensor | None:
    """Rows and columns of image in each window, [windows · B, 2]; one, of zeros, where all of it is padding."""
    if sizes is None:
        return None
    left = sizes - upload(corners, sizes.device, sizes.dtype)[:, None]  # [windows, B, 2]
    return left.clamp(min=1).minimum(upload(crop, sizes.device, sizes.dtype)).flatten(0, 1)


def _starts(size: int, crop: int, stride: int) -> list[int]:
    """Of windows along an axis: one every `stride`, the last one moved back into the image."""
    count = max(size - crop + stride - 1, 0) // stride + 1
    return [min(i * stride, size - crop) for i in range(count)]


def _is_list(head: nn.Module) -> bool:
    return isinstance(head, nn.ModuleList)


def _logged_reason(name: str, head: nn.Module) -> str | None:
    reason = reason_against(head)
    if reason:
        print_log(
            f"{name} ({type(head).__name__}) computes its loss from logits of full resolution: {reason}",
            logger="current", level=logging.WARNING,
        )  # fmt: skip
    return reason
