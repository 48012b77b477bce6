"""Where the time of a step goes: marks on the clock where its parts begin and end.

A part is a method of an object. While it is timed, the object has a method of its own in its place; nothing waits for
the device.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from mmengine.optim import OptimWrapper
from torch import nn

REST = "rest"
DATA, LOG = "data", "log"
MODEL_METHODS = {
    "loss": "model.loss",
    "predict": "model.predict",
    "postprocess_result": "model.postprocess_result",
    "_decode_head_forward_train": "decode_head.forward_train",
    "_auxiliary_head_forward_train": "auxiliary_head.forward_train",
}
HEAD_METHODS = (
    *(
        "forward",
        "loss",
        "loss_and_predict",
        "loss_by_feat",
        "get_targets",
        "loss_and_target",
        "bbox_loss",
        "mask_loss",
    ),
    *("predict", "predict_by_feat", "predict_bbox", "predict_mask"),
)
BODY = ("data_preprocessor", "backbone", "neck")


class Clock(Protocol):
    def mark(self) -> Any: ...

    def ms(self, start: Any, end: Any) -> float: ...

    def synchronize(self) -> None: ...


class WallClock:
    def mark(self) -> float:
        return time.perf_counter()

    def ms(self, start: float, end: float) -> float:
        return (end - start) * 1e3

    def synchronize(self) -> None:
        pass


class DeviceClock:
    """When the GPU gets there."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end)

    def synchronize(self) -> None:
        torch.cuda.synchronize()


# ---- spans of time


@dataclass
class Span:
    label: str
    start: Any
    end: Any = None
    inner: list["Span"] = field(default_factory=list)


def self_times(span: Span, ms: Callable[[Any, Any], float]) -> dict[str, float]:
    """Milliseconds of each label, in order, without what the spans inside it take: they add up to the span."""
    times = {span.label: ms(span.start, span.end) - sum(ms(inner.start, inner.end) for inner in span.inner)}
    for inner in span.inner:
        for label, own in self_times(inner, ms).items():
            times[label] = times.get(label, 0.0) + own
    return times


def median_times(steps: list[dict[str, float]]) -> dict[str, float]:
    """Of each label over the steps, what belongs to none of the parts last."""
    labels = sorted(dict.fromkeys(label for step in steps for label in step), key=lambda label: label == REST)
    return {label: statistics.median(step.get(label, 0.0) for step in steps) for label in labels}


class Recorder:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.steps: list[Span] = []
        self.open: list[Span] = []

    @contextmanager
    def span(self, label: str) -> Iterator[None]:
        span = Span(label, self.clock.mark())
        (self.open[-1].inner if self.open else self.steps).append(span)
        self.open.append(span)
        try:
            yield
        finally:
            self.open.pop()
            span.end = self.clock.mark()

    def timed(self, label: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.span(label):
                return function(*args, **kwargs)

        return run


# ---- the parts of a model


class Part(NamedTuple):
    label: str
    owner: object
    method: str


def parts_of(model: nn.Module, optim_wrapper: OptimWrapper | None) -> list[Part]:
    """Of a detector or segmenter of mmdet or mmseg, and of the optimizer where it is trained."""
    parts = [Part(label, model, method) for method, label in MODEL_METHODS.items() if hasattr(model, method)]
    for name, child in model.named_children():
        parts += [Part(name, child, called_method(child))] if name in BODY else _head_parts(name, child)
    if optim_wrapper is not None:
        methods = dict(backward="backward", step="optimizer", zero_grad="optimizer")
        parts += [Part(label, optim_wrapper, method) for method, label in methods.items()]
    return parts


def _head_parts(label: str, head: nn.Module) -> Iterator[Part]:
    if isinstance(head, nn.ModuleList):
        children = head.named_children()
    else:
        for method in HEAD_METHODS:
            if hasattr(head, method):
                yield Part(f"{label}.{method}", head, called_method(head) if method == "forward" else method)
        children = head.named_children() if hasattr(head, "bbox_head") else ()  # those of a RoI head
    for name, child in children:
        yield from _head_parts(f"{label}.{name}", child)


def called_method(module: nn.Module) -> str:
    """What a call of the module runs: its forward, or what torch.compile made of it, which marks would break apart."""
    return "forward" if module._compiled_call_impl is None else "_compiled_call_impl"


@contextmanager
def replaced(owner: object, method: str, function: Callable) -> Iterator[None]:
    """Give one object, not its class, another method for a while."""
    own = vars(owner)
    before = own.get(method)
    own[method] = function
    try:
        yield
    finally:
        if before is None:
            del own[method]
        else:
            own[method] = before


def part_times(step: Callable[[], object], parts: list[Part], clock: Clock, repeats: int) -> dict[str, float]:
    """Median milliseconds of each part that a step runs, and of the REST; steps follow one another as without marks."""
    recorder = Recorder(clock)
    with ExitStack() as stack:
        for label, owner, method in parts:
            stack.enter_context(replaced(owner, method, recorder.timed(label, getattr(owner, method))))
        for _ in range(repeats):
            with recorder.span(REST):
                step()
    clock.synchronize()
    return median_times([self_times(span, clock.ms) for span in recorder.steps])
