"""Counting what a forward pass multiplies, module by module, from the operators that run."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from vig_kernels.gla import IMPLEMENTATIONS

from .published import extras_of_module

# Multiply-adds of operators that torch has no formula for, from their arguments and their result. For a number that
# `grid_sample` makes: four neighbours, and the weight that deformable attention gives it (the 5 N_q K C of the
# Deformable DETR paper, arXiv 2010.04159, appendix A.1).
MORE_MACS: dict[str, Callable[[tuple, Tensor], int]] = {
    "aten.grid_sampler_2d": lambda args, out: 5 * out.numel(),
    "torchvision.deform_conv2d": lambda args, out: out.numel() * args[1][0].numel(),  # args[1]: the weight
}


@dataclass
class Count:
    """Of one module, without the modules in it.

    macs: multiply-adds of products; extras: what counters by module hooks add to them (`published.py`); activations:
    numbers that products make.
    """

    macs: int = 0
    extras: int = 0
    activations: int = 0


class OperatorCounter(TorchDispatchMode):
    """While active, counts the products that run: those with a FLOP formula of torch's, and those of MORE_MACS."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, Count] = defaultdict(Count)
        self.running = [""]  # names of the modules that are running, the innermost last

    @property
    def here(self) -> Count:
        return self.counts[self.running[-1]]

    def add(self, macs: int, out: Tensor) -> None:
        self.here.macs += macs
        self.here.activations += out.numel()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        packet = function.overloadpacket
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=out)
            self.add(flops // 2, next(x for x in tree_leaves(out) if isinstance(x, Tensor)))
        elif str(packet) in MORE_MACS:
            self.add(MORE_MACS[str(packet)](args, out), out)
        return out


def scan_macs(q_shape: torch.Size, v_shape: torch.Size) -> int:
    """Multiply-adds of the scan itself, both directions: an update and a reading of the K x V state per token.

    q is ``[B, L, h, K]``, v ``[B, L, h, V]``. Chunked forms multiply more to need fewer steps; that is not counted.
    """
    return 2 * 2 * q_shape.numel() * v_shape[-1]


@contextmanager
def counting(model: nn.Module) -> Iterator[dict[str, Count]]:
    """Count what runs in `model`, on whatever device; gives the counts by the names of its modules.

    Gated linear attention counts as its definition and gives zeros: whichever form of it would run computes more.
    """
    counter = OperatorCounter()

    def scan(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        out = v.new_zeros(v.shape)
        counter.add(scan_macs(q.shape, v.shape), out)
        return out

    with ExitStack() as stack:
        stack.enter_context(patch.dict(IMPLEMENTATIONS, dict.fromkeys(IMPLEMENTATIONS, scan)))
        for name, module in model.named_modules():
            enter, leave = _hooks(counter, name)
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        stack.enter_context(counter)
        yield counter.counts


def _hooks(counter: OperatorCounter, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
    def enter(module: nn.Module, inputs: tuple) -> None:
        counter.running.append(name)

    def leave(module: nn.Module, inputs: tuple, output: Any) -> None:
        counter.here.extras += extras_of_module(module, inputs, output)
        counter.running.pop()

    return enter, leave
