"""The folders of COCO and ADE20K: what belongs where, what is missing, and where to get it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Layout:
    """What a data set's folder looks like and where its content comes from."""

    name: str
    tree: str
    source: str
    splits: dict[str, tuple[str, ...]]  # what a split needs; a name with a dot is a file, the others are folders
    official: dict[str, int]  # images a split


LAYOUTS = {
    "coco": Layout(
        "COCO 2017",
        """\
├── annotations/
│   ├── instances_train2017.json
│   └── instances_val2017.json
├── train2017/   000000000009.jpg ...
└── val2017/     000000000139.jpg ...""",
        "cocodataset.org, page Download: the 2017 train and val images (train2017.zip, val2017.zip) and the 2017 "
        "train/val annotations (annotations_trainval2017.zip), all unpacked in this folder",
        {s: (f"annotations/instances_{s}2017.json", f"{s}2017") for s in ("train", "val")},
        {"train": 118287, "val": 5000},
    ),
    "ade20k": Layout(
        "ADE20K",
        """\
├── images/
│   ├── training/     ADE_train_00000001.jpg ...
│   └── validation/   ADE_val_00000001.jpg ...
└── annotations/
    ├── training/     ADE_train_00000001.png ...
    └── validation/   ADE_val_00000001.png ...""",
        "the MIT scene parsing benchmark, sceneparsing.csail.mit.edu: the archive ADEChallengeData2016, unpacked; its "
        "top folder is the one to name",
        {
            s: (f"images/{folder}", f"annotations/{folder}")
            for s, folder in (("train", "training"), ("val", "validation"))
        },
        {"train": 20210, "val": 2000},
    ),
}


# Arguments of tools/make_toy_data.py for the embedded sets, by the name of their folder.
EMBEDDED = {
    "toy": "data/toy",
    "hard": "data/hard --difficulty hard --size 256x384 --train 1600 --val 160",
}


def missing_data_message(kind: str, folder: str | Path, missing: list[str]) -> str:
    """What to tell a user whose data set is not there: what is missing, the layout, the source, the way around."""
    layout = LAYOUTS[kind]
    indent = "\n    "
    name = Path(folder).parent.name  # data/NAME/coco
    name = name if name in EMBEDDED else "toy"
    return (
        f"{layout.name} is missing or incomplete in {folder}:\n"
        + "".join(f"  - {item}\n" for item in missing)
        + f"Expected layout:\n    {folder}/{indent}{layout.tree.replace(chr(10), indent)}\n"
        + f"Where to get it: {layout.source}.\n"
        + f"Without a download: `python tools/make_toy_data.py {EMBEDDED[name]}` writes a small embedded set in both "
        + f"layouts (data/{name}/coco and data/{name}/ade)."
    )


def needed_paths(kind: str, split: str) -> tuple[str, ...]:
    """What a split needs, as paths below the data set's folder; ValueError for an unknown split."""
    splits = LAYOUTS[kind].splits
    if split not in splits:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(splits)}")
    return splits[split]


def path_problem(path: Path) -> str | None:
    """Why a required file (its name has a dot) or folder cannot be used."""
    if not path.exists():
        return "missing" if not path.is_symlink() else "a link that points to nothing"
    if "." in path.name:
        if not path.is_file():
            return "not a file"
        return None if path.stat().st_size else "empty (0 bytes)"
    if not path.is_dir():
        return "a file where a folder is expected (perhaps a symbolic link that was unpacked as text)"
    return None if next(path.iterdir(), None) else "an empty folder"


def layout_problems(kind: str, root: str | Path, splits: Iterable[str] = ("train", "val")) -> list[str]:
    """A quick look: which folders and annotation files are missing or empty. No image is read."""
    root = Path(root)
    if not root.is_dir():
        return [f"{root}: {'missing' if not root.exists() else 'not a folder'}"]
    paths = [path for split in splits for path in needed_paths(kind, split)]
    found = [(path, path_problem(root / path)) for path in paths]
    return [f"{path}: {what}" for path, what in found if what]
