#!/usr/bin/env python
"""Speed of the training data of detectors and segmenters: the stock pipeline, and the lighter one with equal results.

examples:
  python tools/benchmark_data.py det_configs/mask_rcnn_vig_t.py seg_configs/upernet_vig_t.py --json data.json
  python tools/benchmark_data.py det_configs/mask_rcnn_vig_t.py --data-root /data/coco --workers 1,8,16
  python tools/benchmark_data.py mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py --data-root /data/coco --quick
  python tools/benchmark_data.py seg_configs/upernet_vig_t.py --batch-size 16 --loading fast \\
      --cfg-options train_dataloader.dataset.data_prefix.img_path=images/all
  python tools/benchmark_data.py seg_configs/upernet_vig_t.py --data toy --quick

configs: a file, or mmdet::PATH or mmseg::PATH for a stock one. Its train_dataloader is measured, on the data set in its
layout; --data-root says where that is.

loading:
  stock      mmdet's and mmseg's own transforms, collate function and data preprocessor
  fast       those of vig_backbone.openmmlab.fast_loading in their place

of an image, in one process with one thread:
  transforms  milliseconds of CPU time
  collate     of a batch, over its images. For `fast` that is all it takes to send it but a copy of the skeleton; for
              `stock` PyTorch then copies every tensor to shared memory and pickles every array
  preprocess  data preprocessor, the copy to --device and waiting for it included
  pipe KB     pickled through the workers' queue, and unpickled by the main process
  shared KB   in shared memory, in so many pieces: each costs the main process a file descriptor and a mapping

loader, as mmengine builds it, over the data set again and again; nobody uses the batches:
  images/s    once the queue has run dry
  per worker  images/s over the number of worker processes; 0 workers: the main process loads
  main ms     CPU time of the main thread for an image, which training has to wait for

exit code: 0 measured, 1 nothing could be measured, 2 wrong usage
"""

import argparse
import math
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from _benchmark import format_ms, optional, write_json
from _data import LOADINGS, Cost, Rate, measure_cost, measure_rate, prepare_process, variants
from _step_configs import find_config, parse_options
from _timing import TimeLimitError, describe_machine, short_reason, time_limit
from mmengine.config import Config

from vig_backbone.openmmlab.configuration import load_config
from vig_backbone.openmmlab.errors import ConfigError

PACKAGES = ("mmdet", "mmsegmentation", "mmcv-lite", "opencv-python-headless", "numpy")


def attempt(row: Cost | Rate, measure: Callable[[], None], limit: float) -> None:
    """A failure is part of the row."""
    try:
        with time_limit(limit):
            measure()
    except (Exception, TimeLimitError) as error:
        row.failure = short_reason(error)


# ---- tables


def format_costs(costs: list[Cost]) -> list[str]:
    """One column for each loading, whose transforms stand in the same order."""
    measured = [cost for cost in costs if not cost.failure]
    lines = [f"  {cost.loading}: {cost.failure}" for cost in costs if cost.failure]
    if not measured:
        return lines

    def line(title: str, values: list[str]) -> str:
        return f"  {title:24}" + "".join(f"{value:>12}" for value in values)

    def number(form: str, name: str) -> list[str]:
        return [optional(form, getattr(cost, name)) for cost in measured]

    lines.append(line("ms of an image", [cost.loading for cost in measured]))
    for k, (name, _) in enumerate(measured[0].transforms):
        lines.append(line(name, [format_ms(cost.transforms[k][1]) for cost in measured]))
    lines.append(line("all transforms", [format_ms(cost.sample_ms) for cost in measured]))
    lines.append(line("collate", number("{:.3f}", "collate_ms")))
    lines.append(line("preprocess", number("{:.3f}", "preprocess_ms")))
    for title, name in (("pipe KB", "pipe_bytes"), ("shared KB", "shared_bytes")):
        lines.append(line(title, [f"{getattr(cost, name) / 1e3:.1f}" for cost in measured]))
    lines.append(line("in pieces", number("{:.2f}", "shared_tensors")))
    return lines


def format_rate(rate: Rate) -> str:
    start = f"  {rate.loading:8}{rate.workers:9}"
    if rate.failure:
        return f"{start}  {rate.failure}"
    return (
        f"{start}{rate.images_per_second:10.1f}{rate.images_per_second / max(rate.workers, 1):12.1f}{rate.main_ms:9.3f}"
    )


RATE_HEADER = f"  {'loading':8}{'workers':>9}{'images/s':>10}{'per worker':>12}{'main ms':>9}"


# ---- command line


def parse_list(choices: dict | None = None) -> Callable[[str], list]:
    """Of numbers, or of names among `choices`."""

    def parse(text: str) -> list:
        parts = [part.strip() for part in text.split(",")]
        if choices is None and not all(part.isdecimal() for part in parts):
            raise argparse.ArgumentTypeError(f"expected numbers of worker processes such as 0,1,4, got {text!r}")
        if choices is not None and not set(parts) <= set(choices):
            raise argparse.ArgumentTypeError(f"expected some of {','.join(choices)}, got {text!r}")
        return list(dict.fromkeys(map(int, parts) if choices is None else parts))

    return parse


def default_workers() -> list[int]:
    return [0, *(count for count in (1, 2, 4, 8, 16) if count <= (os.cpu_count() or 1))]


def parse_args(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG")
    parser.add_argument("--data", metavar="NAME", help="another data set: 'toy' is the embedded one")
    parser.add_argument("--data-root", metavar="DIR", help="of the data set, in place of the config's")
    parser.add_argument("--workers", type=parse_list(), metavar="N,..", help="default: 0,1,2,4,.. up to the CPUs")
    parser.add_argument("--loading", type=parse_list(LOADINGS), default=[*LOADINGS], metavar="NAME,..", help="of both")
    parser.add_argument("--batch-size", type=int, metavar="N", help="default: the config's")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="change fields of the config")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="of the preprocessor; default: the GPU if any")
    parser.add_argument("--samples", type=int, metavar="N", help="images of a time of the transforms (default: 100)")
    parser.add_argument("--repeats", type=int, metavar="N", help="times of which the median counts (default: 3)")
    parser.add_argument("--seconds", type=float, metavar="S", help="length of a measurement of a loader (default: 3)")
    parser.add_argument("--quick", action="store_true", help="10 samples, 1 repeat, 0.5 seconds")
    parser.add_argument("--time-limit", type=float, default=300, metavar="S", help="for one row (default: 300)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers, updated after every row")
    args = parser.parse_args(argv)

    for name, quick, usual in (("samples", 10, 100), ("repeats", 1, 3), ("seconds", 0.5, 3)):
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else usual)
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    args.workers = default_workers() if args.workers is None else args.workers
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; --device cpu works everywhere")
    if not all(0 < value < math.inf for value in (args.samples, args.repeats, args.seconds, args.time_limit)):
        parser.error("--samples, --repeats, --seconds and --time-limit must be above 0")
    if args.batch_size is not None and args.batch_size < 1:
        parser.error("--batch-size must be above 0")
    if args.data_root and not Path(args.data_root).is_dir():
        parser.error(f"--data-root {args.data_root}: expected a folder")
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        parser.error(f"{args.json}: expected a file in a folder that exists")
    return parser, args


def load(name: str, args: argparse.Namespace) -> Config:
    """The config with the options of the command line laid over it."""
    if not all("=" in option for option in args.cfg_options):
        raise ConfigError(f"--cfg-options {' '.join(args.cfg_options)}: expected KEY=VALUE")
    cfg = load_config(find_config(name), args.data, parse_options(args.cfg_options))
    if args.data_root:
        cfg.train_dataloader.dataset.data_root = args.data_root
    if args.batch_size:
        cfg.train_dataloader.batch_size = args.batch_size
    return cfg


@dataclass
class Report:
    machine: dict[str, str]
    file: Path | None
    costs: list[Cost] = field(default_factory=list)
    rates: list[Rate] = field(default_factory=list)

    def save(self) -> None:
        if self.file:
            rows = {"costs": [*map(asdict, self.costs)], "rates": [*map(asdict, self.rates)]}
            write_json(self.file, {"machine": self.machine, **rows})


def measure(name: str, cfgs: dict[str, Config], args: argparse.Namespace, report: Report) -> None:
    """Measure and print one config, loading by loading."""
    costs = [Cost(name, loading) for loading in cfgs]
    for cost, cfg in zip(costs, cfgs.values()):
        call = partial(measure_cost, cost, cfg, args.samples, args.repeats, args.device)
        attempt(cost, call, args.time_limit)
    report.costs += costs
    report.save()
    print(f"\n{name}: {costs[0].images} images, batch {costs[0].batch}", *format_costs(costs), sep="\n")
    print(RATE_HEADER, flush=True)
    for workers in args.workers:
        for loading, cfg in cfgs.items():
            rate = Rate(name, loading, workers)
            attempt(rate, partial(measure_rate, rate, cfg, args.seconds, args.repeats), args.time_limit)
            report.rates.append(rate)
            report.save()
            print(format_rate(rate), flush=True)


def main(argv: list[str] | None = None) -> int:
    parser, args = parse_args(argv)
    try:
        configs = {name: variants(load(name, args), args.loading) for name in args.configs}
    except ConfigError as error:
        parser.error(str(error))
    warnings.filterwarnings("ignore")  # of stock transforms, about fields of stock configs
    about = describe_machine(torch.device("cpu"), {"CPUs": str(os.cpu_count())}, PACKAGES)
    print(", ".join(f"{key} {value}" for key, value in about.items()))

    report = Report({**about, "preprocessor": str(args.device)}, args.json)
    for name, cfgs in configs.items():
        prepare_process(next(iter(cfgs.values())))
        measure(name, cfgs, args, report)
    if all(row.failure for row in (*report.costs, *report.rates)):
        print("error: nothing could be measured (--data-root says where the data set is)", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
