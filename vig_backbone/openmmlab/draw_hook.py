"""Pictures of predictions beside the ground truth, one PNG per image, for detection and segmentation alike."""

from collections.abc import Sequence
from pathlib import Path

import mmcv
import numpy as np
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from torch import Tensor

LEGIBLE_SIDE = 384  # pixels; smaller images are enlarged by a whole factor, so that labels fit


class DrawPredictionsHook(Hook):
    """While testing, let the model's own visualizer draw every image into `folder` as NAME.png.

    (The stock hooks of mmdet and mmseg differ in where they write, in which format, and under which name.)
    """

    priority = "LOW"

    def __init__(self, folder: str, score_threshold: float = 0.3) -> None:
        self.folder = Path(folder)
        self.score_threshold = score_threshold

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: Sequence | None = None
    ) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        runner.visualizer.dataset_meta = runner.test_dataloader.dataset.metainfo
        options = (
            dict(with_labels=False)
            if runner.cfg.default_scope == "mmseg"
            else dict(pred_score_thr=self.score_threshold)
        )
        for sample in outputs or ():
            name = Path(sample.img_path).stem
            image, drawn = enlarge(mmcv.imread(sample.img_path, channel_order="rgb"), sample.cpu())
            file = str(self.folder / f"{name}.png")
            runner.visualizer.add_datasample(name, image, drawn, draw_gt=True, out_file=file, **options)


def enlarge(image: np.ndarray, sample: BaseDataElement) -> tuple[np.ndarray, BaseDataElement]:
    """An image [H, W, 3] and a copy of its sample, both enlarged until the longer side is about LEGIBLE_SIDE."""
    H, W = image.shape[:2]
    factor = max(1, LEGIBLE_SIDE // max(H, W))
    if factor == 1:
        return image, sample
    sample = sample.clone()
    for field, value in sample.all_items():
        if isinstance(value, PixelData):
            setattr(sample, field, PixelData(data=_repeat(value.data, factor)))
        elif isinstance(value, InstanceData):
            setattr(sample, field, _enlarge_instances(value, factor, (H * factor, W * factor)))
    return mmcv.imresize(image, (W * factor, H * factor), interpolation="bicubic"), sample


def _enlarge_instances(instances: InstanceData, factor: int, size: tuple[int, int]) -> InstanceData:
    enlarged = instances.clone()
    if "bboxes" in enlarged:
        boxes = enlarged.bboxes if isinstance(enlarged.bboxes, Tensor) else enlarged.bboxes.tensor
        enlarged.bboxes = boxes * factor
    if "masks" in enlarged:
        masks = enlarged.masks
        enlarged.masks = _repeat(masks, factor) if isinstance(masks, Tensor) else masks.resize(size)
    return enlarged


def _repeat(x: Tensor, factor: int) -> Tensor:
    """[.., H, W] -> [.., factor * H, factor * W]"""
    return x.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
