"""Decode images to the last byte, many at a time."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

from PIL import Image

from .progress import Progress


class BrokenFileError(Exception):
    """Says what is wrong with one file."""


def read_image(path: Path) -> Image.Image:
    """Decode a file to its last byte. Raises BrokenFileError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BrokenFileError(f"cannot be read ({error.strerror})") from error
    if not data:
        raise BrokenFileError("empty file (0 bytes)")
    try:
        image = Image.open(BytesIO(data))
        if image.format == "PNG":  # load() does not compare the checksums
            image.verify()
            image = Image.open(BytesIO(data))
        image.load()
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, zlib.error ...
        reason = re.sub(r" <_io.BytesIO object at 0x[0-9a-f]+>", "", str(error))
        raise BrokenFileError(f"truncated or damaged ({reason})") from error
    # Inside the coded data a marker never occurs, so a whole JPEG has an end marker behind its last scan.
    if image.format in ("JPEG", "MPO") and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        raise BrokenFileError("truncated (no end-of-image marker)")
    if image.format == "PNG" and b"IEND\xaeB`\x82" not in data[-4096:]:  # its checksum included
        raise BrokenFileError("truncated (no end chunk)")
    return image


def in_threads(job: Callable, items: list, workers: int, progress: Progress | None) -> list:
    """``job`` on each item, in order. Decoding releases the interpreter's lock, so threads are enough."""
    results = []
    with ThreadPoolExecutor(workers) as pool:
        for result in pool.map(job, items):
            results.append(result)
            if progress:
                progress(len(results), len(items))
    return results
