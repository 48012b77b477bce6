"""HierViG (ViG-H), the hierarchical variant with strides 4, 8, 16 and 32.

Paper: "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention", arXiv 2405.18425.
Differences to the official classification code: any image size, one forward pass for training and evaluation. The
parameters are the same; the four out-norms are not in the released checkpoints.
"""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from .base import Backbone, FeatureInfo, check_frozen_stages, lookup_arch, resolve_indices
from .layers import DropPath, GatedLinear, LayerNorm, LayerNorm2d, PatchConv, drop_path_rates
from .mixer import GLAMixer
from .padding import at_stride, clear_padding, clear_padding_tokens

# dim and num_heads are those of the first stage; both double from stage to stage.
ARCHS: dict[str, dict] = {
    "tiny": dict(dim=96, depths=(2, 2, 5, 2), num_heads=3),
    "small": dict(dim=96, depths=(2, 2, 17, 2), num_heads=3),
    "base": dict(dim=128, depths=(2, 2, 17, 2), num_heads=4),
}


def swiglu_width(dim: int) -> int:
    """Hidden width of the feed-forward part: 8/3 of the channels, up to the next multiple of 32."""
    return -(-8 * dim // (3 * 32)) * 32


class Permute(nn.Module):
    """Between maps and channels-last tokens; a module of its own because the official stem is a flat sequence."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(*self.dims)


def to_tokens() -> Permute:
    return Permute(0, 2, 3, 1)


def to_map() -> Permute:
    return Permute(0, 3, 1, 2)


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden_dim = swiglu_width(dim)
        self.fc1 = GatedLinear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))


class Block(nn.Module):
    """Pre-norm block on tokens [B, H, W, C]."""

    def __init__(self, dim: int, num_heads: int, drop_path: float, gla_impl: str) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)
        self.op = GLAMixer(dim, num_heads, gla_impl=gla_impl)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> Tensor:
        y, x = self.norm.before_products(x)
        y, x = self.norm2.before_products(x, self.drop_path(self.op(y, sizes)))
        return x + self.drop_path(self.mlp(y))


class Stage(nn.Module):
    """Blocks at one resolution, and the way down to the next one (none after the last stage)."""

    def __init__(self, dim: int, num_heads: int, rates: Sequence[float], last: bool, gla_impl: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, num_heads, rate, gla_impl) for rate in rates)
        self.downsample = nn.Identity() if last else Downsampling(dim)


class Downsampling(nn.Sequential):
    """Tokens [B, H, W, C] -> [B, ceil(H/2), ceil(W/2), 2C]."""

    def __init__(self, dim: int) -> None:
        conv = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1)
        super().__init__(to_map(), conv, to_tokens(), LayerNorm(2 * dim))

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> Tensor:
        return super().forward(clear_padding_tokens(x, sizes))


class ConvStem(nn.Sequential):
    """Image [B, 3, H, W] -> tokens [B, ceil(H/4), ceil(W/4), C]."""

    def __init__(self, dim: int) -> None:
        super().__init__(
            PatchConv(3, dim // 2, stride=2),
            to_tokens(),
            LayerNorm(dim // 2),
            to_map(),
            nn.GELU(),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
            to_tokens(),
            LayerNorm(dim),
        )

    def forward(self, x: Tensor, valid_sizes: Tensor | None = None) -> Tensor:
        x = clear_padding(x, valid_sizes)
        for layer in self:
            if type(layer) is nn.Conv2d:  # the second one
                x = clear_padding(x, at_stride(valid_sizes, 2))
            x = layer(x)
        return x


class HierViG(Backbone):
    """Hierarchical ViG (ViG-H): strides 4, 8, 16, 32, 28 M / 49 M / 88 M parameters (tiny / small / base).

    Input ``[B, 3, H, W]`` with any H, W >= 32; output a tuple of normalised maps, one for each stage s in
    `out_indices`: ``[B, C * 2**s, ceil(H / (4 * 2**s)), ceil(W / (4 * 2**s))]`` with C = 96, 96, 128.

    Images of different sizes go into one batch padded on the right and below, with `valid_sizes`, their heights and
    widths, ``[B, 2]``, integers on the same device: each gets the maps that it gets alone, and zeros in the padding.

    Args:
        arch: ``'tiny'``, ``'small'`` or ``'base'``.
        out_indices: stages whose output is returned, ascending; negative ones count from the end.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 at the first.
        frozen_stages: -1: nothing; 0: stem; n: the stem and the first n stages.
        with_cp: gradient checkpointing, block by block.
        gla_impl: implementation of the scan, see :func:`vig_kernels.bidirectional_gla`.
        compile: `torch.compile` of the blocks; True, or a dict of its options. Image sizes are dynamic. Blocks that
            differ in their weights alone share a graph, so that deep models take no longer to compile.
        init_cfg: None, or ``dict(type='Pretrained', checkpoint='path or URL')``; takes official files as they are.

    Raises:
        ValueError: for an unknown `arch`, indices out of range, or an image smaller than a patch.
    """

    min_image_size = 32
    optional_parameters = ("outnorm",)

    def __init__(
        self,
        arch: str = "tiny",
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: bool = False,
        gla_impl: str = "auto",
        compile: bool | dict = False,
        init_cfg: dict | None = None,
    ) -> None:
        settings = lookup_arch(arch, ARCHS, "HierViG")
        depths, heads = settings["depths"], settings["num_heads"]
        dims = [settings["dim"] * 2**s for s in range(len(depths))]
        super().__init__(check_frozen_stages(frozen_stages, len(depths), "HierViG"), with_cp, init_cfg)
        self.arch = arch
        self.out_indices = resolve_indices(out_indices, len(depths), "out_indices")
        self.feature_info = FeatureInfo(
            dict(num_chs=dims[s], reduction=4 * 2**s, module=f"layers.{s}", index=s) for s in self.out_indices
        )
        self.patch_embed = ConvStem(dims[0])
        rates = drop_path_rates(drop_path_rate, sum(depths))
        self.layers = nn.ModuleList(
            Stage(
                dims[s],
                heads * 2**s,
                rates[sum(depths[:s]) : sum(depths[: s + 1])],
                last=s == len(depths) - 1,
                gla_impl=gla_impl,
            )
            for s in range(len(depths))
        )
        for s in self.out_indices:
            self.add_module(f"outnorm{s}", LayerNorm2d(dims[s]))
        self._finish(gla_impl, compile)

    def forward(self, x: Tensor, valid_sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        """[B, 3, H, W] -> normalised maps [B, C_s, H_s, W_s] of the stages in `out_indices`."""
        return tuple(self._collect(x, self.out_indices, valid_sizes, norms=map(self._out_norm, self.out_indices)))

    def forward_features(self, x: Tensor, valid_sizes: Tensor | None = None) -> Tensor:
        """The final normalised map [B, 8 C, ceil(H/32), ceil(W/32)]; needs the last stage in `out_indices`."""
        last = len(self.layers) - 1
        return self._collect(x, (last,), valid_sizes, norms=[self._out_norm(last)])[0]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Sequence[int] | int | None = None,
        intermediates_only: bool = False,
        valid_sizes: Tensor | None = None,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Raw maps [B, C_s, H_s, W_s] after the stages `indices` (timm's contract).

        Returns (final normalised map, maps), or the maps alone if `intermediates_only`, stopping at the last of them.
        """
        last = len(self.layers) - 1
        wanted = resolve_indices(indices, last + 1, "indices")
        if intermediates_only:
            return self._collect(x, wanted, valid_sizes)
        sizes = self.check_images(x, valid_sizes)
        maps = self._collect(x, sorted({*wanted, last}), sizes)
        final = clear_padding(self._out_norm(last)(maps[-1]), at_stride(sizes, 4 * 2**last))
        return final, maps[: len(wanted)]

    def _collect(
        self, x: Tensor, indices: Sequence[int], valid_sizes: Tensor | None, norms: Iterable[nn.Module] = ()
    ) -> list[Tensor]:
        """Maps after the stages `indices`, raw, or normalised by a norm for each of them."""
        norm_of = dict(zip(indices, norms))
        valid_sizes = self.check_images(x, valid_sizes)
        x = self.patch_embed(x, valid_sizes)  # [B, H, W, C]
        maps = []
        for s, stage in enumerate(self.layers[: indices[-1] + 1]):
            sizes = at_stride(valid_sizes, 4 * 2**s)
            for block in stage.blocks:
                x = self.run_block(block, x, sizes)
            if s in indices:
                y = x.permute(0, 3, 1, 2)
                maps.append(clear_padding(norm_of[s](y) if norm_of else y, sizes))
            if s < indices[-1]:
                x = stage.downsample(x, sizes)
        return maps

    def _out_norm(self, stage: int) -> nn.Module:
        if stage not in self.out_indices:
            raise ValueError(f"stage {stage} has no out-norm: it is not in out_indices={self.out_indices}")
        return self.get_submodule(f"outnorm{stage}")

    def compiled_parts(self) -> list[nn.Module]:
        return [block for stage in self.layers for block in stage.blocks]

    def freezable_stages(self) -> list[list[nn.Module | nn.Parameter]]:
        stages = []
        for s, stage in enumerate(self.layers):
            norm = [self.get_submodule(f"outnorm{s}")] if s in self.out_indices else []
            stages.append([stage.blocks, *norm])
        # The way down to a stage belongs to that stage.
        for s in range(1, len(self.layers)):
            stages[s].append(self.layers[s - 1].downsample)
        return [[self.patch_embed], *stages]

    def no_weight_decay(self) -> set[str]:
        return set()

    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's grouping of parameters into layers."""
        fine = [
            (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^layers\.(\d+)\.downsample", (0,)),
            (r"^outnorm", (99999,)),
        ]
        return dict(stem=r"^patch_embed", blocks=r"^layers\.(\d+)" if coarse else fine)
