#!/usr/bin/env python
"""Evaluate a trained detector or segmenter on the test split of its config; metrics go to work_dir/metrics.json.

examples:
  python tools/test.py seg_configs/upernet_vig_s.py work_dirs/upernet_vig_s/iter_160000.pth
  python tools/test.py seg_configs/upernet_vig_s.py CHECKPOINT --data toy --show-dir overlays
  python tools/test.py det_configs/mask_rcnn_vig_s.py CHECKPOINT --out detections.pkl --tta
  torchrun --nproc_per_node 8 tools/test.py det_configs/mask_rcnn_vig_s.py CHECKPOINT --launcher pytorch
"""

import argparse
import sys

from _command import add_config_arguments, load, run_command

from vig_backbone.openmmlab.configuration import use_tta
from vig_backbone.openmmlab.distributed import prepare_processes
from vig_backbone.openmmlab.run import draw_predictions, dump_predictions, evaluate


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("checkpoint", help="file that tools/train.py wrote")
    parser.add_argument("--show-dir", metavar="DIR", help="write a picture per image: ground truth beside prediction")
    parser.add_argument(
        "--out", metavar="PATH", help="write predictions: FILE.pkl (detection) or a folder of label maps"
    )
    parser.add_argument("--tta", action="store_true", help="test-time augmentation as the config describes it")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    cfg = load(args)
    if args.tta:
        use_tta(cfg)
    if args.show_dir:
        draw_predictions(cfg, args.show_dir)
    if args.out:
        dump_predictions(cfg, args.out)
    prepare_processes(cfg, args.launcher)
    evaluate(cfg, args.checkpoint)


if __name__ == "__main__":
    sys.exit(run_command(main, parse_args(None)))
