"""Look for the data set before anything is built, so that its absence is explained and not a stack trace."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config

from ..data.layouts import missing_data_message
from .errors import DataError


def check_data_is_there(cfg: Config, splits: tuple[str, ...]) -> None:
    """Raise DataError if a folder or annotation file of `splits` ('train', 'val', 'test') is missing or empty.

    The message names what is missing, the expected layout, where to get it, and the embedded data set. Data sets
    behind a remote storage (``s3://`` and so on) are left to their own reader.
    """
    kind = "coco" if cfg.default_scope == "mmdet" else "ade20k"
    for split in splits:
        for dataset in leaf_datasets(cfg.get(f"{split}_dataloader", {}).get("dataset", {})):
            root = str(dataset.get("data_root") or ".")
            if "://" in root:
                continue
            missing = _missing(dataset, Path(root))
            if missing:
                raise DataError(f"{split}_dataloader: " + missing_data_message(kind, root, missing))


def leaf_datasets(dataset: dict) -> Iterator[dict]:
    """The configs of the data sets inside of wrappers and concatenations; none in an empty one."""
    inner = [dataset["dataset"]] if "dataset" in dataset else dataset.get("datasets", [])
    for child in inner:
        yield from leaf_datasets(child)
    if not inner and dataset:
        yield dataset


def _missing(dataset: dict, root: Path) -> list[str]:
    if not root.is_dir():
        return [f"{root} (no such folder)"]
    missing = []
    annotation = dataset.get("ann_file")
    if annotation:
        file = root / annotation
        if not file.is_file():
            missing.append(f"{file} (no such file)")
        elif file.suffix == ".json" and not _looks_like_json(file):
            missing.append(f"{file} (empty or cut off: {file.stat().st_size} bytes)")
    for field, prefix in (dataset.get("data_prefix") or {}).items():
        folder = root / (prefix or "")
        if not folder.is_dir():
            missing.append(f"{folder} (no such folder; {field})")
        elif next(folder.iterdir(), None) is None:
            missing.append(f"{folder} (empty folder; {field})")
    return missing


def _looks_like_json(file: Path) -> bool:
    """Whether the file starts and ends as a JSON object does; reading all of it would take half a minute for COCO."""
    with open(file, "rb") as stream:
        start = stream.read(64).lstrip()[:1]
        stream.seek(max(0, file.stat().st_size - 64))
        return start == b"{" and stream.read().rstrip()[-1:] == b"}"
