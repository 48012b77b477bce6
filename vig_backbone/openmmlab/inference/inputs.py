"""From what a user names (files, folders, globs) to images and videos, each with a name for what is written of it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import glob, has_magic
from itertools import count
from pathlib import Path

from ..errors import DataError

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".avif", ".gif", ".jp2", ".pbm", ".pgm")
    + (".ppm", ".pnm")
)
VIDEO_SUFFIXES = frozenset((".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv"))


@dataclass(frozen=True)
class Source:
    """An image or video; name: its path below the folder that was given, without suffix, and no other source's."""

    path: Path
    name: str

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_SUFFIXES


def find_sources(inputs: Iterable[str | Path], left_out: Path | None = None) -> list[Source]:
    """Images and videos in the order of `inputs`, those of a folder (and the folders in it) by name, each file once.

    Args:
        inputs: files of any suffix, folders, or globs (``**`` for any depth).
        left_out: a folder that is not searched, for instance the one that results go to.

    Raises:
        DataError: an input that is not there, or has no image or video in it.
    """
    excluded = None if left_out is None else _absolute(left_out)
    found: dict[Path, tuple[Path, str]] = {}  # by absolute path
    for given in map(str, inputs):
        files = list(_files(given, excluded))
        if not files:
            raise DataError(f"{given}: {_what_is_wrong(given)}")
        for path, root in files:
            found.setdefault(_absolute(path), (path, str(path.relative_to(root).with_suffix(""))))
    names = _told_apart(list(found), [name for _, name in found.values()])
    return [Source(path, name) for (path, _), name in zip(found.values(), names)]


def _files(given: str, excluded: Path | None) -> Iterator[tuple[Path, Path]]:
    """Each with the folder that its name begins below."""
    path = Path(given)
    if path.is_file():
        yield path, path.parent
    elif path.is_dir():
        yield from ((file, path) for file in _below(path, excluded))
    elif has_magic(given):
        root = next(parent for parent in path.parents if not has_magic(str(parent)))
        for match in map(Path, sorted(glob(given, recursive=True))):
            if match.is_file() and _is_known(match.name) and not _is_in(match, excluded):
                yield match, root


def _below(folder: Path, excluded: Path | None) -> Iterator[Path]:
    """Those of a folder before those of the folders in it; hidden ones are left out."""
    for where, folders, files in os.walk(folder):
        visible = [each for each in folders if not each.startswith(".")]
        folders[:] = sorted(each for each in visible if not _is_in(Path(where, each), excluded))
        yield from (Path(where, file) for file in sorted(files) if _is_known(file) and not file.startswith("."))


def _is_known(file: str) -> bool:
    return Path(file).suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES


def _is_in(path: Path, folder: Path | None) -> bool:
    return folder is not None and _absolute(path).is_relative_to(folder)


def _absolute(path: Path) -> Path:
    """Links stay what they are called."""
    return Path(os.path.abspath(path))


def _what_is_wrong(given: str) -> str:
    if Path(given).is_dir():
        return "no image or video in this folder, or in folders in it"
    if has_magic(given):
        return "no image or video matches"
    return "no such file or folder; expected images, videos, folders or globs"


def _told_apart(paths: list[Path], names: list[str]) -> list[str]:
    """Names that are the same become paths below their common folder; if that is not enough, with suffix or number."""
    for longer in (_below_common_folder, _with_suffix):
        for same in _same(names):
            new = longer([paths[i] for i in same], names[same[0]])
            for i, name in zip(same, new):
                names[i] = name
    taken = set(names)
    for same in _same(names):
        for i in same[1:]:
            names[i] = next(name for n in count(2) if (name := f"{names[i]}_{n}") not in taken)
            taken.add(names[i])
    return names


def _same(names: list[str]) -> list[list[int]]:
    """Indices of the names that occur more than once, together."""
    places: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        places.setdefault(name, []).append(i)
    return [indices for indices in places.values() if len(indices) > 1]


def _below_common_folder(paths: list[Path], name: str) -> list[str]:
    top = os.path.commonpath([path.parent for path in paths])
    return [str(path.relative_to(top).with_suffix("")) for path in paths]


def _with_suffix(paths: list[Path], name: str) -> list[str]:
    return [f"{name}_{path.suffix[1:]}" for path in paths]
