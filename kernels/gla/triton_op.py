"""The Triton form of bidirectional gated linear attention as a torch operator: autograd, autocast, fakes, cost.

`torch.ops.vig.bidirectional_gla` returns the output and, if asked to, the states that enter each chunk, which the
backward pass, `torch.ops.vig.bidirectional_gla_backward`, needs. README.md of the folder above derives what the kernels
compute.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils.flop_counter import register_flop_formula

from ..launch import check_input, register_autocast, with_unit_stride
from ..plans import Plan, call
from . import triton_launches
from .triton_launches import Launches, num_chunks, state_dtype


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
) -> Tensor:
    """Linear in L in time and memory; float32 states and gates, whatever the type of q, k, v.

    Shapes as in :func:`vig_kernels.bidirectional_gla`, with which the definition (`naive`) it must agree. All tensors
    are read where they lie, whatever their strides, if those of the last dimension are 1.

    Args:
        segments: ``[L]``, int32, a number per packed sequence, for B = 1; tokens of different sequences do not meet.
        valid_sizes: ``[B, 2]``, integers, rows and columns of each image that are not padding.
        width: tokens in a row of the grid, for `valid_sizes`.

    Raises:
        TypeError: if q, k and v differ in type, or have a type that Triton does not multiply (float64).
        RuntimeError: for tensors that are not on a GPU, outside of Triton's interpreter.
    """
    check_input(q, "chunk")
    if log_gate_fwd.dtype != log_gate_bwd.dtype:
        dtype = torch.promote_types(log_gate_fwd.dtype, log_gate_bwd.dtype)
        log_gate_fwd, log_gate_bwd = log_gate_fwd.to(dtype), log_gate_bwd.to(dtype)
    gates = log_gate_fwd, log_gate_bwd
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *gates))
    keep_states = differentiable and _are_small_states(q, v, log_gate_fwd)
    return _forward(q, k, v, *gates, segments, valid_sizes, width, scale, keep_states)[0]


def _are_small_states(q: Tensor, v: Tensor, gate: Tensor) -> bool:
    """Whether they are worth keeping for the backward pass: no larger than the inputs, else they are computed again."""
    K, V = q.shape[-1], v.shape[-1]
    inputs = (2 * K + V) * q.dtype.itemsize + 2 * K * gate.dtype.itemsize  # bytes of a token: L may be symbolic
    return 2 * K * V * state_dtype(q.dtype).itemsize / triton_launches.CHUNK <= inputs


# ---------------------------------------------------------------------------------------------------------------------
# Operators


@torch.library.custom_op("vig::bidirectional_gla", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, log_gate_fwd: Tensor, log_gate_bwd: Tensor,
    segments: Tensor | None, valid_sizes: Tensor | None, width: int, scale: float, keep_states: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v, gate_f, gate_b = with_unit_stride(q, k, v, log_gate_fwd, log_gate_bwd)
    _check_types(q, k, v)
    inputs = q, k, v, gate_f, gate_b, segments, valid_sizes
    out, *states = call(_record_forward, inputs, width, scale, keep_states)
    return out, states[0] if keep_states else q.new_empty(0, dtype=state_dtype(q.dtype))


def _record_forward(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, gate_f: Tensor, gate_b: Tensor,
    segments: Tensor | None, valid_sizes: Tensor | None, width: int, scale: float, keep_states: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    launches = Launches(plan, q, v, gate_f, gate_b, segments, valid_sizes, width, scale)
    out = plan.empty(*v.shape, dtype=v.dtype)
    states = launches.enter_states(k, v, adjoint=False)
    kept = (launches.complete(states),) if keep_states else ()
    launches.outputs((q, k, v), states, out)
    launches.steep_outputs((q, k, v), states, out)
    return out, *kept


@torch.library.custom_op("vig::bidirectional_gla_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, log_gate_fwd: Tensor, log_gate_bwd: Tensor, states: Tensor | None,
    grad_out: Tensor, segments: Tensor | None, valid_sizes: Tensor | None, width: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v, gate_f, gate_b, do = with_unit_stride(q, k, v, log_gate_fwd, log_gate_bwd, grad_out)
    inputs = q, k, v, gate_f, gate_b, states, do, segments, valid_sizes
    return tuple(call(_record_backward, inputs, width, scale))


def _record_backward(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, gate_f: Tensor, gate_b: Tensor, states: Tensor | None, do: Tensor,
    segments: Tensor | None, valid_sizes: Tensor | None, width: int, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    launches = Launches(plan, q, v, gate_f, gate_b, segments, valid_sizes, width, scale)
    if states is None:
        states = launches.complete(launches.enter_states(k, v, adjoint=False))
    dstates = launches.enter_states(q, do, adjoint=True)
    rest = states, do, launches.complete(dstates)
    dq, dk, dv, dgate_f, dgate_b = (plan.empty(*x.shape, dtype=x.dtype) for x in (q, k, v, gate_f, gate_b))
    launches.outputs((k, q, do), dstates, dv)
    launches.gradients((q, k, v), (*rest, dq, dk, dgate_f, dgate_b), strided=(do,))
    grads = dq, dk, dv, dgate_f, dgate_b
    launches.steep_gradients(dstates.steep, (q, k, v), (*rest, *grads), strided=(do,))
    return grads


def _check_types(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one type, got {q.dtype}, {k.dtype} and {v.dtype}: cast them to one")


@_forward.register_fake
def _(q, k, v, log_gate_fwd, log_gate_bwd, segments, valid_sizes, width, scale, keep_states):
    B, L, h, K = q.shape
    shape = (B, h, 2, num_chunks(L), K, v.shape[-1]) if keep_states else (0,)
    states = q.new_empty(shape, dtype=state_dtype(q.dtype))
    return torch.empty(v.shape, dtype=v.dtype, device=v.device), states


@_backward.register_fake
def _(q, k, v, log_gate_fwd, log_gate_bwd, states, grad_out, segments, valid_sizes, width, scale):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, log_gate_fwd, log_gate_bwd))


def _setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, gate_f, gate_b, segments, valid_sizes, ctx.width, ctx.scale, keep_states = inputs
    states = output[1]
    ctx.set_materialize_grads(False)  # states have no gradient: no need for zeros of their size
    ctx.mark_non_differentiable(states)
    ctx.gate_dtypes = gate_f.dtype, gate_b.dtype
    ctx.save_for_backward(q, k, v, gate_f, gate_b, states if keep_states else None, segments, valid_sizes)


def _autograd(ctx: FunctionCtx, grad_out: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 10
    q, k, v, gate_f, gate_b, states, segments, valid_sizes = ctx.saved_tensors
    *grads, dgate_f, dgate_b = _backward(
        q, k, v, gate_f, gate_b, states, grad_out, segments, valid_sizes, ctx.width, ctx.scale
    )
    dgates = (grad.to(dtype) for grad, dtype in zip((dgate_f, dgate_b), ctx.gate_dtypes))
    return *grads, *dgates, None, None, None, None, None


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
