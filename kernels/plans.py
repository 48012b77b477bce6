"""Calls of an operator: what it allocates and launches is worked out once for all tensors that look alike.

A kernel of this package takes forty arguments and runs for tens of microseconds; deciding on launches and Triton's own
look at every argument take longer than that. A plan holds the compiled kernels and where their arguments come from.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from .launch import INTERPRETED, on_device

# A plan is a few kilobytes; images of many sizes make many.
MAX_PLANS = 8192

_plans: dict[tuple[Any, ...], "Plan"] = {}
_compiled: set[tuple[Any, ...]] = set()


class Plan:
    """Records the buffers and the launches of a call, then runs them, with any tensors like those of the recording.

    Args:
        inputs: tensors of the call, each another object, or None.
    """

    def __init__(self, inputs: Sequence[Tensor | None]) -> None:
        self._tensors = list(inputs)  # while recording: inputs and buffers, in the order of their slots
        self._steps: list[_Buffer | _Launch] = []
        self._outputs: list[int] = []

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A buffer, not initialised. While recording it has no memory."""
        buffer = torch.empty(shape, dtype=dtype, device="meta")
        self._tensors.append(buffer)
        self._steps.append(_Buffer(shape, dtype))
        return buffer

    def launch(self, kernel: triton.runtime.JITFunction, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        """A kernel's arguments in their order, then its constants and options."""
        self._steps.append(_Launch(kernel, (*grid, 1, 1)[:3], list(args), constants))

    def finish(self, outputs: Sequence[Tensor]) -> None:
        """End the recording, compile what is not compiled yet, all at a time."""
        slots = {id(x): slot for slot, x in enumerate(self._tensors) if x is not None}
        self._outputs = [slots[id(x)] for x in outputs]
        _compile([step for step in self._steps if isinstance(step, _Launch)])
        forgotten = {*self._outputs}
        for step in reversed(self._steps):
            if isinstance(step, _Launch):
                step.finish(slots, forgotten)
        self._tensors = []

    def run(self, inputs: Sequence[Tensor | None], device: torch.device) -> list[Tensor]:
        """Launch everything; returns the outputs."""
        tensors = list(inputs)
        for step in self._steps:
            step.run(tensors, device)
        return [tensors[slot] for slot in self._outputs]


@dataclass
class _Buffer:
    shape: tuple[int, ...]
    dtype: torch.dtype

    def run(self, tensors: list[Tensor | None], device: torch.device) -> None:
        tensors.append(torch.empty(self.shape, dtype=self.dtype, device=device))


@dataclass
class _Launch:
    kernel: triton.runtime.JITFunction
    grid: tuple[int, int, int]
    args: list[Any]
    constants: dict[str, Any]
    places: list[tuple[int, int]] = field(default_factory=list)  # of tensors: argument, slot
    last_uses: list[int] = field(default_factory=list)  # slots
    compiled: tuple[Callable[..., Any], list[Any]] | None = None  # on the grid; its arguments, constants included

    def finish(self, slots: dict[int, int], used_later: set[int]) -> None:
        self.places = [(i, slots[id(x)]) for i, x in enumerate(self.args) if isinstance(x, Tensor)]
        self.last_uses = sorted({slot for _, slot in self.places} - used_later)
        used_later.update(self.last_uses)
        self.args = [None if isinstance(x, Tensor) else x for x in self.args]

    def run(self, tensors: list[Tensor | None], device: torch.device) -> None:
        start, args = self.compiled or (None, self.args)
        args = args.copy()
        for i, slot in self.places:
            args[i] = tensors[slot]
        if start is not None:
            start(*args)
        else:
            compiled = self.kernel[self.grid](*args, **self.constants)
            if not INTERPRETED:
                names = list(self.kernel.signature.parameters)[len(args) :]
                self.compiled = compiled[self.grid], self.args + [self.constants[name] for name in names]
        for slot in self.last_uses:
            tensors[slot] = None

    def key(self) -> tuple[Any, ...]:
        """What decides which compiled kernel it is; nearly so: numbers that are multiples of 16 count as others do."""
        types = (x.dtype if isinstance(x, Tensor) else type(x) for x in self.args)
        return self.kernel, *self.constants.items(), *types


def _compile(launches: Sequence[_Launch]) -> None:
    """Those that are new, in parallel."""
    new = {key: launch for launch in launches if (key := launch.key()) not in _compiled}
    if len(new) > 1 and not INTERPRETED:
        with ThreadPoolExecutor(os.cpu_count()) as executor, triton.AsyncCompileMode(executor):
            for launch in new.values():
                launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.constants)
    _compiled.update(new)


def call(
    record: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor | None], *numbers: float | bool | None
) -> list[Tensor]:
    """The outputs of an operator.

    Args:
        record: called as ``record(plan, *tensors, *numbers)``, once for all tensors of the same types, sizes, strides
            and alignment and the same numbers; allocates and launches with the methods of the plan, reads nothing but
            that of the tensors, and returns the buffers that are the operator's outputs.
        tensors: the first one, which must not be None, decides on the device.
        numbers: anything that can be hashed.
    """
    key = (record, numbers, *map(_look, tensors))
    device = tensors[0].device
    with on_device(tensors[0]):
        plan = _plans.get(key)
        if plan is None:
            # As inputs of the recording each of them is an object of its own, even if the caller gives one twice.
            inputs = [None if x is None else x.detach() for x in tensors]
            plan = Plan(inputs)
            plan.finish(record(plan, *inputs, *numbers))
            while len(_plans) >= MAX_PLANS:
                _plans.pop(next(iter(_plans)), None)
            _plans[key] = plan
        return plan.run(tensors, device)


def _look(x: Tensor | None) -> tuple[Any, ...] | None:
    """What a plan depends on."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16)


def forget() -> None:
    """Plan anew, for example after constants of a module have changed."""
    _plans.clear()
