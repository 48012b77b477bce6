"""Times and memory of calls, shared by the benchmarks."""

import importlib.metadata
import math
import platform
import re
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

Step = Callable[[], tuple[Tensor, ...]]

OUT_OF_MEMORY = "out of memory"
GRAPH_MS, MAX_GRAPH_CALLS = 2.0, 64  # a graph is filled with calls up to either


class UnavailableError(Exception):
    """A contender that is not there."""


class TimeLimitError(BaseException):
    """A contender took too long. No Exception, lest something between here and there takes it for its own."""


@dataclass(frozen=True)
class Times:
    """Milliseconds of a call; each sample is the mean of `calls` of them."""

    median: float
    min: float
    max: float
    p10: float
    p90: float
    samples: int
    calls: int

    @classmethod
    def of(cls, samples: list[float], calls: int) -> "Times":
        deciles = statistics.quantiles(samples if len(samples) > 1 else 2 * samples, n=10, method="inclusive")
        median = statistics.median(samples)
        return cls(median, min(samples), max(samples), deciles[0], deciles[-1], len(samples), calls)


@dataclass(frozen=True)
class Effort:
    repeats: int
    min_seconds: float  # of a repeat

    def samples(self, ms: float) -> int:
        """So many single calls of that length take as long as all repeats; few do where a call takes a second."""
        least = self.repeats if ms < 1e3 else min(self.repeats, 3)
        return min(max(math.ceil(self.repeats * self.min_seconds * 1e3 / ms), least), 1000)


def seconds_of(run: Callable[[], object], synchronize: Callable[[], None]) -> float:
    """Wall time of one run, all that it starts included."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def wall_times(steps: list[Step], synchronize: Callable[[], None], effort: Effort) -> Times:
    def run(calls: int) -> None:
        for i in range(calls):
            steps[i % len(steps)]()

    def seconds(calls: int) -> float:
        return seconds_of(partial(run, calls), synchronize)

    seconds(1)
    once = seconds(1)
    calls = max(1, math.ceil(effort.min_seconds / once))
    repeats = effort.repeats if once < 1 else min(effort.repeats, 3)
    return Times.of([seconds(calls) / calls * 1e3 for _ in range(repeats)], calls)


def call_times(run: Callable[[], object], synchronize: Callable[[], None], effort: Effort) -> Times:
    """Wall time of single calls, waiting for the device after each."""
    run()
    ms = seconds_of(run, synchronize) * 1e3
    return Times.of([seconds_of(run, synchronize) * 1e3 for _ in range(effort.samples(ms))], calls=1)


def event_times(run: Callable[[], object], calls: int, replays: int) -> Times:
    """Device time of run(), which makes so many calls; runs queue up, so that the device never waits for Python."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    for _ in range(2):
        run()
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return Times.of([start.elapsed_time(end) / calls for start, end in pairwise(events)], calls)


def queued_times(run: Callable[[], object], calls: int, effort: Effort) -> Times:
    """Device time of run(), which makes so many calls, as often as the effort asks for."""
    ms = event_times(run, calls, 3).median * calls
    return event_times(run, calls, effort.samples(ms))


def capture(steps: list[Step], calls: int) -> torch.cuda.CUDAGraph:
    """A graph of so many calls, the input sets in turn; each call keeps its results, in memory of its own."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [steps[i % len(steps)]() for i in range(calls)]
    del results
    return graph


def device_times(steps: list[Step], effort: Effort) -> tuple[Times, str, str]:
    """Times, how they were taken, and why not by a graph."""
    calls = len(steps)
    try:
        graph = capture(steps, calls)
        short_of = GRAPH_MS / event_times(graph.replay, 1, 3).median
        if short_of > 1:  # so long that the gap between two replays does not count
            calls *= min(math.ceil(short_of), math.ceil(MAX_GRAPH_CALLS / calls))
            graph = capture(steps, calls)
        return queued_times(graph.replay, calls, effort), "graph", ""
    except Exception as error:
        torch.cuda.synchronize()
        note = f"no graph: {short_reason(error)}"
    return queued_times(lambda: [step() for step in steps], len(steps), effort), "events", note


def warm_up(steps: list[Step]) -> None:
    """Compile, tune and allocate, off the default stream as graph capture wants it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in (*steps, *steps[:3]):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy on the device, read and written ones."""
    if device.type == "cuda":
        size = min(4 << 30, torch.cuda.mem_get_info(device)[0] // 4)
        source = torch.ones(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        times = event_times(lambda: target.copy_(source), 1, 20)
    else:
        source = torch.ones(256 << 20, dtype=torch.uint8)
        target = torch.empty_like(source)
        times = wall_times([lambda: (target.copy_(source),)], lambda: None, Effort(5, 0))
    return 2 * source.numel() / times.median * 1e3


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeLimitError(f"over the time limit of {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def short_reason(error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None:  # ending a graph capture that ran out of memory is an error of its own
        if isinstance(cause, torch.OutOfMemoryError):
            return OUT_OF_MEMORY
        cause = cause.__cause__ or cause.__context__
    text = (str(error).strip().splitlines() or [""])[0][:100]
    return text if isinstance(error, UnavailableError | TimeLimitError) else f"{type(error).__name__}: {text}"


def peak_bytes(step: Step) -> int:
    step()  # the libraries' workspaces for this stream are not the call's
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def describe_machine(device: torch.device, settings: dict[str, str], packages: tuple[str, ...]) -> dict[str, str]:
    """The name of the device, the settings, and versions: of Python, torch and those of the packages that are there."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        models = re.findall(r"model name\s*: (.+)", info.read_text()) if info.is_file() else []
        name = f"{models[0] if models else 'CPU'}, threads: {torch.get_num_threads()}"
    machine = {"device": name, **settings, "python": platform.python_version(), "torch": torch.__version__}
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            machine[package] = importlib.metadata.version(package)
    return machine
