"""Strict and loud loading of backbone weights: official files, and checkpoints of whole detectors and segmenters."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

# Where the weights sit in the files that are around; a file without any of these holds the weights themselves.
CONTAINER_KEYS = ("model", "state_dict", "model_ema", "ema_state_dict")
WRAPPER_PREFIXES = ("module.", "_orig_mod.")
AVERAGING_COUNTERS = ("steps", "n_averaged")  # beside the weights of mmengine's and torch's averaged models
CLASSIFIER_PREFIXES = ("head.", "classifier.")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or does not fit the model."""


def load_checkpoint(model: nn.Module, checkpoint: str | os.PathLike, key: str | None = None, prefix: str = "") -> None:
    """Load backbone weights from a file or URL, all of them or none.

    Takes the official files as they are, and checkpoints of whole models that contain the backbone. The classifier
    (``head.*``, ``classifier.*``) is dropped; parameters that released files lack by design (the out-norms of
    :class:`HierViG`) may be missing; anything else missing, unexpected or of another shape is an error.

    Args:
        model: :class:`ViG` or :class:`HierViG`.
        checkpoint: path or URL of a ``.pth`` or ``.safetensors`` file.
        key: which entry of the file holds the weights; by default the first one found of ``model``, ``state_dict``,
            ``model_ema``, ``ema_state_dict``, or the file itself.
        prefix: what the names of the backbone start with; found by itself where it is ``backbone.``.

    Raises:
        CheckpointError: file missing, truncated or not a checkpoint; weights of another variant or model.
    """
    source = str(checkpoint)
    dropped = getattr(model, "dropped_parameters", CLASSIFIER_PREFIXES)
    load_weights(model, select_weights(read_checkpoint(source), source, key, prefix, dropped), source)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load weights by their names in the model, all of them or none; CheckpointError if they do not fit."""
    problems = compare(model, weights)
    if problems:
        raise CheckpointError(
            f"{source} does not fit {_describe(model)}: {'; '.join(problems)}.{_hint(model, weights)}"
        )
    model.load_state_dict(weights, strict=False)


def read_checkpoint(source: str) -> Mapping:
    """The content of a checkpoint file or URL, on the CPU, by safe (weights-only) unpickling."""
    path = local_file(source)
    return _read_file(path, str(path))


def local_file(source: str) -> Path:
    """The file of a checkpoint, fetched where `source` is a URL."""
    path = _download(source) if urlparse(source).scheme in ("http", "https") else Path(source)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: give the path of a .pth or .safetensors file, or its URL")
    return path


def _read_file(path: Path, name: str) -> Mapping:
    """The content of a file that is called `name` in errors."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError as error:
        raise CheckpointError(f"{name} needs the package {error.name}, which is not installed") from error
    except Exception as error:  # torch raises half a dozen types for a damaged file, some without a text
        reason = f"{type(error).__name__} {error}".splitlines()[0].strip()
        raise CheckpointError(
            f"{name} cannot be read as a checkpoint ({path.stat().st_size} bytes; truncated, or not written by "
            f"torch.save): {reason}. Fetch or copy the file again"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{name} holds a {type(content).__name__}, expected a dictionary of weights")
    return content


def select_weights(
    content: Mapping,
    source: str,
    key: str | None = None,
    prefix: str = "",
    dropped: tuple[str, ...] = CLASSIFIER_PREFIXES,
) -> dict[str, Tensor]:
    """The backbone's own weights out of a checkpoint's content, by their names in it, less those `dropped`."""
    weights = find_weights(content, source, key, prefix)
    prefix = prefix or ("backbone." if any(name.startswith("backbone.") for name in weights) else "")
    weights = _below(weights, prefix)
    if not weights:
        raise CheckpointError(f"no weight in {source} starts with {prefix!r}")
    return {name: value for name, value in weights.items() if not name.startswith(dropped)}


def find_weights(content: Mapping, source: str, key: str | None = None, prefix: str = "") -> dict[str, Tensor]:
    """All weights of a checkpoint's content, by their names in the model, which is wrapped in nothing.

    Args:
        prefix: of names that are looked for; wrappers in it stay.
    """
    if key is not None and key not in content:
        raise CheckpointError(f"{source} has no entry {key!r}: it holds {sorted(map(str, content))[:12]}")
    key = weights_key(content) if key is None else key
    weights = content if key is None else content[key]
    if not isinstance(weights, Mapping):
        raise CheckpointError(
            f"{source} holds a {type(weights).__name__} under {key!r}, expected a dictionary of weights"
        )
    weights = {str(name): value for name, value in weights.items() if isinstance(value, Tensor)}
    weights = {name: value for name, value in weights.items() if name not in AVERAGING_COUNTERS}
    if not weights:
        raise CheckpointError(f"{source} holds no weights{'' if key is None else f' under {key!r}'}")
    # Wrappers nest in any order; a prefix that names one takes care of it itself.
    while wrapper := next((w for w in WRAPPER_PREFIXES if all(name.startswith(w) for name in weights)), ""):
        if prefix.startswith(wrapper):
            break
        weights = _below(weights, wrapper)
    return weights


def weights_key(content: Mapping) -> str | None:
    """The entry of a checkpoint's content that has the weights; None if they are the content."""
    return next((name for name in CONTAINER_KEYS if isinstance(content.get(name), Mapping)), None)


def compare(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """What does not fit, one text for each kind of misfit; empty if everything fits."""
    expected = model.state_dict()
    optional = getattr(model, "optional_parameters", ())
    missing = [name for name in expected if name not in weights and not name.startswith(optional or ("\0",))]
    # A model built for fewer outputs has fewer of the optional parameters than the file.
    unexpected = [name for name in weights if name not in expected and not name.startswith(optional or ("\0",))]
    reshaped = [
        f"{name} {list(weights[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape:", reshaped))
    return [f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds if names]


def _below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}


def _some(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _describe(model: nn.Module) -> str:
    return f"{type(model).__name__}(arch={getattr(model, 'arch', None)!r})"


def _is_same_variant(candidate: nn.Module, model: nn.Module) -> bool:
    """Whether `model` is of the candidate's class, or a classifier built on it, and of its size."""
    return isinstance(model, type(candidate)) and getattr(model, "arch", None) == candidate.arch


def _hint(model: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """Name the variant that the weights belong to, if they belong to one."""
    found = find_variant({name: value for name, value in weights.items() if not name.startswith(CLASSIFIER_PREFIXES)})
    if found is None or _is_same_variant(found[1], model):
        return ""
    return f" These are the weights of {_describe(found[1])}, {found[0]!r}: set type and arch accordingly"


def find_variant(weights: Mapping[str, Tensor]) -> tuple[str, nn.Module] | None:
    """Name and skeleton (on the meta device) of the backbone that has these weights, if one has."""
    from .builder import BACKBONES

    for name, make in BACKBONES.items():
        with torch.device("meta"):
            candidate = make()
        if not compare(candidate, weights):
            return name, candidate
    return None


def _download(url: str) -> Path:
    """Fetch a URL into torch's cache of checkpoints, whole or not at all."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / Path(urlparse(url).path).name
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        fetched = Path(scratch) / path.name
        try:
            torch.hub.download_url_to_file(url, str(fetched))
        except (OSError, RuntimeError, HTTPException) as error:
            raise CheckpointError(f"{url} cannot be fetched ({error}). Offline: put the file at {path}") from error
        _read_file(fetched, url)  # a connection that breaks off raises nothing: keep only what can be read
        os.replace(fetched, path)
    return path
