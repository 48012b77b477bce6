"""Sizes of images on the command line: HxW, or one side of a square, in pixels."""

import argparse


def parse_size(text: str) -> tuple[int, int]:
    """Height and width of ``512`` or ``800x1344``."""
    sides = [int(side) if side.strip().isdecimal() else 0 for side in text.split("x")]
    if len(sides) > 2 or not all(sides):
        raise argparse.ArgumentTypeError(f"expected HxW, or one side, in pixels, such as 800x1344 or 512, got {text!r}")
    return sides[0], sides[-1]


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """Several, with commas between them; each once."""
    return list(dict.fromkeys(map(parse_size, text.split(","))))
