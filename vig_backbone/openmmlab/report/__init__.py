"""Understanding a run: reports of evaluations, curves of trainings, pictures and statistics of the data."""

from .curves import Curves, read_curves
from .run import Report, make_report

__all__ = ["Curves", "Report", "make_report", "read_curves"]
