"""The states that chunks add, and their scan."""

import triton
import triton.language as tl

from .common import at, dot, load, load_gates, load_segments, locate, store

# A chunk is steep where its log-gates (of base 2, as all here) are below this on average, in any channel.
STEEP = tl.constexpr(-1.5)


@triton.jit(do_not_specialize=["L", "N", "width"])
def chunk_states(
    x, y, gates_f, gates_b, updates, decays, steep, segments, sizes,
    L, N, h, width,
    x_b, x_l, x_h, y_b, y_l, y_h, gf_b, gf_l, gf_h, gb_b, gb_l, gb_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ADJOINT: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_SIZES: tl.constexpr,
    TERMS: tl.constexpr, SCORE_TERMS: tl.constexpr, GATE_TERMS: tl.constexpr,
):  # fmt: skip
    """updates[., d, n] = y^T (x * decay between the token and the border of its chunk), [V, K], for both directions d.

    x, y are k and v; the forward scan's keys decay to the chunk's end, without their own gate. ADJOINT: q and the
    gradient of the output; the forward scan's queries decay from the chunk's start, their own gate included.
    """
    slot = tl.program_id(0)
    b, n, head, first, local, row_ok = locate(slot, N, h, L, sizes, width, C, HAS_SIZES)
    tile, vtile = tl.program_id(1) % tl.cdiv(K, BK), tl.program_id(1) // tl.cdiv(K, BK)
    cols, vcols = tile * BK + tl.arange(0, BK), vtile * BV + tl.arange(0, BV)
    col_ok, vcol_ok = cols < K, vcols < V
    gf = load_gates(at(gates_f, b, head, first, gf_b, gf_h, gf_l), local, cols, gf_l, row_ok, col_ok)
    gb = load_gates(at(gates_b, b, head, first, gb_b, gb_h, gb_l), local, cols, gb_l, row_ok, col_ok)
    x_i = load(at(x, b, head, first, x_b, x_h, x_l), local, cols, x_l, row_ok, col_ok)
    y_i = load(at(y, b, head, first, y_b, y_h, y_l), local, vcols, y_l, row_ok, vcol_ok)

    # Sums from the border that a direction's decay reaches to: of numbers <= 0, never differences.
    i, j = local[:, None], local[None, :]
    if ADJOINT:
        sums_f, sums_b = j <= i, j >= i
    else:
        sums_f, sums_b = j > i, j < i
    decay_f = tl.exp2(dot(tl.where(sums_f, 1.0, 0.0), gf, 1, GATE_TERMS))
    decay_b = tl.exp2(dot(tl.where(sums_b, 1.0, 0.0), gb, 1, GATE_TERMS))
    everything = tl.full([16, C], 1.0, tl.float32)
    total_f, total_b = dot(everything, gf, 1, GATE_TERMS), dot(everything, gb, 1, GATE_TERMS)  # in every row
    across_f, across_b = tl.exp2(total_f), tl.exp2(total_b)
    x_f, x_r = x_i.to(tl.float32) * decay_f, x_i.to(tl.float32) * decay_b
    if HAS_SEGMENTS:
        own, before, after, first_own, last_own = load_segments(segments, local, first, L, C)
        if ADJOINT:
            reach_f, reach_b = own == before, own == after
        else:
            reach_f, reach_b = own == last_own, own == first_own
        x_f, x_r = tl.where(reach_f[:, None], x_f, 0.0), tl.where(reach_b[:, None], x_r, 0.0)
        across_f = tl.where(before == last_own, across_f, 0.0)
        across_b = tl.where(after == first_own, across_b, 0.0)

    y_t = tl.trans(y_i)
    states_f = ((b * h + head) * 2 * N + n) * V * K
    states_b = states_f + N.to(tl.int64) * V * K
    store(updates + states_f, vcols, cols, K, vcol_ok, col_ok, dot(y_t, x_f, TERMS, SCORE_TERMS))
    store(updates + states_b, vcols, cols, K, vcol_ok, col_ok, dot(y_t, x_r, TERMS, SCORE_TERMS))
    if vtile == 0:
        decays += ((b * h + head) * 2 * N + n) * K
        row = tl.arange(0, 16)
        store(decays, row, cols, 0, row == 0, col_ok, across_f)
        store(decays + N * K, row, cols, 0, row == 0, col_ok, across_b)
        tokens = tl.minimum(L - first, C).to(tl.float32)
        is_steep = tl.min(tl.minimum(total_f, total_b)) < STEEP * tokens
        tl.store(steep + slot * tl.cdiv(K, BK) + tile, is_steep.to(tl.int8))


@triton.jit
def _then(decay_1, update_1, decay_2, update_2):
    return decay_1 * decay_2, decay_2 * update_1 + update_2


@triton.jit(do_not_specialize=["N"])
def scan_states(
    updates, decays, states, N,
    K: tl.constexpr, V: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, ADJOINT: tl.constexpr,
):  # fmt: skip
    """states[., d, n]: what enters chunk n from its predecessor p, states[p] * decays[p] + updates[p]; 0 at the start.

    The predecessor is the chunk before in direction 0 and the chunk after in direction 1; ADJOINT the other way round.
    """
    tiles = tl.cdiv(V * K, BE)
    head_and_direction = (tl.program_id(0) // tiles).to(tl.int64)
    descending = (head_and_direction % 2) != ADJOINT
    elements = (tl.program_id(0) % tiles) * BE + tl.arange(0, BE)
    ok = elements < V * K
    channels = elements % K
    updates += head_and_direction * N * V * K
    decays += head_and_direction * N * K
    states += head_and_direction * N * V * K

    carry = tl.zeros([BE], tl.float32)
    index = tl.arange(0, BN)
    zero = carry.to(states.dtype.element_ty)
    tl.store(states + tl.where(descending, N - 1, 0).to(tl.int64) * V * K + elements, zero, mask=ok)
    for start in range(0, N, BN):
        step = start + index
        n = tl.where(descending, N - 1 - step, step)
        mask = (step < N)[:, None] & ok[None, :]
        update = tl.load(updates + n[:, None].to(tl.int64) * (V * K) + elements[None, :], mask=mask, other=0.0)
        decay = tl.load(decays + n[:, None] * K + channels[None, :], mask=mask, other=1.0)
        update = tl.where((index == 0)[:, None], update + decay * carry[None, :], update)
        _, state = tl.associative_scan((decay, update), 0, _then)
        follower = tl.where(descending, n - 1, n + 1)
        tl.store(
            states + follower[:, None].to(tl.int64) * (V * K) + elements[None, :],
            state.to(states.dtype.element_ty),
            mask=(step + 1 < N)[:, None] & ok[None, :],
        )
        carry = tl.sum(tl.where((index == BN - 1)[:, None], state, 0.0), 0)
