"""Pictures of predictions beside the ground truth, one PNG per image, for detection and segmentation alike."""

from collections.abc import Sequence
from pathlib import Path

import mmcv
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement


class DrawPredictionsHook(Hook):
    """While testing, let the model's own visualizer draw every image into `folder` as NAME.png.

    (The stock hooks of mmdet and mmseg differ in where they write, in which format, and under which name.)
    """

    priority = "LOW"

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: Sequence | None = None
    ) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        dataset = runner.test_dataloader.dataset
        runner.visualizer.dataset_meta = dataset.metainfo
        for sample in outputs or ():
            self._draw(runner, sample)

    def _draw(self, runner: Runner, sample: BaseDataElement) -> None:
        image = mmcv.imread(sample.img_path, channel_order="rgb")
        name = Path(sample.img_path).stem
        options = dict(with_labels=False) if runner.cfg.default_scope == "mmseg" else dict(pred_score_thr=0.3)
        runner.visualizer.add_datasample(
            name, image, sample.cpu(), draw_gt=True, out_file=str(self.folder / f"{name}.png"), **options
        )
