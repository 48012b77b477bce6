"""Options and output that the benchmarks share."""

import argparse
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_options(parser: argparse.ArgumentParser, time_limit: str, json_updated: str, plot: str) -> None:
    limit = f"for {time_limit}, compiling included (default: 300)"
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: the GPU where there is one")
    parser.add_argument("--repeats", type=int, metavar="N", help="samples of a time (default: 10)")
    parser.add_argument("--min-seconds", type=float, metavar="S", help="length of a sample (default: 0.05)")
    parser.add_argument("--quick", action="store_true", help="3 repeats of 0.01 s")
    parser.add_argument("--time-limit", type=float, default=300, metavar="S", help=limit)
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"write all numbers, updated after {json_updated}")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help=plot)


def complete_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in the defaults; a value that makes no sense ends the program with exit code 2."""
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    args.repeats = (3 if args.quick else 10) if args.repeats is None else args.repeats
    args.min_seconds = (0.01 if args.quick else 0.05) if args.min_seconds is None else args.min_seconds
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; --device cpu works everywhere")
    if not all(0 < value < math.inf for value in (args.repeats, args.min_seconds, args.time_limit)):
        parser.error("--repeats, --min-seconds and --time-limit must be above 0")
    check_files(parser, args)


def check_files(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What --json and --plot name; exit code 2 for what cannot be written."""
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    if args.plot and args.plot.suffix != ".png":
        parser.error(f"--plot {args.plot}: expected a name that ends in .png")
    for path in (args.json, args.plot):
        if path and (path.is_dir() or not path.parent.is_dir()):
            parser.error(f"{path}: expected a file in a folder that exists")


def format_ms(ms: float) -> str:
    return f"{ms:.{4 if ms < 0.1 else 3 if ms < 10 else 1}f}"


def optional(form: str, value: float | None) -> str:
    return "-" if value is None else form.format(value)


def write_json(path: Path, content: dict[str, Any]) -> None:
    def plain(value: Any) -> Any:
        """JSON has no NaN and no infinity."""
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    path.write_text(json.dumps(plain(content), indent=1))


def new_panels(count: int, **options: Any) -> tuple[Any, list[Any]]:
    """A figure without a display, and its panels side by side, axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, count, figsize=(6 * count, 5), squeeze=False, sharex=True, layout="constrained", **options
    )
    for panel in panels[0]:
        panel.set(xscale="log", yscale="log")
        panel.grid(color="0.88")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, list(panels[0])


def save_plot(figure: Any, title: str, path: Path) -> None:
    from matplotlib import pyplot

    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
