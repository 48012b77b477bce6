"""mmengine does over and over what takes seconds: here it remembers the result.

For every `mmdet::` or `mmseg::` in a config it reads all of that package's hundred metafiles, and it formats the same
config with yapf four times a run.
"""

from functools import cache, lru_cache
from typing import Any

import mmengine.config.config as config_module
import mmengine.config.utils as config_utils


def read_metafiles_once() -> None:
    """Let mmengine keep the metafiles of installed packages, which it only looks things up in. Idempotent."""
    if not hasattr(config_utils.load, "cache_info"):
        config_utils.load = cache(config_utils.load)


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
