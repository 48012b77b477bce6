"""Everything that the adapter adds to ViG: modules and initialisation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from mmcv.cnn import build_norm_layer
from torch import Tensor, nn

from ...padding import clear_padding
from .attention import DeformableAttention
from .grids import Grid, cut, resize
from .interaction import PYRAMID, ConvFFN, Extractor, Injector
from .spatial_prior import SpatialPrior

INTERACTIONS = 4
STRIDES = (4, *PYRAMID)


@dataclass(frozen=True)
class AdapterSettings:
    """Sizes of the adapter; the defaults are those of the paper.

    Attributes:
        num_heads: heads of the deformable attention; must divide C and C times `deform_ratio`.
        deform_ratio: channels of the values in the attention, as a part of C.
        num_points: places that a query reads on each level.
        cffn_ratio: hidden channels of the extractors' feed-forward networks, as a part of C.
        prior_channels: of the first convolutions on the image.
        extra_extractors: at the end, after the last interaction's own.
    """

    num_heads: int
    deform_ratio: float = 1.0
    num_points: int = 4
    cffn_ratio: float = 0.25
    prior_channels: int = 64
    extra_extractors: int = 2


class Interaction(nn.Module):
    """What happens before and after a quarter of the blocks."""

    def __init__(self, dim: int, settings: AdapterSettings, drop_path_rate: float, last: bool) -> None:
        super().__init__()
        attention = (settings.num_heads, settings.num_points, settings.deform_ratio)
        self.injector = Injector(dim, *attention)
        self.extractors = nn.ModuleList(
            Extractor(dim, *attention, int(dim * settings.cffn_ratio), drop_path_rate)
            for _ in range(1 + settings.extra_extractors * last)
        )


class Adapter(nn.Module):
    """The modules around ViG; :class:`ViGAdapter` runs them.

    Args:
        dim: channels C of ViG's tokens and of all maps.
        strides: which of the strides 4, 8, 16 and 32 are returned, ascending.
        settings: sizes.
        drop_path_rate: stochastic depth in the extractors.
        norm_cfg: of the norms behind convolutions and of the outputs.
    """

    def __init__(
        self, dim: int, strides: Sequence[int], settings: AdapterSettings, drop_path_rate: float, norm_cfg: dict
    ) -> None:
        super().__init__()
        fine = strides[0] == 4
        prior_strides = (4, *PYRAMID) if fine else PYRAMID
        self.spatial_prior = SpatialPrior(dim, prior_strides, settings.prior_channels, norm_cfg)
        self.level_embed = nn.Parameter(torch.empty(len(PYRAMID), dim))
        self.interactions = nn.ModuleList(
            Interaction(dim, settings, drop_path_rate, last=i == INTERACTIONS - 1) for i in range(INTERACTIONS)
        )
        if fine:
            self.up = nn.ConvTranspose2d(dim, dim, 2, stride=2)
        self.norms = nn.ModuleDict({str(stride): build_norm_layer(norm_cfg, dim)[1] for stride in strides})

    def init_from_scratch(self) -> None:
        """Convolutions by their number of outputs, linear layers with std 0.02, deformable attention as in mmcv."""
        self.apply(_init_module)
        nn.init.normal_(self.level_embed)

    def to_tokens(self, maps: Mapping[int, Tensor]) -> Tensor:
        """Maps [B, C, H_s, W_s] at strides s = 8, 16, 32 -> tokens [B, K, C] that know which map they are from."""
        tokens = (maps[stride].permute(0, 2, 3, 1).flatten(1, 2) for stride in PYRAMID)
        return torch.cat([x + level for x, level in zip(tokens, self.level_embed)], 1)

    def to_maps(self, c: Tensor, grids: Sequence[Grid]) -> dict[int, Tensor]:
        """The way back."""
        parts = c.split([grid.H * grid.W for grid in grids], 1)
        return {grid.stride: x.unflatten(1, (grid.H, grid.W)).permute(0, 3, 1, 2) for x, grid in zip(parts, grids)}

    def outputs(
        self, maps: dict[int, Tensor], features: Mapping[int, Tensor], valid_sizes: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The maps [B, C, H_s, W_s] that are returned, with zeros in the padding.

        Args:
            maps: the prior at stride 4, if that is among them, and the pyramid at the other strides.
            features: for each stride, what ViG adds to it, ``[B, C, H/16, W/16]``.
            valid_sizes: of the images, in pixels.
        """
        if 4 in maps:
            maps = maps | {4: maps[4] + cut(self.up(maps[8]), *maps[4].shape[-2:])}
        outputs = []
        for name, norm in self.norms.items():
            stride = int(name)
            x, feature = maps[stride], features[stride]
            grid = Grid.of(x, stride, valid_sizes)
            x = x + resize(feature, Grid.of(feature, 16, valid_sizes), grid)
            outputs.append(clear_padding(norm(x), grid.sizes))
        return tuple(outputs)


def _init_module(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        outputs = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / outputs))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, DeformableAttention):  # its linear layers have been here before
        module.init_weights()
    elif isinstance(module, Injector):
        nn.init.zeros_(module.gamma)
    elif isinstance(module, ConvFFN):
        nn.init.zeros_(module.dwconv_bias)
    elif hasattr(module, "reset_parameters"):  # norms of any kind
        module.reset_parameters()
