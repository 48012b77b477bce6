#!/usr/bin/env python
"""Curves of trainings in one picture: loss, learning rate and the scores of the evaluations over iterations.

examples:
  python tools/plot_curves.py work_dirs/upernet_vig_s --out curves.png
  python tools/plot_curves.py work_dirs/vig_t work_dirs/vig_s --smooth 20 --out curves.png
  python tools/plot_curves.py work_dirs/vig_t work_dirs/vig_s --name 'lr 1e-4' 'lr 2e-4' --json curves.json

A run is a work dir, one of the folders with a time in it, or a scalars.json. Trainings that were resumed are joined.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from _benchmark import check_files, save_plot, write_json
from _command import run_command
from _compare_results import smoothed
from _step_results import COLOURS

from vig_backbone.openmmlab.errors import ConfigError
from vig_backbone.openmmlab.report import Curves, read_curves
from vig_backbone.openmmlab.report.curves import Curve


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="work dir of a training")
    parser.add_argument("--out", dest="plot", type=Path, default=Path("curves.png"), metavar="FILE.png")
    parser.add_argument("--name", nargs="+", metavar="NAME", help="of the runs (default: those of their folders)")
    parser.add_argument("--smooth", type=int, default=1, metavar="N", help="show the mean of the last N logged losses")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all curves")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if args.smooth < 1:
        parser.error(f"--smooth {args.smooth}: expected 1 (nothing is smoothed) or more")
    if args.name and len(args.name) != len(args.runs):
        parser.error(f"--name: {len(args.name)} names for {len(args.runs)} runs")
    check_files(parser, args)
    return args


def main(args: argparse.Namespace) -> None:
    curves = [read_curves(run) for run in args.runs]
    names = args.name or unique_names(args.runs)
    lines = {name: panels_of(each, args.smooth) for name, each in zip(names, curves)}
    titles = list(dict.fromkeys(title for panels in lines.values() for title in panels))
    if not titles:
        raise ConfigError(f"{', '.join(args.runs)}: neither a loss nor a score was logged")
    draw(lines, titles, args.plot)
    if args.json:
        content = {name: dict(training=c.training, evaluation=c.evaluation) for name, c in zip(names, curves)}
        write_json(args.json, content)
    for name, panels in lines.items():
        last = ", ".join(f"{title} {points[-1][1]:.4g} at {points[-1][0]:,}" for title, points in panels.items())
        print(f"{name}: {last}")
    print(args.plot)


def unique_names(runs: list[str]) -> list[str]:
    """The last parts of the paths, or the whole paths if two of those are the same."""
    names = [Path(run).resolve().name for run in runs]
    return names if len(set(names)) == len(names) else runs


def panels_of(curves: Curves, smooth: int) -> dict[str, Curve]:
    """Title of a panel -> iterations and values."""
    loss = curves.training.get("loss", [])
    values = smoothed([value for _, value in loss], smooth)
    panels = {
        "loss": [(iteration, value) for (iteration, _), value in zip(loss, values)],
        "learning rate": curves.training.get("lr", []),
        **curves.scores(),
    }
    return {title: points for title, points in panels.items() if points}


def draw(lines: dict[str, dict[str, Curve]], titles: list[str], path: Path) -> None:
    """A panel for each title, a line in it for each run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(3, len(titles))
    rows = -(-len(titles) // columns)
    figure, panels = pyplot.subplots(
        rows, columns, figsize=(6 * columns, 4 * rows), squeeze=False, layout="constrained"
    )
    for panel, title in zip(panels.flat, titles):
        for i, (name, each) in enumerate(lines.items()):
            if title in each:
                style: dict[str, Any] = dict(color=COLOURS[i % len(COLOURS)], label=name, lw=1.5)
                if len(each[title]) < 30:
                    style["marker"] = "o"
                panel.plot(*zip(*each[title]), **style)
        panel.set(title=title, xlabel="iteration")
        panel.grid(color="0.88")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend()
    for panel in list(panels.flat)[len(titles) :]:
        panel.set_visible(False)
    save_plot(figure, "", path)


if __name__ == "__main__":
    sys.exit(run_command(main, parse_args(None)))
