#!/usr/bin/env python
"""Train a detector or segmenter from a config.

examples:
  python tools/train.py seg_configs/upernet_vig_s.py --data toy              # embedded data set, no download
  python tools/train.py seg_configs/upernet_vig_s.py --pretrained --amp      # ADE20K in data/ade, bf16
  python tools/train.py seg_configs/upernet_vig_s.py --amp --resume          # go on
  bash tools/launch/torchrun.sh train det_configs/mask_rcnn_hier_vig_t.py    # all GPUs; slurm.sh: several machines
  python tools/train.py det_configs/mask_rcnn_vig_s.py --cfg-options train_dataloader.batch_size=4
"""

import argparse
import sys

from _command import add_amp_argument, add_config_arguments, load, run_command

from vig_backbone.openmmlab.configuration import (
    PRETRAINED_FOLDER,
    use_amp,
    use_ema,
    use_gradient_checkpointing,
    use_pretrained,
)
from vig_backbone.openmmlab.distributed import prepare_processes
from vig_backbone.openmmlab.fsdp import use_fsdp
from vig_backbone.openmmlab.run import resume_from, train
from vig_backbone.openmmlab.tensorboard import use_tensorboard


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
        "--pretrained",
        nargs="?",
        const=PRETRAINED_FOLDER,
        metavar="CHECKPOINT",
        help="ImageNet weights of the backbone: a file, a URL, or a folder with the official file in it "
        f"(default: {PRETRAINED_FOLDER})",
    )
    add_amp_argument(parser)
    parser.add_argument("--ema", action="store_true", help="evaluate an exponential moving average of the weights")
    parser.add_argument(
        "--fsdp", action="store_true", help="shard parameters, gradients and optimizer state over the processes"
    )
    parser.add_argument("--with-cp", action="store_true", help="gradient checkpointing: less memory, more time")
    parser.add_argument("--tensorboard", action="store_true", help="write the curves for TensorBoard as well")
    parser.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate with the batch size")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    cfg = load(args)
    if args.pretrained:
        use_pretrained(cfg, args.pretrained)
    if args.amp:
        use_amp(cfg, args.amp)
    if args.ema:
        use_ema(cfg)
    if args.fsdp:
        use_fsdp(cfg, args.launcher)
    if args.with_cp:
        use_gradient_checkpointing(cfg)
    if args.tensorboard:
        use_tensorboard(cfg)
    if args.auto_scale_lr:
        cfg.auto_scale_lr.enable = True
    if args.resume:
        resume_from(cfg, args.resume)
    prepare_processes(cfg, args.launcher)
    train(cfg)


if __name__ == "__main__":
    sys.exit(run_command(main, parse_args(None)))
