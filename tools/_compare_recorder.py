"""What a training run writes down for the comparison: losses, times of steps, memory, and what evaluations found."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor


@dataclass
class Evaluation:
    step: int  # training steps before it
    seconds: float  # of training before it: loading data included, evaluations not
    metrics: dict[str, float]  # as the evaluator names them; empty where a detector found nothing


@dataclass
class Record:
    parameters: int
    trained_parameters: int
    batch: int
    losses: list[float] = field(default_factory=list)  # of every step
    step_ms: list[float] = field(default_factory=list)  # of every step, waiting for its data not included
    evaluations: list[Evaluation] = field(default_factory=list)
    peak_bytes: int | None = None  # of training; None on a CPU
    finished: bool = False

    @classmethod
    def read(cls, file: Path) -> "Record":
        content = json.loads(file.read_text())
        evaluations = [Evaluation(**each) for each in content.pop("evaluations")]
        return cls(**content, evaluations=evaluations)

    def write(self, file: Path) -> None:
        """All at once: whoever is killed here leaves the file as it was."""
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self)))
        os.replace(partial, file)


class Stopwatch:
    """Milliseconds of steps: on a GPU between events in its queue, which nobody waits for before `read`."""

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self._spans: list[list[Any]] = []

    def start(self) -> None:
        self._spans.append([self._now()])

    def stop(self) -> None:
        self._spans[-1].append(self._now())

    def read(self) -> list[float]:
        """Of the steps since the last call, for which the device must have finished."""
        spans, self._spans = self._spans, []
        return [start.elapsed_time(end) if self.on_gpu else (end - start) * 1e3 for start, end in spans]

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@HOOKS.register_module()
class TrainingRecorder(Hook):
    """Keeps a `Record` in `file`, up to date after every evaluation; waits for the device only then.

    A step's time is that between the hooks before and after it: forward, backward, optimizer, and what other hooks do
    with its losses. On a GPU it is the device's time, gaps included, from where it could begin with the step.
    """

    priority = "LOWEST"

    def __init__(self, file: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self.file = Path(file)
        self.clock = clock
        self.on_gpu = torch.cuda.is_available()
        self._watch = Stopwatch(self.on_gpu)
        self._losses: list[Tensor] = []
        self._seconds = 0.0
        self._since: float | None = None  # when training went on; None while it does not
        self._record: Record | None = None

    def before_run(self, runner: Runner) -> None:
        counts = [(p.numel(), p.requires_grad) for p in runner.model.parameters()]
        trained = sum(count for count, is_trained in counts if is_trained)
        self._record = Record(sum(count for count, _ in counts), trained, runner.cfg.train_dataloader.batch_size)

    def before_train(self, runner: Runner) -> None:
        self._go_on()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self._watch.start()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        self._watch.stop()
        self._losses.append(outputs["loss"].detach().float().reshape(()))
        if self.on_gpu:  # after every step: mmengine's log begins to count anew
            self._record.peak_bytes = max(self._record.peak_bytes or 0, torch.cuda.max_memory_allocated())

    def before_val(self, runner: Runner) -> None:
        if self._since is None:
            return
        if self.on_gpu:
            torch.cuda.synchronize()
        self._seconds += self.clock() - self._since
        self._since = None
        self._record.step_ms += self._watch.read()
        self._record.losses += torch.stack(self._losses).tolist() if self._losses else []
        self._losses.clear()

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        numbers = {name: float(value) for name, value in (metrics or {}).items()}
        self._record.evaluations.append(Evaluation(runner.iter, self._seconds, numbers))
        self._record.write(self.file)

    def after_val(self, runner: Runner) -> None:
        if runner.iter:
            self._go_on()

    def after_train(self, runner: Runner) -> None:
        self._record.finished = True
        self._record.write(self.file)

    def _go_on(self) -> None:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self._since = self.clock()
