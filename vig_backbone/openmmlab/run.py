"""Training and testing from a config: what tools/train.py and tools/test.py call."""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import MODELS, RUNNERS
from mmengine.runner import Runner
from torch import nn

from ..checkpoint import CheckpointError, compare, read_checkpoint, select_weights
from .checkpoint_hook import latest_whole_checkpoint
from .errors import ConfigError, DataError
from .preflight import check_data_is_there


def train(cfg: Config) -> Runner:
    """Train `cfg` (with `work_dir`, `launcher` and the rest set) after looking for its data; returns the runner."""
    check_data_is_there(cfg, ("train", "val") if cfg.get("val_cfg") else ("train",))
    fine_tuned = cfg.get("load_from") and not cfg.get("resume")
    start = select_weights(read_checkpoint(cfg.load_from), cfg.load_from) if fine_tuned else None
    runner = build_runner(cfg)
    if start is not None:
        # Heads may be new; a backbone that starts half from the file and half from chance is a mistake.
        _refuse_misfit(bare_model(runner).backbone, start, cfg.load_from)
    _build_loops(runner, "train", "val")
    runner.train()
    return runner


def evaluate(cfg: Config, checkpoint: str | Path) -> dict[str, float]:
    """Evaluate `checkpoint` on the test split of `cfg`; returns the metrics, which also go to work_dir/metrics.json."""
    content = read_checkpoint(str(checkpoint))
    check_data_is_there(cfg, ("test",))
    cfg.load_from = str(checkpoint)
    runner = build_runner(cfg)
    _refuse_misfit(bare_model(runner), content.get("state_dict", content), checkpoint)
    _build_loops(runner, "test")
    metrics = runner.test()
    if not metrics:
        print_log("no metrics: the model predicts nothing above its score threshold", "current", logging.WARNING)
    if is_main_process():
        file = Path(cfg.work_dir) / "metrics.json"
        file.write_text(json.dumps({name: float(value) for name, value in metrics.items()}, indent=2) + "\n")
    return metrics


def bare_model(runner: Runner) -> nn.Module:
    """The model without what wraps it: data-parallel training, test-time augmentation."""
    model = runner.model
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def _refuse_misfit(model: nn.Module, weights: Mapping, source: str | Path) -> None:
    """mmengine prints what does not fit and goes on with half a model; this raises CheckpointError."""
    problems = compare(model, weights)
    if problems:
        raise CheckpointError(f"{source} does not fit the {type(model).__name__} of this config: {'; '.join(problems)}")


def _build_loops(runner: Runner, *splits: str) -> None:
    """Build the data sets now, with an error that names them."""
    for split in splits:
        try:
            getattr(runner, f"{split}_loop")
        except (ValueError, KeyError, AssertionError, OSError) as error:
            dataset = runner.cfg[f"{split}_dataloader"].dataset
            where = ", ".join(f"{field}={dataset[field]}" for field in ("data_root", "ann_file") if field in dataset)
            raise DataError(
                f"{split}_dataloader: no usable image in {dataset.get('type')} ({where}), or its annotation is broken "
                f"({type(error).__name__}: {error}). Perhaps it is empty, or its class names are not those of "
                "metainfo.classes; tools/check_data.py looks into the files"
            ) from error


def build_runner(cfg: Config) -> Runner:
    """The runner of a config, of another class than mmengine's where `runner_type` says so.

    Raises:
        ConfigError: if something in the config cannot be built, for instance an unknown argument or `arch`.
    """
    try:
        return RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        raise ConfigError(
            f"the config cannot be built: {type(error).__name__}: {error}{_similar_argument(str(error))}"
        ) from error


def _similar_argument(message: str) -> str:
    """For Python's complaint about an unexpected argument of a registered class: the one that was meant."""
    match = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", message)
    cls = MODELS.get(match[1]) if match else None
    if cls is None:
        return ""
    close = get_close_matches(match[2], inspect.signature(cls).parameters, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def resume_from(cfg: Config, checkpoint: str) -> None:
    """Continue from `checkpoint`, or from the last whole one in work_dir if it is 'auto' (anew if none)."""
    if checkpoint != "auto":
        if not Path(checkpoint).is_file():
            raise ConfigError(f"--resume {checkpoint}: no such file; --resume alone takes the last one of the work dir")
        cfg.resume, cfg.load_from = True, checkpoint
        return
    found, damaged = latest_whole_checkpoint(cfg.work_dir)
    for path in damaged:
        print_log(f"{path} is damaged and passed over", logger="current", level=logging.WARNING)
    if found is None:
        start = cfg.get("load_from") or "scratch"
        print_log(
            f"nothing to resume in {cfg.work_dir}: starting from {start}", logger="current", level=logging.WARNING
        )
        cfg.resume = False
        return
    cfg.resume, cfg.load_from = True, str(found)


def draw_predictions(cfg: Config, folder: str | Path) -> None:
    """Have the test write a picture per image into `folder`: ground truth beside prediction."""
    cfg.custom_hooks = [*cfg.get("custom_hooks", []), dict(type="DrawPredictionsHook", folder=str(folder))]


def dump_predictions(cfg: Config, target: str | Path) -> None:
    """Have the test write its predictions: one pickle file for detection, a folder of label maps for segmentation."""
    evaluators: list[Any] = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
    if cfg.default_scope == "mmdet":
        if Path(target).suffix not in (".pkl", ".pickle"):
            raise ConfigError(f"--out {target}: detections go to one file, name it *.pkl")
        cfg.test_evaluator = [*evaluators, dict(type="DumpDetResults", out_file_path=str(target))]
    else:
        for evaluator in evaluators:
            evaluator["output_dir"] = str(target)
