"""Layer-wise learning-rate decay for both backbones, in mmdet and mmseg alike."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from torch import nn

from ..base import Backbone
from ..hier_vig import HierViG
from ..vig import ViG

DEFAULTS: dict[str, Any] = dict(layer_decay_rate=1.0, custom_keys={})
MULTIPLIERS = ("lr_mult", "decay_mult")
REST = "rest"
LAST = re.compile(r"(norm|outnorm\d+|adapter|head|classifier)\.")  # of the backbone, and yet at the full rate


class LayerRow(NamedTuple):
    """A group of parameters: a layer's, with or without weight decay."""

    layer: str
    tensors: int
    parameters: int
    lr_scale: float
    lr: float
    weight_decay: float


class _Group(NamedTuple):
    lr_scale: float
    layer: str
    decay_scale: float


class ViGOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Optimizer wrapper whose learning rate falls from the heads to the stem of a ViG, HierViG or subclass of these.

    With n blocks, those of all stages counted together, block i (from 0) learns at ``rate ** (n - i)`` of the learning
    rate and the stem, with the position embedding, at ``rate ** (n + 1)``, as in ViTDet; the way down to a stage
    belongs to that stage's first block. Everything else learns at the full rate: norms of outputs, an adapter, neck
    and heads. No weight decay on parameters of at most one dimension, nor on those that a module of the backbone
    names in `no_weight_decay()`. Groups with the full learning rate come first: its log is that of the first group.

    Args:
        optim_wrapper_cfg: as for mmengine's constructor; the optimizer's `lr` and `weight_decay` must be in it.
        paramwise_cfg: `layer_decay_rate` above 0, at most 1 (default: 1, no decay over the layers); `custom_keys`,
            ``{part of a name: dict(lr_mult=…, decay_mult=…)}``, of which the longest that fits a name counts, as in
            mmengine: `lr_mult` multiplies the layer's rate, `decay_mult` takes the place of the rules above.

    Raises:
        ValueError: for a field that is unknown, missing or out of range, a custom key that is part of no name, a model
            without such a backbone, or parameters of the backbone that belong to no layer.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        super().__init__(optim_wrapper_cfg, {**DEFAULTS, **(paramwise_cfg or {})})

    def __call__(self, model: nn.Module) -> OptimWrapper:
        frozen = sum(not p.requires_grad for p in model.parameters())
        table = format_rows(self.rows(model))
        print_log(f"Learning rates by layer ({frozen} frozen tensors in none of them)\n{table}", logger="current")
        return super().__call__(model)

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = "", is_dcn_module: bool = False) -> None:
        """Append the parameter groups of `module`, the model, to `params`; for mmengine, which calls this."""
        for group, members in self._groups(module).items():
            lr, weight_decay = self.base_lr * group.lr_scale, self.base_wd * group.decay_scale
            params.append(dict(params=members, lr=lr, weight_decay=weight_decay))

    def rows(self, model: nn.Module) -> list[LayerRow]:
        """What the parameter groups of `model` are, in the optimizer's order."""
        return [
            LayerRow(
                layer=group.layer,
                tensors=len(members),
                parameters=sum(p.numel() for p in members),
                lr_scale=group.lr_scale,
                lr=self.base_lr * group.lr_scale,
                weight_decay=self.base_wd * group.decay_scale,
            )
            for group, members in self._groups(model).items()
        ]

    def _groups(self, model: nn.Module) -> dict[_Group, list[nn.Parameter]]:
        """The trainable parameters by group, full learning rate first, then from the last layer to the stem."""
        layers = self._layers(model)
        undecayed = {id(p) for p in _undecayed(model)}
        self._check_custom_keys([name for name, _ in model.named_parameters()])
        groups: dict[_Group, list[nn.Parameter]] = {}
        for name, p in model.named_parameters():
            if p.requires_grad:
                layer, lr_scale = layers.get(id(p), (REST, 1.0))
                decays = p.dim() > 1 and id(p) not in undecayed
                custom = self._custom(name)
                group = _Group(
                    lr_scale * custom.get("lr_mult", 1.0), layer, custom.get("decay_mult", 1.0 if decays else 0.0)
                )
                groups.setdefault(group, []).append(p)
        order = sorted(groups, key=lambda g: (g.lr_scale != 1.0, -g.lr_scale, g.layer, -g.decay_scale))
        return {group: groups[group] for group in order}

    def _layers(self, model: nn.Module) -> dict[int, tuple[str, float]]:
        """Layer and its share of the learning rate by parameter id, of what does not learn at the full rate."""
        rate = self.paramwise_cfg["layer_decay_rate"]
        found = {}
        for backbone in _backbones(model):
            layers = backbone_layers(backbone)
            placed = {
                id(p): (name, rate ** (len(layers) - i))
                for i, (name, parts) in enumerate(layers.items())
                for p in _parameters(parts)
            }
            _check_complete(backbone, placed)
            if rate != 1.0:
                found.update(placed)
        return found

    def _custom(self, name: str) -> dict[str, float]:
        custom_keys = self.paramwise_cfg["custom_keys"]
        fitting = [key for key in custom_keys if key in name]
        return custom_keys[min(fitting, key=lambda key: (-len(key), key))] if fitting else {}

    def _validate_cfg(self) -> None:
        what = type(self).__name__
        if unknown := set(self.paramwise_cfg) - set(DEFAULTS):
            raise ValueError(f"{what}: paramwise_cfg has unknown {_names(unknown)}; known are {_names(DEFAULTS)}")
        rate = self.paramwise_cfg["layer_decay_rate"]
        if not isinstance(rate, (int, float)) or not 0 < rate <= 1:
            raise ValueError(f"{what}: paramwise_cfg.layer_decay_rate={rate!r}, expected a number above 0, at most 1")
        for key, custom in self.paramwise_cfg["custom_keys"].items():
            if unknown := set(custom) - set(MULTIPLIERS):
                raise ValueError(
                    f"{what}: paramwise_cfg.custom_keys[{key!r}] has unknown {_names(unknown)}; known are "
                    f"{_names(MULTIPLIERS)}"
                )
        if missing := [field for field in ("lr", "weight_decay") if self.optimizer_cfg.get(field) is None]:
            raise ValueError(f"{what}: optim_wrapper.optimizer must say its {' and '.join(missing)} (0 for none)")

    def _check_custom_keys(self, names: list[str]) -> None:
        unused = [key for key in self.paramwise_cfg["custom_keys"] if not any(key in name for name in names)]
        if unused:
            raise ValueError(
                f"{type(self).__name__}: paramwise_cfg.custom_keys {_names(unused)}: part of no parameter's name; the "
                f"names are like {_names(names[:1] + names[-1:])}"
            )


def backbone_layers(backbone: ViG | HierViG) -> dict[str, list[nn.Module | nn.Parameter]]:
    """The parts of the stem and of each block, in the order in which an image passes them."""
    if isinstance(backbone, ViG):
        blocks = {f"blocks.{i}": [block] for i, block in enumerate(backbone.blocks)}
        return {"stem": [backbone.patch_embed, backbone.pos_embed], **blocks}
    layers: dict[str, list[nn.Module | nn.Parameter]] = {"stem": [backbone.patch_embed]}
    for s, stage in enumerate(backbone.layers):
        for j, block in enumerate(stage.blocks):
            # As with `frozen_stages`: the way down to a stage belongs to that stage.
            way_down = [backbone.layers[s - 1].downsample] if s > 0 and j == 0 else []
            layers[f"layers.{s}.blocks.{j}"] = [*way_down, block]
    return layers


def layer_table(model: nn.Module, cfg: dict) -> list[LayerRow]:
    """The parameter groups that an `optim_wrapper` config gives `model`, in the optimizer's order."""
    wrapper_cfg = {key: value for key, value in cfg.items() if key not in ("constructor", "paramwise_cfg")}
    return ViGOptimWrapperConstructor(wrapper_cfg, cfg.get("paramwise_cfg")).rows(model)


def format_rows(rows: list[LayerRow]) -> str:
    """A table in plain text, a line for each group."""
    cells = [("layer", "tensors", "parameters", "lr scale", "lr", "weight decay")]
    for row in rows:
        numbers = (f"{row.parameters:,}", f"{row.lr_scale:.4g}", f"{row.lr:.4g}", f"{row.weight_decay:.4g}")
        cells.append((row.layer, str(row.tensors), *numbers))
    first, *others = (max(map(len, column)) for column in zip(*cells))
    return "\n".join(
        "  ".join([f"{line[0]:<{first}}", *(f"{cell:>{width}}" for cell, width in zip(line[1:], others))])
        for line in cells
    )


def _backbones(model: nn.Module) -> list[ViG | HierViG]:
    found = [module for module in model.modules() if isinstance(module, (ViG, HierViG))]
    if not found:
        backbone = getattr(getattr(model, "module", model), "backbone", model)
        raise ValueError(
            f"ViGOptimWrapperConstructor knows the layers of ViG and HierViG, not of {type(backbone).__name__}: leave "
            "optim_wrapper.constructor out (mmengine's own takes paramwise_cfg=dict(flat_decay_mult=0.0)), or use the "
            "one that mmdet or mmseg has for that backbone"
        )
    return found


def _check_complete(backbone: Backbone, placed: dict[int, tuple[str, float]]) -> None:
    lost = [name for name, p in backbone.named_parameters() if id(p) not in placed and not LAST.match(name)]
    if lost:
        raise ValueError(
            f"parameters of {type(backbone).__name__} that belong to no layer: {_names(lost)}; put them into a block, "
            "or under the name 'adapter' for the full learning rate"
        )


def _undecayed(model: nn.Module) -> Iterator[nn.Parameter]:
    for backbone in _backbones(model):
        for module in backbone.modules():
            if hasattr(module, "no_weight_decay"):
                yield from map(module.get_parameter, module.no_weight_decay())


def _parameters(parts: list[nn.Module | nn.Parameter]) -> Iterator[nn.Parameter]:
    for part in parts:
        yield from [part] if isinstance(part, nn.Parameter) else part.parameters()


def _names(names: Any) -> str:
    return ", ".join(map(repr, names))
