"""Loading configs the way the tools do: options laid over them, and misspelt fields refused."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from mmengine.config import Config, ConfigDict
from mmengine.utils import import_modules_from_strings

from .errors import ConfigError

# What mmengine's Runner and the tools read at the top of a config.
RUNNER_FIELDS = [
    "model",
    "work_dir",
    "train_dataloader",
    "val_dataloader",
    "test_dataloader",
    "train_cfg",
    "val_cfg",
    "test_cfg",
    "auto_scale_lr",
    "optim_wrapper",
    "param_scheduler",
    "val_evaluator",
    "test_evaluator",
    "default_hooks",
    "custom_hooks",
    "data_preprocessor",
    "load_from",
    "resume",
    "launcher",
    "env_cfg",
    "log_processor",
    "log_level",
    "visualizer",
    "vis_backends",
    "default_scope",
    "randomness",
    "experiment_name",
    "custom_imports",
    "model_wrapper_cfg",
    "find_unused_parameters",
    "sync_bn",
    "compile",
    "tta_model",
    "tta_pipeline",
]
SCOPES = ("mmdet", "mmseg")
AMP_WRAPPERS = {"FiniteOptimWrapper": "FiniteAmpOptimWrapper", "OptimWrapper": "AmpOptimWrapper"}
# The released ImageNet checkpoints of our backbones, {} being the first letter of `arch`.
OFFICIAL_FILES = {"HierViG": "vig_h_{}_*.pth", "ViG": "vig_{}_*.pth", "ViGAdapter": "vig_{}_*.pth"}
PRETRAINED_FOLDER = "checkpoints"


def load_config(path: str | Path, data: str | None = None, options: dict[str, Any] | None = None) -> Config:
    """Read a config and lay `data` and then `options` over it.

    Args:
        path: a text-style config of mmengine.
        data: name of a data set for which the config's folder has ``_base_/data_NAME.py``, or the path of such a file.
        options: dotted names and values, as from ``--cfg-options``.

    Raises:
        ConfigError: file missing or unreadable, unknown data set, or a field that looks misspelt.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no config at {path}.{_similar(path)}")
    cfg = _read(path)
    if cfg.get("default_scope") not in SCOPES:
        raise ConfigError(f"{path}: default_scope={cfg.get('default_scope')!r}, expected one of {SCOPES}")
    if data is not None:
        overlay = _read(_data_file(path, data))._cfg_dict.to_dict()
        cfg.merge_from_dict(_for_every_item(overlay, cfg._cfg_dict))
    _check_field_names(cfg, path)
    if options:
        check_options(cfg, options)
        cfg.merge_from_dict(options)
    if imports := cfg.get("custom_imports"):
        import_modules_from_strings(**imports)  # once more: `data` or `options` may have added some
    return cfg


def use_amp(cfg: Config, dtype: str) -> None:
    """Train with automatic mixed precision in `dtype`, 'bfloat16' or 'float16'."""
    given = cfg.optim_wrapper.get("type")
    if given not in AMP_WRAPPERS and given not in AMP_WRAPPERS.values():
        known = ", ".join(map(repr, [*AMP_WRAPPERS, *AMP_WRAPPERS.values()]))
        raise ConfigError(f"optim_wrapper.type={given!r}: --amp needs one of {known}")
    cfg.optim_wrapper.type = AMP_WRAPPERS.get(given, given)
    cfg.optim_wrapper.dtype = dtype
    if cfg.optim_wrapper.type == "AmpOptimWrapper":
        if not torch.cuda.is_available():
            raise ConfigError(
                "--amp: mmengine's AmpOptimWrapper trains on GPUs only, and there is none here; leave it out, or set "
                "optim_wrapper.type=FiniteAmpOptimWrapper"
            )
        cfg.optim_wrapper.setdefault("loss_scale", "dynamic")


def use_ema(cfg: Config) -> None:
    """Evaluate and keep an exponential moving average of the weights, with mmengine's momentum, 0.0002."""
    hooks = cfg.get("custom_hooks", [])
    if not any(hook.get("type") == "EMAHook" for hook in hooks):
        cfg.custom_hooks = [*hooks, dict(type="EMAHook", update_buffers=True)]


def use_gradient_checkpointing(cfg: Config) -> None:
    """Recompute each block of the backbone in the backward pass instead of keeping its activations."""
    _own_backbone(cfg, "--with-cp").with_cp = True


def use_pretrained(cfg: Config, source: str) -> None:
    """Start the backbone from an ImageNet checkpoint: a file or URL, or a folder with the official file in it.

    Raises:
        ConfigError: no such file; the message says which file to put where.
    """
    backbone = _own_backbone(cfg, "--pretrained")
    if urlparse(source).scheme not in ("http", "https"):
        source = str(official_checkpoint(backbone.type, backbone.arch, Path(source)))
    if cfg.get("load_from"):
        raise ConfigError(f"--pretrained and load_from={cfg.load_from!r}, which has a backbone, too: leave one out")
    backbone.init_cfg = dict(type="Pretrained", checkpoint=source)


def official_checkpoint(backbone: str, arch: str, path: Path) -> Path:
    """The file at `path`, or the official one for a backbone in the folder `path`."""
    if path.is_file():
        return path
    pattern = OFFICIAL_FILES[backbone].format(arch[0])
    found = sorted(path.glob(pattern))
    if len(found) == 1:
        return found[0]
    problem = f"{len(found)} files {pattern} in {path}" if path.is_dir() else f"no file or folder {path}"
    raise ConfigError(
        f"--pretrained: {problem}; expected the official checkpoint of this backbone, {pattern} from the hub "
        f"repository hustvl/ViG, in the folder {path if path.is_dir() else PRETRAINED_FOLDER}, or the path or URL of "
        "another one"
    )


def use_compile(cfg: Config) -> None:
    """Compile the backbone with `torch.compile`."""
    _own_backbone(cfg, "--compile", "; mmengine compiles whole models: --cfg-options compile=True").compile = True


def _own_backbone(cfg: Config, option: str, advice: str = "") -> ConfigDict:
    backbone = cfg.model.get("backbone", {})
    if backbone.get("type") not in OFFICIAL_FILES:
        known = ", ".join(OFFICIAL_FILES)
        raise ConfigError(f"{option}: is for the backbones {known}, not {backbone.get('type')!r}{advice}")
    return backbone


def use_tta(cfg: Config) -> None:
    """Test with the test-time augmentation that the config describes in `tta_model` and `tta_pipeline`."""
    missing = [field for field in ("tta_model", "tta_pipeline") if field not in cfg]
    if missing:
        raise ConfigError(f"--tta: the config has no {' and no '.join(missing)}")
    if cfg.model.type == "FusedEncoderDecoder":
        cfg.model.test_cfg.keep_logits = True  # which mmseg merges
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    if cfg.default_scope == "mmdet":
        # mmdet merges boxes only.
        evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
        for evaluator in evaluators:
            if evaluator.get("type") == "CocoMetric":
                evaluator.metric = "bbox"


def _read(path: Path) -> Config:
    try:
        return Config.fromfile(path)
    except Exception as error:  # a config is Python: anything can go wrong in it
        raise ConfigError(f"{path} cannot be read as a config: {type(error).__name__}: {error}") from error


def _for_every_item(overlay: Any, cfg: Any) -> Any:
    """An overlay in which a dict over a list (the heads of a cascade) is one over each of its items."""
    if not isinstance(overlay, dict):
        return overlay
    if isinstance(cfg, list):
        return {str(i): _for_every_item(overlay, item) for i, item in enumerate(cfg)}
    below = cfg if isinstance(cfg, dict) else {}
    return {key: _for_every_item(value, below.get(key)) for key, value in overlay.items()}


def _similar(path: Path) -> str:
    """Configs that may have been meant."""
    folders = [path.parent, Path("seg_configs"), Path("det_configs")]
    names = {str(file) for folder in folders if folder.is_dir() for file in folder.glob("*.py")}
    close = get_close_matches(str(path), names, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def _data_file(path: Path, data: str) -> Path:
    if data.endswith(".py"):
        if not Path(data).is_file():
            raise ConfigError(
                f"--data {data}: no such file; expected a name such as 'toy', or a file to lay over the config"
            )
        return Path(data)
    file = path.parent / "_base_" / f"data_{data}.py"
    if not file.is_file():
        known = sorted(f.stem.removeprefix("data_") for f in file.parent.glob("data_*.py"))
        raise ConfigError(f"--data {data}: there is no {file}; known for this folder: {', '.join(known) or 'none'}")
    return file


def _check_field_names(cfg: Config, path: Path) -> None:
    """Refuse names at the top of a config that look like a misspelt field; others are the config's own variables."""
    for name in cfg:
        if name not in RUNNER_FIELDS:
            close = get_close_matches(name, RUNNER_FIELDS, n=1, cutoff=0.9 if len(name) > 6 else 0.8)
            if close:
                raise ConfigError(f"{path}: unknown field {name!r}, did you mean {close[0]!r}?")


def check_options(cfg: Config, options: dict[str, Any]) -> None:
    """An option must change a field that is there, or add one to a dict that is there; ConfigError otherwise."""
    for option in options:
        node: Any = cfg._cfg_dict
        walked: list[str] = []
        for part in option.split("."):
            if isinstance(node, (list, tuple)) and part.isdigit() and int(part) < len(node):
                node = node[int(part)]
            elif isinstance(node, dict) and part in node:
                node = node[part]
            elif not walked and part in RUNNER_FIELDS:
                break
            elif isinstance(node, dict) and walked and option.endswith(f".{part}"):
                break  # a new argument: its constructor refuses it if it does not exist
            else:
                choices = list(node) if isinstance(node, dict) else []
                if not walked:
                    choices += RUNNER_FIELDS
                close = get_close_matches(part, choices, n=1, cutoff=0.6)
                hint = f", did you mean {'.'.join([*walked, close[0]])!r}?" if close else ""
                raise ConfigError(f"--cfg-options {option}: the config has no {'.'.join([*walked, part])!r}{hint}")
            walked.append(part)
