#!/usr/bin/env python
"""Run a trained detector or segmenter on images, folders, globs and videos; write pictures, JSON and label maps.

examples:
  python tools/infer.py det_configs/mask_rcnn_vig_t.py CHECKPOINT photo.jpg holiday/ 'more/**/*.png' --json found.jsonl
  python tools/infer.py seg_configs/upernet_vig_s.py CHECKPOINT photos --label-maps --batch-size 8 --amp
  python tools/infer.py seg_configs/upernet_vig_s.py CHECKPOINT satellite.tif --window 512
  python tools/infer.py det_configs/mask_rcnn_vig_t.py work_dirs/demo/detection/epoch_12.pth data/toy/coco/val2017 \\
      --data toy --out found

what is written, below the folder of --out; NAME is the path below the folder that was given, without suffix:
  overlays/NAME.jpg     masks, boxes, names and scores, or classes with a legend; of a video NAME.mp4
  label_maps/NAME.png   --label-maps: index of each pixel's class, the classes' colours as palette; of a video a
                        PNG for each frame, NAME/000000.png
  the file of --json    a line for each image or frame; docs/inference.md has its fields

exit code: 0 all done, 1 some images or videos could not be read (they are listed), 2 wrong usage, 130 interrupted
"""

import argparse
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from _command import add_amp_argument, add_config_arguments, load, run_command

from vig_backbone.openmmlab.errors import ConfigError
from vig_backbone.openmmlab.inference import (
    Failure,
    Painter,
    Predictor,
    ResultWriter,
    Source,
    find_sources,
    predict_sources,
)

SECONDS_BETWEEN_LINES = 5


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser, launcher=False)
    parser.add_argument("checkpoint", help="file that tools/train.py wrote")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="image, video, folder (searched to any depth), glob")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: infer/CONFIG in --work-dir or work_dirs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what is found as lines of JSON")
    parser.add_argument("--label-maps", action="store_true", help="write class indices as PNG (segmentation)")
    parser.add_argument("--no-overlay", action="store_true", help="write no pictures and videos")
    parser.add_argument("--format", choices=("jpg", "png"), default="jpg", help="of pictures (default: jpg)")
    parser.add_argument(
        "--score-threshold", type=float, default=0.3, metavar="S", help="drop detections below it (default: 0.3)"
    )
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images at a time (default: 1)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    add_amp_argument(parser)
    parser.add_argument("--tta", action="store_true", help="test-time augmentation as the config describes it")
    parser.add_argument(
        "--window", type=int, metavar="N", help="segment at full resolution, in overlapping windows of N x N pixels"
    )
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error(f"--batch-size {args.batch_size}: expected at least 1")
    if not 0 <= args.score_threshold <= 1:
        parser.error(f"--score-threshold {args.score_threshold}: expected a number from 0 to 1")
    if args.no_overlay and not (args.label_maps or args.json):
        parser.error("--no-overlay: nothing is left to write, expected --json or --label-maps beside it")
    return args


def folder_of(args: argparse.Namespace) -> Path:
    return args.out or Path(args.work_dir or "work_dirs") / "infer" / Path(args.config).stem


def predict_all(predictor: Predictor, sources: list[Source], args: argparse.Namespace) -> list[Failure]:
    """Write everything, showing how far it is; returns what could not be read."""
    failures = []
    settings = dict(
        overlays=not args.no_overlay, label_maps=args.label_maps, json_file=args.json, image_format=args.format
    )
    painter = Painter(predictor.classes, predictor.palette)
    with ResultWriter(folder_of(args), painter, threshold=args.score_threshold, **settings) as writer:
        outcomes = predict_sources(predictor, sources, args.batch_size)
        for outcome in with_progress(outcomes, sources):
            if isinstance(outcome, Failure):
                failures.append(outcome)
            else:
                writer.write(*outcome)
    return failures


def with_progress(outcomes: Iterator, sources: list[Source]) -> Iterator:
    """The same, with a line now and then, and one at the end."""
    videos = sum(source.is_video for source in sources)
    total = f" of {len(sources)}" if not videos else ""
    start = last = time.monotonic()
    done = 0
    for outcome in outcomes:
        yield outcome
        done += not isinstance(outcome, Failure)
        now = time.monotonic()
        if now - last > SECONDS_BETWEEN_LINES:
            print(f"{done}{total}, {done / (now - start):.1f} a second", flush=True)
            last = now
    seconds = time.monotonic() - start
    kind = "images and frames" if videos else "images"
    print(f"{kind}: {done} in {seconds:.1f} s, {done / max(seconds, 1e-9):.1f} a second")


def main(args: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore")  # of stock models, about arguments of stock configs
    sources = find_sources(args.inputs, left_out=folder_of(args))
    predictor = Predictor(
        load(args), args.checkpoint, device=args.device, amp=args.amp, tta=args.tta, window=args.window
    )
    if args.label_maps and predictor.task != "segmentation":
        raise ConfigError("--label-maps: is for segmentation; the masks of a detector are in the file of --json")
    print(f"{predictor.task} on {predictor.device}, {len(predictor.classes)} classes, {len(sources)} files")
    try:
        failures = predict_all(predictor, sources, args)
    except KeyboardInterrupt:
        print(f"interrupted; what was done until then is in {folder_of(args)}", file=sys.stderr)
        sys.exit(130)
    folder = folder_of(args) if args.label_maps or not args.no_overlay else None
    print("written to", *(each for each in (folder, args.json) if each))
    if failures:
        print(f"{len(failures)} of {len(sources)} files could not be used:", file=sys.stderr)
        print(*(f"  {failure.source.path}: {failure.reason}" for failure in failures), sep="\n", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(run_command(main, parse_args(None)))
