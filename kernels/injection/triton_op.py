"""The Triton form of gating locality injection as a torch operator: launches, autograd, fakes."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ..launch import ceil_div, check_input, contiguous, multiprocessors, power_of_2_from, strides, with_unit_stride
from ..plans import Plan, call
from . import triton_kernels as kernels

# Numbers of each input that a program takes at once.
TILE = 2048
# Programs per multiprocessor of the backward kernel, each with sums of its own for the weights' gradients.
PROGRAMS = 8


def triton_locality_injection(
    scan: Tensor,
    local: Tensor,
    gate_logits: Tensor,
    gate_bias: Tensor | None,
    scan_weight: Tensor,
    local_weight: Tensor,
    eps: float,
    activation: bool,
) -> Tensor:
    """One kernel forward, one backward, which keeps the inputs alone; no atomics.

    Shapes as in :func:`vig_kernels.locality_injection`, with whose definition (`naive`) it must agree.

    Raises:
        TypeError: for float64.
        RuntimeError: for tensors that are not on a GPU, outside of Triton's interpreter.
    """
    check_input(scan, "naive")
    return _forward(scan, local, gate_logits, gate_bias, scan_weight, local_weight, eps, activation)


def _blocks(V: int) -> dict[str, int]:
    BV = power_of_2_from(V)
    return dict(V=V, BV=BV, ROWS=max(TILE // BV, 1))


@torch.library.custom_op("vig::locality_injection", mutates_args=())
def _forward(
    scan: Tensor, local: Tensor, gate_logits: Tensor, gate_bias: Tensor | None, scan_weight: Tensor,
    local_weight: Tensor, eps: float, activation: bool,
) -> Tensor:  # fmt: skip
    inputs = *with_unit_stride(scan, local, gate_logits), *contiguous(gate_bias, scan_weight, local_weight)
    return call(_record_forward, inputs, eps, activation)[0]


def _record_forward(
    plan: Plan, scan: Tensor, local: Tensor, gate_logits: Tensor, gate_bias: Tensor | None, scan_weight: Tensor,
    local_weight: Tensor, eps: float, activation: bool,
) -> tuple[Tensor]:  # fmt: skip
    B, L, h, V = scan.shape
    out = plan.empty(*scan.shape, dtype=scan.dtype)
    blocks = _blocks(V)
    plan.launch(
        kernels.forward, (ceil_div(B * L * h, blocks["ROWS"]),),
        scan, local, gate_logits, gate_bias, scan_weight, local_weight, out, L, h, B * L * h, eps,
        *strides(scan, local, gate_logits), **blocks, ACTIVATION=activation, num_warps=4,
    )  # fmt: skip
    return (out,)


@torch.library.custom_op("vig::locality_injection_backward", mutates_args=())
def _backward(
    scan: Tensor, local: Tensor, gate_logits: Tensor, gate_bias: Tensor | None, scan_weight: Tensor,
    local_weight: Tensor, grad_out: Tensor, eps: float, activation: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    scan, local, gate_logits, grad_out = with_unit_stride(scan, local, gate_logits, grad_out)
    inputs = scan, local, gate_logits, *contiguous(gate_bias, scan_weight, local_weight), grad_out
    *grads, dweights = call(_record_backward, inputs, eps, activation)
    return *grads, dweights[:, 0].sum(0).to(scan_weight.dtype), dweights[:, 1].sum(0).to(local_weight.dtype)


def _record_backward(
    plan: Plan, scan: Tensor, local: Tensor, gate_logits: Tensor, gate_bias: Tensor | None, scan_weight: Tensor,
    local_weight: Tensor, grad_out: Tensor, eps: float, activation: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    B, L, h, V = scan.shape
    blocks = _blocks(V)
    grads = [plan.empty(*x.shape, dtype=x.dtype) for x in (scan, local, gate_logits)]
    programs = min(ceil_div(B * L * h, blocks["ROWS"]), PROGRAMS * multiprocessors(scan.device))
    dweights = plan.empty(programs, 2, V, dtype=torch.float32)
    plan.launch(
        kernels.backward, (programs,),
        scan, local, gate_logits, gate_bias, scan_weight, local_weight, grad_out, *grads, dweights,
        L, h, B * L * h, eps, *strides(scan, local, gate_logits, grad_out), **blocks,
        ACTIVATION=activation, num_warps=4,
    )  # fmt: skip
    return *grads, dweights


@_forward.register_fake
def _(scan, local, gate_logits, gate_bias, scan_weight, local_weight, eps, activation):
    return torch.empty(scan.shape, dtype=scan.dtype, device=scan.device)


@_backward.register_fake
def _(scan, local, gate_logits, gate_bias, scan_weight, local_weight, grad_out, eps, activation):
    inputs = scan, local, gate_logits, scan_weight, local_weight
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs)


def _setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: FunctionCtx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    dscan, dlocal, dlogits, *dweights = _backward(*ctx.saved_tensors, grad_out, ctx.eps, ctx.activation)
    gate_bias = ctx.saved_tensors[3]
    dbias = dlogits.sum((0, 1), dtype=torch.float32).to(gate_bias.dtype) if gate_bias is not None else None
    return dscan, dlocal, dlogits, dbias, *dweights, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
