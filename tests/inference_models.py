"""Untrained models with checkpoints as training writes them, and pictures to run them on."""

from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from vig_backbone.openmmlab.complexity.run import build_model
from vig_backbone.openmmlab.configuration import load_config

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = {
    "detection": REPOSITORY / "det_configs" / "mask_rcnn_vig_t.py",
    "segmentation": REPOSITORY / "seg_configs" / "upernet_vig_t.py",
}


def write_checkpoints(folder: Path) -> dict[str, Path]:
    """Task -> checkpoint, for the embedded data set's classes."""
    torch.manual_seed(0)
    files = {}
    for task, path in CONFIGS.items():
        cfg = load_config(path, data="toy")
        meta = dict(cfg.test_dataloader.dataset.metainfo)
        files[task] = folder / f"{task}.pth"
        torch.save(dict(state_dict=build_model(cfg, "cpu").state_dict(), meta=dict(dataset_meta=meta)), files[task])
    return files


def picture(height: int = 64, width: int = 96, seed: int = 0) -> np.ndarray:
    """Smooth random colours, RGB."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)


def saved(path: Path, height: int = 64, width: int = 96, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(height, width, seed)).save(path)
    return path
