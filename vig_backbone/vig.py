"""ViG, the plain (isotropic, stride 16) variant.

Paper: "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention", arXiv 2405.18425.
Differences to the official classification code: any image size, outputs of several blocks, one forward pass for
training and evaluation. The parameters are the same.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Backbone, FeatureInfo, check_frozen_stages, lookup_arch, resolve_indices
from .layers import DropPath, GatedLinear, LayerNorm2d, PatchConv, RMSNorm, drop_path_rates
from .mixer import GLAMixer
from .padding import at_stride, clear_padding, clear_padding_tokens
from .resizing import resize_bicubic

# `activation` puts a SiLU behind the depthwise convolution and before the output projection of the mixer.
ARCHS: dict[str, dict] = {
    "tiny": dict(dim=192, depth=12, num_heads=3, hidden_dim=512, activation=True),
    "small": dict(dim=384, depth=12, num_heads=6, hidden_dim=1024, activation=False),
    "base": dict(dim=768, depth=12, num_heads=12, hidden_dim=2048, activation=False),
}
POS_EMBED_GRID = 14  # 224 pixels at stride 16


class ConvStem(nn.Module):
    """Image [B, 3, H, W] -> tokens [B, ceil(H/16), ceil(W/16), C] by two overlapping convolutions."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            PatchConv(3, dim // 2, stride=8),
            LayerNorm2d(dim // 2),
            nn.SiLU(),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
            LayerNorm2d(dim),
        )

    def forward(self, x: Tensor, valid_sizes: Tensor | None = None) -> Tensor:
        patch_conv, norm, activation, conv, last_norm = self.proj
        x = activation(norm(patch_conv(clear_padding(x, valid_sizes))))
        x = conv(clear_padding(x, at_stride(valid_sizes, 8)))
        return last_norm(x).permute(0, 2, 3, 1)


class SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj = GatedLinear(dim, hidden_dim)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_proj(x))


class Block(nn.Module):
    """Pre-norm block on tokens [B, H, W, C]."""

    def __init__(
        self, dim: int, num_heads: int, hidden_dim: int, activation: bool, drop_path: float, gla_impl: str
    ) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(dim)
        self.attn = GLAMixer(dim, num_heads, activation, gla_impl)
        self.mlp_norm = RMSNorm(dim)
        self.mlp = SwiGLU(dim, hidden_dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> Tensor:
        y, x = self.attn_norm.before_products(x)
        y, x = self.mlp_norm.before_products(x, self.drop_path(self.attn(y, sizes)))
        return x + self.drop_path(self.mlp(y))


class ViG(Backbone):
    """Plain ViG: 12 blocks at stride 16, 5.6 M / 22 M / 88 M parameters (tiny / small / base).

    Input ``[B, 3, H, W]`` with any H, W >= 16; output a tuple of maps ``[B, C, ceil(H/16), ceil(W/16)]``, one for
    each of `out_indices`: the residual stream after that block, normalised after the last one.

    Images of different sizes go into one batch padded on the right and below, with `valid_sizes`, their heights and
    widths, ``[B, 2]``, integers on the same device: each gets the maps that it gets alone, and zeros in the padding.

    Args:
        arch: ``'tiny'``, ``'small'`` or ``'base'``.
        out_indices: blocks whose output is returned, ascending; negative ones count from the end.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 at the first.
        frozen_stages: -1: nothing; 0: stem and position embedding; n: these and the first n blocks.
        with_cp: gradient checkpointing, block by block.
        gla_impl: implementation of the scan, see :func:`vig_kernels.bidirectional_gla`.
        compile: `torch.compile` of the blocks; True, or a dict of its options. Image sizes are dynamic. Blocks that
            differ in their weights alone share a graph, so that deep models take no longer to compile.
        init_cfg: None, or ``dict(type='Pretrained', checkpoint='path or URL')``; takes official files as they are.

    Raises:
        ValueError: for an unknown `arch`, indices out of range, or an image smaller than a patch.
    """

    min_image_size = 16

    def __init__(
        self,
        arch: str = "small",
        out_indices: Sequence[int] = (2, 5, 8, 11),
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: bool = False,
        gla_impl: str = "auto",
        compile: bool | dict = False,
        init_cfg: dict | None = None,
    ) -> None:
        settings = lookup_arch(arch, ARCHS, "ViG")
        dim, depth = settings["dim"], settings["depth"]
        super().__init__(check_frozen_stages(frozen_stages, depth, "ViG"), with_cp, init_cfg)
        self.arch = arch
        self.embed_dim = dim
        self.out_indices = resolve_indices(out_indices, depth, "out_indices")
        self.feature_info = FeatureInfo(
            dict(num_chs=dim, reduction=16, module=f"blocks.{i}", index=i) for i in self.out_indices
        )
        self.patch_embed = ConvStem(dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, POS_EMBED_GRID**2, dim))
        self.blocks = nn.ModuleList(
            Block(dim, settings["num_heads"], settings["hidden_dim"], settings["activation"], rate, gla_impl)
            for rate in drop_path_rates(drop_path_rate, depth)
        )
        self.norm = RMSNorm(dim)
        self._finish(gla_impl, compile)

    def init_from_scratch(self) -> None:
        super().init_from_scratch()
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor, valid_sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        """[B, 3, H, W] -> maps [B, C, ceil(H/16), ceil(W/16)] for `out_indices`."""
        return tuple(self._collect(x, self.out_indices, valid_sizes, norm_last=True))

    def forward_features(self, x: Tensor, valid_sizes: Tensor | None = None) -> Tensor:
        """The final normalised map [B, C, ceil(H/16), ceil(W/16)]."""
        return self._collect(x, (len(self.blocks) - 1,), valid_sizes, norm_last=True)[0]

    def embed(self, x: Tensor, valid_sizes: Tensor | None = None) -> Tensor:
        """Images [B, 3, H, W] -> tokens [B, ceil(H/16), ceil(W/16), C] with their positions, for the first block."""
        x = self.patch_embed(x, valid_sizes)
        if valid_sizes is not None:
            return x + resize_bicubic(self._grid(), at_stride(valid_sizes, 16), x.shape[1:3])
        return x + self._pos_embed(*x.shape[1:3])

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Sequence[int] | int | None = None,
        intermediates_only: bool = False,
        valid_sizes: Tensor | None = None,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Raw maps [B, C, ceil(H/16), ceil(W/16)] after the blocks `indices` (timm's contract).

        Returns (final normalised map, maps), or the maps alone if `intermediates_only`, stopping at the last of them.
        """
        last = len(self.blocks) - 1
        wanted = resolve_indices(indices, last + 1, "indices")
        if intermediates_only:
            return self._collect(x, wanted, valid_sizes)
        maps = self._collect(x, sorted({*wanted, last}), valid_sizes)
        final = self.norm(maps[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return final, maps[: len(wanted)]

    def _collect(
        self, x: Tensor, indices: Sequence[int], valid_sizes: Tensor | None, norm_last: bool = False
    ) -> list[Tensor]:
        valid_sizes = self.check_images(x, valid_sizes)
        x = self.embed(x, valid_sizes)  # [B, H, W, C]
        sizes = at_stride(valid_sizes, 16)
        maps = []
        for i, block in enumerate(self.blocks[: indices[-1] + 1]):
            x = self.run_block(block, x, sizes)
            if i in indices:
                is_final = norm_last and i == len(self.blocks) - 1
                maps.append(clear_padding_tokens(self.norm(x) if is_final else x, sizes).permute(0, 3, 1, 2))
        return maps

    def _grid(self) -> Tensor:
        return self.pos_embed.view(1, POS_EMBED_GRID, POS_EMBED_GRID, -1)

    def _pos_embed(self, H: int, W: int) -> Tensor:
        """The position embedding, resized to a grid of H x W tokens: [1, H, W, C]."""
        grid = self._grid()
        if (H, W) == (POS_EMBED_GRID, POS_EMBED_GRID):
            return grid
        resized = F.interpolate(grid.permute(0, 3, 1, 2), size=(H, W), mode="bicubic", align_corners=False)
        return resized.permute(0, 2, 3, 1)

    def compiled_parts(self) -> list[nn.Module]:
        return list(self.blocks)

    def freezable_stages(self) -> list[list[nn.Module | nn.Parameter]]:
        return [[self.patch_embed, self.pos_embed], *([block] for block in self.blocks)]

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's grouping of parameters into layers."""
        blocks = r"^blocks\.(\d+)" if coarse else [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]
        return dict(stem=r"^patch_embed|^pos_embed", blocks=blocks)
