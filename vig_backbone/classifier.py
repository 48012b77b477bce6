"""Image classifiers on the two backbones, with torch alone: what the official checkpoints are.

Parameter names are the official ones: ``head`` behind the last norm of :class:`ViG`, ``classifier.norm`` and
``classifier.head`` behind the last stage of :class:`HierViG`, which has no out-norms here. The methods are those that
timm expects of its models; `timm_models.py` makes them known there.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from . import hier_vig, vig
from .base import Backbone, FeatureInfo, resolve_indices
from .checkpoint import load_weights, read_checkpoint, select_weights
from .hier_vig import HierViG
from .padding import at_stride, clear_padding
from .vig import ViG

POOLINGS = ("avg", "")


class Classifier(Backbone):
    """Base of :class:`ViGClassifier` and :class:`HierViGClassifier`; see there."""

    dropped_parameters: tuple[str, ...] = ()  # of a checkpoint: the head stays
    head_name: str  # of the last layer, in the state dict
    stride: int  # of the last map
    num_features: int

    def _add_head(self, num_classes: int, drop_rate: float, global_pool: str) -> None:
        """What comes last in the constructor."""
        self.drop_rate = drop_rate
        self.head_hidden_size = self.num_features
        self.reset_classifier(num_classes, global_pool)

    def get_classifier(self) -> nn.Module:
        """The last layer: `nn.Linear`, or `nn.Identity` without classes."""
        return self.get_submodule(self.head_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer for `num_classes` (0: none), and another `global_pool` where it is given."""
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in POOLINGS:
            raise ValueError(f"global_pool={pool!r}: expected 'avg', or '' for a map without pooling")
        self.global_pool, self.num_classes = pool, num_classes
        reference = next(self.parameters())
        head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        if isinstance(head, nn.Linear):
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        parent, _, name = self.head_name.rpartition(".")
        self.get_submodule(parent).add_module(name, head.to(reference.device, reference.dtype))

    def forward(self, x: Tensor, valid_sizes: Tensor | None = None) -> Tensor:
        """[B, 3, H, W] -> logits [B, num_classes]; `valid_sizes` as for the backbone, padding counts for nothing."""
        valid_sizes = self.check_images(x, valid_sizes)
        return self.forward_head(self.forward_features(x, valid_sizes), sizes=at_stride(valid_sizes, self.stride))

    def forward_head(self, x: Tensor, pre_logits: bool = False, sizes: Tensor | None = None) -> Tensor:
        """The final map [B, C, H, W] -> logits [B, num_classes], or what they are made of with `pre_logits`.

        With valid `sizes` of the map, [B, 2], zeros in its padding. Without pooling, maps instead of vectors.
        """
        if self.global_pool:
            x = x.mean((2, 3)) if sizes is None else x.sum((2, 3)) / sizes.prod(1, keepdim=True)
        else:
            x = x.permute(0, 2, 3, 1)
        if not pre_logits:
            x = self.get_classifier()(F.dropout(x, self.drop_rate, self.training))
        return x if self.global_pool else x.permute(0, 3, 1, 2)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Sequence[int] | int | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        valid_sizes: Tensor | None = None,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps [B, C, H, W] after the blocks (:class:`HierViG`: stages) `indices`, with timm's arguments.

        Returns (final normalised map, maps), or the maps alone if `intermediates_only`, which always stops early.
        `norm` normalises the maps for which there is a norm.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: expected 'NCHW'")
        wanted = resolve_indices(indices, len(self.feature_info), "indices")
        out = super().forward_intermediates(x, wanted, intermediates_only, valid_sizes)
        final, maps = (None, out) if intermediates_only else out
        if norm:
            sizes = self.check_images(x, valid_sizes)
            maps = [self._normalise(y, i, sizes) for i, y in zip(wanted, maps)]
        return maps if intermediates_only else (final, maps)

    def prune_intermediate_layers(
        self, indices: Sequence[int] | int = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> tuple[int, ...]:
        """Drop the layers behind the last of `indices`; returns them, not negative. The head cannot be used then."""
        wanted = resolve_indices(indices, len(self.feature_info), "indices")
        self._prune(wanted[-1] + 1, prune_norm)
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    def _normalise(self, x: Tensor, index: int, valid_sizes: Tensor | None) -> Tensor:
        """The norm over a map that `forward_intermediates` gives for `index`, if there is one."""
        raise NotImplementedError

    def _prune(self, count: int, prune_norm: bool) -> None:
        """Keep the first `count` layers."""
        raise NotImplementedError


class ViGClassifier(Classifier, ViG):
    """Plain ViG with a linear layer on the mean of its last map.

    Args:
        arch: ``'tiny'``, ``'small'`` or ``'base'``.
        num_classes: 0 for none: the output is the mean itself, [B, C].
        drop_rate: dropout before the last layer.
        global_pool: ``'avg'``, or ``''`` for the last layer on each token: maps [B, num_classes, H, W].
        drop_path_rate, with_cp, gla_impl, compile: see :class:`ViG`.

    Raises:
        ValueError: for an unknown `arch` or `global_pool`.
    """

    head_name = "head"
    stride = 16

    def __init__(
        self,
        arch: str = "small",
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
        gla_impl: str = "auto",
        compile: bool | dict = False,
    ) -> None:
        ViG.__init__(self, arch, drop_path_rate=drop_path_rate, with_cp=with_cp, gla_impl=gla_impl, compile=compile)
        self.num_features = self.embed_dim
        self.feature_info = FeatureInfo(
            dict(num_chs=self.embed_dim, reduction=16, module=f"blocks.{i}", index=i) for i in range(len(self.blocks))
        )
        self._add_head(num_classes, drop_rate, global_pool)

    def _normalise(self, x: Tensor, index: int, valid_sizes: Tensor | None) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # which leaves zeros of padding zeros

    def _prune(self, count: int, prune_norm: bool) -> None:
        self.blocks = self.blocks[:count]
        if prune_norm:
            self.norm = nn.Identity()


class HierViGClassifier(Classifier, HierViG):
    """ViG-H with a norm and a linear layer on the mean of its last map.

    Args:
        arch, num_classes, drop_rate, global_pool: see :class:`ViGClassifier`.
        drop_path_rate, with_cp, gla_impl, compile: see :class:`HierViG`.

    Raises:
        ValueError: for an unknown `arch` or `global_pool`.
    """

    head_name = "classifier.head"
    stride = 32

    def __init__(
        self,
        arch: str = "tiny",
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
        gla_impl: str = "auto",
        compile: bool | dict = False,
    ) -> None:
        HierViG.__init__(self, arch, drop_path_rate=drop_path_rate, with_cp=with_cp, gla_impl=gla_impl, compile=compile)
        self.num_features = self.feature_info.channels()[-1]
        # The last out-norm by its name in the checkpoints; the backbone's own outputs are gone.
        self.classifier = nn.ModuleDict(dict(norm=self.get_submodule(f"outnorm{self.out_indices[-1]}")))
        for stage in self.out_indices:
            delattr(self, f"outnorm{stage}")
        self.out_indices = ()
        self._add_head(num_classes, drop_rate, global_pool)

    def _out_norm(self, stage: int) -> nn.Module:
        return self.classifier["norm"]  # asked for that of the last stage alone

    def _normalise(self, x: Tensor, index: int, valid_sizes: Tensor | None) -> Tensor:
        if index + 1 < len(self.feature_info):
            return x
        return clear_padding(self.classifier["norm"](x), at_stride(valid_sizes, self.stride))

    def _prune(self, count: int, prune_norm: bool) -> None:
        self.layers = self.layers[:count]
        self.layers[-1].downsample = nn.Identity()
        if prune_norm:
            self.classifier["norm"] = nn.Identity()


def evaluation_settings(name: str) -> dict[str, Any]:
    """How the official code evaluates a classifier, and the names of its first and last layer, in timm's terms."""
    is_plain = not name.startswith("hier")
    return dict(
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(14, 14) if is_plain else (7, 7),
        min_input_size=(3, 16, 16) if is_plain else (3, 32, 32),
        crop_pct=224 / 256,
        interpolation="bicubic",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        first_conv="patch_embed.proj.0" if is_plain else "patch_embed.0",
        classifier="head" if is_plain else "classifier.head",
    )


CLASSIFIERS: dict[str, Callable[..., Classifier]] = {
    **{f"vig_{arch}": partial(ViGClassifier, arch=arch) for arch in vig.ARCHS},
    **{f"hier_vig_{arch}": partial(HierViGClassifier, arch=arch) for arch in hier_vig.ARCHS},
}


def build_classifier(
    name: str, checkpoint: str | os.PathLike | None = None, new_head: bool = False, **options: Any
) -> Classifier:
    """Build a classifier, with its weights where `checkpoint` is given.

    Args:
        name: as for :func:`build_backbone`.
        checkpoint: path or URL of an official file, or of one that fits as strictly.
        new_head: leave the last layer as it was drawn, for other classes than those of the checkpoint.
        options: further arguments of :class:`ViGClassifier` or :class:`HierViGClassifier`.

    Raises:
        ValueError: for an unknown name.
        CheckpointError: if the checkpoint cannot be read or does not fit.
    """
    if name not in CLASSIFIERS:
        raise ValueError(f"no classifier {name!r}: expected one of {', '.join(map(repr, CLASSIFIERS))}")
    model = CLASSIFIERS[name](**options)
    if checkpoint is not None:
        load_classifier(model, checkpoint, new_head)
    return model


def load_classifier(model: Classifier, checkpoint: str | os.PathLike, new_head: bool = False) -> None:
    """Load the weights of a classifier from a file or URL, all of them or none, the last layer only if not `new_head`.

    Raises:
        CheckpointError: as :func:`vig_backbone.load_checkpoint`; a file without head, or with one of other classes.
    """
    source = str(checkpoint)
    weights = select_weights(read_checkpoint(source), source, dropped=model.dropped_parameters)
    if new_head:
        head = model.head_name + "."
        own = {name: value for name, value in model.state_dict().items() if name.startswith(head)}
        weights = {name: value for name, value in weights.items() if not name.startswith(head)} | own
    load_weights(model, weights, source)
