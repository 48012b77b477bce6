#!/usr/bin/env python
"""See what a training sees: pictures of a split with its boxes, masks and labels, and how much of each class there is.

examples:
  python tools/browse_dataset.py det_configs/mask_rcnn_vig_t.py --count 8
  python tools/browse_dataset.py seg_configs/upernet_vig_s.py --data toy --stage pipeline --out pictures
  python tools/browse_dataset.py mmdet::yolox/yolox_s_8xb8-300e_coco.py --stage pipeline --shuffle
  python tools/browse_dataset.py seg_configs/upernet_vig_s.py --split val --count 0 --json statistics.json

stages:
  original     as it is on disk
  transformed  after all transforms of the config, what the model gets (default)
  pipeline     after each transform, in one picture
"""

import argparse
import json
import random
import sys
import warnings
from pathlib import Path

from _command import run_command
from _step_configs import find_config
from mmengine.config import Config, DictAction
from mmengine.runner import set_random_seed

from vig_backbone.openmmlab.configuration import load_config
from vig_backbone.openmmlab.errors import ConfigError
from vig_backbone.openmmlab.report.browse import STAGES, build_dataset, pictures
from vig_backbone.openmmlab.report.pictures import palette_of
from vig_backbone.openmmlab.report.statistics import Statistics, detection_statistics, segmentation_statistics


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a file, or mmdet::PATH or mmseg::PATH for a stock one")
    parser.add_argument("--split", choices=("train", "val", "test"), default="train", help="default: train")
    parser.add_argument("--stage", choices=STAGES, default="transformed", help="default: transformed")
    parser.add_argument("--count", type=int, default=16, metavar="N", help="pictures (default: 16; 0: none)")
    parser.add_argument("--shuffle", action="store_true", help="any images, not the first ones")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice and of the transforms")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: work_dirs/CONFIG/browse_SPLIT_STAGE")
    parser.add_argument("--data", metavar="NAME", help="another data set: 'toy' and 'hard' are embedded ones")
    parser.add_argument(
        "--maps", type=int, default=500, metavar="N", help="label maps to read for the table of classes (default: 500)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table")
    parser.add_argument(
        "--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="change fields of the config"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    if args.count < 0 or args.maps < 1:
        raise ConfigError(f"--count {args.count} --maps {args.maps}: expected 0 or more pictures, and 1 or more maps")
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise ConfigError(f"--json {args.json}: expected a file in a folder that exists")
    warnings.filterwarnings("ignore")  # of stock transforms, about arguments of stock configs
    path = find_config(args.config)
    cfg = load_config(path, args.data, args.cfg_options)
    dataset = build_dataset(cfg, args.split)
    statistics = count_classes(cfg, dataset, args.maps)
    kind = cfg[f"{args.split}_dataloader"].dataset.type
    print(f"{args.split} split of {path.stem}, {kind}:", statistics.text(), sep="\n")
    if args.json:
        args.json.write_text(json.dumps(statistics.to_dict(), indent=1) + "\n")
    if args.count:
        write_pictures(dataset, args, args.out or Path("work_dirs") / path.stem / f"browse_{args.split}_{args.stage}")


def count_classes(cfg: Config, dataset: object, maps: int) -> Statistics:
    return segmentation_statistics(dataset, maps) if cfg.default_scope == "mmseg" else detection_statistics(dataset)


def write_pictures(dataset: object, args: argparse.Namespace, folder: Path) -> None:
    set_random_seed(args.seed)
    indices = list(range(len(dataset)))
    if args.shuffle:
        random.Random(args.seed).shuffle(indices)
    palette = palette_of(dataset.metainfo.get("classes") or (), dataset.metainfo.get("palette"))
    folder.mkdir(parents=True, exist_ok=True)
    shown = indices[: args.count]
    for i, (name, picture) in enumerate(pictures(dataset, shown, args.stage, palette)):
        picture.save(folder / f"{i:04d}_{name}.png")
    print(f"{folder}: {len(shown)} pictures, {args.stage}")


if __name__ == "__main__":
    sys.exit(run_command(main, parse_args(None)))
