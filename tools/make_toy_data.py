#!/usr/bin/env python
"""Write the embedded data set: shapes and digits on real photos, in COCO and in ADE20K layout. Nothing is downloaded.

examples:
  python tools/make_toy_data.py data/toy                     # 160 + 40 images of 128x128, seconds
  python tools/make_toy_data.py data/toy --preview toy.png   # and a picture of what is in it
  python tools/make_toy_data.py data/hard --difficulty hard --size 256x384 --train 1600 --val 160
  python tools/make_toy_data.py data/toy --seed 1 --overwrite
"""

import argparse
import sys

from _sizes import parse_size

from vig_backbone.data.contact_sheet import draw_contact_sheet
from vig_backbone.data.progress import ProgressLine
from vig_backbone.data.toy import make_toy_data


def parse_args(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="folder to write; it holds coco/, ade/ and toy.json afterwards")
    parser.add_argument("--size", type=parse_size, default=(128, 128), metavar="HxW", help="default: 128x128")
    parser.add_argument("--train", type=int, default=160, metavar="N", help="training images (default: 160)")
    parser.add_argument("--val", type=int, default=40, metavar="N", help="validation images (default: 40)")
    parser.add_argument("--difficulty", choices=("easy", "hard"), default="easy", help="7 or 16 classes of things")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace a toy data set made with other arguments")
    parser.add_argument("--preview", metavar="FILE", help="also draw images with masks and boxes to this PNG")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    parser, args = parse_args(argv)
    progress = ProgressLine("drawing images", sys.stderr)
    try:
        summary = make_toy_data(
            args.root, args.train, args.val, args.size, args.difficulty, args.seed, progress, args.overwrite
        )
        if args.preview:
            draw_contact_sheet(args.root, args.preview)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    print(f"{summary.root}: {'already there' if summary.already_there else 'written'}")
    for split, count in summary.images.items():
        per_class = ", ".join(f"{name} {n}" for name, n in summary.instances[split].items())
        print(f"  {split}: {count} images, {sum(summary.instances[split].values())} objects ({per_class})")
    print(f"  detection: {summary.coco} ({len(summary.things)} classes)")
    print(f"  segmentation: {summary.ade} ({len(summary.semantic_classes)} classes, background first)")
    if args.preview:
        print(f"  preview: {args.preview}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
