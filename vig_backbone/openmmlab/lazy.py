"""Names in a registry whose classes are imported when first built: they need mmdet or mmseg, which take seconds."""

from importlib import import_module
from typing import Any

from mmengine.registry import Registry


def register_lazily(registry: Registry, name: str, module: str) -> None:
    """Let `registry` build class `name` of `module`, a path relative to this package. Idempotent."""

    def build(*args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(module, __package__), name)(*args, **kwargs)

    build.__name__ = build.__qualname__ = name
    if name not in registry.module_dict:
        registry.register_module(name=name, module=build)
