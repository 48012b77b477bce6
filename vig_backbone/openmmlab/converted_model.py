"""Whether a detector or segmenter computes the same with the weights of a converted checkpoint."""

from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from ..checkpoint import CheckpointError, compare, find_weights, read_checkpoint
from ..convert import Converted, require_same_outputs
from .config_text import config_from_text


def verify_model(source: str, converted: Converted, key: str | None = None) -> float | None:
    """The relative difference between the outputs of two models of the config in the checkpoint, one from each file.

    None where the source has no config.

    Raises:
        CheckpointError: they differ (see `verify_backbone`), or the weights do not fit the config.
    """
    content = read_checkpoint(source)
    text = (content.get("meta") or {}).get("cfg")
    if not text:
        return None
    cfg = config_from_text(text, source)
    weights = {source: find_weights(content, source, key), str(converted.path): _weights_of(converted)}
    original, again = (_build(cfg, weights[name], name) for name in weights)
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return require_same_outputs(raw_outputs(original, image), raw_outputs(again, image), converted)


def raw_outputs(model: nn.Module, images: Tensor) -> Any:
    """What the last layers on whole maps give for images [B, 3, H, W]: logits, or maps of the neck and RPN."""
    if not hasattr(model, "extract_feat"):  # a classifier
        return model(images)
    maps = model.extract_feat(images)
    if hasattr(model, "decode_head"):
        return model.decode_head(maps)
    return maps, model.rpn_head(maps) if getattr(model, "rpn_head", None) is not None else model.bbox_head(maps)


def _weights_of(converted: Converted) -> dict[str, Tensor]:
    return find_weights(read_checkpoint(str(converted.path)), str(converted.path))


def _build(cfg: Config, weights: dict[str, Tensor], source: str) -> nn.Module:
    init_default_scope(cfg.get("default_scope", "mmengine"))
    if cfg.model.get("backbone", {}).get("compile"):
        cfg.model.backbone.compile = False  # it takes a minute, and changes the order of sums
    model = MODELS.build(cfg.model).eval()
    problems = compare(model, weights)
    if problems:
        raise CheckpointError(f"{source} does not fit the config in it: {'; '.join(problems)}")
    model.load_state_dict(weights)
    return model
