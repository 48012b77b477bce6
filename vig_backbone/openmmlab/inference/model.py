"""The model of a config with all the weights of a checkpoint, and the names and colours of its classes."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import BaseTTAModel, revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, DefaultScope
from torch import nn

from ...checkpoint import CheckpointError, compare, read_checkpoint
from ..errors import ConfigError
from ..preflight import leaf_datasets

TASKS = {"mmdet": "detection", "mmseg": "segmentation"}
Color = tuple[int, int, int]  # red, green, blue, 0 to 255


@dataclass(frozen=True)
class Classes:
    """What labels stand for, and the colour of each in pictures."""

    names: tuple[str, ...]
    palette: tuple[Color, ...]


def find_device(name: str | None) -> torch.device:
    """The device of this name, by default the first GPU, the CPU if there is none.

    Raises:
        ConfigError: no such device here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {name}: cannot be used here ({reason}); expected cpu, cuda or cuda:N") from error
    return device


def load_model(cfg: Config, checkpoint: str, device: torch.device) -> tuple[nn.Module, Classes]:
    """The model in evaluation mode, with the classes it was trained on.

    Raises:
        ConfigError: the model cannot be built.
        CheckpointError: no checkpoint, or not one of this model: every weight must be there and fit.
    """
    content = read_checkpoint(checkpoint)
    import_module(f"{cfg.default_scope}.models")
    import_module(f"{cfg.default_scope}.datasets")
    model = _build(cfg)
    bare = model.module if isinstance(model, BaseTTAModel) else model
    meta = content.get("meta")
    trained_on = (meta.get("dataset_meta") if isinstance(meta, Mapping) else None) or {}
    wanted = _num_classes(bare)
    _refuse_other_classes(trained_on.get("classes"), wanted, checkpoint)
    weights = content.get("state_dict", content)
    if problems := compare(bare, weights):
        raise CheckpointError(
            f"{checkpoint} does not fit the {type(bare).__name__} of this config: {'; '.join(problems)}. Give the "
            "config, --data and --cfg-options that it was trained with"
        )
    bare.load_state_dict(weights)
    return revert_sync_batchnorm(model).to(device).eval(), _classes(trained_on, _metainfo(cfg), wanted)


def _build(cfg: Config) -> nn.Module:
    try:
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            return MODELS.build(cfg.model)
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        raise ConfigError(f"the model cannot be built: {type(error).__name__}: {error}") from error


def _num_classes(model: nn.Module) -> int | None:
    """Of the head that names what is found; an RPN, or heads for training alone, may count others."""
    for path in ("roi_head.bbox_head", "roi_head.bbox_head.0", "bbox_head", "decode_head"):
        try:
            count = getattr(model.get_submodule(path), "num_classes", None)
        except AttributeError:
            continue
        if isinstance(count, int):
            return count
    return None


def _refuse_other_classes(trained_on: Any, wanted: int | None, checkpoint: str) -> None:
    if trained_on is not None and wanted is not None and len(trained_on) != wanted:
        some = ", ".join(trained_on[:4]) + (", ..." if len(trained_on) > 4 else "")
        raise CheckpointError(
            f"{checkpoint} was trained on {len(trained_on)} classes ({some}), the model of this config has {wanted}: "
            "give the config, --data and --cfg-options that it was trained with"
        )


def _metainfo(cfg: Config) -> dict[str, Any]:
    """What the config says about the classes of its test data, without looking for that data."""
    for dataset in leaf_datasets(cfg.get("test_dataloader", {}).get("dataset", {})):
        name = str(dataset.get("type"))
        cls = DATASETS.get(name if "." in name else f"{cfg.default_scope}.{name}")
        return {**getattr(cls, "METAINFO", {}), **(dataset.get("metainfo") or {})}
    return {}


def _classes(trained_on: Mapping, configured: Mapping, count: int | None) -> Classes:
    """Names and colours from the checkpoint, else from the config, else made up."""
    names = trained_on.get("classes") or configured.get("classes") or ()
    if count is not None and len(names) != count:
        names = [f"class {label}" for label in range(count)]
    same = tuple(configured.get("classes") or ()) == tuple(names)
    palette = trained_on.get("palette") or (same and configured.get("palette")) or ()
    if isinstance(palette, str) or len(palette) < len(names):
        palette = distinct_colors(len(names))
    return Classes(tuple(names), tuple(tuple(int(value) for value in color) for color in palette[: len(names)]))


def distinct_colors(count: int) -> list[Color]:
    """Hues a golden section of the circle apart, in three brightnesses."""
    parts = [colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.75, (0.95, 0.7, 0.5)[i % 3]) for i in range(count)]
    return [tuple(round(255 * part) for part in rgb) for rgb in parts]
