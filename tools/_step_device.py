"""What a step asks of the device: of a GPU by torch's profiler, elsewhere as a hint by the operators that it calls."""

import json
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

KERNEL, MEMORY, CALL = "kernel", "memory", "call"
KINDS = {"kernel": KERNEL, "gpu_memcpy": MEMORY, "gpu_memset": MEMORY, "cuda_runtime": CALL, "cuda_driver": CALL}
TOP_KERNELS = 15

LAUNCH = re.compile(r"cu(da)?(Launch\w*Kernel\w*|GraphLaunch\w*)")
WORK = re.compile(r"cu(da)?(Launch|GraphLaunch|Mem)\w*")
WAIT = re.compile(r"cu(da)?((Stream|Device|Event|Ctx)Synchronize|Memcpy(?!\w*Async)\w*)(_v\d+)?")
END = re.compile(r"cu(da)?(Device|Ctx)Synchronize")


# ---- from a profile to numbers


@dataclass(frozen=True)
class Event:
    name: str
    start: float  # microseconds
    duration: float
    kind: str  # KERNEL and MEMORY on the device, CALL of CUDA's interface on the host

    @property
    def end(self) -> float:
        return self.start + self.duration


@dataclass(frozen=True)
class KernelTime:
    name: str
    ms: float
    calls: float


@dataclass(frozen=True)
class DeviceUse:
    """All of a step."""

    busy_ms: float  # at least one kernel or copy runs
    copy_ms: float  # copies and fills of memory
    kernels: float
    launches: float  # calls: a graph is one
    syncs: float  # calls that wait for the device
    top: list[KernelTime]


def events_of(trace: dict[str, Any]) -> list[Event]:
    """Those of a Chrome trace as torch's profiler writes it that concern the device."""
    return [
        Event(entry["name"], float(entry["ts"]), float(entry["dur"]), KINDS[entry["cat"]])
        for entry in trace["traceEvents"]
        if entry.get("ph") == "X" and entry.get("cat") in KINDS
    ]


def device_use(events: list[Event], steps: int) -> DeviceUse:
    """Of one step out of so many that the events cover; waiting for the end of the last one is not the step's."""
    on_device = [event for event in events if event.kind != CALL]
    calls = [event for event in events if event.kind == CALL]
    last_work = max((call.start for call in calls if WORK.fullmatch(call.name)), default=0.0)
    calls = [call for call in calls if call.start <= last_work or not END.fullmatch(call.name)]
    return DeviceUse(
        busy_ms=covered(on_device) / steps / 1e3,
        copy_ms=sum(event.duration for event in on_device if event.kind == MEMORY) / steps / 1e3,
        kernels=sum(event.kind == KERNEL for event in on_device) / steps,
        launches=sum(LAUNCH.fullmatch(call.name) is not None for call in calls) / steps,
        syncs=sum(WAIT.fullmatch(call.name) is not None for call in calls) / steps,
        top=longest_kernels(on_device, steps),
    )


def covered(events: list[Event]) -> float:
    """Microseconds during which at least one of them runs."""
    total, reached = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event.start):
        total += max(0.0, event.end - max(reached, event.start))
        reached = max(reached, event.end)
    return total


def longest_kernels(events: list[Event], steps: int) -> list[KernelTime]:
    """By the time that all events of a name take together."""
    durations: dict[str, list[float]] = defaultdict(list)
    for event in events:
        durations[event.name].append(event.duration)
    kernels = [KernelTime(name, sum(each) / steps / 1e3, len(each) / steps) for name, each in durations.items()]
    return sorted(kernels, key=lambda kernel: kernel.ms, reverse=True)[:TOP_KERNELS]


def profile_steps(step: Callable[[], object], steps: int) -> DeviceUse:
    """Of the GPU, in so many steps that follow one another."""
    for count in (1, steps):  # the first profile of a process sets up the profiler
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(count):
                step()
            torch.cuda.synchronize()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(errors="replace"), strict=False)
    return device_use(events_of(trace), steps)


# ---- without a GPU

# On a GPU these wait for the device, because a number or a shape that the host needs depends on what it computes.
ALWAYS_WAIT = {
    *("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::masked_select"),
    *("aten::_unique", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount"),
    "torchvision::nms",
}
WITH_MASKS = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


def would_wait(name: str, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether an operator, by its name without the overload, makes the host wait for a GPU. (Copies apart.)"""
    if name == "aten::repeat_interleave":
        return kwargs.get("output_size") is None
    if name in WITH_MASKS:
        return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return name in ALWAYS_WAIT


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count, self.waiting = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        self.count += 1
        self.waiting += would_wait(function.name().partition(".")[0], args, kwargs)
        return function(*args, **kwargs)


def count_operators(step: Callable[[], object]) -> tuple[int, int]:
    """Operators of a step, views included, and those of them that would wait for a GPU."""
    with _Operators() as operators:
        step()
    return operators.count, operators.waiting
