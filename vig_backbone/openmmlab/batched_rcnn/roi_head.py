"""mmdet's StandardRoIHead with assignment, sampling and losses of the whole batch at once."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from mmdet.models.roi_heads import StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.utils import unpack_gt_instances
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BaseInstanceMasks
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from .assign import BatchedAssigner
from .batch import Objects, pad_ignored, pad_objects, take
from .boxes import BoxDeltas
from .losses import accuracy, box_loss, check_losses, class_loss, sample_weights
from .mask_targets import batched_mask_target
from .proposals import Proposals
from .roi_features import pool
from .sample import BatchedSampler

_STOCK = "StandardRoIHead"
# The mask branch runs on the positive samples, their number rounded up to a multiple of this.
_MASKS_STEP = 16


class SampledRoIs(NamedTuple):
    """The sample of a batch, K places per image."""

    boxes: Tensor  # [B, K, 4]
    valid: Tensor  # [B, K]
    positive: Tensor  # [B, K]
    matched: Tensor  # [B, K], which object of its image, where positive
    goals: Tensor  # [B, K, 4], that object's box
    labels: Tensor  # [B, K], its class, that of the background where not positive
    heads: int  # positives are found in the first so many places only

    def rois(self) -> Tensor:
        """[B·K, 5]: image, x1, y1, x2, y2."""
        image = torch.arange(len(self.boxes), device=self.boxes.device, dtype=self.boxes.dtype)
        return torch.cat((image[:, None, None].expand(-1, self.boxes.size(1), 1), self.boxes), 2).flatten(0, 1)


class BatchedRoIHead(StandardRoIHead):
    """StandardRoIHead whose training waits for the device once; the config is the same, with or without masks.

    Losses and accuracy are those of StandardRoIHead for the same sample; which RoIs are drawn differs (see
    BatchedSampler). The box branch runs on `sampler.num` RoIs per image, those for which there are too few proposals
    with weight 0. The mask branch runs on the positive ones only: their number is read from the device right after the
    sampling, when its queue is short anyway since the proposals' suppression has just waited for it, and saves the
    most expensive head the places that are not positive. It never runs on none, so every parameter has a gradient.

    Prediction is that of StandardRoIHead.

    Raises:
        ConfigError: an assigner, sampler, loss, box coder or head that is not supported; the message names the class
            to use instead.
    """

    def init_assigner_sampler(self) -> None:
        super().init_assigner_sampler()
        if not self.train_cfg:
            return
        self._check_heads()
        self._assigner = BatchedAssigner(self.bbox_assigner, _STOCK)
        self._sampler = BatchedSampler(self.bbox_sampler, _STOCK)
        self._deltas = BoxDeltas(self.bbox_head.bbox_coder)

    def loss(
        self, x: tuple[Tensor], rpn_results_list: Sequence[InstanceData], batch_data_samples: list[DetDataSample]
    ) -> dict[str, Tensor]:
        """`loss_cls`, `loss_bbox`, `acc` and, with masks, `loss_mask`; the proposals padded or as a list."""
        instances, ignored, _ = unpack_gt_instances(batch_data_samples)
        objects = pad_objects(instances)
        sample = self._sample(Proposals.of(rpn_results_list), objects, pad_ignored(ignored))
        counts = sample.positive.sum(1).tolist() if self.with_mask else []
        rois = sample.rois()
        features = pool(self.bbox_roi_extractor, x, rois)
        losses = self._box_losses(features, sample)
        if self.with_mask:
            places = _positives_first(sample.positive.flatten(), sum(counts))
            if self.share_roi_extractor:
                features = features.index_select(0, places)
            else:
                features = pool(self.mask_roi_extractor, x, rois[places])
            masks = [image.masks for image in instances]
            losses["loss_mask"] = self._mask_loss(features, rois[places], sample, places, counts, masks)
        return losses

    @torch.no_grad()
    def _sample(self, proposals: Proposals, objects: Objects, ignored: Tensor | None) -> SampledRoIs:
        boxes = proposals.boxes
        assigned = self._assigner(boxes, proposals.valid, objects, ignored)
        if self._sampler.adds_objects:
            numbers = torch.arange(1, objects.valid.size(1) + 1, device=boxes.device)
            assigned = torch.cat((torch.where(objects.valid, numbers, -1), assigned), 1)
            boxes = torch.cat((objects.boxes, boxes), 1)
        samples = self._sampler(assigned)
        matched = (take(assigned, samples.index) - 1).clamp(min=0)
        labels = take(objects.labels, matched).masked_fill(~samples.positive, self.bbox_head.num_classes)
        boxes, goals = take(boxes, samples.index), take(objects.boxes, matched)
        return SampledRoIs(boxes, samples.valid, samples.positive, matched, goals, labels, samples.heads)

    def _box_losses(self, features: Tensor, sample: SampledRoIs) -> dict[str, Tensor]:
        scores, deltas = self.bbox_head(features)
        losses = {}
        if scores is not None:
            labels, valid = sample.labels.flatten(), sample.valid.flatten()
            weights = sample_weights(sample.positive.flatten(), valid, self.train_cfg.pos_weight)
            count = (weights > 0).sum().clamp(min=1)
            losses["loss_cls"] = class_loss(self.bbox_head.loss_cls, scores, labels, weights, count)
            losses["acc"] = accuracy(scores, labels, valid)
        if deltas is not None:
            losses["loss_bbox"] = self._regression_loss(deltas.view(*sample.labels.shape, -1, 4), sample)
        return losses

    def _regression_loss(self, deltas: Tensor, sample: SampledRoIs) -> Tensor:
        """Of deltas [B, K, classes or 1, 4]."""
        first = (deltas, sample.boxes, sample.goals, sample.positive, sample.labels)
        deltas, boxes, goals, positive, labels = (t[:, : sample.heads].flatten(0, 1) for t in first)
        deltas = _of_class(deltas, labels, self.bbox_head.reg_class_agnostic)  # [P, 4]
        if self.bbox_head.reg_decoded_bbox:
            predictions, targets = self._deltas.decode(boxes, deltas), goals
        else:
            predictions, targets = deltas, self._deltas.encode(boxes, goals)
        targets = targets.masked_fill(~positive[:, None], 0)
        return box_loss(self.bbox_head.loss_bbox, predictions, targets, positive, sample.valid.sum())

    def _mask_loss(
        self,
        features: Tensor,
        rois: Tensor,
        sample: SampledRoIs,
        places: Tensor,
        counts: list[int],
        masks: list[BaseInstanceMasks],
    ) -> Tensor:
        """Of the features of `rois`, the `places` of the sample; the first `sum(counts)` of them are positive."""
        head, found = self.mask_head, sum(counts)
        logits = _of_class(head(features), sample.labels.flatten()[places], head.class_agnostic)  # [P, h, w]
        matched = sample.matched.flatten()[places[:found]]
        targets = batched_mask_target(masks, rois[:found], matched, counts, self.train_cfg)
        losses = F.binary_cross_entropy_with_logits(logits[:found].float(), targets, reduction="sum")
        # The places that are not positive enter with weight 0: without a positive one the loss is 0, not nothing.
        losses = losses + logits[found:].float().sum() * 0
        # The shape of mmdet's loss, [1].
        return head.loss_mask.loss_weight * (losses / max(1, targets.numel()))[None]

    def _check_heads(self) -> None:
        if self.with_shared_head:
            raise ConfigError(f"roi_head.shared_head is not supported by BatchedRoIHead; use {_STOCK}")
        if not self.with_bbox:
            raise ConfigError(f"roi_head.bbox_head is missing: BatchedRoIHead samples for it; use {_STOCK}")
        head = self.bbox_head
        if not isinstance(head, BBoxHead) or _overridden(head, BBoxHead, ("loss", "get_targets", "loss_and_target")):
            raise ConfigError(f"roi_head.bbox_head of {type(head).__name__} has losses of its own; use {_STOCK}")
        check_losses(head.loss_cls, head.loss_bbox, head.bbox_coder, _STOCK)
        if self.with_mask:
            self._check_mask_head(self.mask_head)

    def _check_mask_head(self, head: nn.Module) -> None:
        if type(head) is not FCNMaskHead:
            raise ConfigError(f"roi_head.mask_head must be an FCNMaskHead, not {type(head).__name__}; use {_STOCK}")
        loss = head.loss_mask
        if not getattr(loss, "use_mask", False) or loss.class_weight is not None:
            raise ConfigError(
                f"mask_head.loss_mask must be a CrossEntropyLoss with use_mask=True and no class_weight; use {_STOCK}"
            )


def _positives_first(positive: Tensor, count: int) -> Tensor:
    """Places of the `count` positives, in order, then of others to make up a multiple of _MASKS_STEP, and not none."""
    wanted = max(1, -(-count // _MASKS_STEP)) * _MASKS_STEP
    return positive.byte().argsort(descending=True, stable=True)[:wanted]


def _of_class(predictions: Tensor, labels: Tensor, agnostic: bool) -> Tensor:
    """The predictions [P, C, ...] for the class that each is labelled with: [P, ...]; any for the background."""
    labels = torch.zeros_like(labels) if agnostic else labels.clamp(max=predictions.size(1) - 1)
    index = labels.view(-1, *[1] * (predictions.dim() - 1)).expand(-1, 1, *predictions.shape[2:])
    return predictions.gather(1, index).squeeze(1)


def _overridden(module: nn.Module, base: type[nn.Module], methods: tuple[str, ...]) -> bool:
    return any(getattr(type(module), name) is not getattr(base, name) for name in methods)
