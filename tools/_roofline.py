"""What a step must compute and move at least, and what this machine can: the roofline."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _timing import Effort, call_times, event_times
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward


@dataclass(frozen=True)
class Machine:
    flops_per_second: float  # of a large matrix product
    bytes_per_second: float  # of a large copy, read and written

    def __str__(self) -> str:
        rates = self.flops_per_second / 1e12, self.bytes_per_second / 1e9
        return "matrix products {:.2f} TFLOP/s, copy bandwidth {:.0f} GB/s (bytes read and written)".format(*rates)


@dataclass(frozen=True)
class Cost:
    flops: int
    bytes: int
    floor_ms: float  # the sum over operators of the longer of computing and moving


class _OperatorCosts(TorchDispatchMode):
    """FLOPs and bytes of each operator that torch's FLOP counter has a formula for; all others are free."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: list[tuple[int, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        packet = function.overloadpacket
        if packet in flop_registry:
            count = convolution_backward_flops if packet is CONVOLUTION_BACKWARD else flop_registry[packet]
            tensors = {id(x): x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
            self.costs.append((count(*args, **kwargs, out_val=out), sum(map(memory_of, tensors.values()))))
        return out


def convolution_backward_flops(grad_out: Tensor, x: Tensor, weight: Tensor, *rest: Any, out_val: tuple) -> int:
    """Each of the two gradients costs what the convolution did; torch's formula takes grouped ones for dense."""
    return 2 * grad_out.numel() // grad_out.shape[1] * weight.numel() * sum(grad is not None for grad in out_val[:2])


def memory_of(x: Tensor) -> int:
    """Bytes that an operator moves for it; what a view repeats lies in memory once."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def count_cost(step: Callable[[], object], machine: Machine) -> Cost:
    """Of one eager run of the step."""
    with _OperatorCosts() as counter:
        step()
    seconds = sum(max(f / machine.flops_per_second, b / machine.bytes_per_second) for f, b in counter.costs)
    return Cost(sum(f for f, _ in counter.costs), sum(b for _, b in counter.costs), seconds * 1e3)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of the best of some large matrix products."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def product() -> None:
        torch.mm(a, b, out=out)

    times = event_times(product, 1, 20) if device.type == "cuda" else call_times(product, lambda: None, Effort(5, 0.01))
    return 2 * n**3 / times.min * 1e3
