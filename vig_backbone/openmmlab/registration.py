"""Names under which configs find what this package adds: once, in mmengine's root, for mmdet and mmseg alike."""

from mmengine.registry import HOOKS, MODEL_WRAPPERS, MODELS, Registry

from ..hier_vig import HierViG
from ..necks import SimpleFeaturePyramid
from ..vig import ViG
from .checkpoint_hook import AtomicCheckpointHook
from .data_hook import CheckDataHook
from .distributed import GlooDataParallel
from .draw_hook import DrawPredictionsHook
from .evaluate_first_hook import EvaluateFirstHook

MODULES: dict[Registry, tuple[type, ...]] = {
    MODELS: (ViG, HierViG, SimpleFeaturePyramid),
    MODEL_WRAPPERS: (GlooDataParallel,),
    HOOKS: (AtomicCheckpointHook, CheckDataHook, DrawPredictionsHook, EvaluateFirstHook),
}


def register_modules() -> None:
    """Register everything in MODULES under its class name. Idempotent."""
    for registry, classes in MODULES.items():
        for cls in classes:
            if registry.module_dict.get(cls.__name__) is not cls:
                registry.register_module(module=cls)
