"""Log-gates from their low-rank code: expanded, activated and, backward, taken back, without the logits in memory."""

import triton
import triton.language as tl

from .common import LOG2_E, dot, load, log_sigmoid, store


@triton.jit
def _weights(weight, bias, cols, ranks, D: tl.constexpr, RANK: tl.constexpr):
    """Rows of the weights [cols, ranks], and the bias as their column RANK, for which the code is 1."""
    w = load(weight, cols, ranks, RANK, cols < D, RANK).to(tl.float32)
    b = tl.load(bias + cols, mask=cols < D, other=0.0).to(tl.float32)
    return tl.where((ranks == RANK)[None, :], b[:, None], w)


@triton.jit
def _code(code, rows, ranks, code_l, ok, RANK: tl.constexpr):
    x = load(code, rows, ranks, code_l, ok, RANK)
    return tl.where((ranks == RANK)[None, :] & ok[:, None], 1.0, x.to(tl.float32))


@triton.jit(do_not_specialize=["tokens"])
def log_gates(
    code, weight, bias, gates_f, gates_b, tokens, inverse_temperature, code_l,
    D: tl.constexpr, RANK: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
    TERMS: tl.constexpr, WEIGHT_TERMS: tl.constexpr,
):  # fmt: skip
    """gates_f, gates_b [tokens, D] = log_sigmoid(code weight^T + bias) / temperature, first and second half of rows."""
    ranks, tiles = tl.arange(0, BR), tl.cdiv(D, BD)
    cols, backward = tl.program_id(1) % tiles * BD + tl.arange(0, BD), tl.program_id(1) >= tiles
    half = tl.where(backward, D, 0)
    gates = tl.where(backward, gates_b, gates_f)
    w = _weights(weight + half * RANK, bias + half, cols, ranks, D, RANK)
    for tile in tl.range(tl.program_id(0), tl.cdiv(tokens, BT), tl.num_programs(0), num_stages=3):
        rows = (tile * BT + tl.arange(0, BT)).to(tl.int64)
        x = _code(code, rows, ranks, code_l, rows < tokens, RANK)
        log_gate = log_sigmoid(dot(x, tl.trans(w), TERMS, WEIGHT_TERMS)) * inverse_temperature
        store(gates, rows, cols, D, rows < tokens, D, log_gate)


@triton.jit(do_not_specialize=["tokens"])
def log_gates_backward(
    code, weight, bias, dgates_f, dgates_b, dcode, dweights, tokens, inverse_temperature,
    code_l, df_l, db_l,
    D: tl.constexpr, RANK: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
    TERMS: tl.constexpr, WEIGHT_TERMS: tl.constexpr,
):  # fmt: skip
    """dcode [tiles of both directions, tokens, RANK]: addends of the code's gradient.

    dweights [programs, RANK + 1, 2 D]: what each program's tokens add to the gradients of the weights, the bias last.
    """
    ranks, tiles = tl.arange(0, BR), tl.cdiv(D, BD)
    cols, backward = tl.program_id(1) % tiles * BD + tl.arange(0, BD), tl.program_id(1) >= tiles
    half = tl.where(backward, D, 0)
    dgates, d_l = tl.where(backward, dgates_b, dgates_f), tl.where(backward, db_l, df_l)
    w = _weights(weight + half * RANK, bias + half, cols, ranks, D, RANK)
    dcode += tl.program_id(1).to(tl.int64) * tokens * RANK
    dweight = tl.zeros([BR, BD], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(tokens, BT), tl.num_programs(0), num_stages=3):
        rows = (tile * BT + tl.arange(0, BT)).to(tl.int64)
        ok = rows < tokens
        x = _code(code, rows, ranks, code_l, ok, RANK)
        logits = dot(x, tl.trans(w), TERMS, WEIGHT_TERMS)
        slope = inverse_temperature / (1 + tl.exp2(tl.minimum(logits * LOG2_E, 126.0)))
        dlogits = load(dgates, rows, cols, d_l, ok, D).to(tl.float32) * slope
        store(dcode, rows, ranks, RANK, ok, RANK, dot(dlogits, w, WEIGHT_TERMS, WEIGHT_TERMS))
        dweight += dot(tl.trans(x), dlogits, TERMS, WEIGHT_TERMS)
    dweights += tl.program_id(0) * (RANK + 1) * 2 * D + half
    store(dweights, ranks, cols, 2 * D, ranks <= RANK, D, dweight)
