"""Models in folders as Hugging Face has them: ``config.json`` and ``model.safetensors``.

A folder with a classifier is also one of timm's: ``timm.create_model("local-dir:FOLDER", pretrained=True)``.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from torch import nn

from .builder import BACKBONES, build_backbone
from .checkpoint import CheckpointError, find_weights, load_weights, read_checkpoint
from .classifier import CLASSIFIERS, Classifier, build_classifier, evaluation_settings
from .convert import write_safetensors

CONFIG, WEIGHTS = "config.json", "model.safetensors"
BUILDERS = {"backbone": build_backbone, "classifier": build_classifier}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def save_pretrained(model: nn.Module, folder: str | os.PathLike) -> Path:
    """Write a backbone or classifier into `folder`, for :func:`from_pretrained`; returns the folder.

    Raises:
        ValueError: for a model of another class.
        CheckpointError: if safetensors is not installed.
    """
    from . import __version__

    folder = Path(folder)
    name, kind = _architecture(model)
    config: dict[str, Any] = dict(architecture=name, model_type=kind)
    if kind == "classifier":
        config |= dict(num_classes=model.num_classes, num_features=model.num_features)
        config["model_args"] = dict(num_classes=model.num_classes, global_pool=model.global_pool)
        config["pretrained_cfg"] = evaluation_settings(name) | dict(num_classes=model.num_classes)
    else:
        config["model_args"] = dict(out_indices=model.out_indices)
    config["vig_backbone_version"] = __version__
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    write_safetensors(folder / WEIGHTS, weights, dict(architecture=name, vig_backbone_version=__version__))
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return folder


def from_pretrained(source: str | os.PathLike, **options: Any) -> nn.Module:
    """A backbone or classifier, in evaluation mode, with the weights of a folder or of a hub repository.

    Args:
        source: a folder that :func:`save_pretrained` wrote, or the id of a hub repository with the same files,
            ``owner/name`` or ``owner/name@revision``, which needs the package huggingface_hub.
        options: further arguments of the model, before those that were saved.

    Raises:
        CheckpointError: nothing there, the hub cannot be reached, or the files do not fit each other.
    """
    config_file, weights_file = _files(str(source))
    config = _read_config(config_file)
    build = BUILDERS[config["model_type"]]
    try:
        model = build(config["architecture"], **{**config.get("model_args", {}), **options})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{config_file} with {options} describes no model: {error}") from error
    load_weights(model, find_weights(read_checkpoint(str(weights_file)), str(weights_file)), str(weights_file))
    return model.eval()


def _architecture(model: nn.Module) -> tuple[str, str]:
    """Name and kind of a model."""
    kind, models = ("classifier", CLASSIFIERS) if isinstance(model, Classifier) else ("backbone", BACKBONES)
    for name, make in models.items():
        if type(model) is make.func and model.arch == make.keywords["arch"]:
            return name, kind
    raise ValueError(
        f"a {type(model).__name__} cannot be saved this way: expected ViG, HierViG, or a classifier on them; "
        "tools/convert_checkpoint.py is for checkpoints of detectors and segmenters"
    )


def _files(source: str) -> tuple[Path, Path]:
    if Path(source).is_dir():
        return Path(source) / CONFIG, Path(source) / WEIGHTS
    if not HUB_ID.fullmatch(source):
        raise CheckpointError(f"no folder {source}: expected one with {CONFIG}, or a hub repository, owner/name")
    try:
        from huggingface_hub import hf_hub_download
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"there is no folder {source}, and for the hub the package huggingface_hub is missing: "
            "pip install huggingface_hub"
        ) from error
    repository, _, revision = source.partition("@")
    try:
        config, weights = (
            Path(hf_hub_download(repository, file, revision=revision or None)) for file in (CONFIG, WEIGHTS)
        )
    except (OSError, ValueError, RuntimeError) as error:  # the hub's own are all among them
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"there is no folder {source}, and the hub has no such files or cannot be reached ({reason}). Offline: "
            f"copy {CONFIG} and {WEIGHTS} into a folder, and give its path"
        ) from error
    return config, weights


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise CheckpointError(f"no {file.name} in {file.parent}: expected what save_pretrained writes")
    try:
        config = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}. Fetch or copy it again") from error
    kinds = {"backbone": BACKBONES, "classifier": CLASSIFIERS}
    is_ours = isinstance(config, dict) and config.get("model_type") in kinds
    if not is_ours or config.get("architecture") not in kinds[config["model_type"]]:
        raise CheckpointError(
            f"{file} is of another kind of model: expected model_type 'backbone' or 'classifier', and an architecture "
            f"out of {', '.join(BACKBONES)}"
        )
    return config
