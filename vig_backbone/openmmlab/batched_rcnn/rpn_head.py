"""mmdet's RPNHead with targets, losses and proposals of the whole batch at once."""

import torch
from mmdet.models.dense_heads import RPNHead
from mmdet.models.utils import unpack_gt_instances
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor

from ..errors import ConfigError
from ..padding_masks import PaddingMasks
from ..upload import upload
from .anchors import AnchorCache
from .assign import BatchedAssigner
from .batch import Objects, pad_ignored, pad_objects, take
from .boxes import BoxDeltas
from .losses import box_loss, check_losses, class_loss, sample_weights
from .proposals import Proposals, best_boxes
from .sample import BatchedSampler

_STOCK = "RPNHead"


class BatchedRPNHead(RPNHead):
    """RPNHead whose training does not wait for the device; the config is the same.

    Losses are those of RPNHead for the same sample, given as a sum over the levels; which anchors are drawn differs
    (see BatchedSampler). An image without any anchor inside contributes nothing, where mmdet raises an error. Boxes
    are decoded in float32 also under autocast, where mmdet rounds coordinates to the type of the feature maps.

    Raises:
        ConfigError: an assigner, sampler, loss, box coder or anchor generator that is not supported; the message
            names the class to use instead.
    """

    padding: PaddingMasks | None = None  # of a detector that has some: no proposals from what is padding

    def _init_layers(self) -> None:
        super()._init_layers()
        check_losses(self.loss_cls, self.loss_bbox, self.bbox_coder, _STOCK)
        self._deltas = BoxDeltas(self.bbox_coder)
        self._anchors = AnchorCache(self.prior_generator, _STOCK)
        if self.test_cfg:
            _check_nms(self.test_cfg)
        if self.train_cfg:
            self._assigner = BatchedAssigner(self.assigner, _STOCK)
            self._sampler = BatchedSampler(self.sampler, _STOCK)
            if self._sampler.adds_objects:
                raise ConfigError("train_cfg.rpn.sampler.add_gt_as_proposals must be False: objects are no anchors")

    def loss_and_predict(
        self, x: tuple[Tensor], batch_data_samples: list[DetDataSample], proposal_cfg: ConfigDict | None = None
    ) -> tuple[dict[str, Tensor], Proposals]:
        """Losses, and proposals in the padded form that BatchedRoIHead takes and any other head can read as a list."""
        instances, ignored, metas = unpack_gt_instances(batch_data_samples)
        maps = self(x)
        losses = self.loss_by_feat(*maps, instances, metas, ignored)
        return losses, self._propose(*maps, metas, proposal_cfg)

    def loss_by_feat(
        self,
        cls_scores: list[Tensor],
        bbox_preds: list[Tensor],
        batch_gt_instances: list[InstanceData],
        batch_img_metas: list[dict],
        batch_gt_instances_ignore: list[InstanceData | None] | None = None,
    ) -> dict[str, Tensor]:
        """`loss_rpn_cls` and `loss_rpn_bbox` from the maps [B, A·C, H, W] and [B, A·4, H, W] of every level."""
        anchors = self._anchors(cls_scores)
        objects = pad_objects(batch_gt_instances)
        inside = anchors.inside(batch_img_metas, self.train_cfg["allowed_border"])
        assigned = self._assigner(anchors.boxes, inside, objects, pad_ignored(batch_gt_instances_ignore))
        samples = self._sampler(assigned)

        scores = take(_rows(cls_scores, self.cls_out_channels), samples.index)
        weights = sample_weights(samples.positive, samples.valid, self.train_cfg["pos_weight"])
        labels = (~samples.positive).long()  # objects are class 0, background 1
        loss_cls = class_loss(
            self.loss_cls, scores.flatten(0, 1), labels.flatten(), weights.flatten(), samples.avg_factor
        )

        heads = samples.index[:, : samples.heads]
        positive = samples.positive[:, : samples.heads].flatten()
        boxes = anchors.boxes[heads.flatten()]
        targets = self._box_targets(boxes, objects, take(assigned, heads), positive)
        deltas = take(_rows(bbox_preds, 4), heads).flatten(0, 1)
        predictions = self._deltas.decode(boxes, deltas) if self.reg_decoded_bbox else deltas
        loss_bbox = box_loss(self.loss_bbox, predictions, targets, positive, samples.avg_factor)
        return dict(loss_rpn_cls=loss_cls, loss_rpn_bbox=loss_bbox)

    def _box_targets(self, boxes: Tensor, objects: Objects, assigned: Tensor, positive: Tensor) -> Tensor:
        """[B·K, 4] for anchors [B·K, 4] assigned to the objects [B, K], zeros where not positive."""
        goals = take(objects.boxes, (assigned - 1).clamp(min=0)).flatten(0, 1)
        targets = goals if self.reg_decoded_bbox else self._deltas.encode(boxes, goals)
        return targets.masked_fill(~positive[:, None], 0)

    def predict_by_feat(
        self,
        cls_scores: list[Tensor],
        bbox_preds: list[Tensor],
        score_factors: list[Tensor] | None = None,
        batch_img_metas: list[dict] | None = None,
        cfg: ConfigDict | None = None,
        rescale: bool = False,
        with_nms: bool = True,
    ) -> list[InstanceData]:
        """What RPNHead returns: `bboxes` [n, 4], `scores` [n] and `labels` [n] of every image, best first."""
        if score_factors is not None or not with_nms:
            raise ValueError("BatchedRPNHead predicts with NMS and without score factors, as RPNHead does")
        return list(self._propose(cls_scores, bbox_preds, batch_img_metas, cfg, rescale))

    @torch.no_grad()
    def _propose(
        self,
        cls_scores: list[Tensor],
        bbox_preds: list[Tensor],
        metas: list[dict],
        cfg: ConfigDict | None,
        rescale: bool = False,
    ) -> Proposals:
        cfg = self.test_cfg if cfg is None else cfg
        _check_nms(cfg)
        anchors = self._anchors(cls_scores)
        logits = _rows(cls_scores, self.cls_out_channels).float()
        scores = logits.sigmoid().squeeze(-1) if self.use_sigmoid_cls else logits.softmax(-1)[..., 0]
        if self.padding is not None and self.padding.sizes is not None:
            scores = scores.masked_fill(~anchors.of_image(self.padding.sizes), -1)  # behind all others
        scores, index, counts = _best_of_each_level(scores, anchors.counts, cfg.get("nms_pre", -1))
        deltas = take(_rows(bbox_preds, 4), index)
        sizes = [[*meta["img_shape"][1::-1]] * 2 for meta in metas]
        limits = upload(sizes, scores.device, torch.float32).unsqueeze(1)  # [B, 1, 4]
        boxes = self._deltas.decode(anchors.boxes[index], deltas, limits)
        if rescale:
            factors = [[1 / factor for factor in meta["scale_factor"]] * 2 for meta in metas]
            boxes = boxes * upload(factors, scores.device, torch.float32).unsqueeze(1)
        smallest = cfg.get("min_bbox_size", -1)
        sides = boxes[..., 2:] - boxes[..., :2]
        valid = scores >= 0
        if smallest >= 0:
            valid &= (sides > smallest).all(-1)
        return best_boxes(boxes, scores, counts, valid, cfg.nms.iou_threshold, cfg.max_per_img)


def _rows(maps: list[Tensor], channels: int) -> Tensor:
    """Maps [B, A·C, H, W] of every level as rows [B, anchors, C], in the order of the anchors."""
    return torch.cat([level.permute(0, 2, 3, 1).reshape(len(level), -1, channels) for level in maps], 1)


def _best_of_each_level(scores: Tensor, counts: list[int], most: int) -> tuple[Tensor, Tensor, list[int]]:
    """The `most` best of every level (all of a level with fewer, or if `most` is not positive), best first.

    Scores [B, M], their places [B, M] among all anchors, how many of each level. Sorted because torch.topk leaves open
    which of equal scores it takes, and the padding of an image gives many.
    """
    best, places, start = [], [], 0
    for part in scores.split(counts, 1):
        ranked, place = part.sort(dim=1, descending=True, stable=True)
        count = min(most, part.size(1)) if most > 0 else part.size(1)
        best.append(ranked[:, :count])
        places.append(place[:, :count] + start)
        start += part.size(1)
    return torch.cat(best, 1), torch.cat(places, 1), [part.size(1) for part in best]


def _check_nms(cfg: ConfigDict) -> None:
    known = {"type", "iou_threshold", "split_thr"}  # the last one bounds mmcv's memory and changes no result
    if set(cfg.nms) - known or cfg.nms.get("type", "nms") != "nms" or "iou_threshold" not in cfg.nms:
        raise ConfigError(
            f"nms of proposals must be dict(type='nms', iou_threshold=...), got {cfg.nms}; or use {_STOCK}"
        )
