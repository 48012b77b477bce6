"""ViG backbones for dense prediction. The models need torch alone; in an OpenMMLab environment they are registered."""

from importlib.util import find_spec

from .builder import build_backbone
from .checkpoint import CheckpointError, load_checkpoint
from .classifier import build_classifier
from .hier_vig import HierViG
from .pretrained import from_pretrained, save_pretrained
from .vig import ViG

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "HierViG",
    "ViG",
    "build_backbone",
    "build_classifier",
    "from_pretrained",
    "load_checkpoint",
    "save_pretrained",
]

if find_spec("mmengine") is not None:
    from . import openmmlab  # noqa: F401  (registers the backbones and answers for mmcv._ext)
