"""Outputs and gradients of mild chunks: one reference point, half of the chunk's sum, for all pairs of a direction."""

import triton
import triton.language as tl

from .common import at, decaying, dot, load, load_gates, load_segments, locate, store


@triton.jit
def _mild_decays(gates, pairs, GATE_TERMS: tl.constexpr):
    """exp of the running sums of log-gates relative to half the whole sum, its inverse, and exp of that half, [C, K].

    pairs: which keys (columns) each query (row) sees.
    """
    sums = dot(tl.where(pairs, 0.5, -0.5), gates, 1, GATE_TERMS)
    half = dot(tl.full(pairs.shape, 0.5, tl.float32), gates, 1, GATE_TERMS)
    return tl.exp2(sums), tl.exp2(-sums), tl.exp2(half)


@triton.jit(do_not_specialize=["L", "N", "width"])
def outputs(
    q, k, v, gates_f, gates_b, states, out, segments, sizes,
    L, N, h, width, scale,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, gf_b, gf_l, gf_h, gb_b, gb_l, gb_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, HAS_SIZES: tl.constexpr,
    TERMS: tl.constexpr, SCORE_TERMS: tl.constexpr, GATE_TERMS: tl.constexpr,
):  # fmt: skip
    """out = scale * (scores v + decayed q states) of mild chunks; scores and states hold both directions."""
    b, n, head, first, local, row_ok = locate(tl.program_id(0), N, h, L, sizes, width, C, HAS_SIZES)
    cols, vcols = tl.arange(0, BK), tl.arange(0, BV)
    col_ok, vcol_ok = cols < K, vcols < V
    states += ((b * h + head) * 2 * N + n) * V * K
    gates_f = at(gates_f, b, head, first, gf_b, gf_h, gf_l)
    gates_b = at(gates_b, b, head, first, gb_b, gb_h, gb_l)
    q_i = load(at(q, b, head, first, q_b, q_h, q_l), local, cols, q_l, row_ok, col_ok).to(tl.float32)
    k_i = load(at(k, b, head, first, k_b, k_h, k_l), local, cols, k_l, row_ok, col_ok).to(tl.float32)
    v_i = load(at(v, b, head, first, v_b, v_h, v_l), local, vcols, v_l, row_ok, vcol_ok)
    gf = load_gates(gates_f, local, cols, gf_l, row_ok, col_ok)
    gb = load_gates(gates_b, local, cols, gb_l, row_ok, col_ok)
    s_f = load(states, vcols, cols, K, vcol_ok, col_ok)
    s_b = load(states + N.to(tl.int64) * V * K, vcols, cols, K, vcol_ok, col_ok)
    if HAS_SEGMENTS:
        own, before, behind, _, _ = load_segments(segments, local, first, L, C)
        same = own[:, None] == own[None, :]

    o = tl.zeros([C, BV], tl.float32)
    for backward in tl.static_range(2):
        if backward:
            gates, state, pairs = gb, s_b, local[:, None] <= local[None, :]
        else:
            gates, state, pairs = gf, s_f, local[:, None] >= local[None, :]
        of_q, of_k, border = _mild_decays(gates, pairs, GATE_TERMS)
        q_d = q_i * of_q
        scores = dot(q_d, tl.trans(k_i * of_k), SCORE_TERMS, TERMS)
        q_d *= border
        if HAS_SEGMENTS:
            pairs = pairs & same
            q_d = tl.where((own == (behind if backward else before))[:, None], q_d, 0.0)
        o += dot(tl.where(pairs, scores, 0.0), v_i, TERMS, TERMS)
        o += dot(q_d, tl.trans(state), SCORE_TERMS, TERMS)
    store(out + ((b * L + first) * h + head) * V, local, vcols, h * V, local < L - first, vcol_ok, o * scale)


@triton.jit(do_not_specialize=["L", "N", "width"])
def gradients(
    q, k, v, gates_f, gates_b, states, do, dstates, dq, dk, dv, dgates_f, dgates_b, segments, sizes,
    L, N, h, width, scale,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, gf_b, gf_l, gf_h, gb_b, gb_l, gb_h, do_b, do_l, do_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, HAS_SIZES: tl.constexpr,
    TERMS: tl.constexpr, SCORE_TERMS: tl.constexpr, GATE_TERMS: tl.constexpr,
):  # fmt: skip
    """Gradients of all five inputs in mild chunks; dstates[., d, n] is that of what chunk n adds to direction d."""
    b, n, head, first, local, row_ok = locate(tl.program_id(0), N, h, L, sizes, width, C, HAS_SIZES)
    cols, vcols = tl.arange(0, BK), tl.arange(0, BV)
    col_ok, vcol_ok = cols < K, vcols < V
    store_ok = local < L - first
    gates_f = at(gates_f, b, head, first, gf_b, gf_h, gf_l)
    gates_b = at(gates_b, b, head, first, gb_b, gb_h, gb_l)
    states_at = ((b * h + head) * 2 * N + n) * V * K
    keys = ((b * L + first) * h + head) * K
    v_i = load(at(v, b, head, first, v_b, v_h, v_l), local, vcols, v_l, row_ok, vcol_ok)
    do_i = load(at(do, b, head, first, do_b, do_h, do_l), local, vcols, do_l, row_ok, vcol_ok)
    q_i = load(at(q, b, head, first, q_b, q_h, q_l), local, cols, q_l, row_ok, col_ok)
    k_i = load(at(k, b, head, first, k_b, k_h, k_l), local, cols, k_l, row_ok, col_ok)
    if HAS_SEGMENTS:
        own, before, behind, first_own, last_own = load_segments(segments, local, first, L, C)
        gate_f_ok, gate_b_ok = decaying(segments, local, first, L, own, row_ok)
        same = own[:, None] == own[None, :]

    dq_i, dk_i = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    dv_i = tl.zeros([C, BV], tl.float32)
    for direction in range(2):  # not unrolled: both at once would need twice the registers that there are
        backward = direction == 1
        gates = load_gates(
            tl.where(backward, gates_b, gates_f), local, cols, tl.where(backward, gb_l, gf_l), row_ok, col_ok
        )
        i, j = local[:, None], local[None, :]
        pairs = tl.where(backward, i <= j, i >= j)
        pairs_t = tl.where(backward, i >= j, i <= j)  # rows are keys, columns queries
        of_q, of_k, border = _mild_decays(gates, pairs, GATE_TERMS)
        q_d, k_d = q_i.to(tl.float32) * of_q, k_i.to(tl.float32) * of_k
        k_end = k_d * border
        met_t = pairs_t
        gate_ok = row_ok
        if HAS_SEGMENTS:  # which queries the state from outside reaches, which keys reach the state that leaves
            met_t = pairs_t & same
            reach_q = (own == tl.where(backward, behind, before))[:, None]
            reach_k = (own == tl.where(backward, first_own, last_own))[:, None]
            through = tl.where(backward, behind == first_own, before == last_own)
            k_end = tl.where(reach_k, k_end, 0.0)
            gate_ok = tl.where(backward, gate_b_ok, gate_f_ok)
        state_at = states_at + direction * N.to(tl.int64) * V * K
        dstate = load(dstates + state_at, vcols, cols, K, vcol_ok, col_ok)
        scores = dot(k_d, tl.trans(q_d), SCORE_TERMS, TERMS)
        dv_i += dot(tl.where(met_t, scores, 0.0), do_i, TERMS, TERMS)
        dv_i += dot(k_end, tl.trans(dstate), SCORE_TERMS, TERMS)

        state = load(states + state_at, vcols, cols, K, vcol_ok, col_ok)
        dq_d = dot(do_i, state, TERMS, TERMS) * border
        dk_d = dot(v_i, dstate, TERMS, TERMS) * border
        passing = state.to(tl.float32) * dstate.to(tl.float32)  # [V, K], before its decay across the chunk
        if HAS_SEGMENTS:
            dq_d, dk_d = tl.where(reach_q, dq_d, 0.0), tl.where(reach_k, dk_d, 0.0)
            passing = tl.where(through, passing, 0.0)
        dgates = dot(tl.full([C, C], 1.0, tl.float32), k_d * dk_d, 1, GATE_TERMS)
        dgates += dot(tl.full([C, BV], 1.0, tl.float32), passing, 1, GATE_TERMS) * border * border
        ds = tl.where(met_t, dot(v_i, tl.trans(do_i), TERMS, TERMS), 0.0)
        dk_d += dot(ds, q_d, TERMS, SCORE_TERMS)
        dq_d += dot(tl.trans(ds), k_d, TERMS, SCORE_TERMS)
        dq_i += dq_d * of_q
        dk_i += dk_d * of_k
        # Every pair counts once at its query and once, negatively, at its key: a sum over the tokens on the queries'
        # side of a gate holds the pairs that the gate lies between; the others cancel, having the same factors twice.
        dgates += dot(tl.where(pairs_t, 1.0, 0.0), q_d * dq_d - k_d * dk_d, 1, GATE_TERMS)
        dgates = tl.where(gate_ok[:, None], dgates * scale, 0.0)
        store(tl.where(backward, dgates_b, dgates_f) + keys, local, cols, h * K, store_ok, col_ok, dgates)
    store(dq + keys, local, cols, h * K, store_ok, col_ok, tl.where(row_ok[:, None], dq_i * scale, 0.0))
    store(dk + keys, local, cols, h * K, store_ok, col_ok, tl.where(row_ok[:, None], dk_i * scale, 0.0))
    store(dv + ((b * L + first) * h + head) * V, local, vcols, h * V, store_ok, vcol_ok, dv_i * scale)
