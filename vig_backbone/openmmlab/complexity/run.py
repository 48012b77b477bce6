"""Building the model of a config without its weights, and running what it runs for an image."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import ConfigError

Size = tuple[int, int]  # height, width
PROPOSALS, DETECTIONS = 1000, 100  # that go through the box heads and the mask heads of an image


class _EmptyOn(TorchFunctionMode):
    """`torch.empty`, which layers get their parameters from, gives tensors on a device; on 'meta' they have no memory.

    Constructors that compute, with `linspace` or `arange`, do so on the CPU as ever.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": self.device}
        return function(*args, **kwargs)


def build_model(cfg: Config, device: str) -> nn.Module:
    """The model of a config of mmdet or mmseg in evaluation mode, without weights where `device` is 'meta'.

    Raises:
        ConfigError: if it cannot be built.
    """
    settings = deepcopy(cfg.get("model"))  # some constructors write into it
    if not isinstance(settings, dict) or "backbone" not in settings:
        raise ConfigError("the config has no model.backbone: expected a detector or segmenter with one")
    import_module(f"{cfg.default_scope}.models")
    settings.backbone.pop("compile", None)
    try:
        with DefaultScope.overwrite_default_scope(cfg.default_scope), _EmptyOn(device):
            model = MODELS.build(settings)
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        raise ConfigError(f"the model cannot be built: {type(error).__name__}: {error}") from error
    return model.to(device).eval()


def run_model(model: nn.Module, size: Size) -> None:
    """The products of a prediction for one image: backbone, neck and heads, but no suppression and no resizing.

    Heads on proposals see PROPOSALS boxes, and DETECTIONS in each mask head. Auxiliary heads do not run.
    """
    images = torch.zeros(1, 3, *size, device=next(model.parameters()).device)
    with torch.no_grad():
        if hasattr(model, "roi_head") and hasattr(model, "rpn_head"):
            with _pooled_features():
                _run_two_stages(model, images)
        else:
            model._forward(images, None if hasattr(model, "decode_head") else _samples(size))


def _run_two_stages(model: nn.Module, images: Tensor) -> None:
    maps = model.extract_feat(images)
    model.rpn_head(maps)
    head = model.roi_head
    boxes = images.new_zeros(PROPOSALS, 5)  # image, x1, y1, x2, y2
    stages = [(stage,) for stage in range(head.num_stages)] if hasattr(head, "num_stages") else [()]
    for stage in stages:
        head._bbox_forward(*stage, maps, boxes)
        if head.with_mask:
            head._mask_forward(*stage, maps, boxes[:DETECTIONS])


@contextmanager
def _pooled_features() -> Iterator[None]:
    """Features of RoIs are zeros of the right shape: which level a box is on asks for the values of tensors."""
    from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor

    def forward(extractor: nn.Module, maps: tuple[Tensor, ...], rois: Tensor, *scale: float) -> Tensor:
        return maps[0].new_zeros(len(rois), extractor.out_channels, *extractor.roi_layers[0].output_size)

    with patch.object(SingleRoIExtractor, "forward", forward):
        yield


def _samples(size: Size) -> list:
    """What heads that ask for it learn about the image."""
    from mmdet.structures import DetDataSample

    shapes = dict.fromkeys(("img_shape", "ori_shape", "pad_shape", "batch_input_shape"), size)
    return [DetDataSample(metainfo=dict(img_id=0, scale_factor=(1.0, 1.0), **shapes))]
