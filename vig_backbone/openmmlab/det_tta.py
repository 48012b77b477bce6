"""Test-time augmentation for detectors that also predict masks."""

from mmdet.models import DetTTAModel
from mmdet.structures import DetDataSample


class BoxTTAModel(DetTTAModel):
    """mmdet's DetTTAModel, which merges boxes and refuses masks, for Mask R-CNN: the masks are left out."""

    def merge_preds(self, data_samples_list: list[list[DetDataSample]]) -> list[DetDataSample]:
        for samples in data_samples_list:
            for sample in samples:
                sample.pred_instances.pop("masks", None)
        return super().merge_preds(data_samples_list)
