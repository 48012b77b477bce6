"""mmdet's two-stage detectors with heads that train on the whole batch at once."""

import logging

from mmdet.models.detectors import CascadeRCNN, FasterRCNN, MaskRCNN, TwoStageDetector
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.logging import print_log
from torch import Tensor

from ..padding_masks import PaddingMasks
from .rpn_head import BatchedRPNHead

HEADS = {"RPNHead": "BatchedRPNHead", "StandardRoIHead": "BatchedRoIHead"}


class _BatchedHeads(TwoStageDetector):
    """Builds batched heads where the config names the stock ones; others stay what they are, which is logged.

    With images that take their sizes along (FastDetPreprocessor), losses and predictions do not depend on how far an
    image is padded: neck and RPN see zeros there, and no proposals come from there.

    With a BatchedRPNHead it also leaves out what mmdet does for the RPN in every step: a copy of all samples, masks
    included, to set the labels to 0, which that head does not read.
    """

    def __init__(self, *args, rpn_head: ConfigDict, roi_head: ConfigDict, **kwargs) -> None:
        super().__init__(*args, rpn_head=_batched(rpn_head), roi_head=_batched(roi_head), **kwargs)
        dense = [self.neck, self.rpn_head] if self.with_neck else [self.rpn_head]
        self._padding = PaddingMasks(*dense)
        if isinstance(self.rpn_head, BatchedRPNHead):
            self.rpn_head.padding = self._padding

    def extract_feat(self, batch_inputs: Tensor) -> tuple[Tensor, ...]:
        """Maps of the neck for images [B, 3, H, W]."""
        self._padding.set_images(batch_inputs)
        return self._padding.extended(super().extract_feat(batch_inputs))

    def loss(self, batch_inputs: Tensor, batch_data_samples: list[DetDataSample]) -> dict[str, Tensor]:
        """The losses of images [B, 3, H, W], by the name under which TwoStageDetector gives them."""
        if not isinstance(self.rpn_head, BatchedRPNHead):
            return super().loss(batch_inputs, batch_data_samples)
        x = self.extract_feat(batch_inputs)
        proposal_cfg = self.train_cfg.get("rpn_proposal", self.test_cfg.rpn)
        losses, proposals = self.rpn_head.loss_and_predict(x, batch_data_samples, proposal_cfg=proposal_cfg)
        return losses | self.roi_head.loss(x, proposals, batch_data_samples)


class BatchedFasterRCNN(_BatchedHeads, FasterRCNN):
    """FasterRCNN, whose RPNHead and StandardRoIHead are replaced by BatchedRPNHead and BatchedRoIHead."""


class BatchedMaskRCNN(_BatchedHeads, MaskRCNN):
    """MaskRCNN, whose RPNHead and StandardRoIHead are replaced by BatchedRPNHead and BatchedRoIHead."""


class BatchedCascadeRCNN(_BatchedHeads, CascadeRCNN):
    """CascadeRCNN, whose RPNHead is replaced by BatchedRPNHead; its RoI head trains image by image as in mmdet."""


def _batched(head: ConfigDict) -> ConfigDict:
    if head["type"] in HEADS:
        return ConfigDict(head, type=HEADS[head["type"]])
    if head["type"] not in HEADS.values():
        message = f"{head['type']} has no batched form: it trains image by image"
        print_log(message, logger="current", level=logging.WARNING)
    return head
