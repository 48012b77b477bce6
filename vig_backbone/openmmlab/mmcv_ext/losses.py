"""Sigmoid and softmax focal loss with their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import kernel_mode, wide, wide_dtype

__all__ = [
    "sigmoid_focal_loss_backward",
    "sigmoid_focal_loss_forward",
    "softmax_focal_loss_backward",
    "softmax_focal_loss_forward",
]


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Fill ``output`` (N, C) with the loss of every class (contract of ``mmcv.ops.sigmoid_focal_loss``).

    ``input`` (N, C) logits; ``target`` (N,) class, where any value outside [0, C) means that no class is present;
    ``weight`` (C,) or empty scales a row by the weight of its target class (rows without a class by 1).
    """
    with kernel_mode(input):
        logits, positive = wide(input), _is_target(input, target)
        p, q, log_p, log_q = _probabilities(logits)
        loss = torch.where(positive, -alpha * q**gamma * log_p, (alpha - 1) * p**gamma * log_q)
        output.copy_(loss * _row_weight(weight, target, logits).unsqueeze(1))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Fill ``grad_input`` (N, C) with the derivative of each loss with respect to its logit."""
    with kernel_mode(input):
        logits, positive = wide(input), _is_target(input, target)
        p, q, log_p, log_q = _probabilities(logits)
        present = alpha * q**gamma * (gamma * p * log_p - q)
        absent = (alpha - 1) * p**gamma * (gamma * q * log_q - p)
        grad_input.copy_(torch.where(positive, present, absent) * _row_weight(weight, target, logits).unsqueeze(1))


def softmax_focal_loss_forward(
    softmax: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Fill ``output`` (N,) with the loss of the target class (contract of ``mmcv.ops.softmax_focal_loss``).

    ``softmax`` (N, C) probabilities; ``target`` (N,) class, a negative one is ignored (loss 0); ``weight`` (C,) or
    empty scales a row by the weight of its target class.
    """
    with kernel_mode(softmax):
        p = _target_probability(softmax, target)
        loss = -alpha * (1 - p) ** gamma * _log(p) * _row_weight(weight, target, p)
        output.copy_(torch.where(target >= 0, loss, 0.0))


def softmax_focal_loss_backward(
    softmax: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Fill ``grad_input`` (N, C) with the derivative of each row's loss with respect to the logits.

    ``buff`` (N,) receives the factor that multiplies ``one_hot(target) - softmax``.
    """
    with kernel_mode(softmax):
        p = _target_probability(softmax, target)
        q = 1 - p
        # With gamma < 1 the power below has a pole at p = 1, where its factor log(p) is 0.
        slope = torch.where(q > 0, gamma * q ** (gamma - 1) * p * _log(p), 0.0)
        factor = alpha * (slope - q**gamma) * _row_weight(weight, target, p)
        factor = torch.where(target >= 0, factor, 0.0)
        buff.copy_(factor)
        grad_input.copy_(factor.unsqueeze(1) * (_is_target(softmax, target).to(p.dtype) - wide(softmax)))


def _is_target(scores: Tensor, target: Tensor) -> Tensor:
    return target.unsqueeze(1) == torch.arange(scores.size(1), device=scores.device)


def _probabilities(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p, 1 - p, log p and log(1 - p), each from the logit so that none loses digits near 0 and 1."""
    log_p, log_q = torch.nn.functional.logsigmoid(logits), torch.nn.functional.logsigmoid(-logits)
    return logits.sigmoid(), (-logits).sigmoid(), log_p, log_q


def _target_probability(softmax: Tensor, target: Tensor) -> Tensor:
    if not softmax.numel():
        return softmax.new_zeros(target.shape, dtype=wide_dtype(softmax))
    return wide(softmax).gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1)


def _log(probability: Tensor) -> Tensor:
    return probability.clamp(min=torch.finfo(torch.float32).tiny).log()


def _row_weight(weight: Tensor, target: Tensor, like: Tensor) -> Tensor:
    if not weight.numel():
        return like.new_ones(target.shape)
    known = (target >= 0) & (target < len(weight))
    return torch.where(known, weight.to(like.dtype)[target.clamp(0, len(weight) - 1)], 1.0)
