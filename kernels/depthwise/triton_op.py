"""The Triton form of the depthwise convolution as a torch operator: launches, autograd, fakes, cost."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils.flop_counter import register_flop_formula

from ..launch import (
    ceil_div,
    check_input,
    multiprocessors,
    power_of_2_from,
    register_autocast,
    strides,
    with_unit_stride,
)
from ..plans import Plan, call
from . import triton_kernels as kernels

# Numbers of a row that a program takes at once, with four warps.
CONVOLVE_TILE = 1024
GRADIENTS_TILE = 512
# Channels of them, at most: 128 bytes in bfloat16.
CHANNELS = 64
# Programs that run on a multiprocessor at a time; registers are the limit.
CONVOLVE_PROGRAMS = 3
GRADIENTS_PROGRAMS = 3
# Rows that `convolve` loads ahead, where registers allow it.
AHEAD = 2
# What a program does beside its strip of rows, in the time of a row: the rows above and below, the weights.
START = 4


def triton_depthwise_conv3x3(x: Tensor, weight: Tensor, activation: bool, valid_sizes: Tensor | None = None) -> Tensor:
    """One kernel forward; backward one, or two with `activation`. Keeps x and weight alone; no atomics.

    Shapes as in :func:`vig_kernels.depthwise_conv3x3`, with whose definition (`naive`) it must agree. An
    autocast region takes x to its own type, and the weights as they are.

    Raises:
        TypeError: for float64.
        RuntimeError: for tensors that are not on a GPU, outside of Triton's interpreter.
    """
    check_input(x, "naive")
    return _forward(x, weight, activation, None if valid_sizes is None else valid_sizes.contiguous())


class _Tiles(NamedTuple):
    """How a map is divided: into strips of rows, blocks of columns and blocks of channels, a program for each."""

    count: int  # with all their channels
    grid: tuple[int]
    strips: tuple[int, int]  # their rows and, per image, their number
    blocks: dict[str, int]


def _divide(x: Tensor, tile: int, programs: int) -> _Tiles:
    """For so many programs on each multiprocessor at a time."""
    B, H, W, C = x.shape
    BC = CHANNELS // 2 if C % CHANNELS == CHANNELS // 2 else min(power_of_2_from(C), CHANNELS)
    BW = tile // BC
    columns, channel_blocks = B * ceil_div(W, BW), ceil_div(C, BC)
    rows = _strip_rows(H, columns * channel_blocks, programs * multiprocessors(x.device))
    strips = ceil_div(H, rows)
    count = columns * strips
    return _Tiles(count, (count * channel_blocks,), (rows, strips), dict(BW=BW, BC=BC, num_warps=4))


def _strip_rows(H: int, columns: int, programs: int) -> int:
    """Rows of the strips into which to cut each of `columns`, where so many programs run at a time."""

    def time(rows: int) -> int:
        return ceil_div(columns * ceil_div(H, rows), programs) * (rows + START)

    return min((ceil_div(H, max(programs * waves // columns, 1)) for waves in (1, 2, 3)), key=time)


def _taps(weight: Tensor) -> Tensor:
    """[9, C]: for each of the nine, channels are neighbours."""
    return weight.flatten(1).t().contiguous()


def _convolve(
    x: Tensor, taps: Tensor, valid: Tensor | None, activation: bool = False, grad_out: Tensor | None = None
) -> Tensor:
    """The result, or, given its gradient, that of what `activation` gets."""
    return call(_record_convolve, (x, taps, grad_out, valid), activation)[0]


def _record_convolve(
    plan: Plan, x: Tensor, taps: Tensor, grad_out: Tensor | None, valid: Tensor | None, activation: bool
) -> tuple[Tensor]:
    _, H, W, C = x.shape
    out = plan.empty(*x.shape, dtype=x.dtype)
    tiles = _divide(x, CONVOLVE_TILE, CONVOLVE_PROGRAMS)
    plan.launch(
        kernels.convolve, tiles.grid,
        x, taps, grad_out, out, valid, H, W, C, *tiles.strips, *strides(x, out if grad_out is None else grad_out),
        ACTIVATION=activation, AHEAD=AHEAD if grad_out is None else 1, **tiles.blocks,
    )  # fmt: skip
    return (out,)


def _gradients(x: Tensor, taps: Tensor, dy: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Those of x and, [9, C] in float32, of the taps, from that of the convolution."""
    dx, dtaps = call(_record_gradients, (x, taps, dy, valid))
    return dx, dtaps.sum(0)


def _record_gradients(plan: Plan, x: Tensor, taps: Tensor, dy: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    _, H, W, C = x.shape
    dx = plan.empty(*x.shape, dtype=x.dtype)
    tiles = _divide(x, GRADIENTS_TILE, GRADIENTS_PROGRAMS)
    dtaps = plan.empty(tiles.count, 9, C, dtype=torch.float32)
    plan.launch(
        kernels.gradients, tiles.grid,
        x, taps, dy, dx, dtaps, valid, H, W, C, *tiles.strips, *strides(x, dy), **tiles.blocks,
    )  # fmt: skip
    return dx, dtaps


# ---------------------------------------------------------------------------------------------------------------------
# Operators


@torch.library.custom_op("vig::depthwise_conv3x3", mutates_args=())
def _forward(x: Tensor, weight: Tensor, activation: bool, valid_sizes: Tensor | None = None) -> Tensor:
    return _convolve(*with_unit_stride(x), _taps(weight), valid_sizes, activation)


@torch.library.custom_op("vig::depthwise_conv3x3_backward", mutates_args=())
def _backward(
    x: Tensor,
    weight: Tensor,
    grad_out: Tensor,
    activation: bool,
    weight_gradient: bool,
    valid_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Without `weight_gradient`, that of the weight has size 0."""
    x, dy = with_unit_stride(x, grad_out)
    taps = _taps(weight)
    if activation:
        dy = _convolve(x, taps, valid_sizes, activation, dy)
    if not weight_gradient:
        return _convolve(dy, taps.flip(0), valid_sizes), weight.new_empty(0)
    dx, dtaps = _gradients(x, taps, dy, valid_sizes)
    return dx, torch.empty(weight.shape, dtype=weight.dtype, device=x.device).copy_(dtaps.t().view(weight.shape))


@_forward.register_fake
def _(x, weight, activation, valid_sizes=None):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@_backward.register_fake
def _(x, weight, grad_out, activation, weight_gradient, valid_sizes=None):
    dweight = torch.empty(weight.shape if weight_gradient else (0,), dtype=weight.dtype, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), dweight


def _setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.activation, valid_sizes = inputs
    ctx.save_for_backward(x, weight, valid_sizes)


def _autograd(ctx: FunctionCtx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    weight_gradient = ctx.needs_input_grad[1]
    x, weight, valid_sizes = ctx.saved_tensors
    dx, dweight = _backward(x, weight, grad_out, ctx.activation, weight_gradient, valid_sizes)
    return dx, dweight if weight_gradient else None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _in_type_of_region(dtype: torch.dtype, x: Tensor, *rest: Any) -> tuple[Any, ...]:
    return x.to(dtype), *rest


register_autocast("depthwise_conv3x3", _in_type_of_region)


# ---------------------------------------------------------------------------------------------------------------------
# Cost of the convolutions


@register_flop_formula(torch.ops.vig.depthwise_conv3x3)
def _forward_flops(x_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * 9 * x_shape.numel()


@register_flop_formula(torch.ops.vig.depthwise_conv3x3_backward)
def _backward_flops(x_shape, weight_shape, grad_shape, activation, weight_gradient, *args, **kwargs) -> int:
    return 2 * 9 * x_shape.numel() * (1 + weight_gradient)
