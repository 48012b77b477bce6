"""Puts the lighter data loading into a config, or takes it out again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from mmengine.config import Config, ConfigDict

from .errors import ConfigError

COLLATE = dict(type="packed_collate")
STOCK_COLLATE = dict(type="pseudo_collate")
TRANSFORMS = {
    "mmdet": {"LoadAnnotations": "FastLoadDetAnnotations", "PackDetInputs": "FastPackDetInputs"},
    "mmseg": {
        "RandomCrop": "FastRandomCrop",
        "PhotoMetricDistortion": "FastPhotoMetricDistortion",
        "PackSegInputs": "FastPackSegInputs",
    },
}
PREPROCESSORS = {
    "mmdet": {"DetDataPreprocessor": "FastDetPreprocessor"},
    "mmseg": {"SegDataPreProcessor": "FastSegPreprocessor"},
}
# What handles masks of any kind; others, such as CopyPaste, read the arrays of BitmapMasks.
SAFE_FOR_RUN_MASKS = (
    *("LoadImageFromFile", "LoadAnnotations", "FastLoadDetAnnotations", "PackDetInputs", "FastPackDetInputs"),
    *("Resize", "RandomResize", "RandomChoiceResize", "RandomChoice", "RandomFlip", "RandomCrop", "Pad"),
    *("FilterAnnotations", "PhotoMetricDistortion", "YOLOXHSVRandomAug"),
)


def use_fast_loading(cfg: Config) -> Config:
    """Replace what there is a lighter equal of in the training data's pipeline, its loader and the preprocessor.

    The results are those of the stock parts. What is not known here stays as it is. Changes and returns `cfg`.
    """
    scope = cfg.get("default_scope")
    if scope not in TRANSFORMS:
        raise ConfigError(f"default_scope={scope!r}: there is data loading for {' and '.join(TRANSFORMS)}")
    _add_import(cfg)
    known = _replace_preprocessor(cfg, PREPROCESSORS[scope])
    names = dict(TRANSFORMS[scope])
    if not known:  # another preprocessor may not widen labels
        names.pop("PackSegInputs", None)
    _replace_transforms(cfg, names)
    loader = cfg.train_dataloader
    if known and loader.get("collate_fn", STOCK_COLLATE) == STOCK_COLLATE:
        loader.collate_fn = ConfigDict(COLLATE)
    loader.setdefault("pin_memory", torch.cuda.is_available())
    return cfg


def use_stock_loading(cfg: Config) -> Config:
    """The inverse of `use_fast_loading`; changes and returns `cfg`."""
    scope = cfg.get("default_scope")
    _replace_preprocessor(cfg, _inverse(PREPROCESSORS.get(scope, {})))
    _replace_transforms(cfg, _inverse(TRANSFORMS.get(scope, {})))
    if cfg.train_dataloader.get("collate_fn") == COLLATE:
        cfg.train_dataloader.collate_fn = ConfigDict(STOCK_COLLATE)
        cfg.train_dataloader.pop("pin_memory", None)
    return cfg


def _inverse(names: dict[str, str]) -> dict[str, str]:
    return {new: old for old, new in names.items()}


def _add_import(cfg: Config) -> None:
    """Of this package, for those who read the config as it is then."""
    imports = cfg.setdefault("custom_imports", ConfigDict(imports=[], allow_failed_imports=False))
    listed = [imports.imports] if isinstance(imports.imports, str) else list(imports.imports)
    imports.imports = listed if "vig_backbone" in listed else [*listed, "vig_backbone"]


def _replace_preprocessor(cfg: Config, names: dict[str, str]) -> bool:
    """Whether the model's is one of the names, old or new."""
    found = [each for each in (cfg.get("data_preprocessor"), cfg.model.get("data_preprocessor")) if each]
    for each in found:
        each.type = names.get(_bare(each.get("type")), each.get("type"))
    return bool(found) and all(each.type in names.values() for each in found)


def _replace_transforms(cfg: Config, names: dict[str, str]) -> None:
    for pipeline in pipelines(cfg.train_dataloader.dataset):
        every = [_bare(transform.get("type")) for transform in _transforms(pipeline)]
        safe = all(name in SAFE_FOR_RUN_MASKS for name in every)
        for transform in _transforms(pipeline):
            name = _bare(transform.get("type"))
            if name in names and (safe or names[name] != "FastLoadDetAnnotations"):
                transform.type = names[name]


def _bare(name: Any) -> Any:
    """Without the scope; a class as it is."""
    return name.removeprefix("mmdet.").removeprefix("mmseg.") if isinstance(name, str) else name


def pipelines(dataset: dict) -> Iterator[list]:
    """Those of a data set and of the data sets that it wraps."""
    if dataset.get("pipeline"):
        yield dataset.pipeline
    for inner in (dataset.get("dataset"), *dataset.get("datasets", ())):
        if inner:
            yield from pipelines(inner)


def _transforms(node: Any) -> Iterator[dict]:
    """Those of a pipeline and of the pipelines inside it, such as RandomChoice's."""
    if isinstance(node, dict):
        if "type" in node:
            yield node
        node = list(node.get("transforms", ()))
    if isinstance(node, list | tuple):
        for each in node:
            yield from _transforms(each)
