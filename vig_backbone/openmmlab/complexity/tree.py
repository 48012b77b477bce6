"""A report as text: a line for each module, down to some depth."""

from .report import Cost, Report

INDENT = 2
HEADER = f"{'parameters':>13}{'GFLOPs':>11}{'paper-style':>13}{'activations':>14}"


def format_tree(report: Report, depth: int = 2) -> list[str]:
    """The whole model, and the modules in it up to `depth` dots below; those without parameters and products left out.

    Parameters and activations in millions, FLOPs (1 is one multiply-add) in 10^9: of all products, and paper-style.
    """
    chosen = {name: cost for name, cost in report.modules.items() if _depth(name) <= depth and _matters(cost)}
    titles = {name: " " * INDENT * _depth(name) + (name.rpartition(".")[2] or "whole model") for name in chosen}
    width = max(map(len, titles.values()))
    return [" " * width + HEADER, *(f"{titles[name]:{width}}{_format(cost)}" for name, cost in chosen.items())]


def _depth(name: str) -> int:
    return name.count(".") + 1 if name else 0


def _matters(cost: Cost) -> bool:
    return cost.parameters > 0 or cost.macs > 0


def _format(cost: Cost) -> str:
    numbers = f"{cost.parameters / 1e6:11.2f} M{cost.macs / 1e9:11.3f}{cost.published / 1e9:13.3f}"
    return f"{numbers}{cost.activations / 1e6:12.1f} M"
