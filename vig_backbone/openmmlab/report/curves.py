"""The curves of a training: what mmengine logged, by iteration, also where the training was resumed or begun anew."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError

Curve = list[tuple[int, float]]  # iteration, value

# Not of the training: counters, and what the machine takes.
NOT_CURVES = ("step", "iter", "epoch", "time", "data_time", "memory", "base_lr")
# The scores that are shown if they were logged, and what makes percent of them.
SCORES = {
    "mIoU": ("mIoU", 1.0),
    "coco/bbox_mAP": ("box AP", 100.0),
    "coco/segm_mAP": ("mask AP", 100.0),
    "pascal_voc/mAP": ("mAP", 100.0),
}


@dataclass(frozen=True)
class Entry:
    """A line of the log: of a training step, or of an evaluation."""

    iteration: int
    values: dict[str, float]
    training: bool


@dataclass
class Curves:
    """Values by their names in the log; iterations rise within each."""

    name: str
    training: dict[str, Curve] = field(default_factory=dict)
    evaluation: dict[str, Curve] = field(default_factory=dict)

    def scores(self) -> dict[str, Curve]:
        """Those of SCORES in percent, by their titles; without any of them, all evaluations as they were logged.

        COCO's -1, which says that there is no object, is left out.
        """
        found = {name: self.evaluation[name] for name in SCORES if name in self.evaluation}
        if not found:
            return self.evaluation
        return {
            SCORES[name][0]: [(iteration, value * SCORES[name][1]) for iteration, value in curve if value >= 0]
            for name, curve in found.items()
        }


def read_curves(run: str | Path) -> Curves:
    """The curves of a work dir, of one of the folders with a time in it, or of a `scalars.json`.

    A training that was resumed replaces what earlier ones had logged from its first iteration on, one that was begun
    anew replaces all.

    Raises:
        DataError: if nothing of a training was logged there.
    """
    logs = [log for log in map(read_log, scalar_files(Path(run))) if any(entry.training for entry in log)]
    if not logs:
        raise DataError(
            f"{run}: no training was logged there, expected a work dir of tools/train.py with "
            "TIME/vis_data/scalars.json in it (mmengine's LocalVisBackend writes it)"
        )
    curves = Curves(Path(run).resolve().name)
    for entry in join(logs):
        target = curves.training if entry.training else curves.evaluation
        for name, value in entry.values.items():
            target.setdefault(name, []).append((entry.iteration, value))
    return curves


def scalar_files(run: Path) -> list[Path]:
    """The logs of a run, in the order in which they were written: their folders are named after the time."""
    if run.is_file():
        return [run]
    return sorted([*run.glob("vis_data/scalars.json"), *run.glob("*/vis_data/scalars.json")])


def read_log(file: Path) -> list[Entry]:
    """What one process logged. Evaluations of trainings by epochs count epochs in the file, here iterations."""
    texts = [text for text in file.read_text().splitlines() if text.strip()]
    lines = [_parse(text) for text in texts]
    if lines and lines[-1] is None:
        lines.pop()  # a killed process leaves half a line
    if None in lines:
        raise DataError(
            f"{file}: line {lines.index(None) + 1} is not an object of names and values, as mmengine writes them: "
            f"{texts[lines.index(None)][:60]!r}; remove it to read the rest"
        )
    steps = [line for line in lines if "iter" in line]
    per_epoch = max((math.ceil(line["iter"] / line["epoch"]) for line in steps if line.get("epoch")), default=1)
    return [
        Entry(
            iteration=line["iter"] if "iter" in line else line["step"] * per_epoch,
            values={name: value for name, value in line.items() if _is_curve(name, value)},
            training="iter" in line,
        )
        for line in lines
        if "step" in line
    ]


def _parse(text: str) -> dict | None:
    """None for what is not a JSON object."""
    try:
        line = json.loads(text)
    except json.JSONDecodeError:
        return None
    return line if isinstance(line, dict) else None


def _is_curve(name: str, value: object) -> bool:
    return name not in NOT_CURVES and isinstance(value, int | float)


def join(logs: list[list[Entry]]) -> list[Entry]:
    """The entries of one training from the logs of its processes, in order; each log has a training step."""
    joined: list[Entry] = []
    for log in logs:
        begin = _first_step(log)
        anew = not joined or begin <= _first_step(joined)
        start = min(entry.iteration for entry in log)
        joined = [] if anew else [entry for entry in joined if entry.iteration < start]
        joined += log
    return joined


def _first_step(log: list[Entry]) -> int:
    return next(entry.iteration for entry in log if entry.training)
