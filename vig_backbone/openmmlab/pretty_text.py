"""mmengine formats the same config with yapf four times a run, seconds each; here it remembers the result."""

from functools import lru_cache
from typing import Any

import mmengine.config.config as config_module


def format_once() -> None:
    """Let mmengine's configs remember their formatted text. Idempotent."""
    original = config_module.FormatCode
    if hasattr(original, "remembered"):
        return

    @lru_cache(maxsize=8)
    def remembered(text: str, style: tuple) -> Any:
        return original(text, style_config=dict(style))

    def format_code(text: str, style_config: dict) -> Any:
        return remembered(text, tuple(style_config.items()))

    format_code.remembered = remembered
    config_module.FormatCode = format_code
