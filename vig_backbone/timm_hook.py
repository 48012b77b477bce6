"""Make the models known to timm when timm is imported, before or after this package, without importing it."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

TRIGGER = "timm.models"


class RegisterAfterImport(MetaPathFinder):
    """Finds `timm.models` as the other finders do, and loads our entry points behind it, once."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TRIGGER:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            register()

        spec.loader.exec_module = execute_and_register
        return spec


def register() -> None:
    """Register the models in timm, which is loaded."""
    import_module(".timm_models", __package__)


def register_when_imported() -> None:
    """Register the models in timm now if it is loaded, or else as soon as it is. Idempotent."""
    if TRIGGER in sys.modules:
        register()
    elif not any(isinstance(finder, RegisterAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, RegisterAfterImport())
