"""Folders in ImageNet's layout: where the images are, and which output of a classifier is which folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..openmmlab.errors import ConfigError, DataError

IMAGENET_CLASSES = 1000
LAYOUT = "expected a folder for each class, with its images in it: {split}/n01440764/*.JPEG and so on"


class ClassMap(NamedTuple):
    """`indices`: of each folder's class, by the folder's name; `reason`: one sentence that says how this is known."""

    indices: dict[str, int]
    reason: str
    is_imagenet: bool = False


def split_folder(folder: str | Path, split: str) -> Path:
    """FOLDER/split, or FOLDER itself where there is no such folder; DataError if there is neither."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"no folder {folder}: {LAYOUT.format(split=split)}")
    return folder / split if (folder / split).is_dir() else folder


def class_folders(root: str | Path) -> list[str]:
    """Names of the folders in `root`, sorted; DataError if there is none."""
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"no folder {root}: {LAYOUT.format(split=root.name)}")
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        files = sum(entry.is_file() for entry in root.iterdir())
        raise DataError(
            f"{root} has no folders in it, but {files} files: {LAYOUT.format(split=root.name)}. ImageNet's validation "
            "archive is flat: its images must be moved into folders by the list of its development kit"
        )
    return names


def map_classes(
    folders: Sequence[str],
    num_classes: int,
    class_names: Sequence[str] | None = None,
    class_file: str | Path | None = None,
    synsets: Sequence[str] = (),
) -> ClassMap:
    """Which output of a classifier each folder is.

    Args:
        folders: names of folders, sorted.
        num_classes: outputs of the classifier.
        class_names: of the outputs, where the checkpoint has them.
        class_file: lines ``FOLDER INDEX``; counts before anything else.
        synsets: ImageNet's 1000, in the order of the outputs.

    Raises:
        ConfigError: nothing says which folder is which class, or something contradicts it.
    """
    if class_file is not None:
        return ClassMap(_read_class_file(Path(class_file), folders, num_classes), f"by {class_file}")
    if class_names is not None:
        by_name = {name: i for i, name in enumerate(class_names)}
        return ClassMap(_pick(folders, by_name, "the checkpoint"), "by the names of its classes in the checkpoint")
    by_synset = {name: i for i, name in enumerate(synsets)}
    if num_classes == len(synsets) and by_synset.keys() >= set(folders):
        return ClassMap(_pick(folders, by_synset, "ImageNet"), "by ImageNet's synsets", is_imagenet=True)
    if len(folders) != num_classes:
        strangers = [name for name in folders if name not in by_synset]
        raise ConfigError(
            f"{len(folders)} folders, but the checkpoint has {num_classes} classes and no names of them. Folders that "
            f"are called as ImageNet's synsets can be fewer; {_some(strangers or folders)} are not. Expected "
            "--classes FILE, with a line FOLDER INDEX for each folder"
        )
    if all(name.isdecimal() for name in folders) and sorted(folders, key=int) != list(folders):
        raise ConfigError(
            f"the folders are numbers, and their order as text ({', '.join(folders[:4])}, …) is not that of the "
            "numbers: expected --classes FILE, with a line FOLDER INDEX for each folder"
        )
    return ClassMap(
        {name: i for i, name in enumerate(folders)}, "by assumption: the sorted names are the order of the classes"
    )


def _pick(folders: Sequence[str], indices: dict[str, int], owner: str) -> dict[str, int]:
    strangers = [name for name in folders if name not in indices]
    if strangers:
        raise ConfigError(
            f"{len(strangers)} of {len(folders)} folders are no classes of {owner}: {_some(strangers)}; its classes "
            f"are {_some(list(indices))}. Remove these folders, or give --classes FILE, with lines FOLDER INDEX"
        )
    return {name: indices[name] for name in folders}


def _read_class_file(file: Path, folders: Sequence[str], num_classes: int) -> dict[str, int]:
    if not file.is_file():
        raise ConfigError(f"--classes {file}: no such file; expected lines FOLDER INDEX")
    indices = {}
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        name, _, index = line.strip().rpartition(" ")
        if not name or not index.isdecimal() or int(index) >= num_classes:
            raise ConfigError(
                f"--classes {file}, line {number}: {line.strip()!r}; expected FOLDER INDEX, the index of the class "
                f"from 0 to {num_classes - 1}"
            )
        indices[name.strip()] = int(index)
    missing = [name for name in folders if name not in indices]
    if missing:
        raise ConfigError(f"--classes {file} lacks {len(missing)} of {len(folders)} folders: {_some(missing)}")
    return {name: indices[name] for name in folders}


def _some(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(map(repr, names[:count])) + (", …" if len(names) > count else "")
