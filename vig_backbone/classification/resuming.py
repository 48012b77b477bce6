"""Going on with a fine-tuning: the same classes, the same model, and the schedule that it began with."""

from collections.abc import Mapping
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS

from ..checkpoint import CheckpointError, compare, find_weights, read_checkpoint
from ..openmmlab.config_text import config_from_text
from ..openmmlab.errors import ConfigError
from ..openmmlab.run import resume_from
from .folders import class_folders

# What the state of optimizer, schedules and average in a checkpoint belongs to.
KEPT_FIELDS = ("optim_wrapper", "param_scheduler", "train_cfg", "custom_hooks")


def resume_training(cfg: Config, checkpoint: str, epochs: int | None = None) -> None:
    """Go on from `checkpoint`, or from the last whole one in work_dir if it is 'auto' (anew if none).

    Optimizer, schedule, number of epochs and moving average are those of the checkpoint.

    Raises:
        CheckpointError: of another model, or not of a fine-tuning.
        ConfigError: no such file, other classes than the folders of `cfg`, or another number of `epochs`.
    """
    resume_from(cfg, checkpoint)
    if not cfg.resume:
        return
    source = cfg.load_from
    content = read_checkpoint(source)
    saved = _saved_config(content, source)
    _check_classes(content["meta"], cfg, source)
    with torch.device("meta"):
        model = MODELS.build({**cfg.model, "checkpoint": None})
    if problems := compare(model, find_weights(content, source)):
        raise CheckpointError(f"--resume: {source} does not fit {cfg.model.name}: {'; '.join(problems)}")
    cfg.model.checkpoint = None  # all weights are in this one
    for name in KEPT_FIELDS:
        cfg[name] = saved[name]
    if epochs not in (None, cfg.train_cfg.max_epochs):
        raise ConfigError(
            f"--epochs {epochs}: {source} is of a training of {cfg.train_cfg.max_epochs}, whose schedule ends there; "
            f"leave --epochs out, or begin another training with --pretrained {source} and another --work-dir"
        )


def _saved_config(content: Mapping[str, Any], source: str) -> Config:
    meta = content.get("meta")
    text = meta.get("cfg") if isinstance(meta, Mapping) else None
    saved = config_from_text(text, source) if text else {}
    if not all(name in saved for name in KEPT_FIELDS) or saved["model"].get("type") != "ImageClassifier":
        raise CheckpointError(f"--resume: {source} is no checkpoint of a fine-tuning; to start from it: --pretrained")
    return saved


def _check_classes(meta: Mapping[str, Any], cfg: Config, source: str) -> None:
    names = tuple((meta.get("dataset_meta") or {}).get("classes", ()))
    folders = tuple(class_folders(cfg.train_dataloader.dataset.class_root))
    if names != folders:
        raise ConfigError(
            f"--resume: {source} was trained on {len(names)} classes ({', '.join(names[:3])}, …), and there are "
            f"{len(folders)} folders ({', '.join(folders[:3])}, …); begin another training with --pretrained {source} "
            "and another --work-dir"
        )
