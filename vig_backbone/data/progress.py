"""How far a long job is: what reports it, and a line that shows it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

Progress = Callable[[int, int], None]  # called with (done, total)


class ProgressLine:
    """Callable (done, total) that draws a bar on a terminal, and in a log writes a line every ``every`` seconds."""

    def __init__(self, label: str, stream: TextIO, every: float = 5.0) -> None:
        self.label, self.stream = label, stream
        self.every = 0.1 if stream.isatty() else every
        self.start: float | None = None  # the first call

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.start is None:
            self.start = self.last = now
        if done < total and now - self.last < self.every:
            return
        self.last = now
        share = done / total if total else 1.0
        left = (now - self.start) / share * (1 - share) if share else 0.0
        numbers = f"{self.label} {done:,}/{total:,} ({share:.0%}), {left:.0f} s left"
        if self.stream.isatty():
            bar = "#" * round(30 * share)
            self.stream.write(f"\r[{bar:<30}] {numbers}   " + ("\n" if done == total else ""))
        else:
            self.stream.write(numbers + "\n")
        self.stream.flush()
