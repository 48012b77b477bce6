"""The definition of the residual sum and its normalisation, in PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def naive_add_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The definition that every other form must agree with.

    Shapes as in :func:`vig_kernels.add_norm`. Computes in float32, or in float64 where `x` is.
    """
    if branch is not None:
        x = (x + branch).to(x.dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    if bias is None:
        y = F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps)
    else:
        y = F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)
    return y.to(dtype), x
