"""Names under which configs find what this package adds: once, in mmengine's root, for mmdet and mmseg alike."""

from mmengine.registry import HOOKS, MODELS, Registry

from ..hier_vig import HierViG
from ..necks import SimpleFeaturePyramid
from ..vig import ViG
from .checkpoint_hook import AtomicCheckpointHook
from .data_hook import CheckDataHook
from .evaluate_first_hook import EvaluateFirstHook


MODULES: dict[Registry, tuple[type, ...]] = {
    MODELS: (ViG, HierViG, SimpleFeaturePyramid),
    HOOKS: (AtomicCheckpointHook, EvaluateFirstHook, CheckDataHook),
}


def register_modules() -> None:
    """Register everything in MODULES under its class name. Idempotent."""
    for registry, classes in MODULES.items():
        for cls in classes:
            if registry.module_dict.get(cls.__name__) is not cls:
                registry.register_module(module=cls)
