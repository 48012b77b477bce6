#!/usr/bin/env python
"""Check that a COCO or ADE20K folder is whole: every file is read once, whatever is broken is named.

examples:
  python tools/check_data.py coco data/coco
  python tools/check_data.py ade20k data/ade/ADEChallengeData2016 --workers 16
  python tools/check_data.py ade20k data/toy/ade --num-classes 8 --json report.json

exit code: 0 whole, 1 broken, 2 wrong usage (a folder that does not exist included)
"""

import argparse
import json
import sys
from pathlib import Path

from vig_backbone.data.check import check_ade20k, check_coco
from vig_backbone.data.layouts import layout_problems, missing_data_message
from vig_backbone.data.progress import ProgressLine


def parse_args(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("coco", "ade20k"))
    parser.add_argument("root", help="the data set's folder")
    parser.add_argument("--num-classes", type=int, help="ade20k: the highest label (default: 150)")
    parser.add_argument("--workers", type=int, metavar="N", help="reading threads (default: one a CPU)")
    parser.add_argument("--quick", action="store_true", help="compare names and annotations only, decode no image")
    parser.add_argument("--limit", type=int, default=50, metavar="N", help="problems to print (default: 50)")
    parser.add_argument("--json", metavar="FILE", help="write the whole report, all problems included")
    args = parser.parse_args(argv)
    if args.kind == "coco" and args.num_classes is not None:
        parser.error("--num-classes belongs to ade20k")
    return parser, args


def main(argv: list[str] | None = None) -> int:
    parser, args = parse_args(argv)
    options = {"workers": args.workers, "full": not args.quick, "progress": ProgressLine("reading images", sys.stderr)}
    if args.num_classes is not None:
        options["num_classes"] = args.num_classes
    try:
        report = (check_coco if args.kind == "coco" else check_ade20k)(args.root, **options)
        if args.json:
            Path(args.json).write_text(json.dumps(report.to_dict(), indent=1))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(report.text(args.limit))
    missing = layout_problems(args.kind, args.root)
    if missing:
        print(missing_data_message(args.kind, args.root, missing))
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
