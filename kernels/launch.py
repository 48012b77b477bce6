"""What the launches of all Triton kernels share."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

# The kernels run on the CPU then; decided when they are defined.
INTERPRETED: bool = triton.knobs.runtime.interpret


def check_input(x: Tensor, other: str) -> None:
    """Refuse tensors that no Triton kernel takes: on a CPU, outside of Triton's interpreter, and in float64.

    Args:
        other: the implementation that takes any, for the message.

    Raises:
        RuntimeError, TypeError: with what to do.
    """
    if x.device.type != "cuda" and not INTERPRETED:
        raise RuntimeError(
            f"impl='triton' needs CUDA tensors, got {x.device}: use impl={other!r}, or set TRITON_INTERPRET=1 before "
            "Python starts to run the kernels in Triton's (slow) interpreter"
        )
    if x.dtype == torch.float64:
        raise TypeError(f"impl='triton' has no float64 form: use impl={other!r}, or float32")


def on_device(x: Tensor) -> torch.cuda.device:
    """The device of `x` as the current one, on which Triton launches."""
    return torch.cuda.device(x.device.index if x.device.type == "cuda" else -1)  # -1 changes nothing


def strides(*tensors: Tensor) -> list[int]:
    """Those of the first three dimensions of each."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def with_unit_stride(*tensors: Tensor) -> list[Tensor]:
    """The tensors, copied where the numbers of their last dimension are not neighbours."""
    return [x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in tensors]


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Each of them, where there is one."""
    return tuple(None if x is None else x.contiguous() for x in tensors)


# Triton's own of these two take microseconds.
def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2_from(n: int) -> int:
    """The smallest that is at least n, for n > 0."""
    return 1 << (n - 1).bit_length()


@cache
def multiprocessors(device: torch.device) -> int:
    """Their number; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that one program may use; no limit for the interpreter."""
    if device.type != "cuda":
        return 2**30
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


_library = torch.library.Library("vig", "FRAGMENT")


def register_autocast(name: str, rule: Callable[..., tuple[Any, ...]]) -> None:
    """Let `rule` change the arguments of operator ``vig::name`` in an autocast region.

    Args:
        rule: from the type of the region and the operator's arguments to new arguments.
    """
    for device_type in ("cuda", "cpu"):
        key = f"Autocast{device_type.upper()}"
        _library.impl(name, _with_autocast(name, rule, device_type, key), key)


def _with_autocast(name: str, rule: Callable[..., tuple[Any, ...]], device_type: str, key: str) -> Callable[..., Any]:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def run(*arguments: Any) -> Any:
        arguments = rule(torch.get_autocast_dtype(device_type), *arguments)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return getattr(torch.ops.vig, name)(*arguments)

    return run
