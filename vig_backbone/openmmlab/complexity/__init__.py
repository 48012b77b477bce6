"""Parameters and FLOPs of the models of configs, module by module, for any image size in no time.

Everywhere here 1 FLOP is one multiply-add, as in the tables of the field; torch's FLOP counter counts two.
"""

from .report import Report, count_config
from .run import DETECTIONS, PROPOSALS
from .table import Row, format_table, replace_table
from .tree import format_tree

__all__ = [
    "DETECTIONS",
    "PROPOSALS",
    "Report",
    "Row",
    "count_config",
    "format_table",
    "format_tree",
    "replace_table",
]
