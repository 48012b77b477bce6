"""The Triton form of `log_gates` as a torch operator: launches, autograd, fakes, cost."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils.flop_counter import register_flop_formula

from ..launch import ceil_div, check_input, multiprocessors, power_of_2_from, with_unit_stride
from ..plans import Plan, call
from . import triton_kernels as kernels
from .gates import MAX_RANK

# Tokens and channels of a tile; with two warps, and no more than 32 tokens, Triton does not use wgmma (see
# triton_launches.py).
TOKENS, CHANNELS, WARPS = 32, 64, 2
# Programs per multiprocessor: as many as run at a time.
PROGRAMS, BACKWARD_PROGRAMS = 12, 4


def triton_log_gates(
    code: Tensor, weight: Tensor, bias: Tensor, num_heads: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """One kernel forward, one backward, which keeps the inputs alone; no atomics.

    Shapes as in :func:`vig_kernels.log_gates`, with whose definition (`naive`) it must agree.

    Raises:
        TypeError: for float64.
        ValueError: for a code that is too long.
        RuntimeError: for tensors that are not on a GPU, outside of Triton's interpreter.
    """
    check_input(code, "naive")
    if code.shape[-1] > MAX_RANK:
        raise ValueError(
            f"impl='triton' takes codes of up to {MAX_RANK} numbers, got {code.shape[-1]}: use impl='naive'"
        )
    return _forward(code, weight, bias, num_heads, temperature)


def gate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of log-gates. Not float16, which does not hold those that are nearly 0."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _constants(code: Tensor, weight: Tensor) -> dict[str, int]:
    D, R = len(weight) // 2, code.shape[-1]
    terms = {torch.bfloat16: 1, torch.float16: 2}.get(code.dtype, 3)
    return dict(
        D=D, RANK=R, BT=TOKENS, BD=min(max(power_of_2_from(D), 16), CHANNELS), BR=max(power_of_2_from(R + 1), 16),
        TERMS=terms, WEIGHT_TERMS=max(terms, 2), num_warps=WARPS,
    )  # fmt: skip


def _grid(tokens: int, constants: dict[str, int], programs: int) -> tuple[int, int]:
    """For about so many programs: those that share the tokens, tiles of the channels of both directions."""
    tiles = 2 * ceil_div(constants["D"], constants["BD"])
    return min(ceil_div(tokens, TOKENS), ceil_div(programs, tiles)), tiles


@torch.library.custom_op("vig::log_gates", mutates_args=())
def _forward(code: Tensor, weight: Tensor, bias: Tensor, num_heads: int, temperature: float) -> tuple[Tensor, Tensor]:
    (rows,) = with_unit_stride(code.flatten(0, 1))
    gates = call(_record_forward, (rows, weight.contiguous(), bias.contiguous()), temperature)
    forward, backward = (x.view(*code.shape[:2], num_heads, -1) for x in gates)
    return forward, backward


def _record_forward(
    plan: Plan, code: Tensor, weight: Tensor, bias: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    constants = _constants(code, weight)
    tokens, D = len(code), constants["D"]
    gates = plan.empty(tokens, D, dtype=gate_dtype(code.dtype)), plan.empty(tokens, D, dtype=gate_dtype(code.dtype))
    plan.launch(
        kernels.log_gates, _grid(tokens, constants, PROGRAMS * multiprocessors(code.device)),
        code, weight, bias, *gates, tokens, 1 / temperature, code.stride(0), **constants,
    )  # fmt: skip
    return gates


@torch.library.custom_op("vig::log_gates_backward", mutates_args=())
def _backward(
    code: Tensor, weight: Tensor, bias: Tensor, dgate_f: Tensor, dgate_b: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows, *grads = with_unit_stride(code.flatten(0, 1), *(x.flatten(2).flatten(0, 1) for x in (dgate_f, dgate_b)))
    inputs = rows, weight.contiguous(), bias.contiguous(), *grads
    dcode, dweights = (x.sum(0) for x in call(_record_backward, inputs, temperature))
    dweight, dbias = dweights[:-1].t().clone(memory_format=torch.contiguous_format), dweights[-1].clone()
    return dcode.to(code.dtype).view(code.shape), dweight.to(weight.dtype), dbias.to(bias.dtype)


def _record_backward(
    plan: Plan, code: Tensor, weight: Tensor, bias: Tensor, dgate_f: Tensor, dgate_b: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    constants = _constants(code, weight)
    (tokens, R), D = code.shape, constants["D"]
    programs, tiles = _grid(tokens, constants, BACKWARD_PROGRAMS * multiprocessors(code.device))
    dcode = plan.empty(tiles, tokens, R, dtype=torch.float32)
    dweights = plan.empty(programs, R + 1, 2 * D, dtype=torch.float32)
    plan.launch(
        kernels.log_gates_backward, (programs, tiles),
        code, weight, bias, dgate_f, dgate_b, dcode, dweights, tokens, 1 / temperature,
        *(x.stride(0) for x in (code, dgate_f, dgate_b)), **constants,
    )  # fmt: skip
    return dcode, dweights


@_forward.register_fake
def _(code, weight, bias, num_heads, temperature):
    shape, dtype = (*code.shape[:2], num_heads, len(weight) // (2 * num_heads)), gate_dtype(code.dtype)
    return code.new_empty(shape, dtype=dtype), code.new_empty(shape, dtype=dtype)


@_backward.register_fake
def _(code, weight, bias, dgate_f, dgate_b, temperature):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (code, weight, bias))


def _setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    code, weight, bias, _, ctx.temperature = inputs
    ctx.save_for_backward(code, weight, bias)


def _autograd(ctx: FunctionCtx, dgate_f: Tensor, dgate_b: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(*ctx.saved_tensors, dgate_f, dgate_b, ctx.temperature), None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.vig.log_gates)
def _forward_flops(code_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    B, L, R = code_shape
    return 2 * B * L * R * weight_shape[0]


@register_flop_formula(torch.ops.vig.log_gates_backward)
def _backward_flops(code_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * _forward_flops(code_shape, weight_shape)
