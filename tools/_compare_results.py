"""What the comparison found: a summary of each model, when it reached which score, the table, the plot."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from _benchmark import optional, save_plot
from _compare_recorder import Record
from _compare_runs import Run
from _step_results import COLOURS

SHARES = (0.5, 0.9)  # of the reference's final score: the thresholds that are timed


@dataclass(frozen=True)
class Score:
    title: str
    metric: str  # its name in the evaluations
    unit: float  # what that is multiplied with to give percent


# The first one of a task decides on thresholds.
SCORES = {
    "mmseg": (Score("mIoU", "mIoU", 1),),
    "mmdet": (Score("mask AP", "coco/segm_mAP", 100), Score("box AP", "coco/bbox_mAP", 100)),
}


@dataclass
class Row:
    """A model, and a training of it for each seed."""

    name: str
    config: str
    options: list[str]
    scope: str
    stock: bool
    runs: list[Run] = field(default_factory=list)

    @property
    def records(self) -> list[Record]:
        """Of the trainings that came to their end."""
        return [run.record for run in self.runs if not run.failure]

    @property
    def failures(self) -> list[str]:
        return [f"seed {run.seed}: {run.failure}" for run in self.runs if run.failure]


@dataclass(frozen=True)
class Summary:
    """Means over the seeds; scores in percent, a list has one number for each seed."""

    parameters: int
    final: dict[str, list[float]]
    best: dict[str, list[float]]
    seconds_to: dict[float, float | None]  # by share of the reference's score; None unless every seed reached it
    samples_per_second: float  # batch over the median of all steps, waiting for data not included
    samples_per_second_with_data: float
    first_s: float  # the first step
    training_s: float
    total_s: float
    peak_bytes: int | None


# ---- curves

Curve = list[tuple[float, float]]  # seconds of training, percent


def curve_of(record: Record, score: Score) -> Curve:
    """A metric that is missing or not finite, as where a detector has found nothing, counts as 0."""
    values = [(each.seconds, each.metrics.get(score.metric, 0.0) * score.unit) for each in record.evaluations]
    return [(seconds, value if math.isfinite(value) else 0.0) for seconds, value in values]


def seconds_to(curve: Curve, threshold: float) -> float | None:
    """When a curve first reaches a score, straight lines between its points; None if it never does."""
    if curve and curve[0][1] >= threshold:
        return curve[0][0]
    for (start, low), (end, high) in pairwise(curve):
        if high >= threshold:
            return start + (end - start) * (threshold - low) / (high - low)
    return None


def smoothed(values: list[float], window: int) -> list[float]:
    """Means over the last `window` values, fewer at the beginning."""
    return [fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


# ---- rows


def final_score(row: Row) -> float:
    score = SCORES[row.scope][0]
    return fmean(curve_of(record, score)[-1][1] for record in row.records)


def reference_of(rows: list[Row]) -> Row | None:
    """The stock model of the best final score, where there is none the best of all; of rows of one task."""
    finished = [row for row in rows if row.records]
    return max(finished, key=lambda row: (row.stock, final_score(row)), default=None)


def thresholds_of(rows: list[Row]) -> dict[float, float]:
    """Scores in percent by share of the reference's; empty where nothing was trained, or it has learnt nothing."""
    reference = reference_of(rows)
    final = final_score(reference) if reference else 0.0
    return {share: share * final for share in SHARES} if final > 0 else {}


def summarize(row: Row, thresholds: dict[float, float]) -> Summary:
    """Of a row in which at least one training came to its end."""
    records, first = row.records, SCORES[row.scope][0]
    curves = {score.title: [curve_of(record, score) for record in records] for score in SCORES[row.scope]}
    step_ms = median(ms for record in records for ms in record.step_ms)
    training_s = fmean(record.evaluations[-1].seconds for record in records)
    samples = fmean(record.evaluations[-1].step * record.batch for record in records)
    times = {share: [seconds_to(curve, at) for curve in curves[first.title]] for share, at in thresholds.items()}
    peaks = [record.peak_bytes for record in records if record.peak_bytes is not None]
    return Summary(
        parameters=records[0].parameters,
        final={title: [curve[-1][1] for curve in each] for title, each in curves.items()},
        best={title: [max(value for _, value in curve) for curve in each] for title, each in curves.items()},
        seconds_to={share: None if None in found else fmean(found) for share, found in times.items()},
        samples_per_second=records[0].batch / step_ms * 1e3,
        samples_per_second_with_data=samples / training_s,
        first_s=fmean(record.step_ms[0] for record in records) / 1e3,
        training_s=training_s,
        total_s=fmean(run.total_s for run in row.runs if not run.failure),
        peak_bytes=max(peaks, default=None),
    )


# ---- the table

Cell = Callable[[Summary], str]


def spread(values: list[float]) -> str:
    """The mean, and with several seeds the standard deviation."""
    return f"{fmean(values):.1f}" + (f" ±{stdev(values):.1f}" if len(values) > 1 else "")


def columns_of(scope: str, thresholds: dict[float, float]) -> dict[str, Cell]:
    titles = [score.title for score in SCORES[scope]]
    columns: dict[str, Cell] = {"params M": lambda s: f"{s.parameters / 1e6:.1f}"}
    for title in titles:
        columns[title] = lambda s, title=title: spread(s.final[title])
        columns[f"best {title}"] = lambda s, title=title: spread(s.best[title])
    for share in thresholds:
        columns[f"to {share:.0%}, s"] = lambda s, share=share: optional("{:.1f}", s.seconds_to[share])
    columns |= {
        "samples/s": lambda s: f"{s.samples_per_second:.1f}",
        "with data": lambda s: f"{s.samples_per_second_with_data:.1f}",
        "peak MB": lambda s: optional("{:.0f}", s.peak_bytes and s.peak_bytes / 1e6),
        "first s": lambda s: f"{s.first_s:.1f}",
        "training s": lambda s: f"{s.training_s:.1f}",
        "total s": lambda s: f"{s.total_s:.1f}",
    }
    return columns


def format_table(rows: list[Row]) -> str:
    """Rows of one task, what failed, the thresholds, and each model against the reference."""
    thresholds, reference = thresholds_of(rows), reference_of(rows)
    columns = columns_of(rows[0].scope, thresholds)
    lines = [["model", *columns]]
    for row in rows:
        summary = summarize(row, thresholds) if row.records else None
        lines.append([row.name, *(cell(summary) if summary else "failed" for cell in columns.values())])
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = [
        "  ".join([f"  {name:{widths[0]}}", *(cell.rjust(width) for cell, width in zip(cells, widths[1:]))])
        for name, *cells in lines
    ]
    text += [f"  {row.name}, {failure}" for row in rows for failure in row.failures]
    if thresholds:
        scores = ", ".join(f"{share:.0%} is {at:.1f}" for share, at in thresholds.items())
        text.append(f"  thresholds of the final {SCORES[reference.scope][0].title} of {reference.name}: {scores}")
        text += _ratios(rows, reference, thresholds)
    return "\n".join(text)


def _ratios(rows: list[Row], reference: Row, thresholds: dict[float, float]) -> list[str]:
    """A line for each model other than the reference."""
    lines, other, share = [], summarize(reference, thresholds), max(thresholds)
    for row in rows:
        if row is not reference and row.records:
            summary = summarize(row, thresholds)
            ours, theirs = summary.seconds_to[share], other.seconds_to[share]
            speed = f"{summary.samples_per_second / other.samples_per_second:.2f}x its samples/s"
            sooner = f", {share:.0%} of its score in {ours / theirs:.2f} of its time" if ours and theirs else ""
            score = final_score(row) - final_score(reference)
            lines.append(f"  {row.name} against {reference.name}: {score:+.1f} points, {speed}{sooner}")
    return lines


# ---- the plot


def draw_plot(groups: list[list[Row]], title: str, path: Path) -> None:
    """A row of panels for each task: loss and score over the samples that were seen, score over seconds of training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(groups), 3, figsize=(18, 5 * len(groups)), squeeze=False, layout="constrained")
    for (losses, over_samples, over_time), rows in zip(panels, groups):
        score = SCORES[rows[0].scope][0]
        for row, colour in zip(rows, COLOURS):
            for i, record in enumerate(row.records):
                style = dict(color=colour, lw=2 if row.stock else 2.5, ls="--" if row.stock else "-")
                style |= dict(label=row.name if i == 0 else None)
                _draw(record, curve_of(record, score), (losses, over_samples, over_time), style)
        losses.set(title="training loss, smoothed", xlabel="samples", ylabel="loss", yscale="log")
        over_samples.set(title=f"{score.title}, validation", xlabel="samples", ylabel="percent", ylim=0)
        over_time.set(title=f"{score.title}, validation", xlabel="seconds of training", ylabel="percent", ylim=0)
        for panel in (losses, over_samples, over_time):
            panel.grid(color="0.88")
            panel.spines[["top", "right"]].set_visible(False)
            panel.legend()
    save_plot(figure, title, path)


def _draw(record: Record, curve: Curve, panels: tuple[Any, Any, Any], style: dict[str, Any]) -> None:
    losses, over_samples, over_time = panels
    samples = [record.batch * (i + 1) for i in range(len(record.losses))]
    losses.plot(samples, smoothed(record.losses, max(1, len(record.losses) // 40)), **style)
    evaluated = [record.batch * each.step for each in record.evaluations]
    over_samples.plot(evaluated, [value for _, value in curve], marker="o", **style)
    over_time.plot(*zip(*curve), marker="o", **style)
