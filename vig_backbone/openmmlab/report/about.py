"""What a report is about: config, checkpoint, data, versions, so that the numbers can be made again."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from ...checkpoint import read_checkpoint

PACKAGES = ("torch", "triton", "mmengine", "mmcv", "mmcv-lite", "mmdet", "mmsegmentation", "numpy", "pycocotools")


def describe(cfg: Config, checkpoint: str, command: str, images: int) -> dict[str, str]:
    """By titles, in the order of reading. images: how many were evaluated."""
    dataset = cfg.test_dataloader.dataset
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    where = [str(dataset[name]) for name in ("data_root", "ann_file") if dataset.get(name)]
    return {
        "config": str(cfg.filename),
        "model": _model_name(cfg),
        "checkpoint": checkpoint,
        "sha256": file_hash(checkpoint),
        "trained": _progress(checkpoint),
        "data": ", ".join([f"{dataset.type}: {images:,} images", *where]),
        "command": command,
        "versions": ", ".join([f"Python {platform.python_version()}", *_versions()]),
        "device": device,
        "made": time.strftime("%Y-%m-%d %H:%M"),
    }


def file_hash(path: str) -> str:
    """SHA-256 of a file; '-' for what is not one, as a URL."""
    if not Path(path).is_file():
        return "-"
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def _model_name(cfg: Config) -> str:
    model: Any = cfg.model
    while "module" in model:  # test-time augmentation
        model = model.module
    backbone = model.get("backbone") or {}
    parts = [model.type, *(str(backbone[name]) for name in ("type", "arch") if backbone.get(name))]
    return ", ".join(parts)


def _progress(checkpoint: str) -> str:
    meta = read_checkpoint(checkpoint).get("meta")
    if not isinstance(meta, Mapping):
        return "-"
    return ", ".join(f"{name} {meta[name]}" for name in ("epoch", "iter", "seed", "time") if name in meta) or "-"


def _versions() -> list[str]:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found
