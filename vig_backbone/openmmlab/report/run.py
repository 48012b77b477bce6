"""From a config and a checkpoint to a report: one evaluation, then the page and its numbers."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.registry import DATASETS, init_default_scope

from ..errors import ConfigError, DataError
from ..run import evaluate
from . import record  # noqa: F401  (registers the metrics)
from .about import describe
from .curve_part import curve_part
from .curves import read_curves, scalar_files
from .page import facts, numbers, page, section
from .part import Part


@dataclass(frozen=True)
class Report:
    """A page, all numbers in it, and the metrics as tools/test.py prints them."""

    html: str
    numbers: dict[str, Any]
    metrics: dict[str, float]


def make_report(
    cfg: Config, checkpoint: str, command: str, training: str | Path | None = None, images: int = 6
) -> Report | None:
    """Evaluate `checkpoint` on the test split of `cfg`, once, and describe what came out.

    Args:
        cfg: with its work_dir; metrics.json goes there, as from tools/test.py.
        command: what to print as the way to make it again.
        training: work dir of the training; by default the folder of the checkpoint, if a training was logged there.
        images: how many of the worst and of the best are shown.

    Returns:
        None in all processes but the first.

    Raises:
        DataError: no ground truth, or no log of a training in `training`.
    """
    curves = _training_part(checkpoint, training)
    metrics, records = evaluate_and_record(cfg, checkpoint)
    if records is None:
        return None
    scope = cfg.default_scope
    part = _segmentation(records, images) if scope == "mmseg" else _detection(cfg, records, images)
    about = describe(cfg, checkpoint, command, len(records["images"]))
    values = {name: float(value) for name, value in metrics.items()}
    html = [
        section("What was evaluated", facts(about)),
        section("Metrics", numbers({name: f"{value:g}" for name, value in values.items()}) if values else ""),
        *part.html,
        *(curves.html if curves else ()),
    ]
    title = f"{Path(about['config']).stem}: {'segmentation' if scope == 'mmseg' else 'detection'}"
    content = {"about": about, "metrics": values, scope: part.numbers, "curves": curves.numbers if curves else None}
    return Report(page(title, html), content, values)


def evaluate_and_record(cfg: Config, checkpoint: str) -> tuple[dict[str, float], dict[str, Any] | None]:
    """The metrics that `evaluate` gives, and what `record` has kept; None for that in all processes but the first."""
    evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list | tuple) else [cfg.test_evaluator]
    if any(evaluator.get("format_only") for evaluator in evaluators):
        raise ConfigError(
            "test_evaluator.format_only=True: a report needs ground truth; evaluate on a split that has some, such as "
            "that of val_dataloader"
        )
    with TemporaryDirectory() as folder:
        file = Path(folder) / "records.pkl"
        cfg.test_evaluator = [*evaluators, _recorder(cfg, evaluators, str(file))]
        metrics = evaluate(cfg, checkpoint)
        return metrics, pickle.loads(file.read_bytes()) if is_main_process() else None


def _recorder(cfg: Config, evaluators: list, file: str) -> dict[str, Any]:
    common = dict(out_file=file, collect_device=evaluators[0].get("collect_device", "cpu"))
    if cfg.default_scope == "mmdet":
        return dict(type="RecordDetections", **common)
    return dict(type="RecordSegmentation", ignore_index=evaluators[0].get("ignore_index", 255), **common)


def _training_part(checkpoint: str, training: str | Path | None) -> Part | None:
    if training is None:
        folder = Path(checkpoint).parent
        if not scalar_files(folder):
            return None
        try:
            return curve_part(read_curves(folder))
        except DataError:  # a log without a training step: nobody asked for it
            return None
    return curve_part(read_curves(training))


def _segmentation(records: dict[str, Any], images: int) -> Part:
    from .seg_part import segmentation_part

    return segmentation_part(records, images)


def _detection(cfg: Config, records: dict[str, Any], images: int) -> Part:
    from .det_part import detection_part
    from .detection import Evaluation, make_truth, read_truth

    files = [e.ann_file for e in cfg.test_evaluator if e.get("type") == "CocoMetric" and e.get("ann_file")]
    if files:
        truth, categories = read_truth(files[0], records["classes"])
    else:
        init_default_scope(cfg.default_scope)
        dataset = DATASETS.build(cfg.test_dataloader.dataset)
        infos = [dataset.get_data_info(i) for i in range(len(dataset))]
        truth, categories = make_truth(infos, records["classes"])
    return detection_part(Evaluation(truth, categories, records["images"]), records["palette"], images)
