"""The definition of the gated linear layer, in PyTorch."""

import torch.nn.functional as F
from torch import Tensor


def naive_linear_swiglu(x: Tensor, weight: Tensor) -> Tensor:
    """The definition that every other form must agree with; a product and, on a GPU, two kernels more.

    Shapes as in :func:`vig_kernels.swiglu.linear_swiglu`. In low precision PyTorch sums in float32, but rounds gates,
    values and SiLU. An autocast region moves the product to its own type.
    """
    gate, value = F.linear(x, weight.to(x.dtype)).chunk(2, dim=-1)
    return F.silu(gate) * value
