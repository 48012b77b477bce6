"""COCO's compressed run lengths, without pycocotools."""

from __future__ import annotations

import numpy as np


def encode_rle(mask: np.ndarray) -> dict:
    """A bool mask [H, W] as COCO's compressed run lengths, the same string that pycocotools makes."""
    flat = mask.ravel(order="F").astype(np.int8)
    edges = np.flatnonzero(np.diff(flat, prepend=0))
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    text = []
    for i, run in enumerate(runs):
        value, more = (run - runs[i - 2] if i > 2 else run), True
        while more:  # five bits a character; bit 5 says that more follow, bit 4 of the last one is the sign
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text.append(chr(48 + (bits | 32 * more)))
    return {"size": list(mask.shape), "counts": "".join(text)}


def decode_rle(rle: dict) -> np.ndarray:
    """The bool mask [H, W] of COCO's compressed run lengths."""
    runs: list[int] = []
    value = shift = 0
    for char in rle["counts"].encode():
        value |= ((char - 48) & 31) << shift
        shift += 5
        if (char - 48) & 32:
            continue
        if (char - 48) & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return flat.reshape(rle["size"], order="F")
