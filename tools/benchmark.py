#!/usr/bin/env python
"""Speed and memory of backbones against image size: ViG's, and those of timm that it is compared with.

examples:
  python tools/benchmark.py
  python tools/benchmark.py vig_tiny deit_tiny --json backbones.json --plot backbones.png
  python tools/benchmark.py vig_tiny --resolutions 512,1024,2048,4096 --modes inference --fit
  python tools/benchmark.py vig_tiny deit_tiny deit_tiny_nosdpa --resolutions 1024 --modes latency   # memory
  python tools/benchmark.py vig_tiny deit_tiny --resolutions 64 --quick --device cpu

models:
{models}
All are feature extractors with random weights: the plain ones (ViG, DeiT) give their last normalised tokens, the
hierarchical ones (HierViG, Swin, ConvNeXt) the maps of all four stages. DeiT and Swin are built for the image size.
DeiT attends by PyTorch's scaled_dot_product_attention; deit_*_nosdpa writes attention out, and is measured eagerly
alone, because torch.compile may put the fused form back.

modes:
  inference  a batch: no_grad, eval(), autocast
  training   a batch: forward in autocast, mean square of the outputs in float32, gradients of all parameters;
             train(), no drop path, no optimizer, no gradient checkpointing
  latency    inference of one image, until the device has finished it

paths:
  eager      as it is
  compiled   torch.compile for this very size
  graphed    the compiled step, captured in a CUDA graph that is replayed

columns:
  batch      images of a step: about 8 x 1024 x 1024 pixels (on a CPU 512 x 512), a power of two; halved where that is
             out of memory
  ms         median of a step. On a GPU by CUDA events between steps that queue up, so that Python counts where the
             device waits for it; wall time for `latency` and on a CPU
  spread     from the 10th to the 90th percentile, in percent of the median
  images/s   batch over median
  peak MB    allocated by torch during a step, parameters, buffers and images included; for `graphed` that of the
             compiled step, which the graph keeps
  first s    first call, compiling (with torch's caches on disk) and capturing included
  GFLOP, MB  of a step, over its images, for the operators that torch's FLOP counter knows: matrix products,
             convolutions, attention and our scan (where that runs in PyTorch, its matrix products). A multiply-add is
             two; each operator reads its inputs and writes its outputs once; all else counts as free
  roofline   least time over measured time. Least time: the sum over these operators of the longer of FLOPs over the
             rate of a large matrix product and bytes over the bandwidth of a large copy, both measured at the start.
             Small steps, whose tensors stay in the cache, or kernels that fuse such operators can be above 100%

Ratios compare each side at its fastest path, per image. --fit: time of an image ~ pixels ** exponent, squares from 512.

exit code: 0 measured, 1 nothing could be measured, 2 wrong usage
"""

import argparse
import gc
import math
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from _benchmark import DTYPES, add_options, complete_options, write_json
from _models import (
    CONTENDERS,
    DEFAULTS,
    EAGER,
    GRAPHED,
    LATENCY,
    MODES,
    PATHS,
    Contender,
    Setup,
    Size,
    Workload,
    find_contender,
)
from _results import Row, draw_plot, fits_of, format_header, format_row, name_of, ratios_of
from _roofline import Machine, matmul_rate
from _sizes import parse_sizes
from _timing import (
    OUT_OF_MEMORY,
    Effort,
    TimeLimitError,
    call_times,
    capture,
    copy_bandwidth,
    describe_machine,
    peak_bytes,
    queued_times,
    seconds_of,
    short_reason,
    time_limit,
    warm_up,
)

RESOLUTIONS = [(224, 224), (512, 512), (800, 1344), (1024, 1024), (2048, 2048)]
BATCH_PIXELS = {"cuda": 8 * 1024**2, "cpu": 512**2}


def batch_for(size: Size, pixels: int) -> int:
    """The power of two nearest to so many pixels in all, at least 1."""
    return 2 ** max(0, round(math.log2(pixels / math.prod(size))))


@dataclass
class Benchmark:
    setup: Setup
    paths: list[str]
    batch_size: int | None
    effort: Effort
    time_limit: float
    over_limit: dict[tuple[str, str, bool], int] = field(default_factory=dict)  # (model, mode, is eager) -> pixels

    def rows(self, contender: Contender, size: Size, mode: str) -> Iterator[Row]:
        batch = self.batch_size or batch_for(size, BATCH_PIXELS[self.setup.device.type])
        batch = 1 if mode == LATENCY else batch
        paths = [EAGER] if contender.eager_only else self.paths
        workload, note = self.workload(contender, size, mode, batch), ""
        for path in paths:
            row = self.try_to_measure(workload, path)
            while row.failure == OUT_OF_MEMORY and batch > 1:
                note, batch = f"batch {batch}: out of memory", batch // 2
                del workload
                workload = self.workload(contender, size, mode, batch)
                row = self.try_to_measure(workload, path)
            row.note = row.note or note
            yield row

    def workload(self, contender: Contender, size: Size, mode: str, batch: int) -> Workload:
        """A new one, after the memory of those before is free again."""
        if self.paths != [EAGER]:
            torch.compiler.reset()
        gc.collect()
        if self.setup.device.type == "cuda":
            torch.cuda.empty_cache()
        return Workload(contender, size, mode, batch, self.setup)

    def try_to_measure(self, workload: Workload, path: str) -> Row:
        row = Row(workload.contender.name, workload.size, workload.mode, path, workload.batch)
        limit = row.model, row.mode, path == EAGER
        pixels = math.prod(row.size)
        if pixels >= self.over_limit.get(limit, math.inf):
            row.failure = "left out: over the time limit before"
            return row
        try:
            with time_limit(self.time_limit):
                self.measure(row, workload)
        except (Exception, TimeLimitError) as error:
            row.failure = short_reason(error)
            if isinstance(error, TimeLimitError):
                self.over_limit[limit] = pixels
        return row

    def measure(self, row: Row, workload: Workload) -> None:
        row.class_name = type(workload.model).__name__
        row.parameters = sum(x.numel() for x in workload.model.parameters())
        run = step = workload.step(row.path)
        row.first_s = seconds_of(step, self.synchronize)
        if self.setup.device.type == "cuda":
            row.peak_bytes = workload.held_bytes() + peak_bytes(step)
        if row.path == GRAPHED:
            start = time.perf_counter()
            warm_up([step])
            run = capture([step], calls=1).replay
            row.first_s += time.perf_counter() - start

        if self.setup.device.type == "cuda" and row.mode != LATENCY:
            row.ms = queued_times(run, 1, self.effort)
        else:
            row.ms = call_times(run, self.synchronize, self.effort)
        row.images_per_second = row.batch / row.ms.median * 1e3
        try:
            row.cost = workload.cost
            row.roofline_share = row.cost.floor_ms / row.ms.median
        except Exception as error:  # an eager step may not fit into memory where a compiled one does
            row.note = f"no roofline: {short_reason(error)}"

    def synchronize(self) -> None:
        if self.setup.device.type == "cuda":
            torch.cuda.synchronize()


# ---- command line


def parse_model(text: str) -> Contender:
    try:
        return find_contender(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse_choices(choices: tuple[str, ...]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if not set(names) <= set(choices):
            raise argparse.ArgumentTypeError(f"expected some of {','.join(choices)}, got {text!r}")
        return [name for name in choices if name in names]

    return parse


def without_missing(contenders: list[Contender]) -> list[Contender]:
    """Ours alone where timm is not installed, or broken."""
    try:
        import timm  # noqa: F401
    except Exception as error:  # a torchvision that does not fit to torch is more than an ImportError
        print(f"timm cannot be used ({short_reason(error)}): its models are left out", file=sys.stderr)
        return [contender for contender in contenders if not contender.from_timm]
    return contenders


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    models = textwrap.fill(" ".join(CONTENDERS), 120, initial_indent="  ", subsequent_indent="  ")
    description = __doc__.replace("{models}", models)
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = f"image sizes (default: {','.join(map(name_of, RESOLUTIONS))})"
    parser.add_argument("models", nargs="*", type=parse_model, metavar="MODEL", help=f"default: {' '.join(DEFAULTS)}")
    parser.add_argument("--resolutions", type=parse_sizes, default=RESOLUTIONS, metavar="N|HxW,..", help=sizes)
    parser.add_argument("--modes", type=parse_choices(MODES), default=[*MODES], metavar="MODE,..", help="default: all")
    parser.add_argument(
        "--paths", type=parse_choices(PATHS), metavar="PATH,..", help="default: all that the device has"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="of inference and training")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of autocast (default: bf16; on a CPU fp32, without it)")
    parser.add_argument("--tf32", action="store_true", help="allow TensorFloat-32 for what is in fp32")
    parser.add_argument("--no-channels-last", action="store_true", help="ConvNeXt in NCHW as well")
    parser.add_argument("--fit", action="store_true", help="print how time grows with pixels")
    add_options(parser, "one path of a model at one size in one mode", "every row", "draw all against resolution")
    args = parser.parse_args(argv)

    complete_options(parser, args)
    on_gpu = args.device.type == "cuda"
    args.dtype = args.dtype or ("bf16" if on_gpu else "fp32")
    args.paths = args.paths or [path for path in PATHS if on_gpu or path != GRAPHED]
    args.models = list(dict.fromkeys(args.models or map(find_contender, DEFAULTS)))
    if GRAPHED in args.paths and not on_gpu:
        parser.error("--paths graphed: CUDA graphs need a GPU")
    if args.batch_size is not None and args.batch_size < 1:
        parser.error("--batch-size must be above 0")
    if args.fit and len([size for size in args.resolutions if size[0] == size[1] >= 512]) < 2:
        parser.error("--fit needs two square sizes from 512 up in --resolutions")
    if any(model.from_timm for model in args.models):
        args.models = without_missing(args.models)
        if not args.models:
            parser.error("no model is left to measure: pip install timm")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    dtype = DTYPES[args.dtype]
    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = args.tf32
    torch.backends.cudnn.benchmark = True
    settings = {"dtype": args.dtype, "tf32": "allowed" if args.tf32 else "off"}
    about = describe_machine(args.device, settings, ("triton", "timm"))
    machine = Machine(matmul_rate(args.device, dtype), copy_bandwidth(args.device))
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(machine)

    setup = Setup(args.device, dtype, not args.no_channels_last, machine)
    effort = Effort(args.repeats, args.min_seconds)
    benchmark = Benchmark(setup, args.paths, args.batch_size, effort, args.time_limit)
    rows: list[Row] = []

    def report() -> dict[str, Any]:
        found = {"rows": rows, "ratios": ratios_of(rows), "fits": fits_of(rows)}
        return {"machine": {**about, **asdict(machine)}, **{key: [*map(asdict, x)] for key, x in found.items()}}

    for size in args.resolutions:
        for mode in args.modes:
            print(format_header(mode, size))
            for row in (row for contender in args.models for row in benchmark.rows(contender, size, mode)):
                print(format_row(row), flush=True)
                rows.append(row)
                if args.json:
                    write_json(args.json, report())
            for ratio in ratios_of([row for row in rows if (row.size, row.mode) == (size, mode)]):
                print(f"  {ratio}", flush=True)

    if args.fit:
        print("", *fits_of(rows), sep="\n")
    if all(row.failure for row in rows):
        print("error: nothing could be measured", file=sys.stderr)
        return 1
    if args.plot:
        draw_plot(rows, f"Backbones, {args.dtype}\n{about['device']}", args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
