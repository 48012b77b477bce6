#!/usr/bin/env python
"""Classification: top-1 and top-5 of a checkpoint, and fine-tuning, on a folder in ImageNet's layout.

examples:
  python tools/classify.py eval vig_small checkpoints/vig_s_81p7acc.pth data/imagenet --amp --batch-size 256
  python tools/classify.py eval vig_tiny CHECKPOINT photos --classes classes.txt --json accuracy.json
  python tools/classify.py finetune vig_small data/flowers --pretrained checkpoints/vig_s_81p7acc.pth --amp --ema
  python tools/classify.py finetune vig_small data/flowers --resume
  torchrun --nproc_per_node 8 tools/classify.py finetune vig_small data/flowers --pretrained --launcher pytorch

A folder has val/CLASS/*.JPEG (any suffix of an image) and, for fine-tuning, train/CLASS/*.JPEG; `eval` also takes the
class folders themselves. docs/classification.md says which folder is which class, and has the recipe.

exit code: 0 done, 1 some images could not be read (they are listed), 2 wrong usage, 130 interrupted
"""

import argparse
import os
import sys
from pathlib import Path
from urllib.parse import urlparse

import torch
from _benchmark import write_json
from _command import add_amp_argument, run_command
from mmengine.config import Config, DictAction
from mmengine.dist import is_main_process

from vig_backbone import HierViG
from vig_backbone.classification import Accuracy, build_from_file, evaluation_data, finetune, finetuning_config, measure
from vig_backbone.classification.finetuning import EPOCHS, change_fields, use_average
from vig_backbone.classification.folders import ClassMap
from vig_backbone.classification.published import IMAGENET_SIZE, PUBLISHED, against_published
from vig_backbone.classification.resuming import resume_training
from vig_backbone.classifier import CLASSIFIERS
from vig_backbone.data.progress import ProgressLine
from vig_backbone.openmmlab.configuration import PRETRAINED_FOLDER, official_checkpoint, use_amp
from vig_backbone.openmmlab.distributed import prepare_processes
from vig_backbone.openmmlab.errors import ConfigError


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{eval,finetune}")
    add_evaluation(commands.add_parser("eval", help="top-1 and top-5 of a checkpoint"))
    add_finetuning(commands.add_parser("finetune", help="train a classifier on other classes"))
    args = parser.parse_args(argv)
    least = {"batch_size": 1, "workers": 0, "size": 32}
    for name, minimum in least.items():
        if getattr(args, name) < minimum:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least {minimum}")
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        parser.error(f"--json {args.json}: expected a file in a folder that exists")
    return args


def add_evaluation(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("checkpoint", help="path or URL of an official file, or of one that `finetune` wrote")
    parser.add_argument("folder", type=Path, help="with val/CLASS/*.JPEG, or CLASS/*.JPEG")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="lines FOLDER INDEX: which folder is which class")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    add_shared(parser, batch_size=64)
    parser.set_defaults(run=evaluate)


def add_finetuning(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("folder", type=Path, help="with train/CLASS/*.JPEG and val/CLASS/*.JPEG")
    parser.add_argument(
        "--pretrained",
        nargs="?",
        const=PRETRAINED_FOLDER,
        metavar="CHECKPOINT",
        help="ImageNet weights, all but the last layer: a file, a URL, or a folder with the official file in it "
        f"(default: {PRETRAINED_FOLDER}); without it from scratch",
    )
    parser.add_argument("--epochs", type=int, metavar="N", help=f"default: {EPOCHS}")
    parser.add_argument("--ema", action="store_true", help="evaluate and keep a moving average of the weights")
    parser.add_argument("--with-cp", action="store_true", help="gradient checkpointing: less memory, more time")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="go on from a checkpoint, with its schedule and optimizer; without one (or 'auto') from the last whole "
        "one in the work dir",
    )
    parser.add_argument(
        "--work-dir", type=Path, metavar="DIR", help="logs and checkpoints (default: work_dirs/NAME_FOLDER)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        metavar="KEY=VALUE",
        help="change fields of the recipe, e.g. optim_wrapper.optimizer.lr=1e-4 model.label_smoothing=0",
    )
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm"), default="none", help="how it was started")
    add_shared(parser, batch_size=64)
    parser.set_defaults(run=train)


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=CLASSIFIERS, metavar="NAME", help=", ".join(CLASSIFIERS))


def add_shared(parser: argparse.ArgumentParser, batch_size: int) -> None:
    parser.add_argument(
        "--size", type=int, default=IMAGENET_SIZE, metavar="N", help=f"of images, in pixels (default: {IMAGENET_SIZE})"
    )
    parser.add_argument(
        "--batch-size", type=int, default=batch_size, metavar="N", help=f"of each process (default: {batch_size})"
    )
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="that read images (default: 4)")
    add_amp_argument(parser)
    parser.add_argument("--compile", action="store_true", help="torch.compile of the blocks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def evaluate(args: argparse.Namespace) -> None:
    model, names = build_from_file(args.name, args.checkpoint, args.compile)
    dataset, classes = evaluation_data(args.name, args.folder, model.num_classes, names, args.classes, args.size)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{args.name}, {model.num_classes} classes, on {device}; {len(dataset):,} images in {dataset.root}")
    print(f"{len(classes.indices)} folders, their classes known {classes.reason}", flush=True)
    progress = ProgressLine("images", sys.stderr)
    accuracy = measure(move(model, device), dataset, args.amp, args.batch_size, args.workers, progress)
    print(*report(args, accuracy, classes), sep="\n")
    if args.json:
        write_json(args.json, numbers(args, accuracy, classes, model.num_classes))
    if accuracy.unreadable:
        print(f"{len(accuracy.unreadable)} of {len(dataset)} images could not be read:", file=sys.stderr)
        print(*(f"  {problem}" for problem in accuracy.unreadable), sep="\n", file=sys.stderr)
        sys.exit(1)


def move(model: torch.nn.Module, device: str) -> torch.nn.Module:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # as torch names a device that does not exist, or is not there
        raise ConfigError(f"--device {device}: {str(error).splitlines()[0]}") from error


def report(args: argparse.Namespace, accuracy: Accuracy, classes: ClassMap) -> list[str]:
    top5 = "" if accuracy.top5 is None else f", top-5 {accuracy.top5:.2f} %"
    how = f"{args.size} pixels, batches of {args.batch_size}, {args.amp or 'float32'}"
    lines = [
        f"top-1 {accuracy.top1:.2f} %{top5} of {accuracy.images:,} images ({how})",
        f"{accuracy.images_per_second:.1f} images/s, reading included",
    ]
    if classes.is_imagenet:
        lines.append(against_published(args.name, accuracy.top1, accuracy.images, args.size))
    return lines


def numbers(args: argparse.Namespace, accuracy: Accuracy, classes: ClassMap, num_classes: int) -> dict:
    return dict(
        name=args.name,
        checkpoint=args.checkpoint,
        folder=str(args.folder),
        num_classes=num_classes,
        folders=len(classes.indices),
        classes_known=classes.reason,
        size=args.size,
        amp=args.amp,
        top1=accuracy.top1,
        top5=accuracy.top5,
        images=accuracy.images,
        images_per_second=accuracy.images_per_second,
        unreadable=accuracy.unreadable,
        published_top1=PUBLISHED[args.name].top1 if classes.is_imagenet else None,
    )


def train(args: argparse.Namespace) -> None:
    cfg = recipe(args)
    prepare_processes(cfg, args.launcher)
    result = finetune(cfg)
    if not is_main_process():
        return
    print(f"best top-1 {result.top1:.2f} % on {args.folder / 'val'}: {result.checkpoint}")
    print(f"again: python tools/classify.py eval {args.name} {result.checkpoint} {args.folder} --size {args.size}")
    if args.json:
        write_json(args.json, dict(name=args.name, top1=result.top1, checkpoint=str(result.checkpoint)))


def find_pretrained(name: str, source: str) -> str:
    """The file of --pretrained, or its URL."""
    if urlparse(source).scheme in ("http", "https"):
        return source
    model = CLASSIFIERS[name]
    family = "HierViG" if issubclass(model.func, HierViG) else "ViG"
    return str(official_checkpoint(family, model.keywords["arch"], Path(source)))


def recipe(args: argparse.Namespace) -> Config:
    """The config of the command line."""
    os.environ.setdefault("LOCAL_RANK", "0")  # mmengine reads it
    work_dir = args.work_dir or Path("work_dirs") / f"{args.name}_{args.folder.resolve().name}"
    cfg = finetuning_config(
        args.name,
        args.folder,
        work_dir,
        pretrained=args.pretrained and find_pretrained(args.name, args.pretrained),
        epochs=EPOCHS if args.epochs is None else args.epochs,
        batch_size=args.batch_size,
        size=args.size,
        workers=args.workers,
        seed=args.seed,
    )
    cfg.model.with_cp, cfg.model.compile = args.with_cp, args.compile
    if args.resume:
        resume_training(cfg, args.resume, args.epochs)
    if args.cfg_options:
        change_fields(cfg, args.cfg_options)
    if args.amp:
        use_amp(cfg, args.amp)
    if args.ema:
        use_average(cfg)
    return cfg


def main(args: argparse.Namespace) -> None:
    args.run(args)


if __name__ == "__main__":
    sys.exit(run_command(main, parse_args(None)))
