#!/usr/bin/env python
"""Evaluate a checkpoint and write what came out as one HTML file: tables, curves, errors, worst and best images.

examples:
  python tools/report.py seg_configs/upernet_vig_s.py work_dirs/upernet_vig_s/iter_160000.pth
  python tools/report.py det_configs/mask_rcnn_vig_t.py CHECKPOINT --data toy --out report.html --json report.json
  python tools/report.py mmseg::pspnet/pspnet_r50-d8_4xb4-80k_ade20k-512x512.py CHECKPOINT --log work_dirs/pspnet

The page needs no network and no other file; docs/report.md says what is in it.
"""

import argparse
import shlex
import sys
from pathlib import Path

from _benchmark import write_json
from _command import add_config_arguments, load, run_command
from _step_configs import find_config

from vig_backbone.openmmlab.configuration import use_tta
from vig_backbone.openmmlab.distributed import prepare_processes
from vig_backbone.openmmlab.errors import ConfigError
from vig_backbone.openmmlab.report import make_report


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("checkpoint", help="file that tools/train.py wrote")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="default: report.html in the work dir")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers of the report")
    parser.add_argument("--log", metavar="DIR", help="work dir of the training (default: the checkpoint's folder)")
    parser.add_argument("--images", type=int, default=6, metavar="N", help="of the worst, and of the best (default: 6)")
    parser.add_argument("--tta", action="store_true", help="test-time augmentation as the config describes it")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    args.config = str(find_config(args.config))
    cfg = load(args)
    out = args.out or Path(cfg.work_dir) / "report.html"
    check_targets(args, out)
    if args.tta:
        use_tta(cfg)
    prepare_processes(cfg, args.launcher)
    report = make_report(cfg, args.checkpoint, shlex.join(["python", *sys.argv]), args.log, args.images)
    if report is None:  # not the first process
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(report.html, encoding="utf-8")
    if args.json:
        write_json(args.json, report.numbers)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


def check_targets(args: argparse.Namespace, out: Path) -> None:
    """Before the evaluation, which takes long."""
    if args.images < 0:
        raise ConfigError(f"--images {args.images}: expected 0 or more")
    if out.suffix not in (".html", ".htm") or out.is_dir():
        raise ConfigError(f"--out {out}: expected the name of a file that ends in .html")
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise ConfigError(f"--json {args.json}: expected a file in a folder that exists")


if __name__ == "__main__":
    sys.exit(run_command(main, parse_args(None)))
