"""What the parts of a report share: their form, and the pictures of the worst and of the best images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .page import picture, row

Scored = tuple[float, dict[str, Any]]  # of an image: its score in percent, what was recorded


@dataclass(frozen=True)
class Part:
    """Pieces of a page, and all numbers in them, ready for JSON but for NaN."""

    html: list[str]
    numbers: dict[str, Any]


def best_and_worst(images: Sequence[Scored], count: int) -> dict[str, list[Scored]]:
    """`count` of each, or fewer, none in both. images: the worst first."""
    worst = list(images[:count])
    rest = images[len(worst) :]
    return {"Worst": worst, "Best": list(rest[::-1][:count])}


def gallery(groups: dict[str, list[Scored]], show: Callable[[dict[str, Any]], str]) -> list[str]:
    """Headings, and pictures (data URLs that `show` makes) with the names of their files and their scores."""
    parts = []
    for title, images in groups.items():
        if images:
            figures = [picture(show(image), f"{Path(image['img_path']).name}: {score:.1f}") for score, image in images]
            parts += [f"<h3>{title}</h3>", row(*figures)]
    return parts
