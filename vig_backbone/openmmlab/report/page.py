"""An HTML page in one file: style, tables that sort, sections. No network, light and dark, any width of screen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

Cell = str | int | float | None

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --paper: #fff; --soft: #667085; --line: #dfe3ea; --box: #f5f7fa;
  --mark: 20, 90, 180; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --paper: #12161c; --soft: #98a2b3; --line: #2c3440; --box: #1a2028; --mark: 90, 160, 255; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1100px; padding: 16px; font: 15px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); }
h1 { font-size: 1.5em; margin: .3em 0; } h2 { font-size: 1.2em; margin: 2em 0 .5em; } h3 { font-size: 1em; }
p { max-width: 75ch; } .soft, figcaption { color: var(--soft); font-size: .9em; }
.wide { overflow: auto; max-height: 75vh; } thead th { position: sticky; top: 0; background: var(--paper); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9em; }
th, td { padding: 3px 10px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td.text { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.sorts th { cursor: pointer; } tfoot td { font-weight: bold; border-bottom: 0; }
table.matrix th, table.matrix td { padding: 2px 5px; text-align: center; border: 1px solid var(--line); }
.numbers { display: flex; flex-wrap: wrap; gap: 10px; }
.numbers div { background: var(--box); border-radius: 8px; padding: 8px 14px; }
.numbers b { display: block; font-size: 1.4em; }
.row { display: flex; flex-wrap: wrap; gap: 16px; }
figure { margin: 8px 0; } figure.chart { flex: 1 1 320px; max-width: 520px; }
figure.chart > svg { width: 100%; } svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
svg .grid { stroke: var(--line); } .legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: .85em; }
figure.pictures { flex: 1 1 460px; max-width: 100%; }
img { max-width: 100%; height: auto; border-radius: 4px; } img.pixels { image-rendering: pixelated; }
code { background: var(--box); padding: 1px 4px; border-radius: 3px; overflow-wrap: anywhere; }
"""

# Sorts a table by the column whose head is clicked, the other way round at the second click.
SCRIPT = """
for (const head of document.querySelectorAll('table.sorts th')) head.onclick = () => {
  const body = head.closest('table').tBodies[0], column = head.cellIndex, up = head.dataset.up !== '1';
  const value = row => { const cell = row.cells[column], n = parseFloat(cell.dataset.value);
    return isNaN(n) ? cell.textContent : n; };
  head.dataset.up = up ? '1' : '0';
  [...body.rows].sort((a, b) => { const x = value(a), y = value(b);
    const order = typeof x === 'number' && typeof y === 'number' ? x - y : String(x).localeCompare(String(y));
    return up ? order : -order; }).forEach(row => body.append(row));
};
"""


def page(title: str, parts: Iterable[str]) -> str:
    """The whole file."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n"
        + "\n".join(part for part in parts if part)
        + f"\n<script>{SCRIPT}</script></body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading and what is below it; empty if nothing is."""
    body = "\n".join(part for part in parts if part)
    return f"<section><h2>{escape(title)}</h2>\n{body}</section>" if body else ""


def paragraph(text: str, soft: bool = False) -> str:
    return f'<p class="soft">{escape(text)}</p>' if soft else f"<p>{escape(text)}</p>"


def row(*parts: str) -> str:
    """Side by side as far as the screen is wide enough."""
    return f'<div class="row">{"".join(parts)}</div>' if any(parts) else ""


def facts(values: dict[str, str]) -> str:
    """What was evaluated, a line each."""
    lines = "".join(
        f'<tr><td>{escape(k)}</td><td class="text"><code>{escape(v)}</code></td></tr>' for k, v in values.items()
    )
    return f'<div class="wide"><table>{lines}</table></div>'


def numbers(values: dict[str, str]) -> str:
    """The figures that matter most, large."""
    boxes = "".join(f"<div>{escape(name)}<b>{escape(value)}</b></div>" for name, value in values.items())
    return f'<div class="numbers">{boxes}</div>'


def cell(value: Cell) -> str:
    """A number as it is read; '-' for none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, float | np.floating):
        return f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int | np.integer) else escape(value)


def table(
    heads: Sequence[str], rows: Iterable[Sequence[Cell]], sorts: bool = True, last: Sequence[Cell] | None = None
) -> str:
    """A table; by a click on its heads it sorts, all but the row `last`."""
    head = "".join(f"<th>{escape(each)}</th>" for each in heads)
    body = "".join(map(_table_row, rows))
    foot = f"<tfoot>{_table_row(last)}</tfoot>" if last else ""
    kind = ' class="sorts"' if sorts else ""
    return f'<div class="wide"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody>{foot}</table></div>'


def _table_row(values: Sequence[Cell]) -> str:
    return "<tr>" + "".join(map(_cell, values)) + "</tr>"


def _cell(value: Cell) -> str:
    raw = "" if value is None or isinstance(value, str) else f' data-value="{-1 if math.isnan(value) else value}"'
    return f"<td{raw}>{cell(value)}</td>"


def matrix(shares: np.ndarray, names: Sequence[str]) -> str:
    """Rows of shares from 0 to 1 as percent on shades of them; rows are the truth."""
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = []
    for name, values in zip(names, shares):
        cells = "".join(
            f'<td style="background:rgba(var(--mark),{value**0.5 * 0.6:.2f})">{100 * value:.0f}</td>'
            for value in values
        )
        rows.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    return f'<div class="wide"><table class="matrix"><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'


def picture(source: str, caption: str, pixels: bool = False) -> str:
    """source: a data URL; pixels: keep the edges of pixels when the picture is enlarged."""
    kind = ' class="pixels"' if pixels else ""
    return (
        f'<figure class="pictures"><img{kind} src="{source}" alt="{escape(caption, quote=True)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
