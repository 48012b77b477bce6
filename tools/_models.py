"""The models of the benchmark, feature extractors with random weights, and the steps that are measured."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from _roofline import Cost, Machine, count_cost
from _timing import Step
from torch import Tensor, nn

from vig_backbone.builder import BACKBONES, build_backbone

Size = tuple[int, int]  # height, width
INFERENCE, TRAINING, LATENCY = MODES = ("inference", "training", "latency")
EAGER, COMPILED, GRAPHED = PATHS = ("eager", "compiled", "graphed")


# ---- models


@dataclass(frozen=True)
class Contender:
    """Plain models give their last normalised tokens (`forward_features`), hierarchical ones the maps of all stages."""

    name: str
    build: Callable[[Size], nn.Module]
    forward: str = "forward"  # the method that is measured
    from_timm: bool = False
    is_convnet: bool = False
    eager_only: bool = False  # torch.compile would make another one of it


def build_ours(name: str, size: Size) -> nn.Module:
    return build_backbone(name)


def build_timm(name: str, size: Size) -> nn.Module:
    """A plain vision transformer whose position embedding has the size of the image."""
    import timm

    return timm.create_model(name, pretrained=False, num_classes=0, img_size=size)


def build_without_sdpa(name: str, size: Size) -> nn.Module:
    """The same with attention written out: products and a softmax of its own, the attention matrix in memory."""
    from timm.layers import set_fused_attn, use_fused_attn

    before = use_fused_attn()
    set_fused_attn(False)
    try:
        return build_timm(name, size)
    finally:
        set_fused_attn(before)


def build_timm_pyramid(name: str, size: Size, **options: Size) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, features_only=True, **options)


def build_swin(name: str, size: Size) -> nn.Module:
    """With the image size known, the masks of the shifted windows are built once; blocks pad to whole windows."""
    return build_timm_pyramid(name, size, img_size=size)


def _contenders() -> list[Contender]:
    ours = [
        Contender(name, partial(build_ours, name), "forward" if name.startswith("hier") else "forward_features")
        for name in BACKBONES
    ]
    deit = {f"deit_{size}": f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")}
    plain = [
        Contender(name + suffix, partial(build, full_name), "forward_features", from_timm=True, eager_only=bool(suffix))
        for name, full_name in deit.items()
        for suffix, build in (("", build_timm), ("_nosdpa", build_without_sdpa))
    ]
    swin = Contender("swin_tiny", partial(build_swin, "swin_tiny_patch4_window7_224"), from_timm=True)
    convnext = partial(build_timm_pyramid, "convnext_tiny")
    return [*ours, *plain, swin, Contender("convnext_tiny", convnext, from_timm=True, is_convnet=True)]


CONTENDERS = {contender.name: contender for contender in _contenders()}
DEFAULTS = (
    *("vig_tiny", "vig_small", "hier_vig_tiny"),
    *("deit_tiny", "deit_small", "deit_base", "swin_tiny", "convnext_tiny"),
)


def find_contender(name: str) -> Contender:
    """By its name, or by timm's full one; ValueError for an unknown name."""
    short = name.removesuffix("_patch16_224").removesuffix("_patch4_window7_224")
    if short not in CONTENDERS:
        raise ValueError(f"no model {name}: expected any of {', '.join(CONTENDERS)}")
    return CONTENDERS[short]


# ---- what is done with them


@dataclass(frozen=True)
class Setup:
    device: torch.device
    dtype: torch.dtype
    channels_last: bool  # for convnets
    machine: Machine


@dataclass
class Workload:
    """A model, a batch of images and what is done with them; built when first used."""

    contender: Contender
    size: Size
    mode: str
    batch: int
    setup: Setup

    @cached_property
    def model(self) -> nn.Module:
        model = self.contender.build(self.size).to(self.setup.device, memory_format=self.memory_format)
        return model.train(self.mode == TRAINING)

    @cached_property
    def images(self) -> Tensor:
        # A generator of its own: a failed graph capture can leave the default one unusable.
        generator = torch.Generator(self.setup.device).manual_seed(0)
        images = torch.randn(self.batch, 3, *self.size, generator=generator, device=self.setup.device)
        return images.contiguous(memory_format=self.memory_format)

    @property
    def memory_format(self) -> torch.memory_format:
        is_last = self.setup.channels_last and self.contender.is_convnet
        return torch.channels_last if is_last else torch.contiguous_format

    @cached_property
    def function(self) -> Callable[[Tensor], Any]:
        """Images to features, or to the loss."""
        forward = getattr(self.model, self.contender.forward)

        def loss(images: Tensor) -> Tensor:
            features = forward(images)
            maps = [features] if isinstance(features, Tensor) else features
            return sum(x.float().square().mean() for x in maps)

        return loss if self.mode == TRAINING else forward

    @cached_property
    def compiled(self) -> Callable[[Tensor], Any]:
        return torch.compile(self.function, dynamic=False)

    def step(self, path: str) -> Step:
        function, images = self.function if path == EAGER else self.compiled, self.images
        parameters = [x for x in self.model.parameters() if x.requires_grad]

        def infer() -> tuple[Tensor, ...]:
            with torch.no_grad(), self.autocast():
                function(images)
            return ()

        def train() -> tuple[Tensor, ...]:
            with self.autocast():
                loss = function(images)
            torch.autograd.grad(loss, parameters, allow_unused=True)
            return ()

        return train if self.mode == TRAINING else infer

    def autocast(self) -> AbstractContextManager:
        full = self.setup.dtype == torch.float32
        return nullcontext() if full else torch.autocast(self.setup.device.type, self.setup.dtype)

    def held_bytes(self) -> int:
        """Memory that is taken before a step begins."""
        held = (*self.model.parameters(), *self.model.buffers(), self.images)
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}.values())

    @cached_property
    def cost(self) -> Cost:
        """Of an eager step."""
        return count_cost(self.step(EAGER), self.setup.machine)
