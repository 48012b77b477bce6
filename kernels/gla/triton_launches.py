"""What one call of the Triton form allocates and launches, and with how many programs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.runtime import JITFunction

from ..launch import ceil_div, multiprocessors, power_of_2_from, shared_memory, strides
from ..plans import Plan
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


def num_chunks(L: int) -> int:
    return ceil_div(L, CHUNK)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
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


def is_one_tile(K: int, V: int, dtype: torch.dtype, gate_dtype: torch.dtype, device: torch.device) -> bool:
    """Whether all of K and V fit into one tile, which the kernels for mild chunks ask for."""
    if max(K, V) > (128 if dtype == torch.bfloat16 else 64):
        return False
    return _tile_bytes(K, V, dtype, gate_dtype, backward=True) + SCRATCH <= shared_memory(device)


def _tile_bytes(K: int, V: int, dtype: torch.dtype, gate_dtype: torch.dtype, backward: bool) -> int:
    """What `outputs`, or `gradients`, load of a chunk: q, k, v, the gradient of the output; gates; states."""
    BK, BV = _block(K, 128), _block(V, 128)
    n = 2 if backward else 1
    tokens = CHUNK * ((2 * BK + n * BV) * dtype.itemsize + 2 * BK * gate_dtype.itemsize)
    return tokens + 2 * n * BK * BV * state_dtype(dtype).itemsize


def _block(size: int, largest: int) -> int:
    return min(max(power_of_2_from(size), 16), largest)


def _share(N: int, walks: int, programs: int) -> int:
    """Into how many parts to cut each of `walks` over N chunks, where so many programs run at a time."""

    def time(parts: int) -> float:
        return ceil_div(walks * parts, programs) * (ceil_div(N, parts) + 0.5)  # a program's start counts, too

    return min((min(max(programs * waves // walks, 1), N) for waves in (1, 2, 3)), key=time)


@dataclass
class States:
    """States that enter each chunk, [B, h, 2, N, K, V], as `outputs` wants them; steep chunks, [2, B, N, h].

    With carries, [B, h, 2, M, K, V], the states lack what enters their stretch of G chunks: decays * carries.
    """

    states: Tensor
    decays: Tensor
    carries: Tensor | None
    steep: Tensor
    G: int
    adjoint: bool


class Launches:
    """The kernels of one call, forward or backward.

    `outputs` and `gradients` run on all chunks as if they were mild, `steep_outputs` and `steep_gradients` after them
    on the steep ones; where K and V do not fit into one tile, on all. These four take the inputs (with strides) and the
    gates, `rest` (contiguous, but for those in `strided`), then numbers.
    """

    def __init__(
        self, plan: Plan, q: Tensor, v: Tensor, gate_f: Tensor, gate_b: Tensor,
        segments: Tensor | None, sizes: Tensor | None, width: int, scale: float,
    ):  # fmt: skip
        self.plan = plan
        self.B, self.L, self.h, self.K = q.shape
        self.V = v.shape[-1]
        self.N = num_chunks(self.L)
        self.device = q.device
        self.types = q.dtype, gate_f.dtype
        self.one_tile = is_one_tile(self.K, self.V, *self.types, q.device)
        self.gates = gate_f, gate_b
        self.restrictions = segments, sizes
        self.width = width
        self.scale = scale / 2
        self.num_warps = 2 if max(self.K, self.V) <= 64 else 4
        self.options = dict(
            K=self.K, V=self.V, C=CHUNK, HAS_SEGMENTS=segments is not None, HAS_SIZES=sizes is not None,
            **_terms(*self.types),
        )  # fmt: skip

    def enter_states(self, x: Tensor, y: Tensor, adjoint: bool) -> States:
        """From keys and values; adjoint: from queries and the gradient of the output."""
        B, L, h, K, V, N = self.B, self.L, self.h, self.K, self.V, self.N
        BK, BV = _block(K, 128 if self.one_tile else 64), _block(V, 64)
        tiles = ceil_div(K, BK) * ceil_div(V, BV)
        num_warps = 1 if x.dtype == torch.bfloat16 and BK * BV <= 2048 else 2
        # Stretches only where walks along all chunks would leave the GPU idle, and then as many as `outputs` likes.
        G = N
        if 2 * B * h * 2 * tiles < WARPS // num_warps * multiprocessors(self.device):
            G = ceil_div(N, _share(N, B * h, self._in_flight(backward=False)[1]))
        M = ceil_div(N, G)
        plan = self.plan
        states = plan.empty(B, h, 2, N, K, V, dtype=state_dtype(x.dtype))
        decays = plan.empty(B, h, 2, N, K, dtype=torch.float32)
        totals = plan.empty(B, h, 2, M, K, V, dtype=torch.float32)
        total_decays = plan.empty(B, h, 2, M, K, dtype=torch.float32)
        steep = plan.empty(2, B, N, h, dtype=torch.int8)
        plan.launch(
            kernels.chunk_states, (B * h * 2 * M, tiles),
            x, y, *self.gates, states, decays, totals, total_decays, steep, *self.restrictions,
            L, N, h, self.width, G, M, *strides(x, y, *self.gates), **self.options,
            BK=BK, BV=BV, ADJOINT=adjoint, MILD=self.one_tile,
            STAGES=AHEAD + 1, num_warps=num_warps,
        )  # fmt: skip
        carries = None
        if M > 1:
            carries = plan.empty(*totals.shape, dtype=torch.float32)
            BV = power_of_2_from(V)
            BK = max(256 // BV, 1)
            plan.launch(
                kernels.scan_totals, (B * h * 2, ceil_div(K, BK)),
                totals, total_decays, carries, M, K=K, V=V, BK=BK, BV=BV,
                ADJOINT=adjoint, STEPS=4, STAGES=AHEAD + 1, num_warps=1,
            )  # fmt: skip
        entering = States(states, decays, carries, steep, G, adjoint)
        if not self.one_tile:  # `outputs`, which would take the carries itself, does not run
            self.complete(entering)
        return entering

    def complete(self, entering: States) -> Tensor:
        """The states, nothing missing."""
        if entering.carries is not None:
            M = entering.carries.shape[3]
            BV = power_of_2_from(self.V)
            BK = 4 * max(256 // BV, 1)
            self.plan.launch(
                kernels.add_carries, (self.B * self.h * 2 * (M - 1), ceil_div(self.K, BK)),
                entering.states, entering.decays, entering.carries, self.N, entering.G, M,
                K=self.K, V=self.V, BK=BK, BV=BV, ADJOINT=entering.adjoint,
                STAGES=AHEAD + 1, num_warps=4,
            )  # fmt: skip
            entering.carries = None
        return entering.states

    def outputs(self, x: tuple[Tensor, ...], states: States, out: Tensor) -> None:
        """Of queries, keys and values; or the gradient of v, from keys, queries and the gradient of the output."""
        carried = states.carries is not None
        rest = states.states, states.decays, states.carries, out
        self._mild(kernels.outputs, x, rest, G=states.G if carried else None, ADJOINT=states.adjoint, CARRIED=carried)

    def steep_outputs(self, x: tuple[Tensor, ...], states: States, out: Tensor) -> None:
        carried = states.carries is not None
        rest = states.states, states.decays, states.carries, out
        self._steep(kernels.steep_outputs, states.steep, x, rest, numbers=(states.G,), CARRIED=carried)

    def gradients(self, x: tuple[Tensor, ...], rest: tuple[Tensor, ...], **more: Any) -> None:
        self._mild(kernels.gradients, x, rest, **more)

    def steep_gradients(self, steep: Tensor, x: tuple[Tensor, ...], rest: tuple[Tensor, ...], **more: Any) -> None:
        self._steep(kernels.steep_gradients, steep, x, rest, **more)

    def _mild(
        self, kernel: JITFunction, x: tuple[Tensor, ...], rest: tuple[Tensor | None, ...],
        strided: tuple[Tensor, ...] = (), numbers: tuple[float, ...] = (), G: int | None = None, **constants: Any,
    ) -> None:  # fmt: skip
        """G: the chunks of a program; as many as keep all programs busy if None."""
        if not self.one_tile:
            return
        ahead, programs = self._in_flight(backward=kernel is kernels.gradients)
        heads = self.B * self.h
        G = G or ceil_div(self.N, _share(self.N, heads, programs))
        self.plan.launch(
            kernel, (heads * ceil_div(self.N, G),),
            *x, *self.gates, *rest, *self.restrictions,
            self.L, self.N, self.h, self.width, self.scale, self.B, G, *numbers, *strides(*x, *self.gates, *strided),
            **self.options, **constants, BK=_block(self.K, 128), BV=_block(self.V, 128),
            STAGES=ahead + 1, num_warps=self.num_warps,
        )  # fmt: skip

    def _steep(
        self, kernel: JITFunction, steep: Tensor, x: tuple[Tensor, ...], rest: tuple[Tensor | None, ...],
        strided: tuple[Tensor, ...] = (), numbers: tuple[float, ...] = (), **constants: Any,
    ) -> None:  # fmt: skip
        total = self.B * self.N * self.h
        programs = min(total, STEEP_PROGRAMS * multiprocessors(self.device)) if self.one_tile else total
        self.plan.launch(
            kernel, (programs,),
            *x, *self.gates, *rest, *self.restrictions,
            self.L, self.N, self.h, self.width, self.scale, total, *numbers, *strides(*x, *self.gates, *strided), steep,
            **self.options, **constants, BK=_block(self.K, 32), BV=_block(self.V, 64), ALL=not self.one_tile,
            num_warps=self.num_warps, num_stages=1,
        )  # fmt: skip

    def _in_flight(self, backward: bool) -> tuple[int, int]:
        """Of `outputs` or `gradients`: chunks that a program loads ahead, and programs that run at a time."""
        tile, memory = _tile_bytes(self.K, self.V, *self.types, backward), shared_memory(self.device)
        ahead = AHEAD if 3 * (AHEAD * tile + SCRATCH) <= memory else AHEAD - 1
        programs = min(WARPS // self.num_warps, memory // (ahead * tile + SCRATCH))
        return ahead, max(programs, 1) * multiprocessors(self.device)
