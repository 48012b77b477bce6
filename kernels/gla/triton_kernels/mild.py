"""Outputs and gradients of mild chunks: one reference point, half of the chunk's sum, for all pairs of a direction.

States come multiplied by exp of that half (`chunk_states`), so that the same decayed queries, or keys, meet them.
"""

import triton
import triton.language as tl

from .common import LOG2_E, at, decaying, dot, is_token, load, load_segments, load_state, narrow, store


@triton.jit
def _halves(C: tl.constexpr):
    """1/2 where a forward query (row) sees a key (column), -1/2 where it does not; transposed, that of the backward."""
    i = tl.arange(0, C)
    return tl.where(i[:, None] >= i[None, :], 0.5, -0.5).to(tl.bfloat16)


@triton.jit
def _mild_decays(gates, halves, GATE_TERMS: tl.constexpr):
    """exp of the running sums of log-gates relative to half of the whole sum, and its inverse, [C, K]."""
    sums = dot(halves, gates, 1, GATE_TERMS) * LOG2_E
    return tl.exp2(sums), tl.exp2(-sums)


@triton.jit
def _scores(
    q, k, gates, halves, pairs,
    ADJOINT: tl.constexpr, TERMS: tl.constexpr, SCORE_TERMS: tl.constexpr, GATE_TERMS: tl.constexpr,
):  # fmt: skip
    """Decayed queries, [C, K], and their products with the decayed keys (columns) of their pairs; one direction."""
    of_q, of_k = _mild_decays(gates, halves, GATE_TERMS)
    if ADJOINT:
        of_q, of_k = of_k, of_q
    q_d = q * of_q
    return q_d, tl.where(pairs, dot(q_d, tl.trans(k * of_k), SCORE_TERMS, TERMS), 0.0)


@triton.constexpr_function
def _tile_of_values(values, tokens):
    """No wider than a chunk: then every warp has whole rows of all products, and keeps them to itself."""
    return min(values, tokens)


@triton.jit(do_not_specialize=["L", "N", "width", "B", "G"])
def outputs(
    q, k, v, gates_f, gates_b, states, decays, carries, out, segments, sizes,
    L, N, h, width, scale, B, G,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, gf_b, gf_l, gf_h, gb_b, gb_l, gb_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ADJOINT: tl.constexpr, CARRIED: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_SIZES: tl.constexpr,
    TERMS: tl.constexpr, SCORE_TERMS: tl.constexpr, GATE_TERMS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out = scale * (scores v + decayed q states) of mild chunks; scores and states hold both directions.

    ADJOINT: the gradient of v. q and k have changed places, v is the gradient of the output, states that of the states;
    a key (row) meets the queries (columns) that see it.

    A program takes G chunks. CARRIED: they are a stretch, and states lack what enters it, decays * carries.
    """
    VT: tl.constexpr = _tile_of_values(BV, C)
    cols = tl.arange(0, BK)
    head, b = tl.program_id(0) % h, ((tl.program_id(0) // h) % B).to(tl.int64)
    part, M = tl.program_id(0) // (h * B), tl.num_programs(0) // (h * B)
    local = tl.arange(0, C)
    i, j = local[:, None], local[None, :]
    if ADJOINT:
        pairs_f, pairs_b = i <= j, i >= j
    else:
        pairs_f, pairs_b = i >= j, i <= j
    halves = _halves(C)
    at_head = (b * h + head) * 2
    carry_f, carry_r = (), ()
    if CARRIED:
        for tile in tl.static_range(triton.cdiv(V, VT)):
            vcols = tile * VT + tl.arange(0, VT)
            carry_at = carries + (at_head * M + part) * K * V
            carry_f += (narrow(load_state(carry_at, cols, vcols, K, V), TERMS),)
            carry_r += (narrow(load_state(carry_at + M * K * V, cols, vcols, K, V), TERMS),)
    for n in tl.range(part * G, tl.minimum(part * G + G, N), num_stages=STAGES):
        # Loads stand where they are used: that is where registers begin to hold them.
        first = n * C
        row_ok = is_token(local, first, L, sizes, b, width, HAS_SIZES)
        q_i = load(at(q, b, head, first, q_b, q_h, q_l), local, cols, q_l, row_ok, K).to(tl.float32)
        k_i = load(at(k, b, head, first, k_b, k_h, k_l), local, cols, k_l, row_ok, K).to(tl.float32)
        gates = load(at(gates_f, b, head, first, gf_b, gf_h, gf_l), local, cols, gf_l, row_ok, K)
        q_f, scores = _scores(q_i, k_i, gates, halves, pairs_f, ADJOINT, TERMS, SCORE_TERMS, GATE_TERMS)
        gates = load(at(gates_b, b, head, first, gb_b, gb_h, gb_l), local, cols, gb_l, row_ok, K)
        q_r, more = _scores(q_i, k_i, gates, tl.trans(halves), pairs_b, ADJOINT, TERMS, SCORE_TERMS, GATE_TERMS)
        scores += more
        if HAS_SEGMENTS:
            own, before, after, first_own, last_own = load_segments(segments, local, first, L, C)
            scores = tl.where(own[:, None] == own[None, :], scores, 0.0)
            if ADJOINT:
                reach_f, reach_r = own == last_own, own == first_own
            else:
                reach_f, reach_r = own == before, own == after
            q_f, q_r = tl.where(reach_f[:, None], q_f, 0.0), tl.where(reach_r[:, None], q_r, 0.0)

        at_f = (at_head * N + n) * K
        at_r = at_f + N.to(tl.int64) * K
        if CARRIED:
            q_cf = q_f * tl.load(decays + at_f + cols, mask=cols < K, other=0.0)[None, :]
            q_cr = q_r * tl.load(decays + at_r + cols, mask=cols < K, other=0.0)[None, :]
        for tile in tl.static_range(triton.cdiv(V, VT)):
            vcols = tile * VT + tl.arange(0, VT)
            o = dot(q_f, load_state(states + at_f * V, cols, vcols, K, V), SCORE_TERMS, TERMS)
            o += dot(q_r, load_state(states + at_r * V, cols, vcols, K, V), SCORE_TERMS, TERMS)
            if CARRIED:
                o += dot(q_cf, carry_f[tile], SCORE_TERMS, TERMS)
                o += dot(q_cr, carry_r[tile], SCORE_TERMS, TERMS)
            o += dot(scores, load(at(v, b, head, first, v_b, v_h, v_l), local, vcols, v_l, row_ok, V), TERMS, TERMS)
            store(out + ((b * L + first) * h + head) * V, local, vcols, h * V, local < L - first, V, o * scale)


@triton.constexpr_function
def _as_diagonal(keys, tokens, terms):
    """Whether sums over V are the diagonal of a product: where that is no larger than the other products."""
    return terms == 1 and keys <= tokens


@triton.jit
def _crossing(leaving, state, dstate, through, HAS_SEGMENTS: tl.constexpr, TERMS: tl.constexpr):
    """What every gate of a chunk gets, [K]: from the state that enters if it passes through, and from keys that leave.

    Used in anything but products, the states would lie in shared memory in an order that products read slowly: hence
    the diagonal of a product.
    """
    if _as_diagonal(state.shape[0], leaving.shape[0], TERMS):
        keys = tl.arange(0, state.shape[0])
        passing = tl.where(keys[:, None] == keys[None, :], dot(dstate, tl.trans(state), TERMS, TERMS), 0.0)
        if HAS_SEGMENTS:
            passing = tl.where(through, passing, 0.0)
        if state.shape[0] == leaving.shape[0]:
            crossing = tl.sum(leaving + passing, 0)
        else:
            crossing = tl.sum(leaving, 0) + tl.sum(passing, 0)
    else:
        passing = tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
        if HAS_SEGMENTS:
            passing = tl.where(through, passing, 0.0)
        crossing = tl.sum(leaving, 0) + passing
    return crossing


@triton.jit(do_not_specialize=["L", "N", "width", "B", "G"])
def gradients(
    q, k, v, gates_f, gates_b, states, do, dstates, dq, dk, dgates_f, dgates_b, segments, sizes,
    L, N, h, width, scale, B, G,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, gf_b, gf_l, gf_h, gb_b, gb_l, gb_h, do_b, do_l, do_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, HAS_SIZES: tl.constexpr,
    TERMS: tl.constexpr, SCORE_TERMS: tl.constexpr, GATE_TERMS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k and both gates in mild chunks; dstates[., d, n] is that of what chunk n adds to direction d."""
    cols, vcols = tl.arange(0, BK), tl.arange(0, BV)
    head, b = tl.program_id(0) % h, ((tl.program_id(0) // h) % B).to(tl.int64)
    local = tl.arange(0, C)
    i, j = local[:, None], local[None, :]
    part = tl.program_id(0) // (h * B)
    halves = _halves(C)
    for n in tl.range(part * G, tl.minimum(part * G + G, N), num_stages=STAGES):
        # Loads stand where they are used: that is where registers begin to hold them.
        first = n * C
        row_ok = is_token(local, first, L, sizes, b, width, HAS_SIZES)
        state_f = ((b * h + head) * 2 * N + n) * V * K
        keys = ((b * L + first) * h + head) * K
        store_ok = local < L - first
        v_i = load(at(v, b, head, first, v_b, v_h, v_l), local, vcols, v_l, row_ok, V)
        do_i = load(at(do, b, head, first, do_b, do_h, do_l), local, vcols, do_l, row_ok, V)
        dscores = dot(do_i, tl.trans(v_i), TERMS, TERMS)
        if HAS_SEGMENTS:
            own, before, after, first_own, last_own = load_segments(segments, local, first, L, C)
            gate_f_ok, gate_b_ok = decaying(segments, local, first, L, own, row_ok)
            dscores = tl.where(own[:, None] == own[None, :], dscores, 0.0)
        dscores = narrow(dscores, TERMS)
        dscores_t = tl.trans(dscores)
        q_i = load(at(q, b, head, first, q_b, q_h, q_l), local, cols, q_l, row_ok, K)
        k_i = load(at(k, b, head, first, k_b, k_h, k_l), local, cols, k_l, row_ok, K)
        dq_i, dk_i = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
        for backward in tl.static_range(2):
            state_at = state_f
            if backward:
                state_at += N.to(tl.int64) * V * K
                gates = load(at(gates_b, b, head, first, gb_b, gb_h, gb_l), local, cols, gb_l, row_ok, K)
                pairs, pairs_t = i <= j, i >= j
            else:
                gates = load(at(gates_f, b, head, first, gf_b, gf_h, gf_l), local, cols, gf_l, row_ok, K)
                pairs, pairs_t = i >= j, i <= j
            of_q, of_k = _mild_decays(gates, tl.trans(halves) if backward else halves, GATE_TERMS)
            k_d = k_i.to(tl.float32) * of_k
            dstate = load_state(dstates + state_at, cols, vcols, K, V)
            dk_d = dot(v_i, tl.trans(dstate), TERMS, TERMS)
            state = load_state(states + state_at, cols, vcols, K, V)
            dq_d = dot(do_i, tl.trans(state), TERMS, TERMS)
            gate_ok, through = row_ok, True
            if HAS_SEGMENTS:
                if backward:
                    reach_q, reach_k, through, gate_ok = own == after, own == first_own, after == first_own, gate_b_ok
                else:
                    reach_q, reach_k, through, gate_ok = own == before, own == last_own, before == last_own, gate_f_ok
                dq_d, dk_d = tl.where(reach_q[:, None], dq_d, 0.0), tl.where(reach_k[:, None], dk_d, 0.0)
            leaving = k_d * dk_d  # keys' share in the gradient of a decay of the state that leaves
            crossing = _crossing(leaving, state, dstate, through, HAS_SEGMENTS, TERMS)
            q_d = q_i.to(tl.float32) * of_q
            dq_d += dot(tl.where(pairs, dscores, 0.0), k_d, TERMS, SCORE_TERMS)
            dk_d += dot(tl.where(pairs_t, dscores_t, 0.0), q_d, TERMS, SCORE_TERMS)
            dq_d, dk_d = dq_d * of_q, dk_d * of_k
            dq_i += dq_d
            dk_i += dk_d
            # Every pair counts once at its query and once, negatively, at its key: a sum over the tokens on the
            # queries' side of a gate holds the pairs that the gate lies between; the others cancel.
            differences = q_i.to(tl.float32) * dq_d - k_i.to(tl.float32) * dk_d
            dgate = dot(tl.where(pairs_t, 1.0, 0.0), differences, 1, SCORE_TERMS) + crossing[None, :]
            dgate = tl.where(gate_ok[:, None], dgate * scale, 0.0)
            store((dgates_b if backward else dgates_f) + keys, local, cols, h * K, store_ok, K, dgate)
        store(dq + keys, local, cols, h * K, store_ok, K, dq_i * scale)
        store(dk + keys, local, cols, h * K, store_ok, K, dk_i * scale)
