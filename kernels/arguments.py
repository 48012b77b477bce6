"""What the operators' checks of their arguments share. Needs torch alone."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

MIN_TRITON = (3, 5)


def has_triton() -> bool:
    """Whether the Triton that is installed, if any, compiles the kernels; without importing it."""
    if find_spec("triton") is None:
        return False
    try:
        return TorchVersion(version("triton")) >= MIN_TRITON
    except PackageNotFoundError:
        return True  # a build of another name


HAS_TRITON = has_triton()


def named_implementation(impl: str, implementations: Mapping[str, Callable[..., Tensor]]) -> Callable[..., Tensor]:
    """The function behind a name.

    Raises:
        ValueError: naming those that there are.
    """
    if impl not in implementations:
        missing = "; 'triton' needs Triton 3.5 or newer, which comes with torch 2.9" if impl == "triton" else ""
        raise ValueError(
            f"impl={impl!r} is not available: expected 'auto' or one of {sorted(implementations)}{missing}"
        )
    return implementations[impl]


def check_types_and_devices(tensors: Mapping[str, Tensor]) -> None:
    """All of them floating point, on the device of the first.

    Raises:
        TypeError, ValueError: naming the tensor that is not.
    """
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not torch.is_floating_point(tensor):
            raise TypeError(f"{name} must be a floating point tensor, got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}, {first_name} on {first.device}: move them to one device")


def is_autocast(x: Tensor) -> bool:
    """Whether in an autocast region for the device of x."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def type_of_products(x: Tensor) -> torch.dtype:
    """That of an autocast region, else that of x."""
    return torch.get_autocast_dtype(x.device.type) if is_autocast(x) else x.dtype


def triton_runs_on(x: Tensor) -> bool:
    """Whether the Triton kernels take tensors like this: an NVIDIA GPU with bfloat16 products, anything but float64."""
    if x.device.type != "cuda" or x.dtype == torch.float64 or not HAS_TRITON:
        return False
    return _has_bfloat16_products(x.device.index)


@torch.compiler.assume_constant_result
def _has_bfloat16_products(index: int | None) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(index) >= (8, 0)


def at_least_float32(x: Tensor) -> Tensor:
    """x itself, or in float32 if its type is of lower precision."""
    return x.float() if x.itemsize < 4 else x


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A region in which products have the type of their tensors, on the device of x; some, like meta, have no other."""
    if torch.amp.is_autocast_available(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()
