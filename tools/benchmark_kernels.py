#!/usr/bin/env python
"""Time, memory and accuracy of bidirectional gated linear attention, against whatever else is installed.

On a GPU the time is that of the device: calls captured in a CUDA graph that is replayed, over input sets that together
exceed the L2 cache, so that launches and cached inputs do not count. Eager wall time stands beside it.

examples:
  python tools/benchmark_kernels.py
  python tools/benchmark_kernels.py --shapes 4,6,4096,32,64 1,6,16384,32,64 --json kernels.json
  python tools/benchmark_kernels.py --sweep --plot kernels.png --json sweep.json
  python tools/benchmark_kernels.py --device cpu --contenders naive,chunk --sweep-lengths 256,1024 --quick

contenders:
{contenders}

columns, forward and forward+backward (gradients of all inputs) apart:
  time      median of a call: `graph` replay; `events` where no graph could be captured; `wall` on a CPU
  eager     on a GPU, median wall time of a call from Python, launches included
  first     seconds of the first call, compiling included; --cold: nothing comes from Triton's cache on disk
  copy bw   share of the copy bandwidth: each input read and each output written once, over the time
  peak      memory allocated during the call, outputs included, inputs not
  kept      bytes saved for the backward pass, over the bytes of the inputs
  error     relative RMS against `chunk` in float64 on a short sequence; forward+backward: the worst gradient

exit code: 0 measured, 1 a contender computes something else, 2 wrong usage
"""

import argparse
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from _benchmark import DTYPES, add_options, complete_options, format_ms, new_panels, optional, save_plot, write_json
from _timing import (
    Effort,
    TimeLimitError,
    Times,
    UnavailableError,
    copy_bandwidth,
    describe_machine,
    device_times,
    peak_bytes,
    seconds_of,
    short_reason,
    time_limit,
    wall_times,
    warm_up,
)
from torch import Tensor
from vig_kernels.gla import IMPLEMENTATIONS, bidirectional_gla

Operator = Callable[..., Tensor]
SDPA = F.scaled_dot_product_attention

FORWARD, BACKWARD = "forward", "forward+backward"
MAX_ERROR = {FORWARD: 2e-2, BACKWARD: 1e-1}  # 16-bit arithmetic stays well below; another function does not
MAX_INPUT_SETS = 16
BASELINES = ("triton", "chunk")  # ratios are to the first of them that was measured


@dataclass(frozen=True)
class Shape:
    B: int
    h: int
    L: int
    K: int
    V: int

    def __str__(self) -> str:
        return " ".join(f"{name}={size}" for name, size in asdict(self).items())


GPU_SHAPES = (
    Shape(4, 6, 4096, 32, 64),  # ViG-S, 1024 x 1024 pixels
    Shape(1, 6, 16384, 32, 64),  # ViG-S, 2048 x 2048
    Shape(2, 3, 67200, 16, 32),  # hierarchical ViG-T, first stage, 800 x 1344
    Shape(64, 6, 196, 32, 64),  # ViG-S, 224 x 224
)
CPU_SHAPES = tuple(Shape(1, 6, L, 32, 64) for L in (256, 1024, 4096))
SWEEP_LENGTHS = [2**i for i in range(8, 17)]


# ---- contenders


def gla_inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    """As the model has them: q, k, v are views of one projection, the log-gates of another tensor, in float32."""
    B, h, L, K, V = asdict(shape).values()
    randn = partial(torch.randn, generator=generator, device=generator.device)
    fused = randn(B, L, 2 * h * K + h * V).to(dtype)
    q, k, v = (x.unflatten(-1, (h, -1)) for x in fused.split((h * K, h * K, h * V), dim=-1))  # [B, L, h, .]
    return [q, k, v, *(F.logsigmoid(randn(B, L, 2, h, K)) / 16).unbind(2)]


def contiguous_gla_inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    return [x.contiguous() for x in gla_inputs(shape, dtype, generator)]


def sdpa_inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    """q, k, v [B, h, L, V]: attention of the same model width, h * V."""
    size = (shape.B, shape.h, shape.L, shape.V)
    return [torch.randn(size, generator=generator, device=generator.device).to(dtype) for _ in range(3)]


def load_implementation(name: str) -> Operator:
    if name not in IMPLEMENTATIONS:
        raise UnavailableError("not available")
    return partial(bidirectional_gla, impl=name)


def load_compiled() -> Operator:
    torch._dynamo.reset()

    def chunk(q: Tensor, k: Tensor, v: Tensor, log_gate_fwd: Tensor, log_gate_bwd: Tensor) -> Tensor:
        return bidirectional_gla(q, k, v, log_gate_fwd, log_gate_bwd, impl="chunk")

    return torch.compile(chunk, dynamic=False)


def load_fla() -> Operator:
    """One direction of chunk_gla on the tensors, one on the reversed tensors; reversing them is part of the cost."""
    try:
        from fla.ops.gla import chunk_gla
    except ImportError as error:
        raise UnavailableError("not installed (pip install flash-linear-attention)") from error

    def two_directions(q: Tensor, k: Tensor, v: Tensor, log_gate_fwd: Tensor, log_gate_bwd: Tensor) -> Tensor:
        scale = q.shape[-1] ** -0.5
        forward, _ = chunk_gla(q, k, v, g=log_gate_fwd, scale=scale)
        backward, _ = chunk_gla(q.flip(1), k.flip(1), v.flip(1), g=log_gate_bwd.flip(1), scale=scale)
        return (forward + backward.flip(1)) / 2

    return two_directions


@dataclass(frozen=True)
class Contender:
    name: str
    what: str
    load: Callable[[], Operator]
    make_inputs: Callable[[Shape, torch.dtype, torch.Generator], list[Tensor]]
    is_gla: bool = True  # computes the function in question


def from_registry(name: str, what: str) -> Contender:
    return Contender(name, what, partial(load_implementation, name), gla_inputs)


_CONTENDERS = (
    from_registry("triton", "the fused kernels"),
    from_registry("chunk", "the PyTorch form"),
    Contender("chunk_compiled", "torch.compile of it; what cannot be compiled runs eagerly", load_compiled, gla_inputs),
    Contender("fla", "flash-linear-attention's chunk_gla in two directions", load_fla, contiguous_gla_inputs),
    Contender("sdpa", "attention (another function), as many tokens and channels", lambda: SDPA, sdpa_inputs, False),
    from_registry("naive", "the definition, a loop over tokens"),
)
CONTENDERS = {contender.name: contender for contender in _CONTENDERS}
GPU_CONTENDERS = ["triton", "chunk", "chunk_compiled", "fla", "sdpa"]
CPU_CONTENDERS = ["naive", "chunk"]


# ---- one call


@dataclass(frozen=True)
class Case:
    """Inputs of one call, leaves of autograd, and the gradient that comes back."""

    inputs: list[Tensor]
    grad_out: Tensor

    @classmethod
    def make(
        cls,
        contender: Contender,
        shape: Shape,
        dtype: torch.dtype,
        gate_dtype: torch.dtype,
        device: torch.device,
        seed: int,
    ) -> "Case":
        # A generator of its own: a failed graph capture can leave the default one unusable.
        generator = torch.Generator(device).manual_seed(seed)
        q, k, v, *gates = contender.make_inputs(shape, dtype, generator)
        inputs = [x.detach().requires_grad_() for x in (q, k, v, *(gate.to(gate_dtype) for gate in gates))]
        grad_out = torch.randn(inputs[2].shape, generator=generator, device=device).to(dtype)
        return cls(inputs, grad_out)

    def double(self) -> "Case":
        return Case([x.detach().double().requires_grad_() for x in self.inputs], self.grad_out.double())


def call(operator: Operator, case: Case, mode: str) -> tuple[Tensor, ...]:
    """The output, or the gradients of all inputs after it."""
    if mode == FORWARD:
        with torch.no_grad():
            return (operator(*case.inputs),)
    out = operator(*case.inputs)
    return out.detach(), *torch.autograd.grad(out, case.inputs, case.grad_out)


def storages(tensors: list[Tensor]) -> dict[int, int]:
    """Bytes of each piece of memory that the tensors lie in, by address: views of one tensor count once."""
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}


def floor_bytes(case: Case, mode: str) -> int:
    """The least a call can move: inputs read, outputs written, and once more for the backward pass."""
    ins, out = (sum(x.numel() * x.element_size() for x in tensors) for tensors in (case.inputs, [case.grad_out]))
    return ins + out if mode == FORWARD else (ins + out) + (ins + out) + ins


def kept_bytes(operator: Operator, case: Case) -> tuple[int, int]:
    """Memory saved for the backward pass through autograd: (in the inputs themselves, beside them)."""
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = operator(*case.inputs)
    kept, given = storages(saved), storages(case.inputs)
    del out
    return tuple(sum(size for address, size in kept.items() if (address in given) == own) for own in (True, False))


def relative_rms(x: Tensor, reference: Tensor) -> float:
    return ((x.double() - reference).norm() / reference.norm()).item()


# ---- results


@dataclass
class Result:
    """A contender at one shape in one mode; with a `failure`, what was not measured before it is missing."""

    contender: str
    mode: str
    shape: Shape
    failure: str = ""
    note: str = ""
    time_ms: Times | None = None
    timing: str = ""
    eager_ms: Times | None = None
    first_s: float | None = None
    input_sets: int = 0
    input_bytes: int = 0
    floor_bytes: int = 0
    copy_share: float | None = None  # like error, None for another function than GLA
    error: float | None = None
    accurate: bool | None = None
    peak_bytes: int | None = None  # None on a CPU
    kept_input_bytes: int | None = None  # None for the forward mode
    kept_extra_bytes: int | None = None
    kept_ratio: float | None = None  # of both to input_bytes
    baseline: str = ""
    time_over_baseline: float | None = None


@dataclass
class Benchmark:
    device: torch.device
    dtype: torch.dtype
    gate_dtype: torch.dtype
    effort: Effort
    time_limit: float
    bandwidth: float  # bytes a second
    over_limit: dict[tuple[str, str], int] = field(default_factory=dict)  # (contender, mode) -> tokens

    def run(self, contenders: list[Contender], shape: Shape, mode: str) -> list[Result]:
        """All contenders at one shape, with their ratios."""
        results = [self.try_to_measure(contender, shape, mode) for contender in contenders]
        measured = {result.contender: result for result in results if not result.failure}
        baseline = next((name for name in BASELINES if name in measured), "")
        for result in measured.values() if baseline else ():
            result.baseline = baseline
            result.time_over_baseline = result.time_ms.median / measured[baseline].time_ms.median
        return results

    def try_to_measure(self, contender: Contender, shape: Shape, mode: str) -> Result:
        result = Result(contender.name, mode, shape)
        tokens = shape.B * shape.L
        if tokens >= self.over_limit.get((contender.name, mode), math.inf):
            result.failure = "left out: over the time limit with fewer tokens"
            return result
        try:
            with time_limit(self.time_limit):
                self.measure(result, contender)
        except (Exception, TimeLimitError) as error:
            result.failure = short_reason(error)
            if isinstance(error, TimeLimitError):
                self.over_limit[contender.name, mode] = tokens
        return result

    def measure(self, result: Result, contender: Contender) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what the contender before left
        operator, shape, mode = contender.load(), result.shape, result.mode
        case = self.case(contender, shape, seed=0)
        result.first_s = seconds_of(partial(call, operator, case, mode), self.synchronize)
        if contender.is_gla:
            result.error = self.error(operator, contender, shape, mode)
            result.accurate = result.error <= MAX_ERROR[mode]  # False for NaN
        result.input_bytes = sum(storages(case.inputs).values())
        result.floor_bytes = floor_bytes(case, mode)
        cases = [case, *(self.case(contender, shape, seed) for seed in range(1, self.input_sets(result.input_bytes)))]
        result.input_sets = len(cases)
        steps = [partial(call, operator, case, mode) for case in cases]

        if self.device.type == "cuda":
            warm_up(steps)
            result.peak_bytes = peak_bytes(steps[0])
            result.eager_ms = wall_times(steps, self.synchronize, self.effort)
            result.time_ms, result.timing, result.note = device_times(steps, self.effort)
        else:
            result.time_ms = result.eager_ms = wall_times(steps, self.synchronize, self.effort)
            result.timing = "wall"
        if mode == BACKWARD:
            result.kept_input_bytes, result.kept_extra_bytes = kept_bytes(operator, case)
            result.kept_ratio = (result.kept_input_bytes + result.kept_extra_bytes) / result.input_bytes
        if contender.is_gla:
            result.copy_share = result.floor_bytes / (result.time_ms.median / 1e3) / self.bandwidth

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def case(self, contender: Contender, shape: Shape, seed: int) -> Case:
        return Case.make(contender, shape, self.dtype, self.gate_dtype, self.device, seed)

    def input_sets(self, set_bytes: int) -> int:
        """So many that they exceed twice the L2 cache together."""
        if self.device.type != "cuda":
            return 1
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return min(max(1, math.ceil(2 * cache / set_bytes)), MAX_INPUT_SETS)

    def error(self, operator: Operator, contender: Contender, shape: Shape, mode: str) -> float:
        """Of the output; with the backward pass, of the worst gradient."""
        case = self.case(contender, Shape(1, shape.h, min(shape.L, 512), shape.K, shape.V), seed=0)
        expected = call(partial(bidirectional_gla, impl="chunk"), case.double(), mode)
        errors = [relative_rms(x, reference) for x, reference in zip(call(operator, case, mode), expected)]
        checked = errors if mode == FORWARD else errors[1:]
        return math.nan if any(map(math.isnan, checked)) else max(checked)


# ---- output


def format_ratio(result: Result) -> str:
    ratio = result.time_over_baseline
    if ratio is None or result.contender == result.baseline:
        return "-"
    return f"{ratio:.2f}x slower" if ratio >= 1 else f"{1 / ratio:.2f}x faster"


COLUMNS: dict[str, Callable[[Result], str]] = {
    "time ms": lambda r: format_ms(r.time_ms.median),
    "timing": lambda r: r.timing,
    "eager ms": lambda r: "-" if r.timing == "wall" else format_ms(r.eager_ms.median),
    "first s": lambda r: f"{r.first_s:.2f}",
    "copy bw": lambda r: optional("{:.1%}", r.copy_share),
    "peak MB": lambda r: optional("{:.1f}", r.peak_bytes and r.peak_bytes / 1e6),
    "kept": lambda r: optional("{:.2f}x", r.kept_ratio),
    "error": lambda r: optional("{:.1e}", r.error),
}


def format_table(results: list[Result]) -> str:
    """Contenders of one shape and mode; one that failed is a line with the reason."""
    baseline = next((result.baseline for result in results if result.baseline), "")
    columns = {**COLUMNS, f"vs {baseline}": format_ratio} if baseline else COLUMNS
    cells = [[title, *("" if r.failure else cell(r) for r in results)] for title, cell in columns.items()]
    cells = [column for column in cells if set(column[1:]) - {"", "-"}]
    padded = [[text.rjust(max(map(len, column))) for text in column] for column in cells]
    names = max(len(name) for name in (BACKWARD, *CONTENDERS))
    lines = ["  ".join([f"  {results[0].mode:{names}}", *(column[0] for column in padded)])]
    for i, result in enumerate(results, 1):
        rest = [result.failure] if result.failure else [*(column[i] for column in padded), result.note]
        lines.append("  ".join([f"  {result.contender:{names}}", *rest]).rstrip())
    return "\n".join(lines)


# Contrast to white at least 3, and apart from each other (OKLab) for the colour-blind too; both forms of `chunk` share
# a colour.
LINES = {
    "triton": dict(color="#0072B2", marker="o"),
    "chunk": dict(color="#D55E00", marker="s"),
    "chunk_compiled": dict(color="#D55E00", marker="D", linestyle="--"),
    "fla": dict(color="#08A782", marker="^"),
    "sdpa": dict(color="#9B1D6C", marker="v"),
    "naive": dict(color="#000000", marker="x", linestyle=":"),
}


def draw_plot(results: list[Result], title: str, path: Path) -> None:
    """Time against L, a panel a mode and a line a contender."""
    figure, panels = new_panels(2, sharey=True)
    lengths = sorted({result.shape.L for result in results})
    for panel, mode in zip(panels, (FORWARD, BACKWARD)):
        for name, line in LINES.items():
            points = [r for r in results if (r.contender, r.mode) == (name, mode) and not r.failure]
            if points:
                panel.plot([r.shape.L for r in points], [r.time_ms.median for r in points], label=name, lw=2, **line)
        panel.set(title=mode, xlabel="sequence length L (tokens)")
        panel.set_xticks(lengths, [f"{L}" if L % 1024 else f"{L // 1024}k" for L in lengths])
        panel.xaxis.minorticks_off()
        panel.yaxis.set_major_formatter("{x:g}")
        panel.legend(loc="upper left")
    clock = "wall" if any(result.timing == "wall" for result in results) else "device"
    panels[0].set_ylabel(f"{clock} time of a call (ms)")
    save_plot(figure, title, path)


# ---- command line


def parse_sizes(text: str) -> list[int]:
    sizes = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if not all(sizes):
        raise argparse.ArgumentTypeError(f"expected whole numbers above 0 with commas between, got {text!r}")
    return sizes


def parse_shape(text: str) -> Shape:
    sizes = parse_sizes(text)
    if len(sizes) != 5:
        raise argparse.ArgumentTypeError(f"expected B,h,L,K,V such as 4,6,4096,32,64, got {text!r}")
    return Shape(*sizes)


def parse_contenders(text: str) -> list[Contender]:
    names = text.split(",")
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no contender {', '.join(unknown)}: expected any of {', '.join(CONTENDERS)}")
    return [CONTENDERS[name] for name in names]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    listed = "\n".join(f"  {contender.name:14}  {contender.what}" for contender in CONTENDERS.values())
    parser = argparse.ArgumentParser(
        description=__doc__.replace("{contenders}", listed), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = f"default: {','.join(GPU_CONTENDERS)}; on a CPU {','.join(CPU_CONTENDERS)}"
    parser.add_argument("--contenders", type=parse_contenders, metavar="NAME,..", help=defaults)
    parser.add_argument("--shapes", type=parse_shape, nargs="+", metavar="B,h,L,K,V", help="default: the models' sizes")
    parser.add_argument("--sweep", action="store_true", help="B=1, h=6, K=32, V=64 and L from 256 to 65536")
    parser.add_argument("--sweep-lengths", type=parse_sizes, metavar="L,..", help="the sweep with these L")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of q, k and v (default: bf16; on a CPU fp32)")
    parser.add_argument("--gate-dtype", choices=tuple(DTYPES), help="of the log-gates (default: as q, k and v)")
    parser.add_argument("--cold", action="store_true", help="compile all Triton kernels, cached or not")
    add_options(parser, "one contender at one shape in one mode", "every shape", "draw the sweep")
    args = parser.parse_args(argv)

    complete_options(parser, args)
    on_gpu = args.device.type == "cuda"
    args.dtype = args.dtype or ("bf16" if on_gpu else "fp32")
    args.gate_dtype = args.gate_dtype or args.dtype
    args.contenders = args.contenders or [CONTENDERS[name] for name in (GPU_CONTENDERS if on_gpu else CPU_CONTENDERS)]
    lengths = args.sweep_lengths or (SWEEP_LENGTHS if args.sweep else [])
    args.sweep_shapes = [Shape(1, 6, L, 32, 64) for L in sorted(set(lengths))]
    args.shapes = args.shapes or ([] if lengths else [*(GPU_SHAPES if on_gpu else CPU_SHAPES)])

    if args.plot and not lengths:
        parser.error("--plot draws time against L: add --sweep or --sweep-lengths")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.cold:
        os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # before Triton is imported
    settings = {"dtype": args.dtype, "gates": args.gate_dtype}
    machine = describe_machine(args.device, settings, ("triton", "flash-linear-attention"))
    bandwidth = copy_bandwidth(args.device)
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s (bytes read and written)")

    effort = Effort(args.repeats, args.min_seconds)
    benchmark = Benchmark(args.device, DTYPES[args.dtype], DTYPES[args.gate_dtype], effort, args.time_limit, bandwidth)
    results: list[Result] = []
    for shape in (*args.shapes, *args.sweep_shapes):
        print(f"\n{shape}")
        for mode in (FORWARD, BACKWARD):
            measured = benchmark.run(args.contenders, shape, mode)
            print(format_table(measured), flush=True)
            results += measured
        if args.json:
            rows = [asdict(result) for result in results]
            write_json(args.json, {"machine": machine, "copy_bytes_per_second": bandwidth, "results": rows})
    if args.plot:
        swept = [result for result in results if result.shape in args.sweep_shapes]
        draw_plot(swept, f"Bidirectional GLA, B=1 h=6 K=32 V=64, {args.dtype}\n{machine['device']}", args.plot)

    wrong = [result for result in results if result.accurate is False]
    for r in wrong:
        print(f"error: {r.contender} is wrong at {r.shape}, {r.mode}: relative error {r.error:.1e}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
