"""Charts as SVG, and heat maps: text and lines take the colours of the page, light or dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

Points = Sequence[tuple[float, float]]

# Legible on white and on black; more lines repeat them with dashes.
LINE_COLOURS = ("#2f7ed8", "#e07b00", "#1f9e6e", "#c23b80", "#8a63d2", "#9c8a00", "#d04a3a", "#5b8794")
DASHES = ("", "6 3", "2 3")
WIDTH, HEIGHT = 480, 280
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 40
MOST_POINTS = 600  # of a line; a long training has logged more than a screen has pixels


def line_chart(
    lines: dict[str, Points],
    x_title: str,
    y_title: str,
    y_range: tuple[float, float] | None = None,
    logarithmic: bool = False,
) -> str:
    """Lines by their names, with axes and a legend; points that are not finite (or not above 0, if logarithmic) are
    left out. An empty text if there is no point."""
    lines = {name: thin([p for p in points if _shown(p, logarithmic)]) for name, points in lines.items()}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    xs = [x for points in lines.values() for x, _ in points]
    ys = [_height(y, logarithmic) for points in lines.values() for _, y in points]
    x_low, x_high = _widened(min(xs), max(xs))
    y_low, y_high = y_range or _widened(min(ys), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        right = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        return right, TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    levels = log_ticks(y_low, y_high) if logarithmic else ticks(y_low, y_high)
    parts = [_horizontal(place(x_low, y)[1], _label(y, logarithmic)) for y in levels]
    parts += [
        f'<text x="{place(x, y_low)[0]:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{format_tick(x)}</text>'
        for x in ticks(x_low, x_high)
    ]
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{escape(x_title)}</text>')
    for i, points in enumerate(lines.values()):
        path = " ".join("{:.1f},{:.1f}".format(*place(x, _height(y, logarithmic))) for x, y in points)
        colour, dash = _style(i)
        if len(points) == 1:
            x, y = path.split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>')
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8" stroke-dasharray="{dash}"/>'
        )
    legend = "".join(_legend_entry(i, name) for i, name in enumerate(lines))
    return (
        f'<figure class="chart"><figcaption>{escape(y_title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_title, quote=True)}">{"".join(parts)}'
        f'</svg><div class="legend">{legend}</div></figure>'
    )


def _shown(point: tuple[float, float], logarithmic: bool) -> bool:
    return all(math.isfinite(value) for value in point) and (not logarithmic or point[1] > 0)


def _height(y: float, logarithmic: bool) -> float:
    return math.log10(y) if logarithmic else y


def _label(y: float, logarithmic: bool) -> str:
    return format_tick(10**y if logarithmic else y)


def _widened(low: float, high: float) -> tuple[float, float]:
    """A range that is not empty."""
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _style(i: int) -> tuple[str, str]:
    return LINE_COLOURS[i % len(LINE_COLOURS)], DASHES[i // len(LINE_COLOURS) % len(DASHES)]


def _horizontal(y: float, label: str) -> str:
    return (
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
        f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    )


def _legend_entry(i: int, name: str) -> str:
    colour, dash = _style(i)
    return (
        f'<span><svg viewBox="0 0 20 8" width="20" height="8"><line x1="0" x2="20" y1="4" y2="4" stroke="{colour}" '
        f'stroke-width="2.5" stroke-dasharray="{dash}"/></svg> {escape(name)}</span>'
    )


def thin(points: Points) -> Points:
    """At most MOST_POINTS of them, evenly taken, the last one included."""
    if len(points) <= MOST_POINTS:
        return points
    places = np.linspace(0, len(points) - 1, MOST_POINTS).round().astype(int)
    return [points[i] for i in places]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from low to high, about `count`."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = min((1, 2, 5, 10), key=lambda each: abs(each * power - rough)) * power
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """The same of a logarithmic axis; all numbers are logarithms to base 10."""
    steps = (1,) if high - low > 2.5 else (1, 2, 5)
    powers = range(math.floor(low), math.ceil(high) + 1)
    found = [power + math.log10(step) for power in powers for step in steps]
    inside = [each for each in found if low <= each <= high]
    return inside if len(inside) > 1 else ticks(low, high)


def format_tick(value: float) -> str:
    """Short: 40k for 40,000, 1e-05 for what is small."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}"


def heat_map(shares: np.ndarray, cell: int) -> Image.Image:
    """A matrix of values from 0 to 1, [R, C], as a picture with `cell` pixels a side each; dark for 1.

    The root of the value, so that a few percent can be seen.
    """
    strength = np.sqrt(np.clip(shares, 0, 1))[..., None]
    colours = (1 - strength) * np.array([247, 248, 250]) + strength * np.array([8, 64, 129])
    return Image.fromarray(colours.astype(np.uint8)).resize(
        (shares.shape[1] * cell, shares.shape[0] * cell), Image.Resampling.NEAREST
    )
