"""Argument checks and the choice of implementation."""

from collections.abc import Callable

from torch import Tensor

from ..arguments import HAS_TRITON, check_types_and_devices, named_implementation, triton_runs_on
from ..padding import check_valid_sizes
from .naive import naive_depthwise_conv3x3


def _triton_depthwise_conv3x3(*args: Tensor | bool | None) -> Tensor:
    """The Triton form; Triton itself is imported when it is first used."""
    from .triton_op import triton_depthwise_conv3x3

    return triton_depthwise_conv3x3(*args)


# Each implementation takes the arguments of `depthwise_conv3x3` less `impl`, all of them checked.
IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {"naive": naive_depthwise_conv3x3}
if HAS_TRITON:
    IMPLEMENTATIONS["triton"] = _triton_depthwise_conv3x3


def depthwise_conv3x3(
    x: Tensor,
    weight: Tensor,
    activation: bool = False,
    impl: str = "auto",
    *,
    valid_sizes: Tensor | None = None,
) -> Tensor:
    """Depthwise 3x3 convolution with zero padding and no bias, the local branch of ViG's mixer (arXiv 2405.18425).

    ``y[b, i, j, c] = sum over m, n of weight[c, 0, m, n] * x[b, i + m - 1, j + n - 1, c]``, and ``SiLU(y)`` with
    `activation` (ViG-T only). The official code does the same in `nn.Conv2d` and `nn.SiLU`.

    Args:
        x: tokens, ``[B, H, W, C]``; any strides, float16, bfloat16, float32 or float64.
        weight: ``[C, 1, 3, 3]``, as `nn.Conv2d(C, C, 3, groups=C)` has it; may have another type than `x`.
        activation: SiLU at the end.
        impl: ``'naive'`` (PyTorch), ``'triton'`` (one kernel for NVIDIA GPUs, one or two backward) or ``'auto'``: the
            Triton form where it runs (a GPU of compute capability 8.0 or higher, torch 2.9 or newer, any type but
            float64), else PyTorch.
        valid_sizes: padded batches: of image b only the first ``valid_sizes[b, 0]`` rows and ``valid_sizes[b, 1]``
            columns are tokens. The rest counts as zeros, like what lies outside of the map, and its result is 0.
            ``[B, 2]``, integers on the device of `x`.

    Returns:
        ``[B, H, W, C]`` in the type of `x`, or, like of any convolution, in that of an autocast region; summed in
        float32 (float64 for float64).
        Gradients exist for both tensors.

    Raises:
        ValueError: for an unknown `impl`, or shapes that do not fit each other.
        TypeError: for tensors that are not floating point, or a type that an implementation does not take.
    """
    _check_arguments(x, weight)
    check_valid_sizes(valid_sizes, "x", x)
    if impl == "auto":
        impl = "triton" if triton_runs_on(x) else "naive"
    return named_implementation(impl, IMPLEMENTATIONS)(x, weight, activation, valid_sizes)


def _check_arguments(x: Tensor, weight: Tensor) -> None:
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"x must have shape [B, H, W, C], none of them 0, got {list(x.shape)}")
    expected = [x.shape[-1], 1, 3, 3]
    if list(weight.shape) != expected:
        raise ValueError(f"weight must have shape {expected}, as x {list(x.shape)} asks for, got {list(weight.shape)}")
    check_types_and_devices({"x": x, "weight": weight})
