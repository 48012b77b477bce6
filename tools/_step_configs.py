"""The configs whose step is measured: how they are named on the command line, found, and made ready for it."""

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import torch
from _models import Size
from mmengine.config import Config, DictAction
from mmengine.optim import OptimWrapper
from torch import nn

from vig_backbone.openmmlab.configuration import AMP_WRAPPERS, load_config, use_amp
from vig_backbone.openmmlab.errors import ConfigError
from vig_backbone.openmmlab.packages import get_installed_path

NEXT_OPTION = re.compile(r",(?=[A-Za-z_][\w.]*=)")  # the commas within a list stay
AMP_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class Variant:
    """A config with options of its own: a row of the table."""

    name: str
    config: str
    options: tuple[str, ...] = ()  # KEY=VALUE


def parse_variant(text: str) -> Variant:
    """Read ``[NAME=]CONFIG[@KEY=VALUE,KEY=VALUE...]``; ArgumentTypeError for anything else."""
    head, at, tail = text.partition("@")
    name, equals, config = head.rpartition("=")
    options = tuple(NEXT_OPTION.split(tail)) if at else ()
    if not config or bool(name) != bool(equals) or not all("=" in option for option in options):
        raise argparse.ArgumentTypeError(
            f"expected [NAME=]CONFIG[@KEY=VALUE,KEY=VALUE..], such as ours=seg_configs/upernet_vig_t.py@"
            f"model.backbone.compile=True, got {text!r}"
        )
    return Variant(name or "@".join([Path(config).stem, *([tail] if at else [])]), config, options)


def parse_options(options: list[str]) -> dict[str, Any]:
    """KEY=VALUE as mmengine reads --cfg-options: numbers, booleans, lists and tuples are those."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--options", nargs="*", action=DictAction, default={})
    return parser.parse_args(["--options", *options]).options if options else {}


def find_config(text: str) -> Path:
    """The file of a config of this repository or, for ``mmdet::swin/...py``, of an installed package.

    Raises:
        ConfigError: if the package is not installed. (Whether there is such a file, `load_config` looks.)
    """
    package, colons, path = text.rpartition("::")
    if not colons:
        return Path(text)
    try:
        return Path(get_installed_path(package)) / ".mim" / "configs" / path
    except (PackageNotFoundError, ValueError) as error:
        raise ConfigError(
            f"{text}: no package {package!r} is installed, expected mmdet or mmseg before '::'"
        ) from error


def check_names(parser: argparse.ArgumentParser, variants: list[Variant]) -> None:
    """Exit code 2 for two rows that could not be told apart."""
    names = [variant.name for variant in variants]
    if len(set(names)) < len(names):
        parser.error(f"two rows of one name among {', '.join(names)}: expected different ones, NAME=CONFIG sets them")


def load_variant(variant: Variant, options: list[str]) -> Config:
    """Its config with `options`, and then its own, laid over; ConfigError if that cannot work."""
    cfg = load_config(find_config(variant.config), options=parse_options([*options, *variant.options]))
    if cfg.get("compile"):
        raise ConfigError(f"{variant.name}: compile={cfg.compile} would hide the parts of a step; leave it out")
    return cfg


def drop_pretrained(node: Any) -> None:
    """Let nothing in a config of a model ask for a checkpoint."""
    if isinstance(node, dict):
        if isinstance(node.get("pretrained"), str):
            node["pretrained"] = None
        if _is_pretrained(node.get("init_cfg")):
            node.pop("init_cfg")
        elif isinstance(node.get("init_cfg"), list):
            node["init_cfg"] = [init_cfg for init_cfg in node["init_cfg"] if not _is_pretrained(init_cfg)]
    for item in node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else ():
        drop_pretrained(item)


def _is_pretrained(init_cfg: Any) -> bool:
    return isinstance(init_cfg, dict) and init_cfg.get("type") == "Pretrained"


def set_image_size(cfg: Config, size: Size) -> None:
    """Have segmenters not pad the images of a training step to the config's own size."""
    if cfg.model.get("data_preprocessor", {}).get("size"):
        cfg.model.data_preprocessor.size = size


# ---- precision


class CpuAmpOptimWrapper(OptimWrapper):
    """mmengine's AmpOptimWrapper, which wants a GPU, for a CPU and without a scaled loss."""

    dtype = torch.bfloat16

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), torch.autocast("cpu", self.dtype):
            yield


class CpuHalfOptimWrapper(CpuAmpOptimWrapper):
    dtype = torch.float16


def set_precision(cfg: Config, dtype: torch.dtype, device: torch.device) -> None:
    """Train with autocast to `dtype`, on a GPU as ``tools/train.py --amp`` does, or without for float32."""
    wrapper = cfg.optim_wrapper
    plain = {amp: plain for plain, amp in AMP_WRAPPERS.items()}
    wrapper.type = plain.get(wrapper.get("type", "OptimWrapper"), wrapper.get("type", "OptimWrapper"))
    if wrapper.type not in AMP_WRAPPERS:
        raise ConfigError(f"optim_wrapper.type={wrapper.type!r}: expected one of {', '.join(map(repr, AMP_WRAPPERS))}")
    for field in ("dtype", "loss_scale", "use_fsdp"):
        wrapper.pop(field, None)
    if dtype == torch.float32:
        return
    if wrapper.type == "OptimWrapper" and device.type == "cpu":
        wrapper.type = {torch.bfloat16: CpuAmpOptimWrapper, torch.float16: CpuHalfOptimWrapper}[dtype]
    else:
        use_amp(cfg, AMP_DTYPES[dtype])
