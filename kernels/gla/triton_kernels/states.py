"""The states that enter each chunk.

The chunks of a head are cut into stretches. `chunk_states` walks each of them, in both directions, as if nothing
entered it; `scan_totals` finds what does enter, its carry; `add_carries` adds it to every state of the stretch.
"""

import triton
import triton.language as tl

from .common import (
    CLOSED,
    LOG2_E,
    at,
    dot,
    is_token,
    load,
    load_segments,
    load_state,
    load_transposed,
    store,
)

# A chunk is steep in a direction where its log-gates (of base 2) are below this on average, in any channel.
STEEP = tl.constexpr(-1.5)


@triton.jit(do_not_specialize=["L", "N", "width", "G", "M"])
def chunk_states(
    x, y, gates_f, gates_b, states, decays, totals, total_decays, steep, segments, sizes,
    L, N, h, width, G, M,
    x_b, x_l, x_h, y_b, y_l, y_h, gf_b, gf_l, gf_h, gb_b, gb_l, gb_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ADJOINT: tl.constexpr, MILD: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, HAS_SIZES: tl.constexpr,
    TERMS: tl.constexpr, SCORE_TERMS: tl.constexpr, GATE_TERMS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """states[., d, n] = S_n, the state [K, V] that enters chunk n from its own stretch, S -> S * decay + x~^T y.

    x, y are k and v; x~ decays the forward scan's keys to the chunk's end, without their own gate. ADJOINT: q and the
    gradient of the output; the forward scan's queries decay from the chunk's start, their own gate included. The walk
    is forward in direction 0 and backward in direction 1; ADJOINT the other way round.

    Where a chunk is mild (in this direction), its state comes multiplied by the square root of the decay across the
    chunk, as `outputs` expects it; where it is steep, steep[d, ., n] is set. decays[., d, n] [K] is the factor of
    what enters the stretch; totals and total_decays are the state and the decay at the stretch's end.
    """
    tile, vtile = tl.program_id(1) % tl.cdiv(K, BK), tl.program_id(1) // tl.cdiv(K, BK)
    cols, vcols = tile * BK + tl.arange(0, BK), vtile * BV + tl.arange(0, BV)
    head, backward = tl.program_id(0) % h, (tl.program_id(0) // h) % 2 == 1
    stretch, b = (tl.program_id(0) // (2 * h)) % M, (tl.program_id(0) // (2 * h * M)).to(tl.int64)
    head_and_direction = (b * h + head) * 2 + backward.to(tl.int32)
    gates = tl.where(backward, gates_b, gates_f)
    g_b, g_h, g_l = tl.where(backward, gb_b, gf_b), tl.where(backward, gb_h, gf_h), tl.where(backward, gb_l, gf_l)
    steep += backward.to(tl.int32) * (tl.num_programs(0) // (2 * h * M) * N * h)
    descending = backward != ADJOINT

    # From here on keys are rows and tokens columns. Log-gates are summed from the border that the decay reaches to:
    # numbers <= 0, never differences.
    j, i = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    side = (i - j) * tl.where(descending, -1, 1)
    if ADJOINT:
        summed = tl.where(side <= 0, 1.0, 0.0)
    else:
        summed = tl.where(side < 0, 1.0, 0.0)

    state = tl.zeros([BK, BV], tl.float32)
    product = tl.full([BK], 1.0, tl.float32)
    chunks = tl.minimum(G, N - stretch * G)
    for step in tl.range(0, chunks, num_stages=STAGES):
        n = stretch * G + tl.where(descending, chunks - 1 - step, step)
        first, local = n * C, tl.arange(0, C)
        row_ok = is_token(local, first, L, sizes, b, width, HAS_SIZES)
        g_t = load_transposed(at(gates, b, head, first, g_b, g_h, g_l), local, cols, g_l, row_ok, K)
        g_t = tl.maximum(g_t.to(tl.float32), CLOSED)
        total = tl.max(dot(g_t, tl.full([C, 8], 1.0, tl.float32), GATE_TERMS, 1), 1) * LOG2_E
        across = tl.exp2(total)
        x_t = load_transposed(at(x, b, head, first, x_b, x_h, x_l), local, cols, x_l, row_ok, K)
        if TERMS < 3:  # x as an operand of a product: else Triton does not load it ahead
            x_t = dot(x_t, tl.where(i == j, 1.0, 0.0), TERMS, 1)
        x_t = x_t.to(tl.float32) * tl.exp2(dot(g_t, summed, GATE_TERMS, 1) * LOG2_E)
        if HAS_SEGMENTS:
            own, before, after, first_own, last_own = load_segments(segments, local, first, L, C)
            if ADJOINT:
                reach = own == tl.where(backward, after, before)
            else:
                reach = own == tl.where(backward, first_own, last_own)
            x_t = tl.where(reach[None, :], x_t, 0.0)
            across = tl.where(tl.where(backward, after == first_own, before == last_own), across, 0.0)

        if MILD:
            is_steep = tl.min(total) < STEEP * tl.minimum(L - first, C).to(tl.float32)
            factor = tl.where(is_steep, 1.0, tl.exp2(0.5 * total))
            if vtile == 0:
                tl.store(steep + (b * N + n) * h + head, is_steep.to(tl.int8))
        else:
            factor = tl.full([BK], 1.0, tl.float32)
        at_n = head_and_direction * N + n
        store(states + at_n * K * V, cols, vcols, V, cols < K, V, state * factor[:, None])
        if vtile == 0:
            tl.store(decays + at_n * K + cols, product * factor, mask=cols < K)
        y_i = load(at(y, b, head, first, y_b, y_h, y_l), local, vcols, y_l, row_ok, V)
        state = state * across[:, None] + dot(x_t, y_i, SCORE_TERMS, TERMS)
        product *= across
    at_stretch = head_and_direction * M + stretch
    store(totals + at_stretch * K * V, cols, vcols, V, cols < K, V, state)
    if vtile == 0:
        tl.store(total_decays + at_stretch * K + cols, product, mask=cols < K)


@triton.jit(do_not_specialize=["M"])
def scan_totals(
    totals, total_decays, carries, M,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ADJOINT: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """carries[., m], what enters stretch m: carries[m - 1] * total_decays[m - 1] + totals[m - 1], or m + 1 for m - 1.

    STEPS of the scan at a time, whose loads do not wait for each other.
    """
    rows, cols = tl.program_id(1) * BK + tl.arange(0, BK), tl.arange(0, BV)
    zeros = tl.zeros([BK], tl.int32)
    head_and_direction = tl.program_id(0).to(tl.int64)
    descending = (tl.program_id(0) % 2 == 1) != ADJOINT
    carry = tl.zeros([BK, BV], tl.float32)
    for start in tl.range(0, M, STEPS, num_stages=STAGES):
        for step in tl.static_range(STEPS):
            ok = (rows < K) & (zeros + start + step < M)
            at_m = head_and_direction * M + tl.where(descending, M - 1 - start - step, start + step)
            store(carries + at_m * K * V, rows, cols, V, ok, V, carry)
            decay = tl.load(total_decays + at_m * K + rows, mask=ok, other=0.0)
            carry = carry * decay[:, None] + load(totals + at_m * K * V, rows, cols, V, ok, V)


@triton.jit(do_not_specialize=["N", "G", "M"])
def add_carries(
    states, decays, carries, N, G, M,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, ADJOINT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """states[., n] += decays[., n] * what enters the stretch of chunk n, for all stretches that anything enters."""
    rows, cols = tl.program_id(1) * BK + tl.arange(0, BK), tl.arange(0, BV)
    head_and_direction = (tl.program_id(0) // (M - 1)).to(tl.int64)
    descending = (head_and_direction % 2 == 1) != ADJOINT
    stretch = tl.program_id(0) % (M - 1) + tl.where(descending, 0, 1)
    carry = load_state(carries + (head_and_direction * M + stretch) * K * V, rows, cols, K, V)
    for n in tl.range(stretch * G, tl.minimum(stretch * G + G, N), num_stages=STAGES):
        at_n = head_and_direction * N + n
        decay = tl.load(decays + at_n * K + rows, mask=rows < K, other=0.0)
        state = load_state(states + at_n * K * V, rows, cols, K, V).to(tl.float32) + decay[:, None] * carry
        store(states + at_n * K * V, rows, cols, V, rows < K, V, state)
