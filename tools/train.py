#!/usr/bin/env python
"""Train a detector or segmenter from a config.

examples:
  python tools/train.py seg_configs/upernet_vig_s.py --data toy              # embedded data set, no download
  python tools/train.py seg_configs/upernet_vig_s.py --amp --resume          # ADE20K in data/ade, bf16, go on
  torchrun --nproc_per_node 8 tools/train.py det_configs/mask_rcnn_hier_vig_t.py --launcher pytorch
  python tools/train.py det_configs/mask_rcnn_vig_s.py --cfg-options train_dataloader.batch_size=4
"""

import argparse
import sys

from _command import add_config_arguments, load, run_command

from vig_backbone.openmmlab.configuration import use_amp
from vig_backbone.openmmlab.distributed import prepare_processes
from vig_backbone.openmmlab.run import resume_from, train


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="go on from a checkpoint; without one (or 'auto') from the last whole one in the work dir",
    )
    parser.add_argument(
        "--amp",
        nargs="?",
        const="bfloat16",
        choices=("bfloat16", "float16"),
        help="automatic mixed precision (default type: bfloat16)",
    )
    parser.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate with the batch size")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    cfg = load(args)
    if args.amp:
        use_amp(cfg, args.amp)
    if args.auto_scale_lr:
        cfg.auto_scale_lr.enable = True
    if args.resume:
        resume_from(cfg, args.resume)
    prepare_processes(cfg, args.launcher)
    train(cfg)


if __name__ == "__main__":
    sys.exit(run_command(main, parse_args(None)))
