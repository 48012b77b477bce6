"""The Triton form of the gated linear layer as a torch operator: launches, autograd, fakes, cost."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils.flop_counter import register_flop_formula

from ..launch import ceil_div, check_input, multiprocessors, power_of_2_from, register_autocast, with_unit_stride
from ..plans import Plan, call
from . import triton_kernels as kernels

# Rows and columns of the result that a program of `forward` makes, and its warps; the first that keeps all
# multiprocessors busy. Two programs, or more, share one, so that one multiplies while another one loads or stores.
TILES = ((128, 64, 8), (64, 64, 4), (64, 32, 4))
# Bytes of a row of x, and of the weight, that it takes at a time, and how many times ahead: 96 KB of shared memory.
DEPTHS = (128, 64)
STAGES = 3
# Numbers of the result that a program of `gradient` takes.
GRADIENT_TILE = 2048


def triton_linear_swiglu(x: Tensor, weight: Tensor) -> Tensor:
    """One kernel forward. Keeps x and weight alone: backward makes gates and values again, for one more product.

    Shapes as in :func:`vig_kernels.swiglu.linear_swiglu`, with whose definition (`naive`) it must agree. An autocast
    region takes both to its own type. Products of float32 are TF32 where PyTorch's own are.

    Raises:
        TypeError: for float64.
        RuntimeError: for tensors that are not on a GPU, outside of Triton's interpreter.
    """
    check_input(x, "naive")
    return _forward(x, weight.to(x.dtype))


def _rows(x: Tensor) -> Tensor:
    """[M, C], a view where the strides allow that."""
    return with_unit_stride(x)[0].reshape(-1, x.shape[-1])


def _blocks(x: Tensor, D: int) -> dict[str, int]:
    """For x [M, C]. Without TF32 float32 needs many registers: the smallest tile."""
    (M, C), tiles = x.shape, TILES
    if x.dtype == torch.float32:
        tiles = TILES[-1:]
    elif C <= 128:  # too few steps to load ahead: more programs instead (C = 96 on an H200: 56 instead of 70 µs)
        tiles = TILES[1:]
    busy = (tile for tile in tiles if ceil_div(M, tile[0]) * ceil_div(D, tile[1]) >= multiprocessors(x.device))
    BM, BN, warps = next(busy, tiles[-1])
    depths = (size // x.element_size() for size in DEPTHS)
    BK = min(depths, key=lambda depth: ceil_div(C, depth) * depth)  # the least padding
    return dict(BM=BM, BN=BN, BK=BK, num_warps=warps)


@torch.library.custom_op("vig::linear_swiglu", mutates_args=())
def _forward(x: Tensor, weight: Tensor) -> Tensor:
    # The older name of it, `allow_tf32`, sets this one too, but cannot be read where both have been in use.
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return call(_record_forward, (_rows(x), weight.contiguous()), tf32)[0].view(*x.shape[:-1], -1)


def _record_forward(plan: Plan, x: Tensor, weight: Tensor, tf32: bool) -> tuple[Tensor]:
    (M, C), D = x.shape, len(weight) // 2
    out = plan.empty(M, D, dtype=x.dtype)
    blocks = _blocks(x, D)
    plan.launch(
        kernels.forward, (ceil_div(M, blocks["BM"]) * ceil_div(D, blocks["BN"]),), x, weight, out, M, x.stride(0),
        C=C, D=D, PRECISION="tf32" if tf32 else "ieee", **blocks, num_stages=STAGES,
    )  # fmt: skip
    return (out,)


@torch.library.custom_op("vig::linear_swiglu_backward", mutates_args=())
def _backward(
    x: Tensor, weight: Tensor, grad_out: Tensor, x_gradient: bool, weight_gradient: bool
) -> tuple[Tensor, Tensor]:
    """A gradient that nobody asks for has size 0."""
    rows = _rows(x)
    h = F.linear(rows, weight)
    call(_record_gradient, (h, _rows(grad_out)))
    dx = (h @ weight).view(x.shape) if x_gradient else x.new_empty(0)
    return dx, h.t() @ rows if weight_gradient else weight.new_empty(0)


def _record_gradient(plan: Plan, h: Tensor, grad_out: Tensor) -> tuple[()]:
    """In place."""
    M, D = grad_out.shape
    BN = min(power_of_2_from(D), GRADIENT_TILE // 4)
    BM = GRADIENT_TILE // BN
    grid = (ceil_div(M, BM) * ceil_div(D, BN),)
    plan.launch(kernels.gradient, grid, h, grad_out, M, grad_out.stride(0), D=D, BM=BM, BN=BN, num_warps=4)
    return ()


@_forward.register_fake
def _(x, weight):
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2)


@_backward.register_fake
def _(x, weight, grad_out, x_gradient, weight_gradient):
    return x.new_empty(x.shape if x_gradient else 0), weight.new_empty(weight.shape if weight_gradient else 0)


def _setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: FunctionCtx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _backward(*ctx.saved_tensors, grad_out, *ctx.needs_input_grad)
    return tuple(x if needed else None for x, needed in zip(gradients, ctx.needs_input_grad))


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _in_type_of_region(dtype: torch.dtype, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x.to(dtype), weight.to(dtype)


def _in_types_of_forward(dtype: torch.dtype, *arguments: Any) -> tuple[Any, ...]:
    """Where the region holds the backward pass: its products are of the types that the forward pass had."""
    return arguments


register_autocast("linear_swiglu", _in_type_of_region)
register_autocast("linear_swiglu_backward", _in_types_of_forward)


# ---------------------------------------------------------------------------------------------------------------------
# Cost of the products


def _product_flops(x_shape: torch.Size, weight_shape: torch.Size) -> int:
    return 2 * x_shape.numel() * weight_shape[0]


@register_flop_formula(torch.ops.vig.linear_swiglu)
def _forward_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return _product_flops(x_shape, weight_shape)


@register_flop_formula(torch.ops.vig.linear_swiglu_backward)
def _backward_flops(x_shape, weight_shape, grad_shape, *gradients, out_shape=None, **kwargs) -> int:
    return _product_flops(x_shape, weight_shape) * (1 + sum(gradients))
