"""The shapes of the toy data: signed distances (negative inside) on object coordinates u, v of a radius of about 1."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np


def _polygon(u: np.ndarray, v: np.ndarray, corners: np.ndarray, rounding: float = 0.0) -> np.ndarray:
    squared = np.full(u.shape, np.inf)
    inside = np.zeros(u.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0)):
        ex, ey = bx - ax, by - ay
        along = np.clip(((u - ax) * ex + (v - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        squared = np.minimum(squared, (u - ax - ex * along) ** 2 + (v - ay - ey * along) ** 2)
        if ey:
            inside ^= ((ay > v) != (by > v)) & (u < ax + ex * (v - ay) / ey)
    return np.where(inside, -1.0, 1.0) * np.sqrt(squared) - rounding


def _spokes(radii: list[float]) -> np.ndarray:
    """Corners at equal angles, the first one at the top."""
    angles = 2 * np.pi * np.arange(len(radii)) / len(radii)
    return np.asarray(radii)[:, None] * np.stack([np.sin(angles), -np.cos(angles)], axis=1)


def _plus(arm: float, half: float) -> np.ndarray:
    quarter = np.array([(half, -arm), (half, -half), (arm, -half)])
    turn = np.array([(0, -1), (1, 0)])
    return np.concatenate([quarter @ np.linalg.matrix_power(turn.T, i) for i in range(4)])


def _box(half: float) -> np.ndarray:
    return np.array([(-half, -half), (half, -half), (half, half), (-half, half)])


SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda u, v: np.hypot(u, v) - 0.95,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.72) - 0.24,
    "square": partial(_polygon, corners=_box(0.82)),
    "triangle": partial(_polygon, corners=_spokes([1.1] * 3)),
    "star": partial(_polygon, corners=_spokes([1.1, 0.5] * 5)),
    "cross": partial(_polygon, corners=_plus(0.95, 0.32)),
    "digit": partial(_polygon, corners=_box(0.68), rounding=0.16),
}
