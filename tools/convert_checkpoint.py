#!/usr/bin/env python
"""Make a small file of an official checkpoint, or of one of a training: the weights, and where they come from.

examples:
  python tools/convert_checkpoint.py work_dirs/upernet_vig_s/iter_160000.pth release/upernet_vig_s.pth
  python tools/convert_checkpoint.py vig_s_81p7acc.pth release/vig_s.safetensors
  python tools/convert_checkpoint.py work_dirs/mask_rcnn_vig_s/epoch_12.pth vig_s_coco.pth --backbone-only --half

OUT is NAME.pth or NAME.safetensors. The file is called NAME-<8 digits>.pth, after the start of its SHA-256. In it are
the weights, and as metadata the config of the training, class names and palette, the name of the original, its
SHA-256, and versions of packages. Left out is what only a training needs: the optimizer, schedules, logs.

A training with --ema keeps the moving average, which its evaluation uses, under `state_dict`, and that is converted;
`--key ema_state_dict` takes the last weights instead.

The file is checked before this command ends: models are built from both files, and their outputs for a random image
are compared. They are equal to the last bit, or to the rounding of the weights with --half. A file that fails is
removed. It starts whatever the original starts: tools/test.py, `--pretrained`, `init_cfg`, `build_backbone`.
"""

import argparse
import json
import sys
from pathlib import Path

from _command import run_command

from vig_backbone import CheckpointError
from vig_backbone.convert import Converted, convert_checkpoint, sha256_of, verify_backbone
from vig_backbone.openmmlab.converted_model import verify_model


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN", help="checkpoint, .pth or .safetensors; path or URL")
    parser.add_argument("target", metavar="OUT", help="NAME.pth or NAME.safetensors")
    parser.add_argument("--key", metavar="NAME", help="entry of the checkpoint with the weights, e.g. ema_state_dict")
    parser.add_argument("--backbone-only", action="store_true", help="leave out neck, heads and classifier")
    parser.add_argument("--half", action="store_true", help="floating-point weights in float16: half the size")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write name, hash and metadata of the file")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    converted = convert_checkpoint(args.source, args.target, args.key, args.backbone_only, args.half)
    try:
        checked, difference = check(converted, args)
    except CheckpointError:
        converted.path.unlink()
        raise
    print_report(converted, checked, difference)
    if args.json:
        args.json.write_text(json.dumps(summary(converted, difference), indent=1) + "\n")


def check(converted: Converted, args: argparse.Namespace) -> tuple[str, float | None]:
    """What was compared with the original, and the relative difference of its outputs (None: nothing was)."""
    difference = None if args.backbone_only else verify_model(args.source, converted, args.key)
    if difference is not None:
        return "model", difference
    return "backbone", verify_backbone(args.source, converted, args.key)


def print_report(converted: Converted, checked: str, difference: float | None) -> None:
    for name, size in converted.dropped.items():
        print(f"dropped {name}" + (f" ({size / 1e6:.1f} MB)" if size else ""))
    facts = {name: value for name, value in converted.metadata.items() if name not in ("cfg", "dataset_meta")}
    print(*(f"{name}: {value}" for name, value in facts.items()), sep="\n")
    if classes := converted.metadata.get("dataset_meta", {}).get("classes"):
        print(f"classes: {', '.join(classes[:8])}{f', … ({len(classes)})' if len(classes) > 8 else ''}")
    if difference is None:
        print("not compared with the original: the file has no config, and the weights are of none of our backbones")
    else:
        how = "equal" if difference == 0 else f"{difference:.1e} off (relative, float16)"
        print(f"outputs of the {checked} for a random image: {how}")
    size = converted.path.stat().st_size
    print(f"{converted.path}: {len(converted.weights)} weights, {size / 1e6:.1f} MB")


def summary(converted: Converted, difference: float | None) -> dict:
    return dict(
        file=str(converted.path),
        sha256=sha256_of(converted.path),
        bytes=converted.path.stat().st_size,
        weights=len(converted.weights),
        dropped=converted.dropped,
        difference=difference,
        metadata=converted.metadata,
    )


if __name__ == "__main__":
    sys.exit(run_command(main, parse_args(None)))
