"""The definition of the depthwise convolution, in PyTorch."""

import torch.nn.functional as F
from torch import Tensor

from ..padding import clear_padding_tokens


def naive_depthwise_conv3x3(x: Tensor, weight: Tensor, activation: bool, valid_sizes: Tensor | None = None) -> Tensor:
    """The definition that every other form must agree with: the model's `nn.Conv2d` and `nn.SiLU`.

    Shapes as in :func:`vig_kernels.depthwise_conv3x3`. Computes in the type of `x`, like those modules: in
    low precision PyTorch sums in float32, but SiLU gets rounded numbers. An autocast region moves the convolution to
    its own type, as it would the module.
    """
    weight = weight.to(x.dtype)
    x = clear_padding_tokens(x, valid_sizes)
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, padding=1, groups=len(weight)).permute(0, 2, 3, 1)
    return clear_padding_tokens(F.silu(y) if activation else y, valid_sizes)
