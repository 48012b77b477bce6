#!/usr/bin/env python
"""Parameters and FLOPs of the models of configs: of the whole, of the backbone, of every module.

examples:
  python tools/flops.py det_configs/mask_rcnn_vig_t.py
  python tools/flops.py seg_configs/upernet_hier_vig_s.py --size 512 --depth 4
  python tools/flops.py mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py --size 800x1280 --json swin.json
  python tools/flops.py --table det_configs            # the table of det_configs/README.md
  python tools/flops.py --table seg_configs --write    # put it there

configs: a file, or mmdet::PATH or mmseg::PATH for a stock one. One image goes through the model in evaluation mode:
detectors at 800 x 1280 and segmenters (whole, without sliding windows) at 512 x 2048 pixels, the sizes of published
tables, if --size does not say another one. Each box head on proposals sees {proposals} of them, each mask head
{detections} detections. Nothing is computed, tensors have shapes alone; only models that ask for their values run on
the CPU, which is logged.

columns:
  GFLOPs       of all products of the forward pass: convolutions, linear layers, attention, the scan of gated linear
               attention by its definition (both directions), samples of deformable attention. 1 FLOP is one
               multiply-add, as in the tables of papers; torch's counter and tools/benchmark.py count two. Norms,
               activations, pooling, resizing and suppression are left out
  paper-style  what the counters of published tables see: mmcv 1's hooks on modules, which add biases of convolutions,
               norms (two for each number, but SyncBN), ReLUs and pooling, with the products of attention and of the
               scan. Swin-T: 267 (Mask R-CNN) and 945 (UperNet) as published. For plain ViG, the down-projection of
               SwiGLU is left out, as in its paper, whose counter could not see it
  activations  numbers that these products make
Products count where they are computed: queries, keys and values of ViG in `attn`, whichever module has the parameters.

exit code: 0 counted, 2 a config that cannot be counted or wrong usage
"""

import argparse
import json
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path

from _command import run_command
from _sizes import parse_size
from _step_configs import find_config, parse_options

from vig_backbone.openmmlab.complexity import (
    DETECTIONS,
    PROPOSALS,
    Row,
    count_config,
    format_table,
    format_tree,
    replace_table,
)
from vig_backbone.openmmlab.configuration import load_config
from vig_backbone.openmmlab.errors import ConfigError

# Rows at the end of a folder's table: stock configs with published numbers, and their backbones.
CONTROLS = {
    "det_configs": [("mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py", "Swin-T")],
    "seg_configs": [("mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py", "Swin-T")],
}
UNIT = "1 FLOP is one multiply-add"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    description = __doc__.replace("{proposals}", str(PROPOSALS)).replace("{detections}", str(DETECTIONS))
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", metavar="CONFIG")
    parser.add_argument("--size", type=parse_size, metavar="HxW", help="of the image; one number for a square")
    parser.add_argument("--depth", type=int, default=2, metavar="N", help="of the tree of modules (default: 2)")
    parser.add_argument(
        "--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="change fields of the configs"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers of all modules")
    parser.add_argument(
        "--table", type=Path, metavar="FOLDER", help="the table of all configs in a folder, in Markdown"
    )
    parser.add_argument("--write", action="store_true", help="put that table into the README.md of the folder")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if bool(args.configs) == bool(args.table):
        parser.error("expected configs, or --table FOLDER")
    if args.write and (args.size or not args.table):
        parser.error("--write: expected --table FOLDER, whose README.md to write, and no --size")
    if args.json and (args.table or args.json.is_dir() or not args.json.parent.is_dir()):
        parser.error(f"--json {args.json}: expected configs, and a file in a folder that exists")
    return args


def count(name: str, args: argparse.Namespace) -> Row:
    """A config by its name on the command line, and what it costs."""
    if not all("=" in option for option in args.cfg_options):
        raise ConfigError(f"--cfg-options {' '.join(args.cfg_options)}: expected KEY=VALUE")
    cfg = load_config(find_config(name), options=parse_options(args.cfg_options))
    return Row(name, cfg, count_config(cfg, args.size))


def sort_key(path: Path) -> tuple[list[str], str]:
    """Sizes side by side, tiny before small before base, whatever else is in the name."""
    parts = path.stem.split("_")
    sizes = {"t": "0", "s": "1", "b": "2"}
    return [part for part in parts if part not in sizes], "".join(sizes.get(part, "") for part in parts)


def print_trees(args: argparse.Namespace) -> None:
    rows = []
    for name in args.configs:
        rows.append(row := count(name, args))
        height, width = row.report.size
        print(f"{name}: one image of {height} x {width} pixels; {UNIT}", *format_tree(row.report, args.depth), sep="\n")
    if args.json:
        write_json(args.json, rows)


def write_json(file: Path, rows: list[Row]) -> None:
    numbers = [
        {
            "config": row.name,
            "size": row.report.size,
            "modules": {name: asdict(cost) for name, cost in row.report.modules.items()},
        }
        for row in rows
    ]
    file.write_text(json.dumps({"unit": UNIT, "models": numbers}, indent=1) + "\n")


def table_of(folder: Path, args: argparse.Namespace) -> list[str]:
    """Of all configs in a folder, and of the stock ones that belong below them."""
    files = sorted(folder.glob("*.py"), key=sort_key)
    if not files:
        raise ConfigError(f"--table {folder}: no config there, expected a folder like det_configs")
    rows = [replace(count(str(file), args), name=file.name) for file in files]
    controls = CONTROLS.get(folder.resolve().name, [])
    rows += [replace(count(name, args), backbone=backbone) for name, backbone in controls]
    return format_table(rows)


def print_table(args: argparse.Namespace) -> None:
    lines = table_of(args.table, args)
    print(*lines, sep="\n")
    if args.write:
        readme = args.table / "README.md"
        if not readme.is_file():
            raise ConfigError(f"--write: there is no {readme}")
        readme.write_text(replace_table(readme.read_text(), lines))


def main(args: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore")  # of stock models, about arguments of stock configs
    if args.table:
        print_table(args)
    else:
        print_trees(args)


if __name__ == "__main__":
    sys.exit(run_command(main, parse_args(None)))
