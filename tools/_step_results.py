"""What the benchmark of whole models found: rows of the table, the parts of their steps, ratios, the plot."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from _benchmark import format_ms, optional, save_plot
from _models import Size
from _results import name_of
from _step_device import DeviceUse
from _timing import Times

COLOURS = ("#0072B2", "#D55E00", "#08A782", "#9B1D6C", "#000000", "#808080", "#56B4E9", "#E69F00", "#B0A000", "#CC79A7")


@dataclass
class Row:
    """One measurement; with a `failure`, what was not measured before it is missing."""

    name: str
    config: str
    options: list[str]
    scope: str
    mode: str
    size: Size | None  # None for real images
    batch: int
    failure: str = ""
    note: str = ""
    classes: dict[str, str] = field(default_factory=dict)  # of the model, its backbone and heads
    parameters: int | None = None
    ms: Times | None = None  # of a step
    images_per_second: float | None = None
    first_s: float | None = None
    data_ms: float | None = None  # None for synthetic images
    parts_ms: dict[str, float] | None = None
    peak_bytes: int | None = None  # None on a CPU, like the next two
    device: DeviceUse | None = None
    busy_share: float | None = None
    operators: int | None = None  # None on a GPU, like the next one
    waiting_operators: int | None = None

    @property
    def group(self) -> str:
        return name_of_group(self.mode, self.scope, self.size)


def name_of_group(mode: str, scope: str, size: Size | None) -> str:
    return f"{mode}, {scope}, {'real data' if size is None else name_of(size)}"


# ---- the table

Column = tuple[str, int, Callable[[Row], str]]
TIMES: tuple[Column, ...] = (
    ("batch", 5, lambda r: str(r.batch)),
    ("ms", 9, lambda r: format_ms(r.ms.median)),
    ("spread", 6, lambda r: f"{(r.ms.p90 - r.ms.p10) / r.ms.median:.0%}"),
    ("images/s", 8, lambda r: f"{r.images_per_second:.{0 if r.images_per_second >= 100 else 2}f}"),
    ("first s", 7, lambda r: f"{r.first_s:.1f}"),
)
REAL_DATA: tuple[Column, ...] = (("data ms", 7, lambda r: optional("{:.1f}", r.data_ms)),)
ON_GPU: tuple[Column, ...] = (
    ("peak MB", 7, lambda r: optional("{:.0f}", r.peak_bytes and r.peak_bytes / 1e6)),
    ("busy", 5, lambda r: optional("{:.0%}", r.busy_share)),
    ("copies ms", 9, lambda r: optional("{:.2f}", r.device and r.device.copy_ms)),
    ("kernels", 7, lambda r: optional("{:.0f}", r.device and r.device.kernels)),
    ("syncs", 5, lambda r: optional("{:.0f}", r.device and r.device.syncs)),
)
ON_CPU: tuple[Column, ...] = (
    ("ops", 6, lambda r: optional("{:d}", r.operators)),
    ("syncs", 5, lambda r: optional("{:d}", r.waiting_operators)),
)


@dataclass(frozen=True)
class Table:
    columns: tuple[Column, ...]
    name_width: int

    @classmethod
    def of(cls, names: list[str], on_gpu: bool, real_data: bool) -> "Table":
        columns = (*TIMES, *(REAL_DATA if real_data else ()), *(ON_GPU if on_gpu else ON_CPU))
        return cls(columns, max(36, *map(len, names)))  # the names of parts fit as well

    def header(self, group: str) -> str:
        titles = "  ".join(title.rjust(width) for title, width, _ in self.columns)
        return f"\n{group:{self.name_width + 2}}  {titles}"

    def line(self, row: Row) -> str:
        cells = [row.failure] if row.failure else [cell(row).rjust(width) for _, width, cell in self.columns]
        return "  ".join([f"  {row.name:{self.name_width}}", *cells, row.note]).rstrip()

    def parts(self, rows: list[Row]) -> str:
        """A line a part, a column a model."""
        widths = [max(9, len(row.name)) for row in rows]
        lines = [("part, ms", [row.name for row in rows])]
        for part in order_of_parts(rows):
            lines.append((part, [optional("{:.2f}", row.parts_ms.get(part)) for row in rows]))
        return "\n".join(
            "  ".join([f"  {title:{self.name_width}}", *(cell.rjust(width) for cell, width in zip(cells, widths))])
            for title, cells in lines
        )


def order_of_parts(rows: list[Row]) -> list[str]:
    """All of them; what only later rows have stands behind the part that it follows there."""
    order: list[str] = []
    for row in rows:
        before = -1
        for part in row.parts_ms:
            if part not in order:
                order.insert(before + 1, part)
            before = order.index(part)
    return order


def format_kernels(row: Row) -> str:
    lines = [f"    {kernel.ms:9.3f} ms  {kernel.calls:6.1f} x  {kernel.name[:90]}" for kernel in row.device.top]
    return "\n".join([f"  {row.name}, longest kernels of a step", *lines])


# ---- ratios


@dataclass(frozen=True)
class Ratio:
    """A row against the first of its group."""

    name: str
    other: str
    group: str
    speed: float  # images a second over those of the other one
    peak_memory: float | None  # over that of the other one; None on a CPU or for unequal batches

    def __str__(self) -> str:
        memory = f", {self.peak_memory:.2f}x its peak memory" if self.peak_memory else ""
        return f"{self.name}: {self.speed:.2f}x the images/s of {self.other}{memory}"


def ratios_of(rows: list[Row]) -> list[Ratio]:
    ratios = []
    for group in dict.fromkeys(row.group for row in rows):
        first, *others = [row for row in rows if row.group == group]
        for row in others:
            if not (first.failure or row.failure):
                has_memory = first.peak_bytes and row.peak_bytes and first.batch == row.batch
                memory = row.peak_bytes / first.peak_bytes if has_memory else None
                speed = row.images_per_second / first.images_per_second
                ratios.append(Ratio(row.name, first.name, group, speed, memory))
    return ratios


# ---- the plot


def coarse_parts(row: Row) -> dict[str, float]:
    """The parts of each head together."""
    sums: dict[str, float] = {}
    for part, ms in row.parts_ms.items():
        name = part.partition(".")[0]
        sums[name] = sums.get(name, 0.0) + ms
    return sums


def draw_plot(rows: list[Row], title: str, path: Path) -> None:
    """A panel a group, a bar a model, cut into the parts of its step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row.parts_ms]
    groups = list(dict.fromkeys(row.group for row in rows))
    names = list(dict.fromkeys(part for row in rows for part in coarse_parts(row)))
    height = 1.5 + 0.5 * max(sum(row.group == group for row in rows) for group in groups)
    size = 12, height * len(groups)
    figure, panels = pyplot.subplots(len(groups), 1, figsize=size, squeeze=False, layout="constrained")
    for panel, group in zip(panels[:, 0], groups):
        shown = [row for row in rows if row.group == group]
        reached = [0.0] * len(shown)
        for i, part in enumerate(names):
            widths = [coarse_parts(row).get(part, 0.0) for row in shown]
            colour, hatch = COLOURS[i % len(COLOURS)], "//" if i >= len(COLOURS) else None
            panel.barh([row.name for row in shown], widths, left=reached, color=colour, hatch=hatch, label=part)
            reached = [start + width for start, width in zip(reached, widths)]
        panel.invert_yaxis()
        panel.set(title=f"{group}, batch {shown[0].batch}", xlabel="ms of a step")
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper")
    save_plot(figure, title, path)
