"""The loss as a torch operator: autograd and fakes, for the chunked and the Triton form."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ..arguments import at_least_float32, without_autocast
from . import chunk


def _form(impl: str):
    """The module that has a form's `forward` and `backward`; Triton itself is imported when it is first used."""
    if impl == "chunk":
        return chunk
    from . import triton_launches

    return triton_launches


def apply(impl: str, logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool) -> tuple[Tensor, Tensor]:
    """Loss and hits. Keeps logits, labels and one number a pixel for the backward pass.

    Shapes as in :func:`vig_kernels.resized_cross_entropy`, with whose definition (`naive`) it must agree.
    """
    return _forward(logits, labels, ignore_index, align_corners, impl)[:2]


@torch.library.custom_op("vig::resized_cross_entropy", mutates_args=())
def _forward(
    logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    with without_autocast(logits):
        return _form(impl).forward(logits, labels, ignore_index, align_corners)


@torch.library.custom_op("vig::resized_cross_entropy_backward", mutates_args=())
def _backward(
    logits: Tensor, labels: Tensor, norm: Tensor, grad_loss: Tensor, ignore_index: int, align_corners: bool, impl: str
) -> Tensor:
    with without_autocast(logits):
        return _form(impl).backward(logits, labels, norm, grad_loss, ignore_index, align_corners)


@_forward.register_fake
def _(logits, labels, ignore_index, align_corners, impl):
    loss = labels.new_empty(labels.shape, dtype=at_least_float32(logits).dtype)
    return loss, torch.empty_like(loss, dtype=torch.bool), torch.empty_like(loss)


@_backward.register_fake
def _(logits, labels, norm, grad_loss, ignore_index, align_corners, impl):
    return logits.new_empty(logits.shape)


def _setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor, int, bool, str], output: tuple[Tensor, ...]) -> None:
    logits, labels, *ctx.options = inputs
    _, hits, norm = output
    ctx.save_for_backward(logits, labels, norm)
    ctx.mark_non_differentiable(hits, norm)


def _autograd(ctx: FunctionCtx, grad_loss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    logits, labels, norm = ctx.saved_tensors
    return _backward(logits, labels, norm, grad_loss, *ctx.options), None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
