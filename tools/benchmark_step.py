#!/usr/bin/env python
"""The training step and the inference of whole detectors and segmenters, broken down into their parts.

examples:
  python tools/benchmark_step.py seg_configs/upernet_hier_vig_t.py \\
      mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py --batch-size 16
  python tools/benchmark_step.py stock=mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py \\
      ours=det_configs/mask_rcnn_hier_vig_t.py --json step.json --plot step.png --kernels
  python tools/benchmark_step.py eager=seg_configs/upernet_vig_s.py \\
      compiled=seg_configs/upernet_vig_s.py@model.backbone.compile=True
  python tools/benchmark_step.py masked=det_configs/mask_rcnn_vig_s.py \\
      as_image=det_configs/mask_rcnn_vig_s.py@model.data_preprocessor.valid_sizes=False --smaller 0.25  # padding
  python tools/benchmark_step.py seg_configs/upernet_vig_s.py --data real \\
      --cfg-options train_dataloader.num_workers=8

configs:
  [NAME=]CONFIG[@KEY=VALUE,KEY=VALUE..]: a file, or mmdet::PATH or mmseg::PATH for a stock one; NAME is that of its
  row, each KEY=VALUE an option of this row alone, as in --cfg-options, which is for all rows (and comes before)

modes:
  training   model.train_step as mmengine's loop runs it, and what its RuntimeInfoHook does then: read the losses. One
             process, SyncBN as BN, the config's optimizer at a learning rate of 0, so that all steps do the same work
  inference  model.test_step of a batch by the config's test_cfg: from uint8 images to label maps, or boxes and masks
  latency    the same for one image

Weights are random; nothing is downloaded. Detections follow from them: fewer positive boxes in training than a trained
model has; for prediction the score threshold of the box head is put where 100 scores an image pass it.

data:
  synthetic  uint8 images of --size and annotations on the CPU, the same for every model, packed, collated and pinned
             as the config says: about 7 objects an image, or a label map of regions of all classes. For testing, images
             of segmenters were a third wider, those of detectors 3/5 as large, before they were resized
  real       batches of the config's own train_dataloader, with its worker processes: training only

columns:
  ms         median of a step: training on a GPU by CUDA events between steps that queue up, otherwise wall time until
             the device has finished
  spread     from the 10th to the 90th percentile, in percent of the median
  images/s   batch over median
  first s    first step, compiling and the start of the loader's workers included
  data ms    median wait for a batch, with real data
  peak MB    allocated by torch during a step, weights and the optimizer's state included
  busy       time in which the GPU runs at least one kernel or copy, by torch's profiler, over `ms`
  copies ms  of these, copies and fills of memory
  kernels    of a step; with a graph or torch.compile there are fewer launches (--json)
  syncs      calls that wait for the device. On a CPU a hint instead: operators that would wait (nonzero, item, a mask
             as index ..; copies apart), out of all that are called, `ops`; both without the optimizer's, which on a
             CPU reads its counters

parts: the time of each without the parts inside it. The median over other steps, which follow one another as before
and have marks (CUDA events, on a CPU the clock) where parts begin and end. Where the host is late, a part includes what
the device waits for it. model.loss and model.predict are what the detector or segmenter itself does beside calling its
parts (copies of annotations, a fused loss ..), `optimizer` includes zero_grad, `rest` is what is in no part.

exit code: 0 measured, 1 nothing could be measured, 2 wrong usage
"""

import argparse
import gc
import sys
import warnings
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from _benchmark import DTYPES, add_options, complete_options, write_json
from _models import TRAINING
from _sizes import parse_size
from _step_configs import Variant, check_names, load_variant, parse_variant
from _step_device import count_operators, profile_steps
from _step_parts import DeviceClock, WallClock, part_times
from _step_results import Row, Table, draw_plot, format_kernels, name_of_group, ratios_of
from _step_workload import MODES, SIZES, Setup, Workload
from _timing import (
    Effort,
    TimeLimitError,
    call_times,
    describe_machine,
    peak_bytes,
    queued_times,
    seconds_of,
    short_reason,
    time_limit,
)
from benchmark import parse_choices
from mmengine.config import Config
from mmengine.logging import MMLogger
from torch import nn

from vig_backbone.openmmlab.errors import ConfigError

PROFILED_STEPS = 3
DATA_SOURCES = ("synthetic", "real")


@dataclass
class Benchmark:
    setup: Setup
    effort: Effort
    time_limit: float

    @property
    def on_gpu(self) -> bool:
        return self.setup.device.type == "cuda"

    def row(self, variant: Variant, cfg: Config, mode: str) -> Row:
        """After the memory of those before is free again."""
        torch.compiler.reset()
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
        workload = Workload(variant, cfg, mode, self.setup)
        scope, options = cfg.default_scope, [*variant.options]
        row = Row(variant.name, variant.config, options, scope, mode, workload.size, workload.batch)
        try:
            with time_limit(self.time_limit):
                self.measure(row, workload)
        except (Exception, TimeLimitError) as error:
            row.failure = short_reason(error)
        return row

    def measure(self, row: Row, workload: Workload) -> None:
        row.classes = classes_of(workload.model)
        row.parameters = sum(x.numel() for x in workload.model.parameters())
        workload.prepare()
        step = workload.step
        row.first_s = seconds_of(step, self.synchronize)
        for _ in range(3):  # batches with other numbers of objects
            step()
        workload.feed.waits.clear()
        if self.on_gpu and workload.training:
            row.ms = queued_times(step, 1, self.effort)
        else:
            row.ms = call_times(step, self.synchronize, self.effort)
        row.images_per_second = row.batch / row.ms.median * 1e3
        row.data_ms = median(workload.feed.waits) if self.setup.real_data else None
        row.parts_ms = part_times(step, workload.parts(), self.clock, max(3, self.effort.repeats))
        if self.on_gpu:
            row.peak_bytes = torch.cuda.memory_allocated() + peak_bytes(step)
        try:
            self.look_at_device(row, workload)
        except Exception as error:  # there are machines that let nobody profile
            row.note = f"no profile: {short_reason(error)}"

    def look_at_device(self, row: Row, workload: Workload) -> None:
        if self.on_gpu:
            row.device = profile_steps(workload.step, PROFILED_STEPS)
            row.busy_share = row.device.busy_ms / row.ms.median
        else:
            with workload.without_update():
                row.operators, row.waiting_operators = count_operators(workload.step)

    @property
    def clock(self) -> WallClock | DeviceClock:
        return DeviceClock() if self.on_gpu else WallClock()

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def classes_of(model: nn.Module) -> dict[str, str]:
    return {"model": type(model).__name__, **{name: type(child).__name__ for name, child in model.named_children()}}


# ---- command line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = "of the images (default: 512x512 for segmentation, 800x1344 for detection)"
    options = dict(nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("configs", nargs="+", type=parse_variant, metavar="CONFIG", help="see above")
    parser.add_argument("--modes", type=parse_choices(MODES), metavar="MODE,..", help="default: all")
    parser.add_argument("--data", choices=DATA_SOURCES, default=DATA_SOURCES[0], help="default: synthetic")
    parser.add_argument("--size", type=parse_size, metavar="HxW", help=sizes)
    parser.add_argument(
        "--smaller", type=float, default=0.0, metavar="SHARE",
        help="sides of synthetic images are up to this share smaller, so that batches are padded (default: 0)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, metavar="N", help="of training and inference (default: the config's)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of autocast (default: bf16; on a CPU fp32, without it)")
    parser.add_argument("--cfg-options", **options, help="change fields of all configs")
    parser.add_argument("--kernels", action="store_true", help="on a GPU, list the longest kernels of each row")
    add_options(parser, "one config in one mode", "every row", "draw the parts of every row")
    args = parser.parse_args(argv)

    complete_options(parser, args)
    real = args.data == "real"
    args.dtype = args.dtype or ("bf16" if args.device.type == "cuda" else "fp32")
    args.modes = args.modes or ([TRAINING] if real else [*MODES])
    if args.batch_size is not None and args.batch_size < 1:
        parser.error("--batch-size must be above 0")
    if not 0 <= args.smaller < 1:
        parser.error("--smaller must be at least 0 and below 1")
    if real and (args.size or args.smaller or args.modes != [TRAINING]):
        parser.error("--data real: expected --modes training alone, and no --size or --smaller: the pipeline decides")
    check_names(parser, args.configs)
    try:
        args.loaded = [load_variant(variant, args.cfg_options) for variant in args.configs]
    except (ConfigError, argparse.ArgumentTypeError) as error:
        parser.error(str(error))
    return args


def print_details(table: Table, group: list[Row], with_kernels: bool) -> None:
    measured = [row for row in group if row.parts_ms]
    if measured:
        print(table.parts(measured))
    for ratio in ratios_of(group):
        print(f"  {ratio}")
    for row in measured:
        if with_kernels and row.device:
            print(format_kernels(row))
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    warnings.filterwarnings("ignore", category=UserWarning)  # stock code's
    MMLogger.get_instance("benchmark_step", log_level="ERROR")  # else it lists how each parameter was initialised
    args = parse_args(argv)
    real, on_gpu = args.data == "real", args.device.type == "cuda"
    packages = ("triton", "mmengine", "mmcv", "mmcv-lite", "mmdet", "mmsegmentation")
    about = describe_machine(args.device, {"dtype": args.dtype, "data": args.data}, packages)
    print(", ".join(f"{key} {value}" for key, value in about.items()))

    setup = Setup(args.device, DTYPES[args.dtype], args.size, args.batch_size, real, args.smaller)
    benchmark = Benchmark(setup, Effort(args.repeats, args.min_seconds), args.time_limit)
    table = Table.of([variant.name for variant in args.configs], on_gpu, real)
    rows: list[Row] = []

    def report() -> dict[str, Any]:
        return {"machine": about, "rows": [*map(asdict, rows)], "ratios": [*map(asdict, ratios_of(rows))]}

    for scope in SIZES:
        pairs = [(variant, cfg) for variant, cfg in zip(args.configs, args.loaded) if cfg.default_scope == scope]
        for mode in args.modes if pairs else ():
            print(table.header(name_of_group(mode, scope, setup.image_size(scope))))
            for variant, cfg in pairs:
                rows.append(benchmark.row(variant, cfg, mode))
                print(table.line(rows[-1]), flush=True)
                if args.json:
                    write_json(args.json, report())
            print_details(table, rows[-len(pairs) :], args.kernels)

    if all(row.failure for row in rows):
        print("error: nothing could be measured", file=sys.stderr)
        return 1
    if args.plot:
        draw_plot(rows, f"Steps, {args.dtype}\n{about['device']}", args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
