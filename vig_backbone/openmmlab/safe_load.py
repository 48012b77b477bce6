"""What `torch.load(weights_only=True)`, the default since torch 2.6, needs to know to resume mmengine's checkpoints.

mmengine 0.10 calls `torch.load` with the defaults, and its checkpoints hold the logs (`HistoryBuffer`, NumPy arrays)
beside the weights. The check stays on: the few harmless types are allowed by name, and the one `getattr` in these
files, which fetches the statistics functions of `HistoryBuffer`, is answered by a function that can fetch nothing else.
"""

from typing import Any

import numpy as np
import torch
from mmengine.logging.history_buffer import HistoryBuffer

STATISTICS = ("min", "max", "mean", "current")


def history_buffer_statistic(owner: Any, name: str) -> Any:
    """Stands for `getattr` in checkpoints: the statistics functions of HistoryBuffer, an error for the rest."""
    if owner is not HistoryBuffer or name not in STATISTICS:
        raise ValueError(f"refused to fetch {name!r} of {owner!r} while loading a checkpoint")
    return getattr(HistoryBuffer, name)


def allow_mmengine_checkpoints() -> None:
    """Let `torch.load` read the checkpoints that mmengine writes, with the check for safe types kept on. Idempotent."""
    multiarray = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray
    reconstruct, scalar = multiarray._reconstruct, multiarray.scalar
    scalar_types = (np.float64, np.float32, np.int64, np.int32, np.uint8, np.bool_)
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            (history_buffer_statistic, "builtins.getattr"),
            np.ndarray,
            np.dtype,
            *{type(np.dtype(scalar_type)) for scalar_type in scalar_types},
            # Checkpoints written with NumPy 1 and 2 name these differently.
            *(
                (function, f"numpy.{module}.multiarray.{function.__name__}")
                for function in (reconstruct, scalar)
                for module in ("core", "_core")
            ),
        ]
    )
