"""What the benchmark of backbones found: rows of the table, ratios, the growth with the image size, the plot."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from _benchmark import format_ms, new_panels, optional, save_plot
from _models import CONTENDERS, INFERENCE, LATENCY, TRAINING, Size
from _roofline import Cost
from _timing import Times

PAIRS = (
    ("vig_tiny", "deit_tiny"),
    ("vig_tiny", "deit_tiny_nosdpa"),
    ("vig_small", "deit_small"),
    ("vig_small", "deit_base"),
    ("hier_vig_tiny", "swin_tiny"),
    ("hier_vig_tiny", "convnext_tiny"),
)


def name_of(size: Size) -> str:
    return f"{size[0]}" if size[0] == size[1] else f"{size[0]}x{size[1]}"


@dataclass
class Row:
    """One measurement; with a `failure`, what was not measured before it is missing."""

    model: str
    size: Size
    mode: str
    path: str
    batch: int
    failure: str = ""
    note: str = ""
    class_name: str = ""
    parameters: int | None = None
    ms: Times | None = None  # of a step
    images_per_second: float | None = None
    first_s: float | None = None
    peak_bytes: int | None = None  # None on a CPU
    cost: Cost | None = None  # of a step
    roofline_share: float | None = None

    @property
    def image_ms(self) -> float:
        return self.ms.median / self.batch


# ---- what follows from the rows


@dataclass(frozen=True)
class Ratio:
    """One model against another one, each at its fastest path."""

    model: str
    other: str
    size: Size
    mode: str
    paths: tuple[str, str]
    speed: float  # images a second over those of the other one
    peak_memory: float | None  # over that of the other one; None on a CPU or for unequal batches

    def __str__(self) -> str:
        memory = f", {self.peak_memory:.2f}x its peak memory" if self.peak_memory else ""
        paths = " against ".join(self.paths)
        return f"{self.model}: {self.speed:.2f}x the images/s of {self.other} ({paths}){memory}"


def best_row(rows: list[Row], model: str, size: Size, mode: str) -> Row | None:
    """The fastest path."""
    found = [row for row in rows if (row.model, row.size, row.mode) == (model, size, mode) and not row.failure]
    return min(found, key=lambda row: row.image_ms, default=None)


def ratios_of(rows: list[Row]) -> list[Ratio]:
    ratios = []
    for size, mode in dict.fromkeys((row.size, row.mode) for row in rows):
        for model, other in PAIRS:
            a, b = best_row(rows, model, size, mode), best_row(rows, other, size, mode)
            if a and b:
                has_memory = a.peak_bytes and b.peak_bytes and a.batch == b.batch
                memory = a.peak_bytes / b.peak_bytes if has_memory else None
                ratio = b.image_ms / a.image_ms
                ratios.append(Ratio(model, other, size, mode, (a.path, b.path), ratio, memory))
    return ratios


@dataclass(frozen=True)
class Fit:
    model: str
    mode: str
    exponent: float
    sides: list[int]

    def __str__(self) -> str:
        sides = ", ".join(map(str, self.sides))
        return f"{self.model}, {self.mode}: time ~ pixels ** {self.exponent:.3f} ({sides})"


def fits_of(rows: list[Row]) -> list[Fit]:
    """Exponents of the time of an image against its pixels, straight lines in log-log, over squares from 512 up."""
    sizes = sorted({row.size for row in rows if row.size[0] == row.size[1] >= 512})
    fits = []
    for model, mode in dict.fromkeys((row.model, row.mode) for row in rows):
        best = [row for size in sizes if (row := best_row(rows, model, size, mode))]
        if len(best) > 1:
            pixels = [math.log(math.prod(row.size)) for row in best]
            line = statistics.linear_regression(pixels, [math.log(row.image_ms) for row in best])
            fits.append(Fit(model, mode, line.slope, [row.size[0] for row in best]))
    return fits


# ---- output

COLUMNS: dict[str, tuple[int, Callable[[Row], str]]] = {
    "batch": (5, lambda r: str(r.batch)),
    "ms": (9, lambda r: format_ms(r.ms.median)),
    "spread": (6, lambda r: f"{(r.ms.p90 - r.ms.p10) / r.ms.median:.0%}"),
    "images/s": (9, lambda r: f"{r.images_per_second:.{0 if r.images_per_second >= 100 else 2}f}"),
    "peak MB": (8, lambda r: optional("{:.0f}", r.peak_bytes and r.peak_bytes / 1e6)),
    "first s": (7, lambda r: f"{r.first_s:.1f}"),
    "GFLOP": (7, lambda r: optional("{:.2f}", r.cost and r.cost.flops / r.batch / 1e9)),
    "MB": (7, lambda r: optional("{:.0f}", r.cost and r.cost.bytes / r.batch / 1e6)),
    "roofline": (8, lambda r: optional("{:.1%}", r.roofline_share)),
}
NAME_WIDTH = max(map(len, CONTENDERS))


def format_header(mode: str, size: Size) -> str:
    titles = "  ".join(title.rjust(width) for title, (width, _) in COLUMNS.items())
    return f"\n{f'{mode}, {name_of(size)}':{NAME_WIDTH + 12}}  {titles}"


def format_row(row: Row) -> str:
    cells = [row.failure] if row.failure else [cell(row).rjust(width) for width, cell in COLUMNS.values()]
    return "  ".join([f"  {row.model:{NAME_WIDTH}}", f"{row.path:8}", *cells, row.note]).rstrip()


# Contrast to white at least 3. Models of a size share a colour, the plain ones and the hierarchical ones apart.
PLAIN_COLOURS = {"tiny": "#0072B2", "small": "#D55E00", "base": "#08A782"}
HIERARCHICAL_COLOURS = {"tiny": "#9B1D6C", "small": "#000000", "base": "#808080"}
LINES = {"vig": ("o", "-"), "deit": ("^", "--"), "hier": ("o", "-"), "swin": ("v", "--"), "convnext": ("s", "-.")}
PANELS: tuple[tuple[str, str, str, Callable[[Row], float | None]], ...] = (
    (INFERENCE, "inference", "images/s", lambda row: row.images_per_second),
    (TRAINING, "training step", "images/s", lambda row: row.images_per_second),
    (LATENCY, "inference of one image", "ms", lambda row: row.ms.median),
    (LATENCY, "inference of one image", "peak memory (MB)", lambda row: row.peak_bytes and row.peak_bytes / 1e6),
)


def style_of(model: str) -> dict[str, str]:
    family, *_, variant = model.removesuffix("_nosdpa").split("_")
    colours = PLAIN_COLOURS if family in ("vig", "deit") else HIERARCHICAL_COLOURS
    marker, line = ("x", ":") if model.endswith("_nosdpa") else LINES[family]
    return dict(color=colours[variant], marker=marker, linestyle=line)


def draw_plot(rows: list[Row], title: str, path: Path) -> None:
    """Against the image size, a line a model: what its fastest path reaches. Panels without any number are left out."""
    sizes = sorted({row.size for row in rows}, key=math.prod)
    models = dict.fromkeys(row.model for row in rows)
    drawn = []
    for mode, name, unit, value in PANELS:
        best = {model: [row for size in sizes if (row := best_row(rows, model, size, mode))] for model in models}
        lines = {model: [(math.prod(row.size), value(row)) for row in found] for model, found in best.items()}
        lines = {model: points for model, points in lines.items() if points and points[0][1] is not None}
        if lines:
            drawn.append((name, unit, lines))
    figure, panels = new_panels(len(drawn))
    for panel, (name, unit, lines) in zip(panels, drawn):
        for model, points in lines.items():
            panel.plot(*zip(*points), label=model, lw=2, **style_of(model))
        panel.set(title=name, ylabel=unit, xlabel="image size (pixels)")
        panel.set_xticks([math.prod(size) for size in sizes], map(name_of, sizes), rotation=45)
        panel.xaxis.minorticks_off()
        panel.yaxis.set_major_formatter("{x:g}")
        panel.legend()
    save_plot(figure, title, path)
