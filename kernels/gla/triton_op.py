"""The Triton form of bidirectional gated linear attention as a torch operator: launches, autograd, autocast, fakes.

`torch.ops.vig.bidirectional_gla` returns the output and, if asked to, the states that enter each chunk, which the
backward pass, `torch.ops.vig.bidirectional_gla_backward`, needs. README.md of the folder above derives what the kernels
compute.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils.flop_counter import register_flop_formula

from ..launch import (
    ceil_div,
    multiprocessors,
    on_device,
    power_of_2_from,
    register_autocast,
    require_gpu,
    shared_memory,
    strides,
    with_unit_stride,
)
from . import triton_kernels as kernels

# Tokens of a chunk, a multiple of 16. With 64, Triton would use Hopper's asynchronous matrix instructions (wgmma), and
# they went wrong (illegal addresses) in kernels that spill registers, with Triton 3.6.
CHUNK = 32
# Warps that a multiprocessor holds where a thread has all the registers it may have, 255.
WARPS = 8
# Chunks that a pipelined loop loads ahead; one less where shared memory would not hold them for three programs.
AHEAD = 2
# Programs per multiprocessor for steep chunks: they are rare, and looking for them should cost little.
STEEP_PROGRAMS = 4
# Shared memory of a program beside what it loads, in bytes, where K and V are small.
SCRATCH = 11 * 1024


def triton_bidirectional_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate_fwd: Tensor,
    log_gate_bwd: Tensor,
    scale: float,
    segments: Tensor | None = None,
    valid_sizes: Tensor | None = None,
    width: int = 1,
    temperature: float | None = None,
) -> Tensor:
    """Linear in L in time and memory; float32 states and gates, whatever the type of q, k, v.

    Shapes as in :func:`vig_kernels.bidirectional_gla`, with which the definition (`naive`) it must agree. All tensors
    are read where they lie, whatever their strides, if those of the last dimension are 1.

    Args:
        segments: ``[L]``, int32, a number per packed sequence, for B = 1; tokens of different sequences do not meet.
        valid_sizes: ``[B, 2]``, integers, rows and columns of each image that are not padding.
        width: tokens in a row of the grid, for `valid_sizes`.
        temperature: the log-gates are ``logsigmoid(.) / temperature`` of those given.

    Raises:
        TypeError: if q, k and v differ in type, or have a type that Triton does not multiply (float64).
        RuntimeError: for tensors that are not on a GPU, outside of Triton's interpreter.
    """
    require_gpu(q, "chunk")
    if q.dtype == torch.float64:
        raise TypeError("impl='triton' has no float64 form: use impl='chunk', or float32")
    if log_gate_fwd.dtype != log_gate_bwd.dtype:
        dtype = torch.promote_types(log_gate_fwd.dtype, log_gate_bwd.dtype)
        log_gate_fwd, log_gate_bwd = log_gate_fwd.to(dtype), log_gate_bwd.to(dtype)
    gates = log_gate_fwd, log_gate_bwd
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *gates))
    keep_states = differentiable and _are_small_states(q, v, log_gate_fwd, temperature)
    return _forward(q, k, v, *gates, segments, valid_sizes, width, scale, temperature, keep_states)[0]


def _are_small_states(q: Tensor, v: Tensor, gate: Tensor, temperature: float | None) -> bool:
    """Whether they are worth keeping for the backward pass: no larger than the inputs, else they are computed again."""
    K, V = q.shape[-1], v.shape[-1]
    gate_dtype = gate.dtype if temperature is None else _activated_dtype(q.dtype)
    inputs = (2 * K + V) * q.dtype.itemsize + 2 * K * gate_dtype.itemsize  # bytes of a token: L may be symbolic
    return 2 * K * V * _state_dtype(q.dtype).itemsize / CHUNK <= inputs


# ---------------------------------------------------------------------------------------------------------------------
# Launches


def _num_chunks(L: int) -> int:
    return (L + CHUNK - 1) // CHUNK


def _state_dtype(dtype: torch.dtype) -> torch.dtype:
    """bfloat16 has float32's range; float16 does not, and states are sums over many tokens."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _terms(dtype: torch.dtype, gate_dtype: torch.dtype) -> dict[str, int]:
    """How many bfloat16 terms stand for an operand: of any product, of decayed queries and keys, of log-gates."""
    if dtype == torch.bfloat16:
        terms = dict(TERMS=1, SCORE_TERMS=2, GATE_TERMS=2)
    elif dtype == torch.float16:
        terms = dict(TERMS=2, SCORE_TERMS=2, GATE_TERMS=3)
    else:
        terms = dict(TERMS=3, SCORE_TERMS=3, GATE_TERMS=3)
    exact = {torch.bfloat16: 1, torch.float16: 2}.get(gate_dtype, 3)
    return terms | dict(GATE_TERMS=min(terms["GATE_TERMS"], exact))


def _is_one_tile(K: int, V: int, dtype: torch.dtype, gate_dtype: torch.dtype, device: torch.device) -> bool:
    """Whether all of K and V fit into one tile, which the kernels for mild chunks ask for."""
    if max(K, V) > (128 if dtype == torch.bfloat16 else 64):
        return False
    return _tile_bytes(K, V, dtype, gate_dtype, backward=True) + SCRATCH <= shared_memory(device)


def _tile_bytes(K: int, V: int, dtype: torch.dtype, gate_dtype: torch.dtype, backward: bool) -> int:
    """What `outputs`, or `gradients`, load of a chunk: q, k, v, the gradient of the output; gates; states."""
    BK, BV = _block(K, 128), _block(V, 128)
    n = 2 if backward else 1
    tokens = CHUNK * ((2 * BK + n * BV) * dtype.itemsize + 2 * BK * gate_dtype.itemsize)
    return tokens + 2 * n * BK * BV * _state_dtype(dtype).itemsize


def _block(size: int, largest: int) -> int:
    return min(max(power_of_2_from(size), 16), largest)


def _share(N: int, walks: int, programs: int) -> int:
    """Into how many parts to cut each of `walks` over N chunks, where so many programs run at a time."""

    def time(parts: int) -> float:
        return ceil_div(walks * parts, programs) * (ceil_div(N, parts) + 0.5)  # a program's start counts, too

    return min((min(max(programs * waves // walks, 1), N) for waves in (1, 2, 3)), key=time)


def _in_flight(tile: int, num_warps: int, device: torch.device) -> tuple[int, int]:
    """Chunks of so many bytes that a program loads ahead, and programs that run at a time."""
    ahead = AHEAD if 3 * (AHEAD * tile + SCRATCH) <= shared_memory(device) else AHEAD - 1
    programs = min(WARPS // num_warps, shared_memory(device) // (ahead * tile + SCRATCH))
    return ahead, max(programs, 1) * multiprocessors(device)


@dataclass
class _States:
    """States that enter each chunk, [B, h, 2, N, K, V], as `outputs` wants them; steep chunks, [2, B, N, h].

    With carries, the states lack what enters their stretch of G chunks: decays * carries.
    """

    states: Tensor
    decays: Tensor
    steep: Tensor
    G: int
    carries: Tensor | None
    adjoint: bool

    def complete(self) -> Tensor:
        """The states, nothing missing."""
        if self.carries is not None:
            *heads, N, K, V = self.states.shape
            M = self.carries.shape[3]
            BV = power_of_2_from(V)
            BK = 4 * max(256 // BV, 1)
            kernels.add_carries[(math.prod(heads) * (M - 1), ceil_div(K, BK))](
                self.states, self.decays, self.carries, N, self.G, M, K=K, V=V, BK=BK, BV=BV,
                ADJOINT=self.adjoint, STAGES=AHEAD + 1, num_warps=4,
            )  # fmt: skip
            self.carries = None
        return self.states


def _enter_states(
    x: Tensor, y: Tensor, gate_f: Tensor, gate_b: Tensor, segments: Tensor | None, sizes: Tensor | None, width: int,
    adjoint: bool, temperature: float | None = None, activated: Tensor | None = None,
) -> _States:  # fmt: skip
    """With a temperature, the gates are logits; the log-gates are written to `activated`."""
    B, L, h, K = x.shape
    V = y.shape[-1]
    N = _num_chunks(L)
    gate_dtype = (gate_f if activated is None else activated).dtype
    one_tile = _is_one_tile(K, V, x.dtype, gate_dtype, x.device)
    BK, BV = _block(K, 128 if one_tile else 64), _block(V, 64)
    tiles = ceil_div(K, BK) * ceil_div(V, BV)
    num_warps = 1 if x.dtype == torch.bfloat16 and BK * BV <= 2048 else 2
    # Stretches only where walks along all chunks would leave the GPU idle, and then as many as `outputs` likes.
    G = N
    if 2 * B * h * 2 * tiles < WARPS // num_warps * multiprocessors(x.device):
        tile = _tile_bytes(K, V, x.dtype, gate_dtype, backward=False)
        G = ceil_div(N, _share(N, B * h, _in_flight(tile, _num_warps(K, V), x.device)[1]))
    M = ceil_div(N, G)
    states = x.new_empty(B, h, 2, N, K, V, dtype=_state_dtype(x.dtype))
    decays = x.new_empty(B, h, 2, N, K, dtype=torch.float32)
    totals = x.new_empty(B, h, 2, M, K, V, dtype=torch.float32)
    total_decays = x.new_empty(B, h, 2, M, K, dtype=torch.float32)
    steep = x.new_empty(2, B, N, h, dtype=torch.int8)
    kernels.chunk_states[(B * h * 2 * M, tiles)](
        x, y, gate_f, gate_b, activated, states, decays, totals, total_decays, steep, segments, sizes,
        L, N, h, width, G, M, temperature or 1.0,
        *strides(x, y, gate_f, gate_b), K=K, V=V, C=CHUNK, BK=BK, BV=BV, ADJOINT=adjoint, RAW=temperature is not None,
        HAS_SEGMENTS=segments is not None, HAS_SIZES=sizes is not None, MILD=one_tile,
        **_terms(x.dtype, gate_dtype), STAGES=AHEAD + 1, num_warps=num_warps,
    )  # fmt: skip
    carries = None
    if M > 1:
        carries = torch.empty_like(totals)
        BV = power_of_2_from(V)
        BK = max(256 // BV, 1)
        kernels.scan_totals[(B * h * 2, ceil_div(K, BK))](
            totals, total_decays, carries, M, K=K, V=V, BK=BK, BV=BV,
            ADJOINT=adjoint, STEPS=4, STAGES=AHEAD + 1, num_warps=1,
        )  # fmt: skip
    return _States(states, decays, steep, G, carries, adjoint)


def _num_warps(K: int, V: int) -> int:
    """Of the kernels that write outputs and gradients."""
    return 2 if max(K, V) <= 64 else 4


class _Launch:
    """Runs kernels on all chunks as if they were mild, then their other forms on the steep ones.

    Both take the inputs (with strides) and the gates, `rest` (contiguous, but for those in `strided`), then numbers.
    """

    def __init__(
        self, q: Tensor, v: Tensor, gate_f: Tensor, gate_b: Tensor, segments: Tensor | None, sizes: Tensor | None,
        width: int, scale: float,
    ):  # fmt: skip
        self.B, L, self.h, self.K = q.shape
        self.V = v.shape[-1]
        self.N = _num_chunks(L)
        self.types = q.dtype, gate_f.dtype
        self.device = q.device
        self.one_tile = _is_one_tile(self.K, self.V, *self.types, q.device)
        self.gates = gate_f, gate_b
        self.restrictions = segments, sizes
        self.numbers = L, self.N, self.h, width, scale / 2
        self.options = dict(
            K=self.K, V=self.V, C=CHUNK, HAS_SEGMENTS=segments is not None, HAS_SIZES=sizes is not None,
            num_warps=_num_warps(self.K, self.V), **_terms(q.dtype, gate_f.dtype),
        )  # fmt: skip

    def outputs(self, x: tuple[Tensor, ...], states: _States, out: Tensor) -> None:
        """Of queries, keys and values; or the gradient of v, from keys, queries and the gradient of the output."""
        carried = states.carries is not None
        rest = states.states, states.decays, states.carries, out
        self._mild(kernels.outputs, x, rest, G=states.G if carried else None, ADJOINT=states.adjoint, CARRIED=carried)

    def steep_outputs(self, x: tuple[Tensor, ...], states: _States, out: Tensor) -> None:
        rest = states.states, states.decays, states.carries, out
        numbers, carried = (states.G,), states.carries is not None
        self._steep(kernels.steep_outputs, states.steep, x, rest, numbers=numbers, CARRIED=carried)

    def gradients(self, x: tuple[Tensor, ...], rest: tuple[Tensor, ...], **more: Any) -> None:
        self._mild(kernels.gradients, x, rest, **more)

    def steep_gradients(self, steep: Tensor, x: tuple[Tensor, ...], rest: tuple[Tensor, ...], **more: Any) -> None:
        self._steep(kernels.steep_gradients, steep, x, rest, **more)

    def _mild(
        self, kernel: Callable[..., Any], inputs: tuple[Tensor, ...], rest: tuple[Tensor | None, ...],
        strided: tuple[Tensor, ...] = (), numbers: tuple[float, ...] = (), G: int | None = None, **constants: Any,
    ) -> None:  # fmt: skip
        if not self.one_tile:
            return
        tile = _tile_bytes(self.K, self.V, *self.types, backward=kernel is kernels.gradients)
        ahead, programs = _in_flight(tile, self.options["num_warps"], self.device)
        heads = self.B * self.h
        G = G or ceil_div(self.N, _share(self.N, heads, programs))
        kernel[(heads * ceil_div(self.N, G),)](
            *inputs, *self.gates, *rest, *self.restrictions, *self.numbers, self.B, G, *numbers,
            *strides(*inputs, *self.gates, *strided), **self.options, **constants,
            BK=_block(self.K, 128), BV=_block(self.V, 128), STAGES=ahead + 1,
        )  # fmt: skip

    def _steep(
        self, kernel: Callable[..., Any], steep: Tensor, inputs: tuple[Tensor, ...], rest: tuple[Tensor | None, ...],
        strided: tuple[Tensor, ...] = (), numbers: tuple[float, ...] = (), **constants: Any,
    ) -> None:  # fmt: skip
        total = self.B * self.N * self.h
        programs = min(total, STEEP_PROGRAMS * multiprocessors(self.device)) if self.one_tile else total
        kernel[(programs,)](
            *inputs, *self.gates, *rest, *self.restrictions, *self.numbers, total, *numbers,
            *strides(*inputs, *self.gates, *strided), steep, **self.options, **constants,
            BK=_block(self.K, 32), BV=_block(self.V, 64), ALL=not self.one_tile, num_stages=1,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Operators


@torch.library.custom_op("vig::bidirectional_gla", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, log_gate_fwd: Tensor, log_gate_bwd: Tensor,
    segments: Tensor | None, valid_sizes: Tensor | None, width: int, scale: float, temperature: float | None,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v, gate_f, gate_b = with_unit_stride(q, k, v, log_gate_fwd, log_gate_bwd)
    _check_types(q, k, v)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    activated = _empty_gates(q, temperature)
    with on_device(q):
        if temperature is None:
            states = _enter_states(k, v, gate_f, gate_b, segments, valid_sizes, width, adjoint=False)
        else:
            states = _enter_states(k, v, gate_f, gate_b, segments, valid_sizes, width, False, temperature, activated)
            gate_f, gate_b = activated
        launch = _Launch(q, v, gate_f, gate_b, segments, valid_sizes, width, scale)
        kept = q.new_empty(0, dtype=_state_dtype(q.dtype))
        if keep_states or not launch.one_tile:
            kept = states.complete()
        launch.outputs((q, k, v), states, out)
        launch.steep_outputs((q, k, v), states, out)
    return out, kept if keep_states else kept.new_empty(0), activated


def _empty_gates(q: Tensor, temperature: float | None) -> Tensor:
    """For the log-gates of both directions, [2, B, L, h, K], where the operator gets their logits; else of size 0.

    Not in float16, which does not hold those that are nearly 0.
    """
    return q.new_empty((0,) if temperature is None else (2, *q.shape), dtype=_activated_dtype(q.dtype))


def _activated_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype


@torch.library.custom_op("vig::bidirectional_gla_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, log_gate_fwd: Tensor, log_gate_bwd: Tensor, states: Tensor | None,
    grad_out: Tensor, segments: Tensor | None, valid_sizes: Tensor | None, width: int, scale: float,
    temperature: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v, gate_f, gate_b, do = with_unit_stride(q, k, v, log_gate_fwd, log_gate_bwd, grad_out)
    dq, dk, dv, dgate_f, dgate_b = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, gate_f, gate_b)
    )
    with on_device(q):
        launch = _Launch(q, v, gate_f, gate_b, segments, valid_sizes, width, scale)
        if states is None:
            states = _enter_states(k, v, gate_f, gate_b, segments, valid_sizes, width, adjoint=False).complete()
        dstates = _enter_states(q, do, gate_f, gate_b, segments, valid_sizes, width, adjoint=True)
        dstates.complete()
        launch.outputs((k, q, do), dstates, dv)
        more = dict(strided=(do,), numbers=(temperature or 1.0,), RAW=temperature is not None)
        rest = states, do, dstates.states
        launch.gradients((q, k, v), (*rest, dq, dk, dgate_f, dgate_b), **more)
        grads = dq, dk, dv, dgate_f, dgate_b
        launch.steep_gradients(dstates.steep, (q, k, v), (*rest, *grads), **more)
    return grads


def _check_types(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one type, got {q.dtype}, {k.dtype} and {v.dtype}: cast them to one")


@_forward.register_fake
def _(q, k, v, log_gate_fwd, log_gate_bwd, segments, valid_sizes, width, scale, temperature, keep_states):
    B, L, h, K = q.shape
    shape = (B, h, 2, _num_chunks(L), K, v.shape[-1]) if keep_states else (0,)
    states = q.new_empty(shape, dtype=_state_dtype(q.dtype))
    return torch.empty(v.shape, dtype=v.dtype, device=v.device), states, _empty_gates(q, temperature)


@_backward.register_fake
def _(q, k, v, log_gate_fwd, log_gate_bwd, states, grad_out, segments, valid_sizes, width, scale, temperature):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, log_gate_fwd, log_gate_bwd))


def _setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, gate_f, gate_b, segments, valid_sizes, ctx.width, ctx.scale, ctx.temperature, keep_states = inputs
    _, states, activated = output
    ctx.set_materialize_grads(False)  # states and gates have no gradient: no need for zeros of their size
    ctx.mark_non_differentiable(states, activated)
    ctx.gate_dtypes = gate_f.dtype, gate_b.dtype
    gates = (gate_f, gate_b) if ctx.temperature is None else (activated, None)
    ctx.save_for_backward(q, k, v, *gates, states if keep_states else None, segments, valid_sizes)


def _autograd(ctx: FunctionCtx, grad_out: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 11
    q, k, v, gate_f, gate_b, states, segments, valid_sizes = ctx.saved_tensors
    if ctx.temperature is not None:
        gate_f, gate_b = gate_f.unbind()
    *grads, dgate_f, dgate_b = _backward(
        q, k, v, gate_f, gate_b, states, grad_out, segments, valid_sizes, ctx.width, ctx.scale, ctx.temperature
    )
    dgates = (grad.to(dtype) for grad, dtype in zip((dgate_f, dgate_b), ctx.gate_dtypes))
    return *grads, *dgates, None, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _one_type(dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Any, ...]:
    """The types of the inputs decide. Only where q, k and v disagree, they take the type of the autocast region.

    The log-gates stay as they are: short ones hold the long memory.
    """
    if not q.dtype == k.dtype == v.dtype:
        q, k, v = (x.to(dtype) for x in (q, k, v))
    return q, k, v, *rest


register_autocast("bidirectional_gla", _one_type)


# ---------------------------------------------------------------------------------------------------------------------
# Cost


def gla_flops(q_shape: torch.Size, v_shape: torch.Size) -> int:
    """FLOPs of the recurrence itself, both directions: an update and a reading of the K x V state per token.

    Chunked forms do more work on the matrix units to need fewer steps; that is not counted.
    """
    B, L, h, K = q_shape
    return 2 * 2 * 2 * B * L * h * K * v_shape[-1]


@register_flop_formula(torch.ops.vig.bidirectional_gla)
def _forward_flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    return gla_flops(q_shape, v_shape)


@register_flop_formula(torch.ops.vig.bidirectional_gla_backward)
def _backward_flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * gla_flops(q_shape, v_shape)


def gla_flop_handle(inputs: list[Any], outputs: list[Any]) -> int:
    """For mmengine's counter: ``FlopAnalyzer(model, x).set_op_handle("vig::bidirectional_gla", gla_flop_handle)``.

    Its unit, like that of the papers, is the multiply-add.
    """
    q_shape, v_shape = (inputs[i].type().sizes() for i in (0, 2))
    return gla_flops(q_shape, v_shape) // 2
