"""Teaches mmengine to load `.safetensors` files wherever it takes a checkpoint: `load_from`, the tools, inferencers."""

from typing import Any

from mmengine.runner import CheckpointLoader

from ..checkpoint import read_checkpoint
from ..convert import read_metadata

# mmengine takes prefixes for regular expressions, and asks them in reverse alphabetical order: URLs go before this one.
PREFIX = r".*\.safetensors$"


def load_from_safetensors(filename: str, map_location: Any = None) -> dict[str, Any]:
    """As a checkpoint of mmengine: `meta` and `state_dict`, the latter on the CPU."""
    weights = read_checkpoint(filename)
    if map_location not in (None, "cpu"):
        weights = {name: value.to(map_location) for name, value in weights.items()}
    return dict(meta=read_metadata(filename), state_dict=dict(weights))


def register_safetensors() -> None:
    """Idempotent."""
    CheckpointLoader.register_scheme(PREFIX, load_from_safetensors, force=True)
