"""Names under which configs find what this package adds: once, in mmengine's root, for mmdet and mmseg alike."""

from collections.abc import Callable

from mmengine.registry import (
    FUNCTIONS,
    HOOKS,
    MODEL_WRAPPERS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    RUNNERS,
    TRANSFORMS,
    Registry,
)

from ..hier_vig import HierViG
from ..layers import LayerNorm2d
from ..necks import SimpleFeaturePyramid
from ..vig import ViG
from .checkpoint_hook import AtomicCheckpointHook
from .data_hook import CheckDataHook
from .data_order_hook import DataOrderHook
from .distributed import GlooDataParallel
from .draw_hook import DrawPredictionsHook
from .evaluate_first_hook import EvaluateFirstHook
from .finite_steps import FiniteAmpOptimWrapper, FiniteOptimWrapper
from .finite_steps_hook import FiniteStepsHook
from .fsdp import ShardedAmpOptimWrapper, ShardedOptimWrapper, ShardedRunner
from .layer_decay import ViGOptimWrapperConstructor
from .lazy import register_lazily
from .packed_batch import packed_collate
from .runtime_info_hook import DeferredRuntimeInfoHook

MODULES: dict[Registry, tuple[Callable, ...]] = {
    FUNCTIONS: (packed_collate,),
    MODELS: (ViG, HierViG, SimpleFeaturePyramid, LayerNorm2d),
    MODEL_WRAPPERS: (GlooDataParallel,),
    OPTIM_WRAPPER_CONSTRUCTORS: (ViGOptimWrapperConstructor,),
    OPTIM_WRAPPERS: (FiniteOptimWrapper, FiniteAmpOptimWrapper, ShardedOptimWrapper, ShardedAmpOptimWrapper),
    RUNNERS: (ShardedRunner,),
    HOOKS: (
        AtomicCheckpointHook,
        CheckDataHook,
        DataOrderHook,
        DeferredRuntimeInfoHook,
        DrawPredictionsHook,
        EvaluateFirstHook,
        FiniteStepsHook,
    ),
}

# Classes built on those of mmdet or mmseg, and the modules that have them.
LAZY: dict[Registry, dict[str, str]] = {
    MODELS: {
        "BatchedCascadeRCNN": ".batched_rcnn",
        "BatchedFasterRCNN": ".batched_rcnn",
        "BatchedMaskRCNN": ".batched_rcnn",
        "BatchedRPNHead": ".batched_rcnn",
        "BatchedRoIHead": ".batched_rcnn",
        "BoxTTAModel": ".det_tta",
        "FastDetPreprocessor": ".det_loading",
        "FastSegPreprocessor": ".seg_loading",
        "FusedEncoderDecoder": ".fused_segmentor",
        "ViGAdapter": ".vit_adapter",
    },
    TRANSFORMS: {
        "FastLoadDetAnnotations": ".det_loading",
        "FastPackDetInputs": ".det_loading",
        "FastPackSegInputs": ".seg_loading",
        "FastPhotoMetricDistortion": ".seg_loading",
        "FastRandomCrop": ".seg_loading",
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
