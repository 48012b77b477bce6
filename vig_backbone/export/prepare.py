"""Models in the form that exporters take."""

import copy

import torch.nn.functional as F
from torch import Tensor, nn
from vig_kernels.gla.dispatch import IMPLEMENTATIONS

from ..base import Backbone
from ..layers import DepthwiseConv3x3, GatedLinear, LayerNorm, RMSNorm
from ..mixer import GLAMixer, impl_around_the_scan
from ..vig import ViG
from .scan import exportable_gla

EXPORT = "export"  # a `gla_impl` like the others, once this module is imported
IMPLEMENTATIONS[EXPORT] = exportable_gla


def prepare(model: nn.Module, gla_impl: str = EXPORT) -> nn.Module:
    """A copy of a model for inference whose graph is the same for every image size; same weights, same results.

    Args:
        model: a backbone, or whatever has one in it.
        gla_impl: ``'triton'`` keeps the kernels, as operators in the graph, for a GPU.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, GLAMixer):
            module.gla_impl = gla_impl
        elif isinstance(module, (DepthwiseConv3x3, GatedLinear, LayerNorm, RMSNorm)):
            module.impl = impl_around_the_scan(gla_impl)
        elif isinstance(module, ViG):
            module._pos_embed = _Resized(module)
        if isinstance(module, Backbone):
            module.with_cp = False
        module._compiled_call_impl = None
    return model


class _Resized:
    """The position embedding for any grid, by the same steps also for its own, which resizing leaves as it is."""

    def __init__(self, model: ViG) -> None:
        self.pos_embed = model.pos_embed
        self.grid = model._grid().shape[1:3]

    def __call__(self, H: int, W: int) -> Tensor:
        grid = self.pos_embed.unflatten(1, self.grid).permute(0, 3, 1, 2)
        return F.interpolate(grid, size=(H, W), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
