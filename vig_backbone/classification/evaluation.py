"""Top-1 and top-5 of a classifier's checkpoint on a folder of images."""

import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ..checkpoint import CheckpointError, load_weights, read_checkpoint, select_weights
from ..classifier import CLASSIFIERS, Classifier
from ..convert import read_metadata
from ..data.progress import Progress
from ..openmmlab.errors import ConfigError, DataError
from .data import ClassFolderDataset, evaluation_transform, imagenet_synsets
from .folders import IMAGENET_CLASSES, ClassMap, class_folders, map_classes, split_folder
from .published import IMAGENET_SIZE

TOP = (1, 5)


@dataclass
class Accuracy:
    """Of `images` that could be read; percent."""

    images: int
    top1: float
    top5: float | None  # None with at most five classes
    seconds: float  # reading included
    unreadable: list[str] = field(default_factory=list)  # files, and what is wrong with each

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds


class _Readable(Dataset):
    """The same items, and a text instead of one that cannot be read."""

    def __init__(self, dataset: ClassFolderDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any] | str:
        try:
            return self.dataset[index]
        except DataError as error:
            return str(error)


def evaluate_classifier(
    name: str,
    checkpoint: str | Path,
    folder: str | Path,
    class_file: str | Path | None = None,
    size: int = IMAGENET_SIZE,
    device: str = "cpu",
    amp: str | None = None,
    batch_size: int = 64,
    workers: int = 2,
) -> Accuracy:
    """Accuracy of a checkpoint on FOLDER/val, or the class folders in FOLDER; see the parts for what is raised."""
    model, class_names = build_from_file(name, checkpoint)
    dataset, _ = evaluation_data(name, folder, model.num_classes, class_names, class_file, size)
    return measure(model.to(device), dataset, amp, batch_size, workers)


def build_from_file(
    name: str, checkpoint: str | Path, compile: bool = False
) -> tuple[Classifier, tuple[str, ...] | None]:
    """The classifier `name` with as many classes as its checkpoint has, and their names if they are in it.

    Raises:
        ConfigError: for an unknown name.
        CheckpointError: if the checkpoint cannot be read or does not fit.
    """
    if name not in CLASSIFIERS:
        raise ConfigError(f"no classifier {name!r}: expected one of {', '.join(CLASSIFIERS)}")
    source = str(checkpoint)
    make = CLASSIFIERS[name]
    weights = select_weights(read_checkpoint(source), source, dropped=make.func.dropped_parameters)
    head = weights.get(f"{make.func.head_name}.weight")
    model = make(num_classes=IMAGENET_CLASSES if head is None else len(head), compile=compile)
    load_weights(model, weights, source)
    names = (read_metadata(source).get("dataset_meta") or {}).get("classes")
    if names is not None and len(names) != model.num_classes:
        raise CheckpointError(f"{source} has {len(names)} names of classes, but a head of {model.num_classes}")
    return model.eval(), None if names is None else tuple(names)


def evaluation_data(
    name: str,
    folder: str | Path,
    num_classes: int,
    class_names: tuple[str, ...] | None = None,
    class_file: str | Path | None = None,
    size: int = IMAGENET_SIZE,
) -> tuple[ClassFolderDataset, ClassMap]:
    """The images, prepared as the official code does for the classifier `name`, and how their classes are known.

    Raises:
        DataError: no such folder, or no images in it.
        ConfigError: it is not known which folder is which class; see :func:`map_classes`.
    """
    root = split_folder(folder, "val")
    synsets = imagenet_synsets() if num_classes == IMAGENET_CLASSES else ()
    classes = map_classes(class_folders(root), num_classes, class_names, class_file, synsets)
    return ClassFolderDataset(root, evaluation_transform(name, size), indices=classes.indices), classes


def measure(
    model: Classifier,
    dataset: ClassFolderDataset,
    amp: str | None = None,
    batch_size: int = 64,
    workers: int = 2,
    progress: Progress | None = None,
) -> Accuracy:
    """The accuracy of `model`, where it is; with `amp`, 'bfloat16' or 'float16', in mixed precision.

    Raises:
        ConfigError: logits that are not finite.
        DataError: if none of the images can be read.
    """
    device = next(model.parameters()).device
    loader = DataLoader(
        _Readable(dataset), batch_size, num_workers=workers, collate_fn=_collate, pin_memory=device.type == "cuda"
    )
    autocast = nullcontext() if amp is None else torch.autocast(device.type, getattr(torch, amp))
    unreadable: list[str] = []
    found = torch.zeros(len(TOP), device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    done, start = 0, time.monotonic()
    for batch, problems in loader:
        unreadable += problems
        if batch is not None:
            images, labels = (batch[key].to(device, non_blocking=True) for key in ("inputs", "labels"))
            with torch.inference_mode(), autocast:
                logits = model(images)
            finite = finite & logits.isfinite().all()
            found = found + hits(logits, labels).sum(0)
            done += len(labels)
        if progress:
            progress(done + len(unreadable), len(dataset))
    counts = found.tolist()  # waits for the device
    seconds = time.monotonic() - start
    if not done:
        raise DataError(f"none of the {len(dataset)} images can be read, the first is {unreadable[0]}")
    if not finite:
        raise ConfigError(
            f"logits are not finite: the weights are broken, or too large for {amp or 'float32'}"
            + (", try --amp bfloat16" if amp == "float16" else "")
        )
    top1, top5 = (100 * count / done for count in counts)
    return Accuracy(done, top1, top5 if model.num_classes > TOP[-1] else None, seconds, unreadable)


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits [B, num_classes], labels [B] -> [B, 2]: whether the class is the first, and among the first five."""
    best = logits.topk(min(max(TOP), logits.shape[1])).indices  # [B, up to 5]
    found = best == labels[:, None]
    return torch.stack([found[:, :k].any(1) for k in TOP], 1)


def _collate(items: list[dict[str, Any] | str]) -> tuple[dict[str, Tensor] | None, list[str]]:
    """A batch of the images that could be read (None: of none), and what is wrong with the others."""
    problems = [item for item in items if isinstance(item, str)]
    samples = [item for item in items if not isinstance(item, str)]
    return default_collate(samples) if samples else None, problems
