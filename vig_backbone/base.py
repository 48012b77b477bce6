"""What both backbones have in common: freezing, checkpointing, initialisation, the contract with timm and OpenMMLab."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .checkpoint import load_checkpoint
from .layers import DepthwiseConv3x3, GatedLinear, LayerNorm, RMSNorm
from .mixer import impl_around_the_scan
from .padding import attached_valid_sizes, check_image_sizes

# Graphs of one kind of block, at most: four widths, and for each training or not, one image or several, with valid
# sizes or without, with drop path or without. More would run without a graph.
MAX_GRAPHS = 64


class FeatureInfo(list):
    """One dict per output with ``num_chs``, ``reduction`` (stride in pixels) and ``module``, as in timm."""

    def channels(self) -> list[int]:
        return [info["num_chs"] for info in self]

    def reduction(self) -> list[int]:
        return [info["reduction"] for info in self]

    def module_name(self) -> list[str]:
        return [info["module"] for info in self]


class Backbone(nn.Module):
    """Base of :class:`ViG` and :class:`HierViG`; see there."""

    # Parameters that a checkpoint of the classifier may lack, as prefixes.
    optional_parameters: tuple[str, ...] = ()
    min_image_size: int
    feature_info: FeatureInfo

    def __init__(self, frozen_stages: int, with_cp: bool, init_cfg: dict | None) -> None:
        super().__init__()
        self.frozen_stages = frozen_stages
        self.with_cp = with_cp
        self.init_cfg = _check_init_cfg(init_cfg)

    def _finish(self, gla_impl: str, compile: bool | dict) -> None:
        """What comes last in the constructor."""
        for module in self.modules():
            if isinstance(module, (DepthwiseConv3x3, GatedLinear, LayerNorm, RMSNorm)):
                module.impl = impl_around_the_scan(gla_impl)
        self.init_from_scratch()
        self.train()
        if compile:
            self._compile_parts(**(compile if isinstance(compile, dict) else {}))

    def _compile_parts(self, **options: Any) -> None:
        """Compile the blocks, each by itself: those of the same kind share a graph.

        In one graph the sizes of later maps would be formulas of the image's size, whose simplification alone takes
        more than a minute. Stem and downsamplings are few operators, and Inductor (of torch 2.11) has an assertion that
        fails for the gradient of their strided convolutions where sizes are dynamic.
        """
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, MAX_GRAPHS)
        for part in self.compiled_parts():
            part.compile(**{"dynamic": True, **options})

    def compiled_parts(self) -> list[nn.Module]:
        """What `compile` compiles."""
        raise NotImplementedError

    def freezable_stages(self) -> list[list[nn.Module | nn.Parameter]]:
        """Stem first, then what each further step of `frozen_stages` freezes."""
        raise NotImplementedError

    def init_weights(self) -> None:
        """Initialise from scratch, or load the checkpoint that `init_cfg` names (strictly; see `load_checkpoint`)."""
        if self.init_cfg is None:
            self.init_from_scratch()
        else:
            load_checkpoint(self, **{key: value for key, value in self.init_cfg.items() if key != "type"})

    def init_from_scratch(self) -> None:
        """Linear layers as usual in vision transformers (truncated normal, std 0.02), convolutions as in torch."""
        self.apply(_init_module)

    def train(self, mode: bool = True) -> "Backbone":
        """As usual, but frozen stages stay in evaluation mode, without gradients."""
        super().train(mode)
        for stage in self.freezable_stages()[: self.frozen_stages + 1]:
            for part in stage:
                part.requires_grad_(False)
                if isinstance(part, nn.Module):
                    part.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations (timm's name for `with_cp`)."""
        self.with_cp = enable

    def run_block(self, block: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        """block(*inputs), with gradient checkpointing where it is asked for and of use."""
        if self.with_cp and self.training and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def check_images(self, x: Tensor, valid_sizes: Tensor | None) -> Tensor | None:
        """The valid sizes, given or attached to x; ValueError for anything but images that a patch fits into."""
        if x.dim() != 4 or x.shape[1] != 3:
            raise ValueError(f"{type(self).__name__} takes images [B, 3, H, W], got a tensor of shape {list(x.shape)}")
        H, W = x.shape[-2:]
        if min(H, W) < self.min_image_size:
            raise ValueError(
                f"image of {H}x{W} pixels is smaller than a patch: {type(self).__name__} needs at least "
                f"{self.min_image_size} pixels on each side; resize or pad the image, or leave it out"
            )
        if valid_sizes is None:
            valid_sizes = attached_valid_sizes(x)
        if valid_sizes is not None:
            check_image_sizes(valid_sizes, x)
        return valid_sizes


def resolve_indices(indices: Sequence[int] | int | None, count: int, what: str) -> tuple[int, ...]:
    """Sorted non-negative indices: None is all of them, an int the last so many, negative ones count from the end."""
    if indices is None:
        return tuple(range(count))
    if isinstance(indices, int):
        indices = range(count - indices, count)
    resolved = [i + count if i < 0 else i for i in indices]
    if not resolved or any(not 0 <= i < count for i in resolved):
        raise ValueError(f"{what}={tuple(indices)} does not fit: expected indices from {-count} to {count - 1}")
    if sorted(set(resolved)) != resolved:
        raise ValueError(f"{what}={tuple(indices)} must be in ascending order, without repetition")
    return tuple(resolved)


def lookup_arch(arch: str, archs: dict, model: str) -> dict:
    """The settings of a variant; a ValueError that lists them all for an unknown name."""
    if arch not in archs:
        raise ValueError(f"{model} has no arch={arch!r}: expected one of {', '.join(map(repr, archs))}")
    return archs[arch]


def check_frozen_stages(frozen_stages: int, count: int, model: str) -> int:
    """-1 (nothing is frozen) up to `count`; ValueError otherwise."""
    if not -1 <= frozen_stages <= count:
        raise ValueError(
            f"{model} takes frozen_stages from -1 (none) over 0 (stem) to {count} (all), got {frozen_stages}"
        )
    return frozen_stages


def _check_init_cfg(init_cfg: dict | None) -> dict | None:
    if init_cfg is None:
        return None
    known = {"type", "checkpoint", "key", "prefix"}
    fits = isinstance(init_cfg, Mapping) and init_cfg.get("type") == "Pretrained" and init_cfg.get("checkpoint")
    if not fits or set(init_cfg) - known:
        raise ValueError(
            f"init_cfg={init_cfg!r} is not understood: expected None or "
            "dict(type='Pretrained', checkpoint='path or URL'), with key= and prefix= as options"
        )
    return dict(init_cfg)


def _init_module(module: nn.Module) -> None:
    # Convolutions keep torch's initialisation, their biases above all: with zero biases a token of zero padding stays
    # exactly zero through the network, and every normalisation of it multiplies the gradient by 1 / sqrt(eps).
    if isinstance(module, nn.Conv2d):
        module.reset_parameters()
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
