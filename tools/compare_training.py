#!/usr/bin/env python
"""Train several models from scratch on the embedded data set, by one recipe, and compare what they learn and how fast.

examples:
  python tools/compare_training.py segmentation --amp --json seg.json --plot seg.png  # minutes on a GPU
  python tools/compare_training.py detection --amp --seeds 3
  python tools/compare_training.py eager=seg_configs/upernet_vig_s.py \\
      compiled=seg_configs/upernet_vig_s.py@model.backbone.compile=True --iters 400
  python tools/compare_training.py stock=mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py \\
      ours=det_configs/mask_rcnn_hier_vig_t.py --epochs 4
  python tools/compare_training.py segmentation --data toy --iters 100  # on a CPU, a quarter of an hour

configs:
  segmentation   UperNet on ViG-S, ViG-H-T, DeiT-S and Swin-T, the last two as mmseg has them
  detection      Mask R-CNN on ViG-S, ViG-H-T, ResNet-50 and Swin-T, the last two as mmdet has them
  [NAME=]CONFIG[@KEY=VALUE,KEY=VALUE..]: a file, or mmdet::PATH or mmseg::PATH for a stock one; NAME is that of its
  row, each KEY=VALUE an option of this row alone, as in --cfg-options, which is for all rows (and comes before)

All rows have the data, augmentation, schedule, learning rate, weight decay, drop path, widths of heads, batch and seed
of _base_/data_NAME.py in the folder of the task; no row has pretrained weights, and nothing is downloaded. The rest
stays what each config says: the classes of the model and the ways to load data, to clip and to log. Each training is a
process of its own, `tools/train.py WORK_DIR/ROW/SEED/config.py`, with its log beside that file; no checkpoints are
kept. The embedded data set is written first, where it is missing.

columns, means over the seeds:
  mIoU, AP    of the last of about 8 evaluations in percent, with the standard deviation over seeds; best: of all
  to 50%, s   seconds of training, data included and evaluations not, until the score is 50% of the reference's final
              one, along straight lines between evaluations. The reference is the stock model of the best final score
  samples/s   batch over the median time of a step, waiting for its data not included
  with data   all samples over all seconds of training, first step, compiling and loading included
  peak MB     allocated by torch while training
  first s     the first step: compiling and choosing kernels
  total s     of the whole process: imports and evaluations included

exit code: 0 trained, 1 nothing could be trained, 2 wrong usage; a row that failed says why and does not end the others
"""

import argparse
import math
import os
import shlex
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from _benchmark import check_files, write_json
from _compare_configs import is_stock, load_row, parse_variants, set_run
from _compare_results import SCORES, Row, curve_of, draw_plot, format_table, summarize, thresholds_of
from _compare_runs import Run, train
from _step_configs import Variant, check_names
from _timing import describe_machine
from mmengine.config import Config

from vig_backbone.data.layouts import EMBEDDED
from vig_backbone.openmmlab.errors import ConfigError, DataError
from vig_backbone.openmmlab.preflight import check_data_is_there

LENGTHS = {"mmseg": "iters", "mmdet": "epochs"}
PACKAGES = ("triton", "mmengine", "mmcv", "mmcv-lite", "mmdet", "mmsegmentation")


@dataclass
class Comparison:
    """The rows so far; the JSON file has them after every training."""

    args: argparse.Namespace
    machine: dict[str, str]
    rows: list[Row] = field(default_factory=list)

    def add(self, variant: Variant) -> None:
        """Train a model with every seed."""
        scope = self.config_of(variant).default_scope
        self.rows.append(Row(variant.name, variant.config, [*variant.options], scope, is_stock(variant)))
        for seed in range(self.args.seeds):
            run = self.train(variant, seed)
            self.rows[-1].runs.append(run)
            print(f"  {variant.name}, seed {seed}: {describe(run, scope)}", flush=True)
            if self.args.json:
                write_json(self.args.json, self.report())

    def train(self, variant: Variant, seed: int) -> Run:
        folder = self.args.work_dir / variant.name.replace("/", "_") / str(seed)
        folder.mkdir(parents=True, exist_ok=True)
        run, config, record = Run(seed, str(folder)), folder / "config.py", (folder / "record.json").resolve()
        cfg = self.config_of(variant)
        set_run(cfg, folder, record, seed, self.length(cfg), self.args.workers, self.args.amp)
        cfg.dump(config)
        train(run, config, record, self.args.time_limit)
        return run

    def config_of(self, variant: Variant) -> Config:
        return load_row(variant, self.args.data, self.args.cfg_options)

    def length(self, cfg: Config) -> int | None:
        return getattr(self.args, LENGTHS[cfg.default_scope])

    @property
    def groups(self) -> list[list[Row]]:
        """The rows of each task."""
        groups = [[row for row in self.rows if row.scope == scope] for scope in SCORES]
        return [group for group in groups if group]

    def report(self) -> dict[str, Any]:
        rows = []
        for group in self.groups:
            thresholds = thresholds_of(group)
            rows += [dict(asdict(row), summary=_summary(row, thresholds)) for row in group]
        thresholds = {group[0].scope: thresholds_of(group) for group in self.groups}
        return {"machine": self.machine, "thresholds": thresholds, "rows": rows}


def _summary(row: Row, thresholds: dict[float, float]) -> dict[str, Any] | None:
    return asdict(summarize(row, thresholds)) if row.records else None


def describe(run: Run, scope: str) -> str:
    """One training in a line."""
    if run.failure:
        return run.failure
    scores = ", ".join(f"{score.title} {curve_of(run.record, score)[-1][1]:.1f}" for score in SCORES[scope])
    last = run.record.evaluations[-1]
    return f"{scores} after {last.step} steps, {last.seconds:.0f} s of training, {run.total_s:.0f} s in all"


# ---- command line


def parse_args(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    workers = min(8, os.cpu_count() or 1)
    parser.add_argument("configs", nargs="+", type=parse_variants, metavar="CONFIG", help="see above")
    parser.add_argument("--data", default="hard", metavar="NAME", help="hard or toy (default: hard)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="train each with seeds 0 to N-1 (default: 1)")
    parser.add_argument("--iters", type=int, metavar="N", help="steps of a segmenter (default: as --data has it)")
    parser.add_argument("--epochs", type=int, metavar="N", help="epochs of a detector (default: as --data has it)")
    parser.add_argument(
        "--amp", nargs="?", const="bfloat16", choices=("bfloat16", "float16"), help="mixed precision (bfloat16)"
    )
    parser.add_argument(
        "--workers", type=int, default=workers, metavar="N", help=f"that load data (default: {workers})"
    )
    parser.add_argument(
        "--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="change fields of all configs"
    )
    parser.add_argument("--time-limit", type=float, default=900, metavar="S", help="for one training (default: 900)")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/compare"), metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, updated after every training")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw losses and scores of all models")
    args = parser.parse_args(argv)

    args.configs = [variant for variants in args.configs for variant in variants]
    numbers = [args.seeds, *(number for number in (args.iters, args.epochs) if number is not None)]
    if min(numbers) < 1 or args.workers < 0 or not 0 < args.time_limit < math.inf:
        parser.error("--seeds, --iters, --epochs and --time-limit must be above 0, --workers at least 0")
    check_names(parser, args.configs)
    if args.amp and not torch.cuda.is_available():
        parser.error("--amp: stock models train with it on GPUs only, and there is none here; leave it out")
    check_files(parser, args)
    return parser, args


def prepare(comparison: Comparison) -> None:
    """Make the data, and find what can be found before the first training; ConfigError or DataError."""
    args = comparison.args
    for variant in args.configs:
        cfg = comparison.config_of(variant)
        set_run(cfg, Path(), Path(), 0, comparison.length(cfg), args.workers, args.amp)
        make_data(args.data, cfg.train_dataloader.dataset.data_root)
        check_data_is_there(cfg, ("train", "val"))


def make_data(name: str, data_root: str) -> None:
    """Write the embedded data set of that name if `data_root` is in its folder, which is not there."""
    folder = Path("data", name)
    if name in EMBEDDED and folder in Path(data_root).parents and not folder.exists():
        command = [str(Path(__file__).with_name("make_toy_data.py")), *EMBEDDED[name].split()]
        print(f"$ {shlex.join(['python', *command])}", flush=True)
        if code := subprocess.run([sys.executable, *command]).returncode:
            sys.exit(code)


def main(argv: list[str] | None = None) -> int:
    warnings.filterwarnings("ignore", category=UserWarning)  # stock code's
    parser, args = parse_args(argv)
    settings = {"data": args.data, "precision": args.amp or "float32", "seeds": str(args.seeds)}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    comparison = Comparison(args, describe_machine(device, settings, PACKAGES))
    try:
        prepare(comparison)
    except (ConfigError, DataError) as error:
        parser.error(str(error))
    print(", ".join(f"{key} {value}" for key, value in comparison.machine.items()), flush=True)

    for variant in args.configs:
        comparison.add(variant)
    for group in comparison.groups:
        print(f"\n{group[0].scope}\n{format_table(group)}", flush=True)
    trained = [group for group in comparison.groups if any(row.records for row in group)]
    if not trained:
        print("error: nothing could be trained", file=sys.stderr)
        return 1
    if args.plot:
        title = f"From scratch on the data set {args.data!r}, {settings['precision']}"
        draw_plot(trained, f"{title}\n{comparison.machine['device']}", args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
