"""The part of a report that is about the training."""

from __future__ import annotations

from .charts import line_chart
from .curves import Curves
from .page import paragraph, row, section
from .part import Part


def curve_part(curves: Curves) -> Part:
    """Loss, learning rate and scores over the iterations, and all that was logged as numbers."""
    losses = {name: points for name, points in curves.training.items() if "loss" in name.rpartition(".")[2]}
    rates = {"learning rate": curves.training.get("lr", [])}
    charts = row(
        line_chart(losses, "iteration", "losses", logarithmic=True),
        line_chart(rates, "iteration", "learning rate"),
        line_chart(curves.scores(), "iteration", "scores of the evaluations"),
    )
    text = f"From the log of {curves.name}; losses are means over the last steps, as mmengine logs them."
    return Part(
        [section("Training", paragraph(text, soft=True), charts)],
        {"training": curves.training, "evaluation": curves.evaluation},
    )
