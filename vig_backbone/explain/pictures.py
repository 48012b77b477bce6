"""Figures of maps and numbers, as objects of matplotlib, which is loaded here and nowhere else in this package.

`figure.savefig(path)` writes one; none is kept in pyplot's list, so that nothing has to be closed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .blocks import BlockMaps
from .receptive_field import ReceptiveField, stride_of

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

CELL = 2.3  # inches across a map
DPI = 120
SMALLEST_RANGE = 0.05  # of a share around 1/2: less would blow up noise
SMALLEST_FACTOR = 1.5  # between the ends of a scale of memories
DECADES = 4  # of a receptive field
SHARES = {0.5: "-", 0.9: "--"}  # of a receptive field's total, and the lines of their squares
SERIES = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7")


@dataclass(frozen=True)
class Column:
    """One kind of maps: the field of BlockMaps, its title, the label of its scale, and whether that is logarithmic."""

    field: str
    title: str
    label: str
    is_memory: bool = False


COLUMNS = (
    Column("memory_forward", "memory of the forward scan\n(tokens to the left and above)", "tokens", is_memory=True),
    Column("memory_backward", "memory of the backward scan\n(tokens to the right and below)", "tokens", is_memory=True),
    Column("gate", "gate G\n(before norms and projection)", "0 local branch, 1 scan"),
    Column("scan_share", "scan against local branch\n(shares in the mixer's output)", "0 local branch, 1 scan"),
    Column("forward_share", "forward against backward scan\n(shares in the mixer's output)", "0 backward, 1 forward"),
)


def draw_blocks(
    image: np.ndarray, size: tuple[int, int], blocks: Sequence[BlockMaps], title: str, index: int = 0
) -> Figure:
    """The image beside its maps: a row for each block (per head: for each head of each block), a scale for a column.

    Args:
        image: [., ., 3] uint8, RGB.
        size: height and width that the model saw it in, pixels.
        index: of the image in the batch that the maps are of.

    Raises:
        ImportError: without matplotlib.
    """
    rows = [row for block in blocks for row in _rows(block, index)]
    height = CELL * min(max(size[0] / size[1], 0.3), 3)
    figure = _figure((len(COLUMNS) + 1) * (CELL + 0.25), len(rows) * (height + 0.3) + 1.7)
    grid = figure.subplots(len(rows), len(COLUMNS) + 1, squeeze=False)
    for axes, (label, _) in zip(grid[:, 0], rows):
        _draw_map(axes, image, size, size)
        axes.set_ylabel(label, fontsize=9)
        axes.set_xlabel(" ", fontsize=8, labelpad=2)  # as high as the maps beside it
    grid[0, 0].set_title(f"the image, as the model sees it:\n{size[1]} x {size[0]} pixels", fontsize=9)
    scales = _scales([maps for _, maps in rows])
    for column, panels in zip(COLUMNS, grid[:, 1:].T):
        style = dict(norm=scales[column.field], cmap="magma" if column.is_memory else "PuOr_r")
        for axes, (_, maps) in zip(panels, rows):
            values = maps[column.field]
            drawn = _draw_map(axes, values.numpy(), values.shape, size, **style)
            axes.set_xlabel(_number(values, column.is_memory), fontsize=8, labelpad=2)
        panels[0].set_title(column.title, fontsize=9)
        bar = figure.colorbar(drawn, ax=list(panels), location="bottom", shrink=0.9, aspect=22, pad=0.01, extend="both")
        bar.set_label(column.label, fontsize=8)
        bar.ax.tick_params(labelsize=8)
        if column.is_memory:
            _set_ticks(bar.ax.xaxis, style["norm"].vmin, style["norm"].vmax)
    figure.suptitle(title, fontsize=11)
    return figure


def draw_profile(summaries: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Numbers of the blocks over the depth; `summaries` of BlockMaps, not per head.

    Raises:
        ImportError: without matplotlib.
    """
    figure = _figure(11, 4.2, "constrained")
    memories, shares = figure.subplots(1, 2)
    depth = range(len(summaries))
    lines = [
        (memories, "memory_forward", "forward scan"),
        (memories, "memory_backward", "backward scan"),
        (shares, "gate", "gate G"),
        (shares, "scan_share", "scan against local branch"),
        (shares, "forward_share", "forward against backward scan"),
    ]
    for i, (axes, field, label) in enumerate(lines):
        axes.plot(depth, [summary[field] for summary in summaries], marker="o", color=SERIES[i], label=label)
    values = torch.tensor([[summary["memory_forward"], summary["memory_backward"]] for summary in summaries])
    low, high = _widened(values.min().item() / 1.05, values.max().item() * 1.05)
    memories.set(ylabel="tokens", yscale="log", ylim=(low, high))
    _set_ticks(memories.yaxis, low, high)
    memories.set_title("memory: median over tokens", fontsize=10)
    shares.set_ylim(0, 1)
    shares.set_title("gate, and shares in the mixer's output: mean over tokens", fontsize=10)
    shares.axhline(0.5, color="0.6", lw=0.8)
    names = [summary["name"] for summary in summaries]
    for axes in (memories, shares):
        axes.set_xticks(depth, names, rotation=60, ha="right", fontsize=8)
        axes.grid(color="0.9", which="both", axis="y")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    return figure


def draw_fields(fields: Mapping[str, ReceptiveField], title: str) -> Figure:
    """Receptive fields by name, each on a logarithmic scale, and the share of each in growing squares.

    Raises:
        ImportError: without matplotlib.
    """
    height, width = next(iter(fields.values())).map.shape
    cell = 3.2
    figure = _figure((len(fields) + 1) * cell, cell * min(max(height / width, 0.5), 2) + 1.5, "constrained")
    panels = figure.subplots(1, len(fields) + 1, squeeze=False)[0]
    for axes, (name, field) in zip(panels, fields.items()):
        bar = figure.colorbar(_draw_field(axes, name, field), ax=axes, location="bottom", pad=0.02)
        bar.set_label("gradient by the pixel,\npowers of ten of the largest", fontsize=8)
        bar.ax.tick_params(labelsize=8)
    for i, (name, field) in enumerate(fields.items()):
        panels[-1].plot(*field.curve(), color=SERIES[i % len(SERIES)], label=name)
    panels[-1].set(title="share of the total in a square", xlabel="side of the square, pixels", ylim=(0, 1.02))
    panels[-1].set_xlim(left=0)
    panels[-1].title.set_fontsize(9)
    panels[-1].grid(color="0.9")
    panels[-1].legend(frameon=False, fontsize=8)
    panels[-1].spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    return figure


def _draw_field(axes: Axes, name: str, field: ReceptiveField) -> Any:
    from matplotlib.patches import Rectangle

    size = tuple(field.map.shape)
    values = (field.map / field.map.max()).clamp_min(10.0**-DECADES).log10()
    drawn = _draw_map(axes, values.numpy(), size, size, cmap="inferno", vmin=-DECADES, vmax=0)
    y, x = field.center
    for share, line in SHARES.items():
        side = field.side(share)
        corner = x - side / 2, y - side / 2
        axes.add_patch(Rectangle(corner, side, side, fill=False, color="w", lw=1.2, ls=line))
    sides = ", ".join(f"{share:.0%} in {field.side(share):.0f}" for share in SHARES)
    axes.set_title(f"{name}\n{sides} pixels a side", fontsize=9)
    return drawn


def _figure(width: float, height: float, layout: str = "compressed") -> Figure:
    """Compressed: axes of a fixed aspect close together; constrained: axes that fill the figure."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout=layout, dpi=DPI)


def _rows(block: BlockMaps, index: int) -> list[tuple[str, dict[str, Tensor]]]:
    """Labels, and maps [H, W] by field."""
    maps = {column.field: getattr(block, column.field)[index].float().cpu() for column in COLUMNS}
    H, W = block.gate.shape[-2:]
    label = f"{block.name}\n{W} x {H} tokens"
    if block.gate.dim() == 3:
        return [(label, maps)]
    heads = range(block.gate.shape[1])
    return [(f"{label}\nhead {head}", {name: values[head] for name, values in maps.items()}) for head in heads]


def _scales(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Normalize]:
    """One scale for each column over all rows; both memories share theirs. The outermost hundredths are cut."""
    from matplotlib.colors import LogNorm, Normalize

    def all_values(fields: Sequence[str]) -> Tensor:
        values = torch.cat([row[field].flatten() for row in rows for field in fields])
        return values[values.isfinite()]

    memories = [column.field for column in COLUMNS if column.is_memory]
    low, high = (_quantile(all_values(memories), share) for share in (0.01, 0.99))
    scales: dict[str, Normalize] = {field: LogNorm(*_widened(low, high)) for field in memories}
    for column in COLUMNS:
        if not column.is_memory:
            reach = max(_quantile((all_values([column.field]) - 0.5).abs(), 0.99), SMALLEST_RANGE)
            scales[column.field] = Normalize(0.5 - reach, 0.5 + reach)
    return scales


def _widened(low: float, high: float) -> tuple[float, float]:
    """The ends of a logarithmic scale, at least SMALLEST_FACTOR apart, around the same middle."""
    middle, reach = (low * high) ** 0.5, max(high / low, SMALLEST_FACTOR) ** 0.5
    return middle / reach, middle * reach


def _set_ticks(axis: Axis, low: float, high: float) -> None:
    """Four plain numbers, where matplotlib would write powers of ten, or none at all within one of them."""
    ticks = [low * (high / low) ** (i / 3) for i in range(4)]
    axis.set_ticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def _quantile(values: Tensor, share: float) -> float:
    """torch.quantile has a limit on the number of values."""
    return values.kthvalue(1 + round(share * (len(values) - 1))).values.item()


def _draw_map(axes: Axes, values: np.ndarray, grid: Sequence[int], size: tuple[int, int], **style: Any) -> Any:
    """A map over the image: its last tokens may reach beyond, where they saw padding, and are cut there."""
    height, width = (n * stride_of(pixels, n) for n, pixels in zip(grid, size))
    drawn = axes.imshow(values, extent=(0, width, height, 0), interpolation="nearest", **style)
    axes.set(xlim=(0, size[1]), ylim=(size[0], 0), xticks=[], yticks=[])
    return drawn


def _number(values: Tensor, is_memory: bool) -> str:
    return f"median {values.nanmedian():.3g} tokens" if is_memory else f"mean {values.nanmean():.2f}"
