"""A stand-in for ``mmcv._ext``, the compiled module that mmcv-lite lacks.

mmcv-lite ships the Python side of ``mmcv.ops``. After :func:`install`, ``import mmcv._ext`` is answered by
operators written on ``torchvision.ops`` and plain torch, so ``mmcv.ops`` and the heads built on it work on CPU
and GPU without a compiler. Where a compiled mmcv is installed, it answers first and nothing here is used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import NoReturn

from .names import SUPPORTED, UNSUPPORTED, unsupported_message

__all__ = ["SUPPORTED", "UNSUPPORTED", "install", "is_active"]

_TARGET = "mmcv._ext"
_OPERATOR_FILES = ("nms", "boxes", "rois", "border", "deform", "losses", "attention", "resample", "sync_bn", "misc")


class _ExtLoader(Loader):
    """Fills ``mmcv._ext`` with the operators; torch and torchvision are imported only here."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        for file in _OPERATOR_FILES:
            operators = import_module(f"{__name__}.{file}")
            for name in operators.__all__:
                setattr(module, name, getattr(operators, name))
        module.__getattr__ = _missing_operator


class _ExtFinder(MetaPathFinder):
    """Answers for ``mmcv._ext`` and for nothing else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TARGET:
            return None
        return ModuleSpec(_TARGET, _ExtLoader(), origin=__name__)


def _missing_operator(name: str) -> Callable[..., NoReturn]:
    # mmcv asserts hasattr for every operator it knows as soon as mmcv.ops is imported, so the error waits for a call.
    if name not in UNSUPPORTED:
        raise AttributeError(f"module {_TARGET!r} has no attribute {name!r}")

    def operator(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(unsupported_message(name))

    operator.__name__ = operator.__qualname__ = name
    return operator


def install() -> None:
    """Make ``import mmcv._ext`` work where no compiled mmcv is installed.

    The finder goes to the end of ``sys.meta_path``: a real ``mmcv._ext`` is found first. Calling it again does
    nothing. Imports neither torch nor torchvision nor mmcv; that happens when ``mmcv._ext`` is imported.
    """
    if not any(isinstance(finder, _ExtFinder) for finder in sys.meta_path):
        sys.meta_path.append(_ExtFinder())


def is_active() -> bool:
    """Whether the stand-in is what ``import mmcv._ext`` gives (or gave); imports nothing.

    False when :func:`install` was not called, mmcv is not installed, or a compiled mmcv answers.
    """
    loaded = sys.modules.get(_TARGET)
    if loaded is not None:
        return isinstance(getattr(loaded.__spec__, "loader", None), _ExtLoader)
    spec = _find_ext()
    return spec is not None and isinstance(spec.loader, _ExtLoader)


def _find_ext() -> ModuleSpec | None:
    # importlib.util.find_spec would import the parent package mmcv, and with it torch.
    package = PathFinder.find_spec("mmcv")
    if package is None or package.submodule_search_locations is None:
        return None
    for finder in sys.meta_path:
        find_spec = getattr(finder, "find_spec", None)
        spec = find_spec and find_spec(_TARGET, list(package.submodule_search_locations))
        if spec:
            return spec
    return None
