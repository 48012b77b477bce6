"""Backbones by name, with torch alone."""

from collections.abc import Callable
from functools import partial
from typing import Any

from . import hier_vig, vig
from .base import Backbone
from .checkpoint import load_checkpoint
from .hier_vig import HierViG
from .timm_hook import register_when_imported
from .vig import ViG

BACKBONES: dict[str, Callable[..., Backbone]] = {
    **{f"vig_{arch}": partial(ViG, arch=arch) for arch in vig.ARCHS},
    **{f"hier_vig_{arch}": partial(HierViG, arch=arch) for arch in hier_vig.ARCHS},
}
register_when_imported()  # classifiers under the same names, in timm


def build_backbone(name: str, checkpoint: str | None = None, **options: Any) -> Backbone:
    """Build a backbone, with its weights where `checkpoint` (path or URL) is given.

    Args:
        name: ``'vig_tiny'``, ``'vig_small'``, ``'vig_base'``, ``'hier_vig_tiny'``, ``'hier_vig_small'`` or
            ``'hier_vig_base'``.
        checkpoint: see :func:`vig_backbone.load_checkpoint`.
        options: further arguments of :class:`ViG` or :class:`HierViG`.

    Raises:
        ValueError: for an unknown name.
        CheckpointError: if the checkpoint cannot be read or does not fit.
    """
    if name not in BACKBONES:
        raise ValueError(f"no backbone {name!r}: expected one of {', '.join(map(repr, BACKBONES))}")
    backbone = BACKBONES[name](**options)
    if checkpoint is not None:
        load_checkpoint(backbone, checkpoint)
    return backbone
