"""The Triton form of the residual sum and its normalisation as a torch operator: launches, autograd, fakes."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ..launch import ceil_div, check_input, contiguous, multiprocessors, power_of_2_from
from ..plans import Plan, call
from . import triton_kernels as kernels
from .dispatch import MAX_CHANNELS

# Numbers of the stream that a program takes at once, with four warps: one token at least.
TILE = 2048
# Programs per multiprocessor of the backward kernel, each with sums of its own for the weights' gradients.
PROGRAMS = 4


def triton_add_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """One kernel forward, one backward, which keeps the sum and the weight alone; no atomics.

    Shapes as in :func:`vig_kernels.add_norm`, with whose definition (`naive`) it must agree.

    Raises:
        TypeError: for float64.
        ValueError: for too many channels.
        RuntimeError: for tensors that are not on a GPU, outside of Triton's interpreter.
    """
    check_input(x, "naive")
    if x.shape[-1] > MAX_CHANNELS:
        raise ValueError(f"impl='triton' takes up to {MAX_CHANNELS} channels, got {x.shape[-1]}: use impl='naive'")
    y, total = _forward(x, branch, weight, bias, eps, dtype)
    return y, x if branch is None else total


def _tile(C: int) -> dict[str, int]:
    BC = power_of_2_from(C)
    return dict(C=C, BC=BC, ROWS=max(TILE // BC, 1), num_warps=4)


@torch.library.custom_op("vig::add_norm", mutates_args=())
def _forward(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    y, *total = call(_record_forward, contiguous(x, branch, weight, bias), eps, dtype)
    return y, total[0] if total else x.new_empty(0)


def _record_forward(
    plan: Plan, x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    y = plan.empty(*x.shape, dtype=dtype)
    total = None if branch is None else plan.empty(*x.shape, dtype=x.dtype)
    tile = _tile(x.shape[-1])
    count = x.numel() // x.shape[-1]
    plan.launch(
        kernels.forward, (ceil_div(count, tile["ROWS"]),), x, branch, weight, bias, y, total, count, eps, **tile
    )
    return (y,) if total is None else (y, total)


@torch.library.custom_op("vig::add_norm_backward", mutates_args=())
def _backward(
    total: Tensor, weight: Tensor, dy: Tensor, dtotal: Tensor | None, eps: float, centred: bool,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, branch, weight and bias, the latter two in float32; of size 0 where there is none."""
    inputs = contiguous(total, weight, dy, dtotal)
    dx, *dbranch, dweights = call(_record_backward, inputs, eps, centred, branch_dtype)
    nothing = dx.new_empty(0)
    dbias = dweights[:, 1].sum(0) if centred else dweights.new_empty(0)
    return dx, dbranch[0] if dbranch else nothing, dweights[:, 0].sum(0), dbias


def _record_backward(
    plan: Plan, total: Tensor, weight: Tensor, dy: Tensor, dtotal: Tensor | None, eps: float, centred: bool,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    C = total.shape[-1]
    count, tile = total.numel() // C, _tile(C)
    programs = min(ceil_div(count, tile["ROWS"]), PROGRAMS * multiprocessors(total.device))
    dx = plan.empty(*total.shape, dtype=total.dtype)
    dbranch = None if branch_dtype is None else plan.empty(*total.shape, dtype=branch_dtype)
    dweights = plan.empty(programs, 2, C, dtype=torch.float32)
    plan.launch(
        kernels.backward, (programs,), total, weight, dy, dtotal, dx, dbranch, dweights, count, eps,
        CENTRED=centred, **tile,
    )  # fmt: skip
    return (dx, dweights) if dbranch is None else (dx, dbranch, dweights)


@_forward.register_fake
def _(x, branch, weight, bias, eps, dtype):
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    return y, x.new_empty(0) if branch is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)


@_backward.register_fake
def _(total, weight, dy, dtotal, eps, centred, branch_dtype):
    dx = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    dbranch = dx.new_empty(0) if branch_dtype is None else torch.empty_like(dx, dtype=branch_dtype)
    sums = torch.empty(weight.shape, dtype=torch.float32, device=total.device)
    return dx, dbranch, sums, torch.empty_like(sums) if centred else sums.new_empty(0)


def _setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, branch, weight, bias, ctx.eps, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.branch_dtype = None if branch is None else branch.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    if branch is None:
        ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x if branch is None else output[1], weight)


def _autograd(ctx: FunctionCtx, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
    total, weight = ctx.saved_tensors
    if dy is None:  # the norm was not used
        dbranch = None if ctx.branch_dtype is None or dtotal is None else dtotal.to(ctx.branch_dtype)
        return dtotal, dbranch, None, None, None, None
    centred = ctx.bias_dtype is not None
    dx, dbranch, dweight, dbias = _backward(total, weight, dy, dtotal, ctx.eps, centred, ctx.branch_dtype)
    return (
        dx,
        None if ctx.branch_dtype is None else dbranch,
        dweight.to(weight.dtype),
        dbias.to(ctx.bias_dtype) if centred else None,
        None,
        None,
    )


_forward.register_autograd(_autograd, setup_context=_setup_context)
