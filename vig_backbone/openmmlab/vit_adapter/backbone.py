"""Plain ViG with a ViT-Adapter, as a backbone with four strides."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from ...base import FeatureInfo, resolve_indices
from ...padding import at_stride
from ...vig import ViG
from .adapter import INTERACTIONS, STRIDES, Adapter, AdapterSettings
from .grids import Grid, route
from .interaction import PYRAMID

# As Vision-RWKV has them for the same widths.
SETTINGS = {
    "tiny": AdapterSettings(num_heads=6),
    "small": AdapterSettings(num_heads=6),
    "base": AdapterSettings(num_heads=12, deform_ratio=0.5),
}
FEATURES = ("last", "each")


class ViGAdapter(ViG):
    """ViG with a ViT-Adapter (arXiv 2205.08534): maps ``[B, C, ceil(H/s), ceil(W/s)]`` at strides s = 4, 8, 16, 32.

    Any H, W >= 16; C = 192, 384, 768. The parameters of ViG keep their names, so that official checkpoints load; those
    of the adapter start with ``adapter.`` and may be missing. At first, ViG's tokens are what they are without an
    adapter. `valid_sizes` as in :class:`ViG`. `forward_features` and `forward_intermediates` are those of ViG, which
    does not know the adapter there.

    Args:
        arch: ``'tiny'``, ``'small'`` or ``'base'``.
        out_indices: strides that are returned: 0, 1, 2, 3 for 4, 8, 16, 32.
        add_features: which feature of ViG is added to the outputs: ``'last'``, the normalised one to all of them, as
            published for detection; ``'each'``, that after each of the four interactions to one of them, as for
            segmentation.
        adapter: fields of :class:`AdapterSettings` that are to differ from those for `arch`.
        norm_cfg: norm of convolutions and outputs. SyncBN is BN wherever there is one process.
        drop_path_rate: as in ViG; the extractors have this rate, too.
        frozen_stages: as in ViG; the adapter is never frozen.
        with_cp: gradient checkpointing of blocks, injectors and extractors.
        gla_impl, init_cfg: as in ViG.
        compile: as in ViG, and of the same modules: those of the adapter run as they are.

    Raises:
        ValueError: as ViG, and for an unknown `add_features` or heads that do not divide the channels.
        TypeError: for a field that :class:`AdapterSettings` does not have.
    """

    optional_parameters = ("adapter.",)

    def __init__(
        self,
        arch: str = "small",
        out_indices: Sequence[int] = (0, 1, 2, 3),
        add_features: str = "last",
        adapter: dict | None = None,
        norm_cfg: dict | None = None,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: bool = False,
        gla_impl: str = "auto",
        compile: bool | dict = False,
        init_cfg: dict | None = None,
    ) -> None:
        if add_features not in FEATURES:
            raise ValueError(f"ViGAdapter has no add_features={add_features!r}: expected 'last' or 'each'")
        super().__init__(
            arch,
            out_indices=(-1,),  # of blocks; the adapter's own are set below
            drop_path_rate=drop_path_rate,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            gla_impl=gla_impl,
            init_cfg=init_cfg,
        )
        self.add_features = add_features
        self.out_indices = resolve_indices(out_indices, len(STRIDES), "out_indices")
        self.feature_info = FeatureInfo(
            dict(num_chs=self.embed_dim, reduction=STRIDES[i], module=f"adapter.norms.{STRIDES[i]}", index=i)
            for i in self.out_indices
        )
        settings = replace(SETTINGS[arch], **(adapter or {}))
        strides = self.feature_info.reduction()
        self.adapter = Adapter(self.embed_dim, strides, settings, drop_path_rate, norm_cfg or dict(type="SyncBN"))
        self._finish(gla_impl, compile)  # once more, now with the adapter

    def init_from_scratch(self) -> None:
        super().init_from_scratch()
        if hasattr(self, "adapter"):  # not while the constructor of ViG runs
            self.adapter.init_from_scratch()

    def forward(self, x: Tensor, valid_sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        """[B, 3, H, W] -> normalised maps [B, C, ceil(H/s), ceil(W/s)] of the strides in `out_indices`."""
        valid_sizes = self.check_images(x, valid_sizes)
        prior = self.adapter.spatial_prior(x, valid_sizes)
        tokens = self.embed(x, valid_sizes)
        features, pyramid = self._interact(tokens, prior, valid_sizes)
        return self.adapter.outputs(prior | pyramid, features, valid_sizes)

    def _interact(
        self, x: Tensor, prior: dict[int, Tensor], valid_sizes: Tensor | None
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """From tokens [B, H, W, C]: ViG's features [B, C, H, W] for the four strides, and the pyramid at 8, 16, 32."""
        own = Grid(16, *x.shape[1:3], at_stride(valid_sizes, 16))
        pyramid = [Grid.of(prior[stride], stride, valid_sizes) for stride in PYRAMID]
        to_pyramid, to_own = route([own], pyramid, x.device), route(pyramid, [own], x.device)
        c = self.adapter.to_tokens(prior)
        count = len(self.blocks) // INTERACTIONS
        features = []
        for i, interaction in enumerate(self.adapter.interactions):
            x = self.run_block(partial(interaction.injector, route=to_pyramid), x, c)
            for block in self.blocks[i * count : (i + 1) * count]:
                x = self.run_block(block, x, own.sizes)
            for extractor in interaction.extractors:
                c = self.run_block(partial(extractor, route=to_own, grids=pyramid), c, x)
            features.append(x)
        features[-1] = self.norm(x)
        if self.add_features == "last":
            features = features[-1:] * len(STRIDES)
        maps = (feature.permute(0, 3, 1, 2) for feature in features)
        return dict(zip(STRIDES, maps)), self.adapter.to_maps(c, pyramid)

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"adapter.level_embed"}
