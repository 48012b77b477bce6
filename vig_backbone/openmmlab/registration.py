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
from .lazy import register_lazily
from .runtime_info_hook import DeferredRuntimeInfoHook

MODULES: dict[Registry, tuple[type, ...]] = {
    MODELS: (ViG, HierViG, SimpleFeaturePyramid),
    MODEL_WRAPPERS: (GlooDataParallel,),
    HOOKS: (
        AtomicCheckpointHook,
        CheckDataHook,
        DeferredRuntimeInfoHook,
        DrawPredictionsHook,
        EvaluateFirstHook,
    ),
}

# Classes built on those of mmdet or mmseg, and the modules that have them.
LAZY: dict[Registry, dict[str, str]] = {
    MODELS: {
        "BoxTTAModel": ".det_tta",
        "FusedEncoderDecoder": ".fused_segmentor",
    },
}


def register_modules() -> None:
    """Register everything in MODULES and LAZY under its class name. Idempotent."""
    for registry, classes in MODULES.items():
        for cls in classes:
            if registry.module_dict.get(cls.__name__) is not cls:
                registry.register_module(module=cls)
    for registry, modules in LAZY.items():
        for name, module in modules.items():
            register_lazily(registry, name, module)
