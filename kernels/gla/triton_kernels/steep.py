"""Outputs and gradients of steep chunks.

Blocks of 2m tokens, m = 1, 2, .. C / 2, with their middle as the reference point of the pairs across it.
"""

import triton
import triton.language as tl

from .common import (
    LOG2_E,
    at,
    decaying,
    dot,
    load,
    load_gates,
    load_segments,
    load_state,
    locate,
    store,
)


@triton.jit
def exp(x):
    """e ** x."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def _level(gf, gb, local, level, GATE_TERMS: tl.constexpr):
    """Halves of blocks of 2m = 2 ** (level + 1) tokens: decays of queries and keys to the middle of their block.

    Returns the factors of queries and keys [C, K]; the pairs that meet at this level and the sums that made the
    factors, as 0/1 matrices [C, C] (sum = matrix @ gates); whether a row lies in a right half.
    """
    i, j = local[:, None], local[None, :]
    right = ((local >> level) & 1) == 1
    same_half = (i >> level) == (j >> level)
    pairs = ((i >> (level + 1)) == (j >> (level + 1))) & (same_half == 0)
    sums_f = tl.where(same_half & tl.where(right[:, None], j <= i, j > i), 1.0, 0.0)
    sums_b = tl.where(same_half & tl.where(right[:, None], j < i, j >= i), 1.0, 0.0)
    decay_f, decay_b = exp(dot(sums_f, gf, 1, GATE_TERMS)), exp(dot(sums_b, gb, 1, GATE_TERMS))
    of_q = tl.where(right[:, None], decay_f, decay_b)
    of_k = tl.where(right[:, None], decay_b, decay_f)
    return of_q, of_k, pairs, sums_f, sums_b, right


@triton.jit
def _steep_scores(
    q, k, gates_f, gates_b, q_l, k_l, gf_l, gb_l, local, row_ok,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, SCORE_TERMS: tl.constexpr, TERMS: tl.constexpr,
    GATE_TERMS: tl.constexpr,
):  # fmt: skip
    """Decayed q k^T of one chunk, [C, C]: forward gates below the diagonal, backward gates above, twice q k on it."""
    scores = tl.zeros([C, C], tl.float32)
    for tile in range(tl.cdiv(K, BK)):
        cols = tile * BK + tl.arange(0, BK)
        q_i = load(q, local, cols, q_l, row_ok, K).to(tl.float32)
        k_i = load(k, local, cols, k_l, row_ok, K).to(tl.float32)
        gf = load_gates(gates_f, local, cols, gf_l, row_ok, K)
        gb = load_gates(gates_b, local, cols, gb_l, row_ok, K)
        scores += tl.where(local[:, None] == local[None, :], 2 * tl.sum(q_i * k_i, 1)[:, None], 0.0)
        level = 0
        while (1 << level) < C:
            of_q, of_k, pairs, _, _, _ = _level(gf, gb, local, level, GATE_TERMS)
            scores += tl.where(pairs, dot(q_i * of_q, tl.trans(k_i * of_k), SCORE_TERMS, TERMS), 0.0)
            level += 1
    return scores


@triton.jit
def _steep_score_gradients(
    q, k, gf, gb, dscores, local,
    C: tl.constexpr, TERMS: tl.constexpr, SCORE_TERMS: tl.constexpr, GATE_TERMS: tl.constexpr,
):  # fmt: skip
    """From the gradient of the scores: those of q, k and of both log-gates, as far as pairs inside the chunk go."""
    diagonal = 2 * tl.sum(tl.where(local[:, None] == local[None, :], dscores, 0.0), 1)[:, None]
    dq, dk = diagonal * k, diagonal * q
    dgf, dgb = tl.zeros_like(q), tl.zeros_like(q)
    level = 0
    while (1 << level) < C:
        of_q, of_k, pairs, sums_f, sums_b, right = _level(gf, gb, local, level, GATE_TERMS)
        ds = tl.where(pairs, dscores, 0.0)
        dq_m = dot(ds, k * of_k, TERMS, SCORE_TERMS) * of_q
        dk_m = dot(tl.trans(ds), q * of_q, TERMS, SCORE_TERMS) * of_k
        dq += dq_m
        dk += dk_m
        # Each factor hands its gradient to the gates in its sum: additions only.
        to_f = tl.where(right[:, None], dq_m * q, dk_m * k)
        to_b = tl.where(right[:, None], dk_m * k, dq_m * q)
        dgf += dot(tl.trans(sums_f), to_f, 1, SCORE_TERMS)
        dgb += dot(tl.trans(sums_b), to_b, 1, SCORE_TERMS)
        level += 1
    return dq, dk, dgf, dgb


@triton.jit
def _any_steep(steep, slots, total, ALL: tl.constexpr):
    """Whether any of these chunks is steep, in either direction."""
    if ALL:
        return True
    flags = tl.load(steep + slots, mask=slots < total, other=0) | tl.load(
        steep + total + slots, mask=slots < total, other=0
    )
    return tl.max(flags.to(tl.int32)) > 0


@triton.jit
def _are_mild(steep, slot, total, ALL: tl.constexpr):
    """Whether the forward, and the backward, direction of a chunk is mild."""
    if ALL:
        return False, False
    return tl.load(steep + slot) == 0, tl.load(steep + total + slot) == 0


@triton.jit
def _side(local, backward):
    """Of tokens i (rows) and j (columns): above 0 where j comes before i in this direction, below 0 where after."""
    return (local[:, None] - local[None, :]) * tl.where(backward, -1, 1)


@triton.jit
def _sum(tokens, x, TERMS: tl.constexpr):
    """Of x [C, K] over those tokens (columns) that each row names."""
    return dot(tl.where(tokens, 1.0, 0.0), x, 1, TERMS)


@triton.jit
def _log_factor(gates, mild):
    """The logarithm of the factor that a state comes with (`chunk_states`), [K]."""
    return tl.where(mild, 0.5 * tl.sum(gates, 0), 0.0)


@triton.jit
def _meet_states(
    o, x, states, next_direction, decays, carries, next_carry, gates_f, gates_b, gf_l, gb_l, mild_f, mild_b,
    reach_f, reach_b, local, row_ok, cols, vcols, K: tl.constexpr, V: tl.constexpr,
    KEYS: tl.constexpr, CARRIED: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
    TERMS: tl.constexpr, SCORE_TERMS: tl.constexpr, GATE_TERMS: tl.constexpr,
):  # fmt: skip
    """o + (x, decayed) states of both directions. x: queries, or with KEYS keys and the gradients of states.

    CARRIED: states lack what enters their stretch, decays * carries.
    """
    for direction in range(2):
        backward = direction == 1
        gates = tl.where(backward, gates_b, gates_f)
        gates = load_gates(gates, local, cols, tl.where(backward, gb_l, gf_l), row_ok, K)
        log_factor = _log_factor(gates, tl.where(backward, mild_b, mild_f))
        if KEYS:
            tokens = _side(local, backward) < 0
        else:
            tokens = _side(local, backward) >= 0
        x_d = x * exp(_sum(tokens, gates, GATE_TERMS) - log_factor[None, :])
        if HAS_SEGMENTS:
            x_d = tl.where(tl.where(backward, reach_b, reach_f)[:, None], x_d, 0.0)
        state = load_state(states + direction * next_direction * V, cols, vcols, K, V)
        if CARRIED:
            decay = tl.load(decays + direction * next_direction + cols, mask=cols < K, other=0.0)
            state = state.to(tl.float32)
            state += decay[:, None] * load_state(carries + direction * next_carry, cols, vcols, K, V)
        o += dot(x_d, state, SCORE_TERMS, TERMS)
    return o


@triton.jit(do_not_specialize=["L", "N", "width", "total", "G"])
def steep_outputs(
    q, k, v, gates_f, gates_b, states, decays, carries, out, segments, sizes,
    L, N, h, width, scale, total, G,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, gf_b, gf_l, gf_h, gb_b, gb_l, gb_h, steep,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    CARRIED: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_SIZES: tl.constexpr, ALL: tl.constexpr,
    TERMS: tl.constexpr, SCORE_TERMS: tl.constexpr, GATE_TERMS: tl.constexpr,
):  # fmt: skip
    """`outputs` for steep chunks, or for ALL; any K and V, in tiles of BK and BV. A program looks for its chunks."""
    for start in range(tl.program_id(0), total, 64 * tl.num_programs(0)):
        if _any_steep(steep, start + tl.num_programs(0) * tl.arange(0, 64), total, ALL):
            for slot in range(start, tl.minimum(total, start + 64 * tl.num_programs(0)), tl.num_programs(0)):
                if _any_steep(steep, slot + tl.arange(0, 1), total, ALL):
                    mild_f, mild_b = _are_mild(steep, slot, total, ALL)
                    _steep_outputs(
                        slot, mild_f, mild_b, q, k, v, gates_f, gates_b, states, decays, carries, out, segments, sizes,
                        L, N, h, width, scale, G,
                        q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, gf_b, gf_l, gf_h, gb_b, gb_l, gb_h,
                        K, V, C, BK, BV, CARRIED, HAS_SEGMENTS, HAS_SIZES, TERMS, SCORE_TERMS, GATE_TERMS,
                    )  # fmt: skip


@triton.jit
def _steep_outputs(
    slot, mild_f, mild_b, q, k, v, gates_f, gates_b, states, decays, carries, out, segments, sizes,
    L, N, h, width, scale, G,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, gf_b, gf_l, gf_h, gb_b, gb_l, gb_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    CARRIED: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_SIZES: tl.constexpr,
    TERMS: tl.constexpr, SCORE_TERMS: tl.constexpr, GATE_TERMS: tl.constexpr,
):  # fmt: skip
    b, n, head, first, local, row_ok = locate(slot, N, h, L, sizes, width, C, HAS_SIZES)
    at_n = ((b * h + head) * 2 * N + n) * K
    M = tl.cdiv(N, G)
    if CARRIED:
        carries += ((b * h + head) * 2 * M + n // G) * K * V
    q = at(q, b, head, first, q_b, q_h, q_l)
    k = at(k, b, head, first, k_b, k_h, k_l)
    v = at(v, b, head, first, v_b, v_h, v_l)
    gates_f = at(gates_f, b, head, first, gf_b, gf_h, gf_l)
    gates_b = at(gates_b, b, head, first, gb_b, gb_h, gb_l)
    reach_f, reach_b = row_ok, row_ok
    if HAS_SEGMENTS:
        own, before, after, _, _ = load_segments(segments, local, first, L, C)
        reach_f, reach_b = own == before, own == after

    scores = _steep_scores(
        q, k, gates_f, gates_b, q_l, k_l, gf_l, gb_l, local, row_ok, K, C, BK, SCORE_TERMS, TERMS, GATE_TERMS
    )
    if HAS_SEGMENTS:
        scores = tl.where(own[:, None] == own[None, :], scores, 0.0)
    for vtile in range(tl.cdiv(V, BV)):
        vcols = vtile * BV + tl.arange(0, BV)
        o = dot(scores, load(v, local, vcols, v_l, row_ok, V), TERMS, TERMS)
        for tile in range(tl.cdiv(K, BK)):
            cols = tile * BK + tl.arange(0, BK)
            q_i = load(q, local, cols, q_l, row_ok, K).to(tl.float32)
            o = _meet_states(
                o, q_i, states + at_n * V, N.to(tl.int64) * K, decays + at_n, carries, M * K * V,
                gates_f, gates_b, gf_l, gb_l, mild_f, mild_b, reach_f, reach_b, local, row_ok, cols, vcols, K, V,
                False, CARRIED, HAS_SEGMENTS, TERMS, SCORE_TERMS, GATE_TERMS,
            )  # fmt: skip
        out_i = out + ((b * L + first) * h + head) * V
        store(out_i, local, vcols, h * V, local < L - first, V, o * scale)


@triton.jit(do_not_specialize=["L", "N", "width", "total"])
def steep_gradients(
    q, k, v, gates_f, gates_b, states, do, dstates, dq, dk, dv, dgates_f, dgates_b, segments, sizes,
    L, N, h, width, scale, total,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, gf_b, gf_l, gf_h, gb_b, gb_l, gb_h, do_b, do_l, do_h, steep,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, HAS_SIZES: tl.constexpr, ALL: tl.constexpr,
    TERMS: tl.constexpr, SCORE_TERMS: tl.constexpr, GATE_TERMS: tl.constexpr,
):  # fmt: skip
    """`gradients` for steep chunks, or for ALL; any K and V, in tiles of BK and BV. A program looks for its chunks."""
    for start in range(tl.program_id(0), total, 64 * tl.num_programs(0)):
        if _any_steep(steep, start + tl.num_programs(0) * tl.arange(0, 64), total, ALL):
            for slot in range(start, tl.minimum(total, start + 64 * tl.num_programs(0)), tl.num_programs(0)):
                if _any_steep(steep, slot + tl.arange(0, 1), total, ALL):
                    mild_f, mild_b = _are_mild(steep, slot, total, ALL)
                    _steep_gradients(
                        slot, mild_f, mild_b, q, k, v, gates_f, gates_b, states, do, dstates,
                        dq, dk, dv, dgates_f, dgates_b, segments, sizes, L, N, h, width, scale,
                        q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, gf_b, gf_l, gf_h, gb_b, gb_l, gb_h,
                        do_b, do_l, do_h, K, V, C, BK, BV, HAS_SEGMENTS, HAS_SIZES, TERMS, SCORE_TERMS, GATE_TERMS,
                    )  # fmt: skip


@triton.jit
def _steep_gradients(
    slot, mild_f, mild_b, q, k, v, gates_f, gates_b, states, do, dstates, dq, dk, dv, dgates_f, dgates_b,
    segments, sizes, L, N, h, width, scale,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, gf_b, gf_l, gf_h, gb_b, gb_l, gb_h, do_b, do_l, do_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, HAS_SIZES: tl.constexpr,
    TERMS: tl.constexpr, SCORE_TERMS: tl.constexpr, GATE_TERMS: tl.constexpr,
):  # fmt: skip
    b, n, head, first, local, row_ok = locate(slot, N, h, L, sizes, width, C, HAS_SIZES)
    store_ok = local < L - first
    states_f = ((b * h + head) * 2 * N + n) * K * V
    keys = ((b * L + first) * h + head) * K
    q = at(q, b, head, first, q_b, q_h, q_l)
    k = at(k, b, head, first, k_b, k_h, k_l)
    v = at(v, b, head, first, v_b, v_h, v_l)
    do = at(do, b, head, first, do_b, do_h, do_l)
    gates_f = at(gates_f, b, head, first, gf_b, gf_h, gf_l)
    gates_b = at(gates_b, b, head, first, gb_b, gb_h, gb_l)
    reach_f, reach_b, leave_f, leave_b = row_ok, row_ok, row_ok, row_ok
    if HAS_SEGMENTS:
        own, before, after, first_own, last_own = load_segments(segments, local, first, L, C)
        reach_f, reach_b = own == before, own == after  # by the state from outside: queries
        leave_f, leave_b = own == last_own, own == first_own  # into the state that leaves: keys
        gate_f_ok, gate_b_ok = decaying(segments, local, first, L, own, row_ok)

    # The scores and their gradient, from all of K and all of V
    scores = _steep_scores(
        q, k, gates_f, gates_b, q_l, k_l, gf_l, gb_l, local, row_ok, K, C, BK, SCORE_TERMS, TERMS, GATE_TERMS
    )
    dscores = tl.zeros([C, C], tl.float32)
    for vtile in range(tl.cdiv(V, BV)):
        vcols = vtile * BV + tl.arange(0, BV)
        v_i = load(v, local, vcols, v_l, row_ok, V)
        do_i = load(do, local, vcols, do_l, row_ok, V)
        dscores += dot(do_i, tl.trans(v_i), TERMS, TERMS)
    dscores *= scale
    if HAS_SEGMENTS:
        same = own[:, None] == own[None, :]
        scores, dscores = tl.where(same, scores, 0.0), tl.where(same, dscores, 0.0)
    scores_t = tl.trans(scores)

    # dv, tile by tile of V
    for vtile in range(tl.cdiv(V, BV)):
        vcols = vtile * BV + tl.arange(0, BV)
        dv_i = dot(scores_t, load(do, local, vcols, do_l, row_ok, V), TERMS, TERMS)
        for tile in range(tl.cdiv(K, BK)):
            cols = tile * BK + tl.arange(0, BK)
            k_i = load(k, local, cols, k_l, row_ok, K).to(tl.float32)
            dv_i = _meet_states(
                dv_i, k_i, dstates + states_f, N.to(tl.int64) * K, None, None, 0,
                gates_f, gates_b, gf_l, gb_l, mild_f, mild_b, leave_f, leave_b, local, row_ok, cols, vcols, K, V,
                True, False, HAS_SEGMENTS, TERMS, SCORE_TERMS, GATE_TERMS,
            )  # fmt: skip
        dv_tile = dv + ((b * L + first) * h + head) * V
        store(dv_tile, local, vcols, h * V, store_ok, V, dv_i * scale)

    # dq, dk and the gates, tile by tile of K
    for tile in range(tl.cdiv(K, BK)):
        cols = tile * BK + tl.arange(0, BK)
        q_i = load(q, local, cols, q_l, row_ok, K).to(tl.float32)
        k_i = load(k, local, cols, k_l, row_ok, K).to(tl.float32)
        gf = load_gates(gates_f, local, cols, gf_l, row_ok, K)
        gb = load_gates(gates_b, local, cols, gb_l, row_ok, K)
        dq_i, dk_i, dgf, dgb = _steep_score_gradients(
            q_i, k_i, gf, gb, dscores, local, C, TERMS, SCORE_TERMS, GATE_TERMS
        )

        # The decayed queries and keys that meet the states
        for direction in range(2):
            backward = direction == 1
            dq_d, dk_d = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
            across = tl.zeros([BK], tl.float32)
            for vtile in range(tl.cdiv(V, BV)):
                vcols = vtile * BV + tl.arange(0, BV)
                state_at = states_f + direction * N.to(tl.int64) * K * V
                state = load_state(states + state_at, cols, vcols, K, V)
                dstate = load_state(dstates + state_at, cols, vcols, K, V)
                dq_d += dot(load(do, local, vcols, do_l, row_ok, V), tl.trans(state), TERMS, TERMS)
                dk_d += dot(load(v, local, vcols, v_l, row_ok, V), tl.trans(dstate), TERMS, TERMS)
                across += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)

            gates, side = tl.where(backward, gb, gf), _side(local, backward)
            log_factor = _log_factor(gates, tl.where(backward, mild_b, mild_f))
            dq_d *= exp(_sum(side >= 0, gates, GATE_TERMS) - log_factor[None, :]) * scale
            dk_d *= exp(_sum(side < 0, gates, GATE_TERMS) - log_factor[None, :]) * scale
            across *= exp(tl.sum(gates, 0) - 2 * log_factor) * scale
            gate_ok = row_ok
            if HAS_SEGMENTS:
                gate_ok = tl.where(backward, gate_b_ok, gate_f_ok)
                dq_d = tl.where(tl.where(backward, reach_b, reach_f)[:, None], dq_d, 0.0)
                dk_d = tl.where(tl.where(backward, leave_b, leave_f)[:, None], dk_d, 0.0)
                across = tl.where(tl.where(backward, after == first_own, before == last_own), across, 0.0)
            dq_i += dq_d
            dk_i += dk_d
            # A gate decays the queries after it, the keys before it, and the state that passes through the whole chunk.
            dgate = tl.where(backward, dgb, dgf) + across[None, :]
            dgate += _sum(side <= 0, q_i * dq_d, SCORE_TERMS) + _sum(side > 0, k_i * dk_d, SCORE_TERMS)
            dgate = tl.where(gate_ok[:, None], dgate, 0.0)
            store(tl.where(backward, dgates_b, dgates_f) + keys, local, cols, h * K, store_ok, K, dgate)
        store(dq + keys, local, cols, h * K, store_ok, K, tl.where(row_ok[:, None], dq_i, 0.0))
        store(dk + keys, local, cols, h * K, store_ok, K, tl.where(row_ok[:, None], dk_i, 0.0))
