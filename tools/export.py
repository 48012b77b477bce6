#!/usr/bin/env python
"""Export a backbone, a segmenter, or the maps of a detector, and compare the file with PyTorch.

examples:
  python tools/export.py vig_small vig_s_81p7acc.pth --format onnx --size 512x512
  python tools/export.py seg_configs/upernet_vig_s.py CHECKPOINT --format onnx --size 512x512 --dynamic --argmax
  python tools/export.py det_configs/mask_rcnn_hier_vig_t.py CHECKPOINT --format onnx --size 800x1344
  python tools/export.py hier_vig_tiny --format onnx torch aot --size 224x224 --benchmark

MODEL is a config, or the name of a backbone. Images go in normalised, [1, 3, H, W]. Out come
  of a backbone   its maps
  of a segmenter  logits of the size of the image; with --argmax the labels
  of a detector   the maps of the neck, and the scores and box offsets of the RPN: what comes behind has as many rows as
                  the suppression leaves, which exporters cannot follow

formats: onnx (checked with ONNX Runtime on the CPU), torch (a program of torch.export, .pt2), aot (a package of
AOTInductor, compiled for --device). One file each, in --work-dir. With --dynamic a file takes images of any height and
width from 33 (whole models: 65) to 8192 pixels; without it, of --size alone.

exit code: 0 exported and equal to rounding, 1 the outputs differ, 2 cannot be exported, or wrong usage
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from _command import run_command
from _sizes import parse_size
from mmengine.config import DictAction
from torch import Tensor, nn

from vig_backbone.builder import BACKBONES, build_backbone
from vig_backbone.export import FORMATS, ExportError, ImageSize, export_model, prepare
from vig_backbone.export.check import LIMIT, Difference, compare_outputs, measure_latency
from vig_backbone.export.formats import SUFFIXES, Exported, Run
from vig_backbone.openmmlab.configuration import load_config
from vig_backbone.openmmlab.errors import ConfigError
from vig_backbone.openmmlab.exportable import exportable_model, replace_pooling

SMALLEST_OF_PYRAMIDS = 65  # pixels: strides of detectors go up to 64, and a side of one token is a case of its own


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help=f"a config, or one of {', '.join(BACKBONES)}")
    parser.add_argument("checkpoint", nargs="?", help="weights; without them they are random")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=["onnx"], help="default: onnx")
    parser.add_argument("--size", type=image_size, default=(512, 512), metavar="HxW", help="default: 512x512")
    parser.add_argument("--dynamic", action="store_true", help="one file for all image sizes")
    parser.add_argument("--argmax", action="store_true", help="segmenters: labels instead of logits")
    parser.add_argument("--benchmark", action="store_true", help="measure PyTorch and the files on one image")
    parser.add_argument("--data", metavar="NAME", help="another data set: 'toy' and 'hard' are embedded ones")
    parser.add_argument("--device", default="cpu", help="of PyTorch, and of the package of AOTInductor (default: cpu)")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/export"), metavar="DIR", help="for the files")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="change the config")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write differences and times")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def image_size(text: str) -> tuple[int, int]:
    size = parse_size(text)
    if min(size) < 33:
        raise argparse.ArgumentTypeError(f"expected sides of at least 33 pixels, got {text!r}")
    return size


def build(args: argparse.Namespace) -> tuple[nn.Module, tuple[str, ...]]:
    """The model, and names of its outputs."""
    torch.manual_seed(0)
    if args.model in BACKBONES:
        if args.data or args.cfg_options or args.argmax:
            raise ConfigError("--data, --cfg-options and --argmax: expected a config, not the name of a backbone")
        model = build_backbone(args.model, args.checkpoint).to(args.device).eval()
        return model, tuple(f"map_{i}" for i in range(len(model.out_indices)))
    cfg = load_config(args.model, args.data, args.cfg_options)
    model = exportable_model(cfg, args.checkpoint, args.device, args.argmax)
    return model, model.outputs


def export(model: nn.Module, outputs: tuple[str, ...], format: str, args: argparse.Namespace) -> Exported:
    """One file. On a GPU, the Triton kernels stay what they are in torch's own formats."""
    keeps_kernels = torch.device(args.device).type == "cuda" and format != "onnx"
    ready = replace_pooling(prepare(model, "triton") if keeps_kernels else prepare(model))
    if format == "onnx":
        ready = ready.cpu()
    name = f"{Path(args.model).stem}_{args.size[0]}x{args.size[1]}{'_dynamic' if args.dynamic else ''}"
    size = size_of(args)
    return export_model(ready, args.work_dir / f"{name}{SUFFIXES[format]}", format, size, outputs)


def size_of(args: argparse.Namespace) -> ImageSize:
    return ImageSize(*args.size, args.dynamic, smallest=33 if args.model in BACKBONES else SMALLEST_OF_PYRAMIDS)


def main(args: argparse.Namespace) -> None:
    try:
        export_all(args)
    except ExportError as error:
        raise ConfigError(str(error)) from error  # which run_command prints


def export_all(args: argparse.Namespace) -> None:
    model, outputs = build(args)
    image = torch.randn(1, 3, *args.size, device=args.device)
    rows = [dict(format="PyTorch", ms=measure_latency(model_run(model), image))] if args.benchmark else []
    for format in args.format:
        start = time.perf_counter()
        exported = export(model, outputs, format, args)
        print(f"{exported.path}: {exported.path.stat().st_size / 1e6:.1f} MB, {time.perf_counter() - start:.0f} s")
        differences = compare_outputs(model, exported.run, size_of(args))
        print_differences(differences)
        row = dict(format=format, file=str(exported.path), differences=[asdict(d) for d in differences])
        rows.append(row | (dict(ms=measure_latency(exported.run, image)) if args.benchmark else {}))
    if args.benchmark:
        print_table(rows, args)
    if args.json:
        args.json.write_text(json.dumps(dict(model=args.model, outputs=outputs, rows=rows), indent=1) + "\n")
    if not all(d["relative"] <= LIMIT for row in rows for d in row.get("differences", [])):
        sys.exit(1)


def model_run(model: nn.Module) -> Run:
    def run(images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return list(model(images))

    return run


def print_differences(differences: list[Difference]) -> None:
    for d in differences:
        verdict = "" if d.is_small else "  TOO LARGE"
        print(f"  {d.height} x {d.width}: off by {d.largest:.1e} at most, {d.relative:.1e} relative{verdict}")


def print_table(rows: list[dict], args: argparse.Namespace) -> None:
    print(f"one image of {args.size[0]} x {args.size[1]}, {args.device}, {torch.get_num_threads()} threads, float32:")
    for row in rows:
        print(f"  {row['format']:8s} {row['ms']:9.1f} ms   {rows[0]['ms'] / row['ms']:5.2f}x")


if __name__ == "__main__":
    sys.exit(run_command(main, parse_args(None)))
