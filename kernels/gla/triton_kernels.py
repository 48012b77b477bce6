"""Triton kernels of bidirectional gated linear attention; README.md of the folder above derives them.

Forward: `chunk_states` (what each chunk adds to the states of both directions), `scan_states` (the states that enter
each chunk), `outputs`. Backward: `chunk_states` and `scan_states` on the queries and the gradient of the output, then
`gradients`. `outputs` and `gradients` take every chunk for a mild one, whose gates are weak enough for one reference
point; what they write for the others, which `chunk_states` marks as steep, may be anything and is replaced by
`steep_outputs` and `steep_gradients`, which halve those chunks recursively.

One program works on one chunk of C tokens of one head; programs of neighbouring heads are neighbours, because their
numbers are neighbours in memory. States are [V, K], of direction 0 (forward scan) and 1 (backward scan).
"""

import triton
import triton.language as tl

# A chunk is steep where its log-gates (of base 2, as all here) are below this on average, in any channel.
STEEP = tl.constexpr(-1.5)
LOG2_E = tl.constexpr(1.4426950408889634)
# 2 to anything below is 0 in float32; keeps sums of the most negative floats finite.
CLOSED = tl.constexpr(-1000.0)


# ---------------------------------------------------------------------------------------------------------------------
# Products. The matrix unit multiplies bfloat16 exactly and adds in float32, so a float32 operand goes in as the sum of
# 1, 2 or 3 bfloat16 terms (8, 16 or 24 bits). Sums over tokens are products with a matrix of 0 and 1.


@triton.jit
def _dot(a, b, A_TERMS: tl.constexpr, B_TERMS: tl.constexpr):
    """a b with a in A_TERMS and b in B_TERMS terms, those products left out that are too small to matter."""
    if A_TERMS == 1:
        a_1 = a.to(tl.bfloat16)
    else:
        a_1, a_2, a_3 = _split(a.to(tl.float32), A_TERMS)
    if B_TERMS == 1:
        b_1 = b.to(tl.bfloat16)
    else:
        b_1, b_2, b_3 = _split(b.to(tl.float32), B_TERMS)
    c = _dot_add(tl.zeros([a.shape[0], b.shape[1]], tl.float32), a_1, b_1)
    if A_TERMS > 1:
        c = _dot_add(c, a_2, b_1)
    if B_TERMS > 1:
        c = _dot_add(c, a_1, b_2)
    if A_TERMS > 2:
        c = _dot_add(c, a_3, b_1)
    if B_TERMS > 2:
        c = _dot_add(c, a_1, b_3)
    if (A_TERMS > 2) & (B_TERMS > 2):
        c = _dot_add(c, a_2, b_2)
    return c


@triton.jit
def _split(x, TERMS: tl.constexpr):
    """Two or three bfloat16 terms that add up to x: the upper half of its bits, then what is left."""
    high = _upper_half(x)
    low = x - high
    if TERMS == 2:
        middle = low
    else:
        middle = _upper_half(low)
    return high.to(tl.bfloat16), middle.to(tl.bfloat16), (low - middle).to(tl.bfloat16)


@triton.jit
def _upper_half(x):
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


# Triton's interpreter does not multiply bfloat16: there the same numbers are float32.
INTERPRETED = not isinstance(_split, triton.JITFunction)
OPERAND = tl.constexpr(tl.float32 if INTERPRETED else tl.bfloat16)


@triton.jit
def _dot_add(c, a, b):
    return tl.dot(a.to(OPERAND), b.to(OPERAND), c)


# ---------------------------------------------------------------------------------------------------------------------
# Loading


@triton.jit
def _program(slot, N, h):
    """Image, chunk and head of a slot; heads are neighbours."""
    return (slot // (N * h)).to(tl.int64), (slot // h) % N, slot % h


@triton.jit
def _load(base, rows, cols, stride, row_ok, col_ok):
    """[rows, cols] with zeros where a mask says no."""
    return tl.load(base + rows[:, None] * stride + cols[None, :], mask=row_ok[:, None] & col_ok[None, :], other=0.0)


@triton.jit
def _store(base, rows, cols, stride, row_ok, col_ok, x):
    x = x.to(base.dtype.element_ty)
    tl.store(base + rows[:, None] * stride + cols[None, :], x, mask=row_ok[:, None] & col_ok[None, :])


@triton.jit
def _is_token(local, first, L, sizes, b, width, HAS_SIZES: tl.constexpr):
    """Which rows of a chunk are tokens: not past the end and, with sizes, inside the valid rectangle of their image."""
    ok = local < L - first
    if HAS_SIZES:
        rows = first + local
        ok = ok & (rows // width < tl.load(sizes + 2 * b)) & (rows % width < tl.load(sizes + 2 * b + 1))
    return ok


@triton.jit
def _load_gates(base, rows, cols, stride, row_ok, col_ok):
    """Log-gates of base 2 in float32, closed ones finite; open (0) where a mask says no."""
    gates = _load(base, rows, cols, stride, row_ok, col_ok).to(tl.float32)
    return tl.maximum(gates * LOG2_E, CLOSED)


@triton.jit
def _load_neighbour_gates(
    gates_f, gates_b, gf_l, gb_l, local, cols, col_ok, first, L, sizes, b, width,
    C: tl.constexpr, HAS_SIZES: tl.constexpr,
):  # fmt: skip
    """Forward gates of each row's successor, backward gates of its predecessor; open beyond the chunk."""
    after_ok = _is_token(local + 1, first, L, sizes, b, width, HAS_SIZES) & (local + 1 < C)
    before_ok = _is_token(local - 1, first, L, sizes, b, width, HAS_SIZES) & (local > 0)
    gf = _load_gates(gates_f, local + 1, cols, gf_l, after_ok, col_ok)
    gb = _load_gates(gates_b, local - 1, cols, gb_l, before_ok, col_ok)
    return gf, gb


@triton.jit
def _load_segments(segments, local, first, L, C: tl.constexpr):
    """Sequence numbers of the rows, of the tokens before and after the chunk and of its first and last token."""
    last = tl.minimum(first + C, L) - 1
    own = tl.load(segments + first + local, mask=local < L - first, other=-3)
    before = tl.load(segments + first - 1, mask=first > 0, other=-1)
    after = tl.load(segments + last + 1, mask=last + 1 < L, other=-2)
    return own, before, after, tl.load(segments + first), tl.load(segments + last)


@triton.jit
def _same_segment(segments, local, first, L):
    """Which pairs of rows belong to one sequence, [C, C]."""
    own_i = tl.load(segments + first + local, mask=local < L - first, other=-3)
    own_j = tl.load(segments + first + local, mask=local < L - first, other=-3)
    return own_i[:, None] == own_j[None, :]


# ---------------------------------------------------------------------------------------------------------------------
# The states that chunks add, and their scan


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
    b, n, head = _program(slot, N, h)
    tile, vtile = tl.program_id(1) % tl.cdiv(K, BK), tl.program_id(1) // tl.cdiv(K, BK)
    cols, vcols = tile * BK + tl.arange(0, BK), vtile * BV + tl.arange(0, BV)
    col_ok, vcol_ok = cols < K, vcols < V
    first = n * C
    local = tl.arange(0, C)
    row_ok = _is_token(local, first, L, sizes, b, width, HAS_SIZES)
    gf = _load_gates(gates_f + b * gf_b + head * gf_h + first.to(tl.int64) * gf_l, local, cols, gf_l, row_ok, col_ok)
    gb = _load_gates(gates_b + b * gb_b + head * gb_h + first.to(tl.int64) * gb_l, local, cols, gb_l, row_ok, col_ok)
    x_i = _load(x + b * x_b + head * x_h + first.to(tl.int64) * x_l, local, cols, x_l, row_ok, col_ok)
    y_i = _load(y + b * y_b + head * y_h + first.to(tl.int64) * y_l, local, vcols, y_l, row_ok, vcol_ok)

    # Sums from the border that a direction's decay reaches to: of numbers <= 0, never differences.
    i, j = local[:, None], local[None, :]
    if ADJOINT:
        sums_f, sums_b = j <= i, j >= i
    else:
        sums_f, sums_b = j > i, j < i
    decay_f = tl.exp2(_dot(tl.where(sums_f, 1.0, 0.0), gf, 1, GATE_TERMS))
    decay_b = tl.exp2(_dot(tl.where(sums_b, 1.0, 0.0), gb, 1, GATE_TERMS))
    everything = tl.full([C, C], 1.0, tl.float32)
    total_f, total_b = _dot(everything, gf, 1, GATE_TERMS), _dot(everything, gb, 1, GATE_TERMS)  # in every row
    across_f, across_b = tl.exp2(total_f), tl.exp2(total_b)
    x_f, x_r = x_i.to(tl.float32) * decay_f, x_i.to(tl.float32) * decay_b
    if HAS_SEGMENTS:
        own, before, after, first_own, last_own = _load_segments(segments, local, first, L, C)
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
    _store(updates + states_f, vcols, cols, K, vcol_ok, col_ok, _dot(y_t, x_f, TERMS, SCORE_TERMS))
    _store(updates + states_b, vcols, cols, K, vcol_ok, col_ok, _dot(y_t, x_r, TERMS, SCORE_TERMS))
    if vtile == 0:
        decays += ((b * h + head) * 2 * N + n) * K
        _store(decays, local, cols, 0, local == 0, col_ok, across_f)
        _store(decays + N * K, local, cols, 0, local == 0, col_ok, across_b)
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


# ---------------------------------------------------------------------------------------------------------------------
# Mild chunks: one reference point, half of the chunk's sum, for all pairs of a direction


@triton.jit
def _mild_decays(gates, pairs, GATE_TERMS: tl.constexpr):
    """exp of the running sums of log-gates relative to half the whole sum, its inverse, and exp of that half, [C, K].

    pairs: which keys (columns) each query (row) sees.
    """
    sums = _dot(tl.where(pairs, 0.5, -0.5), gates, 1, GATE_TERMS)
    half = _dot(tl.where(pairs, 0.5, 0.5), gates, 1, GATE_TERMS)
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
    slot = tl.program_id(0)
    b, n, head = _program(slot, N, h)
    first = n * C
    local, cols, vcols = tl.arange(0, C), tl.arange(0, BK), tl.arange(0, BV)
    col_ok, vcol_ok = cols < K, vcols < V
    row_ok = _is_token(local, first, L, sizes, b, width, HAS_SIZES)
    states += ((b * h + head) * 2 * N + n) * V * K
    gates_f += b * gf_b + head * gf_h + first.to(tl.int64) * gf_l
    gates_b += b * gb_b + head * gb_h + first.to(tl.int64) * gb_l
    q_i = _load(q + b * q_b + head * q_h + first.to(tl.int64) * q_l, local, cols, q_l, row_ok, col_ok).to(tl.float32)
    k_i = _load(k + b * k_b + head * k_h + first.to(tl.int64) * k_l, local, cols, k_l, row_ok, col_ok).to(tl.float32)
    v_i = _load(v + b * v_b + head * v_h + first.to(tl.int64) * v_l, local, vcols, v_l, row_ok, vcol_ok)
    gf = _load_gates(gates_f, local, cols, gf_l, row_ok, col_ok)
    gb = _load_gates(gates_b, local, cols, gb_l, row_ok, col_ok)
    s_f = _load(states, vcols, cols, K, vcol_ok, col_ok)
    s_b = _load(states + N.to(tl.int64) * V * K, vcols, cols, K, vcol_ok, col_ok)
    if HAS_SEGMENTS:
        own, before, behind, _, _ = _load_segments(segments, local, first, L, C)
        same = _same_segment(segments, local, first, L)

    o = tl.zeros([C, BV], tl.float32)
    for backward in tl.static_range(2):
        if backward:
            gates, state, pairs = gb, s_b, local[:, None] <= local[None, :]
        else:
            gates, state, pairs = gf, s_f, local[:, None] >= local[None, :]
        of_q, of_k, border = _mild_decays(gates, pairs, GATE_TERMS)
        q_d = q_i * of_q
        scores = _dot(q_d, tl.trans(k_i * of_k), SCORE_TERMS, TERMS)
        q_d *= border
        if HAS_SEGMENTS:
            pairs = pairs & same
            q_d = tl.where((own == (behind if backward else before))[:, None], q_d, 0.0)
        o += _dot(tl.where(pairs, scores, 0.0), v_i, TERMS, TERMS)
        o += _dot(q_d, tl.trans(state), SCORE_TERMS, TERMS)
    _store(out + ((b * L + first) * h + head) * V, local, vcols, h * V, local < L - first, vcol_ok, o * scale)


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
    slot = tl.program_id(0)
    b, n, head = _program(slot, N, h)
    first = n * C
    local, cols, vcols = tl.arange(0, C), tl.arange(0, BK), tl.arange(0, BV)
    col_ok, vcol_ok = cols < K, vcols < V
    row_ok = _is_token(local, first, L, sizes, b, width, HAS_SIZES)
    store_ok = local < L - first
    gates_f += b * gf_b + head * gf_h + first.to(tl.int64) * gf_l
    gates_b += b * gb_b + head * gb_h + first.to(tl.int64) * gb_l
    states_at = ((b * h + head) * 2 * N + n) * V * K
    keys = ((b * L + first) * h + head) * K
    v_i = _load(v + b * v_b + head * v_h + first.to(tl.int64) * v_l, local, vcols, v_l, row_ok, vcol_ok)
    do_i = _load(do + b * do_b + head * do_h + first.to(tl.int64) * do_l, local, vcols, do_l, row_ok, vcol_ok)
    q_i = _load(q + b * q_b + head * q_h + first.to(tl.int64) * q_l, local, cols, q_l, row_ok, col_ok)
    k_i = _load(k + b * k_b + head * k_h + first.to(tl.int64) * k_l, local, cols, k_l, row_ok, col_ok)
    if HAS_SEGMENTS:
        own, before, behind, first_own, last_own = _load_segments(segments, local, first, L, C)
        gate_f_ok, gate_b_ok = _decaying(segments, local, first, L, own, row_ok)
        same = _same_segment(segments, local, first, L)

    dq_i, dk_i = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    dv_i = tl.zeros([C, BV], tl.float32)
    for direction in range(2):  # not unrolled: both at once would need twice the registers that there are
        backward = direction == 1
        gates = _load_gates(
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
        dstate = _load(dstates + state_at, vcols, cols, K, vcol_ok, col_ok)
        scores = _dot(k_d, tl.trans(q_d), SCORE_TERMS, TERMS)
        dv_i += _dot(tl.where(met_t, scores, 0.0), do_i, TERMS, TERMS)
        dv_i += _dot(k_end, tl.trans(dstate), SCORE_TERMS, TERMS)

        state = _load(states + state_at, vcols, cols, K, vcol_ok, col_ok)
        dq_d = _dot(do_i, state, TERMS, TERMS) * border
        dk_d = _dot(v_i, dstate, TERMS, TERMS) * border
        passing = state.to(tl.float32) * dstate.to(tl.float32)  # [V, K], before its decay across the chunk
        if HAS_SEGMENTS:
            dq_d, dk_d = tl.where(reach_q, dq_d, 0.0), tl.where(reach_k, dk_d, 0.0)
            passing = tl.where(through, passing, 0.0)
        dgates = _dot(tl.full([C, C], 1.0, tl.float32), k_d * dk_d, 1, GATE_TERMS)
        dgates += _dot(tl.full([C, BV], 1.0, tl.float32), passing, 1, GATE_TERMS) * border * border
        ds = tl.where(met_t, _dot(v_i, tl.trans(do_i), TERMS, TERMS), 0.0)
        dk_d += _dot(ds, q_d, TERMS, SCORE_TERMS)
        dq_d += _dot(tl.trans(ds), k_d, TERMS, SCORE_TERMS)
        dq_i += dq_d * of_q
        dk_i += dk_d * of_k
        # Every pair counts once at its query and once, negatively, at its key: a sum over the tokens on the queries'
        # side of a gate holds the pairs that the gate lies between; the others cancel, having the same factors twice.
        dgates += _dot(tl.where(pairs_t, 1.0, 0.0), q_d * dq_d - k_d * dk_d, 1, GATE_TERMS)
        dgates = tl.where(gate_ok[:, None], dgates * scale, 0.0)
        _store(tl.where(backward, dgates_b, dgates_f) + keys, local, cols, h * K, store_ok, col_ok, dgates)
    _store(dq + keys, local, cols, h * K, store_ok, col_ok, tl.where(row_ok[:, None], dq_i * scale, 0.0))
    _store(dk + keys, local, cols, h * K, store_ok, col_ok, tl.where(row_ok[:, None], dk_i * scale, 0.0))
    _store(dv + ((b * L + first) * h + head) * V, local, vcols, h * V, store_ok, vcol_ok, dv_i * scale)


@triton.jit
def _decaying(segments, local, first, L, own, row_ok):
    """Rows whose forward, and whose backward, gate decays anything: those with a neighbour in their own sequence."""
    in_row = local < L - first
    previous = tl.load(segments + first + local - 1, mask=in_row & (first + local > 0), other=-1)
    following = tl.load(segments + first + local + 1, mask=local + 1 < L - first, other=-2)
    return row_ok & (own == previous), row_ok & (own == following)


# ---------------------------------------------------------------------------------------------------------------------
# Steep chunks: blocks of 2m tokens, m = 1, 2, .. C / 2, with their middle as the reference point of the pairs across it


@triton.jit
def _level(gf, gb, local, level):
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
    decay_f, decay_b = tl.exp2(_dot(sums_f, gf, 1, 3)), tl.exp2(_dot(sums_b, gb, 1, 3))
    of_q = tl.where(right[:, None], decay_f, decay_b)
    of_k = tl.where(right[:, None], decay_b, decay_f)
    return of_q, of_k, pairs, sums_f, sums_b, right


@triton.jit
def _steep_scores(q, k, gf, gb, local, C: tl.constexpr, SCORE_TERMS: tl.constexpr, TERMS: tl.constexpr):
    """Decayed q k^T of one chunk, [C, C]: forward gates below the diagonal, backward gates above, twice q k on it."""
    scores = tl.where(local[:, None] == local[None, :], 2 * tl.sum(q * k, 1)[:, None], 0.0)
    level = 0
    while (1 << level) < C:
        of_q, of_k, pairs, _, _, _ = _level(gf, gb, local, level)
        scores += tl.where(pairs, _dot(q * of_q, tl.trans(k * of_k), SCORE_TERMS, TERMS), 0.0)
        level += 1
    return scores


@triton.jit
def _steep_score_gradients(
    q, k, gf, gb, dscores, local, C: tl.constexpr, TERMS: tl.constexpr, SCORE_TERMS: tl.constexpr
):
    """From the gradient of the scores: those of q, k and of both log-gates, as far as pairs inside the chunk go."""
    diagonal = 2 * tl.sum(tl.where(local[:, None] == local[None, :], dscores, 0.0), 1)[:, None]
    dq, dk = diagonal * k, diagonal * q
    dgf, dgb = tl.zeros_like(q), tl.zeros_like(q)
    level = 0
    while (1 << level) < C:
        of_q, of_k, pairs, sums_f, sums_b, right = _level(gf, gb, local, level)
        ds = tl.where(pairs, dscores, 0.0)
        dq_m = _dot(ds, k * of_k, TERMS, SCORE_TERMS) * of_q
        dk_m = _dot(tl.trans(ds), q * of_q, TERMS, SCORE_TERMS) * of_k
        dq += dq_m
        dk += dk_m
        # Each factor hands its gradient to the gates in its sum: additions only.
        to_f = tl.where(right[:, None], dq_m * q, dk_m * k)
        to_b = tl.where(right[:, None], dk_m * k, dq_m * q)
        dgf += _dot(tl.trans(sums_f), to_f, 1, 3)
        dgb += _dot(tl.trans(sums_b), to_b, 1, 3)
        level += 1
    return dq, dk, dgf, dgb


@triton.jit
def _steep_chunks(steep, start, total, TILES: tl.constexpr, ALL: tl.constexpr):
    """Whether any of the 64 chunks that this program looks after from `start` on is steep."""
    index = start + tl.num_programs(0) * tl.arange(0, 64)
    found = index < 0
    for tile in range(TILES):
        found = found | (tl.load(steep + index * TILES + tile, mask=index < total, other=0) != 0)
    return ALL | (tl.max(found.to(tl.int32)) > 0)


@triton.jit
def _is_steep(steep, slot, TILES: tl.constexpr, ALL: tl.constexpr):
    found = tl.load(steep + slot * TILES) != 0
    for tile in range(1, TILES):
        found = found | (tl.load(steep + slot * TILES + tile) != 0)
    return ALL | found


@triton.jit(do_not_specialize=["L", "N", "width", "total"])
def steep_outputs(
    q, k, v, gates_f, gates_b, states, out, segments, sizes,
    L, N, h, width, scale,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, gf_b, gf_l, gf_h, gb_b, gb_l, gb_h, steep, total,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, HAS_SIZES: tl.constexpr, ALL: tl.constexpr,
    TERMS: tl.constexpr, SCORE_TERMS: tl.constexpr,
):  # fmt: skip
    """`outputs` for steep chunks, or for ALL; any K and V, in tiles of BK and BV. A program looks for its chunks."""
    for start in range(tl.program_id(0), total, 64 * tl.num_programs(0)):
        if _steep_chunks(steep, start, total, TILES, ALL):
            for slot in range(start, tl.minimum(total, start + 64 * tl.num_programs(0)), tl.num_programs(0)):
                if _is_steep(steep, slot, TILES, ALL):
                    _steep_outputs(
                        slot, q, k, v, gates_f, gates_b, states, out, segments, sizes, L, N, h, width, scale,
                        q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, gf_b, gf_l, gf_h, gb_b, gb_l, gb_h,
                        K, V, C, BK, BV, HAS_SEGMENTS, HAS_SIZES, TERMS, SCORE_TERMS,
                    )  # fmt: skip


@triton.jit
def _steep_outputs(
    slot, q, k, v, gates_f, gates_b, states, out, segments, sizes, L, N, h, width, scale,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, gf_b, gf_l, gf_h, gb_b, gb_l, gb_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, HAS_SIZES: tl.constexpr, TERMS: tl.constexpr, SCORE_TERMS: tl.constexpr,
):  # fmt: skip
    b, n, head = _program(slot, N, h)
    first = n * C
    local = tl.arange(0, C)
    row_ok = _is_token(local, first, L, sizes, b, width, HAS_SIZES)
    states_f = states + ((b * h + head) * 2 * N + n) * V * K
    states_b = states_f + N.to(tl.int64) * V * K
    q += b * q_b + head * q_h + first.to(tl.int64) * q_l
    k += b * k_b + head * k_h + first.to(tl.int64) * k_l
    v += b * v_b + head * v_h + first.to(tl.int64) * v_l
    gates_f += b * gf_b + head * gf_h + first.to(tl.int64) * gf_l
    gates_b += b * gb_b + head * gb_h + first.to(tl.int64) * gb_l
    if HAS_SEGMENTS:
        own, before, after, _, _ = _load_segments(segments, local, first, L, C)

    scores = tl.zeros([C, C], tl.float32)
    for tile in range(tl.cdiv(K, BK)):
        cols = tile * BK + tl.arange(0, BK)
        col_ok = cols < K
        q_i = _load(q, local, cols, q_l, row_ok, col_ok).to(tl.float32)
        k_i = _load(k, local, cols, k_l, row_ok, col_ok).to(tl.float32)
        gf = _load_gates(gates_f, local, cols, gf_l, row_ok, col_ok)
        gb = _load_gates(gates_b, local, cols, gb_l, row_ok, col_ok)
        scores += _steep_scores(q_i, k_i, gf, gb, local, C, SCORE_TERMS, TERMS)
    if HAS_SEGMENTS:
        scores = tl.where(_same_segment(segments, local, first, L), scores, 0.0)
    for vtile in range(tl.cdiv(V, BV)):
        vcols = vtile * BV + tl.arange(0, BV)
        vcol_ok = vcols < V
        o = _dot(scores, _load(v, local, vcols, v_l, row_ok, vcol_ok), TERMS, TERMS)
        for tile in range(tl.cdiv(K, BK)):
            cols = tile * BK + tl.arange(0, BK)
            col_ok = cols < K
            q_i = _load(q, local, cols, q_l, row_ok, col_ok).to(tl.float32)
            gf = _load_gates(gates_f, local, cols, gf_l, row_ok, col_ok)
            gb = _load_gates(gates_b, local, cols, gb_l, row_ok, col_ok)
            q_f, q_r = q_i * tl.exp2(tl.cumsum(gf, 0)), q_i * tl.exp2(tl.cumsum(gb, 0, reverse=True))
            if HAS_SEGMENTS:
                q_f = tl.where((own == before)[:, None], q_f, 0.0)
                q_r = tl.where((own == after)[:, None], q_r, 0.0)
            o += _dot(q_f, tl.trans(_load(states_f, vcols, cols, K, vcol_ok, col_ok)), SCORE_TERMS, TERMS)
            o += _dot(q_r, tl.trans(_load(states_b, vcols, cols, K, vcol_ok, col_ok)), SCORE_TERMS, TERMS)
        out_i = out + ((b * L + first) * h + head) * V
        _store(out_i, local, vcols, h * V, local < L - first, vcol_ok, o * scale)


@triton.jit(do_not_specialize=["L", "N", "width", "total"])
def steep_gradients(
    q, k, v, gates_f, gates_b, states, do, dstates, dq, dk, dv, dgates_f, dgates_b, segments, sizes,
    L, N, h, width, scale,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, gf_b, gf_l, gf_h, gb_b, gb_l, gb_h, do_b, do_l, do_h, steep, total,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, HAS_SIZES: tl.constexpr, ALL: tl.constexpr,
    TERMS: tl.constexpr, SCORE_TERMS: tl.constexpr,
):  # fmt: skip
    """`gradients` for steep chunks, or for ALL; any K and V, in tiles of BK and BV. A program looks for its chunks."""
    for start in range(tl.program_id(0), total, 64 * tl.num_programs(0)):
        if _steep_chunks(steep, start, total, TILES, ALL):
            for slot in range(start, tl.minimum(total, start + 64 * tl.num_programs(0)), tl.num_programs(0)):
                if _is_steep(steep, slot, TILES, ALL):
                    _steep_gradients(
                        slot, q, k, v, gates_f, gates_b, states, do, dstates, dq, dk, dv, dgates_f, dgates_b,
                        segments, sizes, L, N, h, width, scale,
                        q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, gf_b, gf_l, gf_h, gb_b, gb_l, gb_h,
                        do_b, do_l, do_h, K, V, C, BK, BV, HAS_SEGMENTS, HAS_SIZES, TERMS, SCORE_TERMS,
                    )  # fmt: skip


@triton.jit
def _steep_gradients(
    slot, q, k, v, gates_f, gates_b, states, do, dstates, dq, dk, dv, dgates_f, dgates_b, segments, sizes,
    L, N, h, width, scale,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, gf_b, gf_l, gf_h, gb_b, gb_l, gb_h, do_b, do_l, do_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, HAS_SIZES: tl.constexpr, TERMS: tl.constexpr, SCORE_TERMS: tl.constexpr,
):  # fmt: skip
    b, n, head = _program(slot, N, h)
    first = n * C
    local = tl.arange(0, C)
    row_ok = _is_token(local, first, L, sizes, b, width, HAS_SIZES)
    store_ok = local < L - first
    states_f = ((b * h + head) * 2 * N + n) * V * K
    states_b = states_f + N.to(tl.int64) * V * K
    keys = ((b * L + first) * h + head) * K
    q += b * q_b + head * q_h + first.to(tl.int64) * q_l
    k += b * k_b + head * k_h + first.to(tl.int64) * k_l
    v += b * v_b + head * v_h + first.to(tl.int64) * v_l
    do += b * do_b + head * do_h + first.to(tl.int64) * do_l
    gates_f += b * gf_b + head * gf_h + first.to(tl.int64) * gf_l
    gates_b += b * gb_b + head * gb_h + first.to(tl.int64) * gb_l
    gate_f_ok, gate_b_ok = row_ok, row_ok
    if HAS_SEGMENTS:
        own, before, after, first_own, last_own = _load_segments(segments, local, first, L, C)
        gate_f_ok, gate_b_ok = _decaying(segments, local, first, L, own, row_ok)

    # The scores and their gradient, from all of K and all of V
    scores = tl.zeros([C, C], tl.float32)
    for tile in range(tl.cdiv(K, BK)):
        cols = tile * BK + tl.arange(0, BK)
        col_ok = cols < K
        q_i = _load(q, local, cols, q_l, row_ok, col_ok).to(tl.float32)
        k_i = _load(k, local, cols, k_l, row_ok, col_ok).to(tl.float32)
        gf = _load_gates(gates_f, local, cols, gf_l, row_ok, col_ok)
        gb = _load_gates(gates_b, local, cols, gb_l, row_ok, col_ok)
        scores += _steep_scores(q_i, k_i, gf, gb, local, C, SCORE_TERMS, TERMS)
    dscores = tl.zeros([C, C], tl.float32)
    for vtile in range(tl.cdiv(V, BV)):
        vcols = vtile * BV + tl.arange(0, BV)
        v_i = _load(v, local, vcols, v_l, row_ok, vcols < V)
        do_i = _load(do, local, vcols, do_l, row_ok, vcols < V)
        dscores += _dot(do_i, tl.trans(v_i), TERMS, TERMS)
    dscores *= scale
    if HAS_SEGMENTS:
        same = _same_segment(segments, local, first, L)
        scores, dscores = tl.where(same, scores, 0.0), tl.where(same, dscores, 0.0)
    scores_t = tl.trans(scores)

    # dv, tile by tile of V
    for vtile in range(tl.cdiv(V, BV)):
        vcols = vtile * BV + tl.arange(0, BV)
        vcol_ok = vcols < V
        dv_i = _dot(scores_t, _load(do, local, vcols, do_l, row_ok, vcol_ok), TERMS, TERMS)
        for tile in range(tl.cdiv(K, BK)):
            cols = tile * BK + tl.arange(0, BK)
            col_ok = cols < K
            k_i = _load(k, local, cols, k_l, row_ok, col_ok).to(tl.float32)
            gf, gb = _load_neighbour_gates(
                gates_f, gates_b, gf_l, gb_l, local, cols, col_ok, first, L, sizes, b, width, C, HAS_SIZES
            )
            k_f, k_r = k_i * tl.exp2(tl.cumsum(gf, 0, reverse=True)), k_i * tl.exp2(tl.cumsum(gb, 0))
            if HAS_SEGMENTS:
                k_f = tl.where((own == last_own)[:, None], k_f, 0.0)
                k_r = tl.where((own == first_own)[:, None], k_r, 0.0)
            dv_i += _dot(k_f, tl.trans(_load(dstates + states_f, vcols, cols, K, vcol_ok, col_ok)), SCORE_TERMS, TERMS)
            dv_i += _dot(k_r, tl.trans(_load(dstates + states_b, vcols, cols, K, vcol_ok, col_ok)), SCORE_TERMS, TERMS)
        dv_tile = dv + ((b * L + first) * h + head) * V
        _store(dv_tile, local, vcols, h * V, store_ok, vcol_ok, dv_i * scale)

    # dq, dk and the gates, tile by tile of K
    for tile in range(tl.cdiv(K, BK)):
        cols = tile * BK + tl.arange(0, BK)
        col_ok = cols < K
        q_i = _load(q, local, cols, q_l, row_ok, col_ok).to(tl.float32)
        k_i = _load(k, local, cols, k_l, row_ok, col_ok).to(tl.float32)
        gf = _load_gates(gates_f, local, cols, gf_l, row_ok, col_ok)
        gb = _load_gates(gates_b, local, cols, gb_l, row_ok, col_ok)
        dq_i, dk_i, dgf, dgb = _steep_score_gradients(q_i, k_i, gf, gb, dscores, local, C, TERMS, SCORE_TERMS)

        # Gradients of the decayed queries and keys that meet the states
        dq_f, dq_r = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
        dk_f, dk_r = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
        across_f, across_b = tl.zeros([BK], tl.float32), tl.zeros([BK], tl.float32)
        for vtile in range(tl.cdiv(V, BV)):
            vcols = vtile * BV + tl.arange(0, BV)
            vcol_ok = vcols < V
            v_i = _load(v, local, vcols, v_l, row_ok, vcol_ok)
            do_i = _load(do, local, vcols, do_l, row_ok, vcol_ok)
            s_f = _load(states + states_f, vcols, cols, K, vcol_ok, col_ok)
            s_b = _load(states + states_b, vcols, cols, K, vcol_ok, col_ok)
            ds_f = _load(dstates + states_f, vcols, cols, K, vcol_ok, col_ok)
            ds_b = _load(dstates + states_b, vcols, cols, K, vcol_ok, col_ok)
            dq_f += _dot(do_i, s_f, TERMS, TERMS)
            dq_r += _dot(do_i, s_b, TERMS, TERMS)
            dk_f += _dot(v_i, ds_f, TERMS, TERMS)
            dk_r += _dot(v_i, ds_b, TERMS, TERMS)
            across_f += tl.sum(s_f.to(tl.float32) * ds_f.to(tl.float32), 0)
            across_b += tl.sum(s_b.to(tl.float32) * ds_b.to(tl.float32), 0)

        dq_f *= tl.exp2(tl.cumsum(gf, 0)) * scale
        dq_r *= tl.exp2(tl.cumsum(gb, 0, reverse=True)) * scale
        across_f *= tl.exp2(tl.sum(gf, 0)) * scale
        across_b *= tl.exp2(tl.sum(gb, 0)) * scale
        gf, gb = _load_neighbour_gates(
            gates_f, gates_b, gf_l, gb_l, local, cols, col_ok, first, L, sizes, b, width, C, HAS_SIZES
        )
        dk_f *= tl.exp2(tl.cumsum(gf, 0, reverse=True)) * scale
        dk_r *= tl.exp2(tl.cumsum(gb, 0)) * scale
        if HAS_SEGMENTS:
            dq_f = tl.where((own == before)[:, None], dq_f, 0.0)
            dq_r = tl.where((own == after)[:, None], dq_r, 0.0)
            dk_f = tl.where((own == last_own)[:, None], dk_f, 0.0)
            dk_r = tl.where((own == first_own)[:, None], dk_r, 0.0)
            across_f = tl.where(before == last_own, across_f, 0.0)
            across_b = tl.where(after == first_own, across_b, 0.0)
        dq_i += dq_f + dq_r
        dk_i += dk_f + dk_r
        # A gate decays the queries after it, the keys before it, and the state that passes through the whole chunk.
        from_k_f, from_k_r = k_i * dk_f, k_i * dk_r
        dgf += tl.cumsum(q_i * dq_f, 0, reverse=True) + tl.cumsum(from_k_f, 0) - from_k_f + across_f[None, :]
        dgb += tl.cumsum(q_i * dq_r, 0) + tl.cumsum(from_k_r, 0, reverse=True) - from_k_r + across_b[None, :]
        _store(dq + keys, local, cols, h * K, store_ok, col_ok, tl.where(row_ok[:, None], dq_i, 0.0))
        _store(dk + keys, local, cols, h * K, store_ok, col_ok, tl.where(row_ok[:, None], dk_i, 0.0))
        _store(dgates_f + keys, local, cols, h * K, store_ok, col_ok, tl.where(gate_f_ok[:, None], dgf, 0.0))
        _store(dgates_b + keys, local, cols, h * K, store_ok, col_ok, tl.where(gate_b_ok[:, None], dgb, 0.0))
