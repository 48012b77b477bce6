"""Checkpoints without what only a training needs: weights, and where they come from, in one small file.

Such a file is named by the start of its SHA-256, ``NAME-1a2b3c4d.pth`` or ``.safetensors``, and starts whatever the
file starts that it was made of: `build_backbone`, `init_cfg`, the tools.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .builder import build_backbone
from .checkpoint import (
    CheckpointError,
    find_variant,
    find_weights,
    load_checkpoint,
    load_weights,
    local_file,
    read_checkpoint,
    select_weights,
    weights_key,
)

SUFFIXES = (".pth", ".safetensors")
HALF_LIMIT = 0.05  # of the relative difference between outputs with weights in float16 and the original ones


@dataclass(frozen=True)
class Converted:
    """A file that was written."""

    path: Path
    weights: dict[str, Tensor]  # in it
    metadata: dict[str, Any]  # in it
    dropped: dict[str, int]  # entries that are in the original alone, and their bytes


def convert_checkpoint(
    source: str, target: str | os.PathLike, key: str | None = None, backbone_only: bool = False, half: bool = False
) -> Converted:
    """Write the weights of a checkpoint, with their metadata, to `target` with a hash in its name.

    Args:
        source: path or URL of an official file, or of a checkpoint of a training.
        target: ``NAME.pth`` or ``NAME.safetensors``; the file is called ``NAME-<8 hexadecimal digits>.pth``.
        key: entry with the weights, see :func:`load_checkpoint`. (A training with a moving average has it under
            ``state_dict``, and the last weights themselves under ``ema_state_dict``.)
        backbone_only: leave out neck, heads and classifier, and ``backbone.`` in the names.
        half: floating-point weights in float16.

    Raises:
        CheckpointError: the source cannot be read, `target` has another suffix, a number is too large for float16.
    """
    target = Path(target)
    if target.suffix not in SUFFIXES:
        raise CheckpointError(f"{target}: expected a file NAME.pth or NAME.safetensors to write")
    content = read_checkpoint(source)
    everything = find_weights(content, source, key)
    weights = select_weights(content, source, key) if backbone_only else everything
    weights = {name: value.detach().contiguous().clone() for name, value in weights.items()}
    if half:
        weights = {name: _halved(name, value, source) for name, value in weights.items()}
    metadata = _metadata(content, source, backbone_only)
    dropped = _dropped(content, key, everything, weights)
    return Converted(_write(target, weights, metadata), weights, metadata, dropped)


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """What a checkpoint says of itself: `cfg` (a config's text), `dataset_meta` (class names, palette), `source`, …

    Of checkpoints of a training it is the `meta` of mmengine. {} if the file says nothing.
    """
    path = local_file(str(path))
    if path.suffix != ".safetensors":
        return dict(read_checkpoint(str(path)).get("meta") or {})
    read_checkpoint(str(path))  # for its errors
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        texts = file.metadata() or {}
    return {name: _from_json(text) for name, text in texts.items()}


def verify_backbone(source: str, converted: Converted, key: str | None = None) -> float | None:
    """The relative difference between the outputs of two backbones, one from each file, for a random image.

    None where the weights are of no backbone that :func:`build_backbone` knows.

    Raises:
        CheckpointError: they differ by more than rounding to the type of the converted weights does.
    """
    weights = select_weights(read_checkpoint(source), source, key)
    variant = find_variant(weights)
    if variant is None:
        return None
    original, again = (build_backbone(variant[0], gla_impl="chunk").eval() for _ in range(2))
    load_weights(original, weights, source)
    load_checkpoint(again, converted.path)
    if missing := again.state_dict().keys() - weights.keys():  # out-norms, drawn by chance in both
        original_state = original.state_dict()
        again.load_state_dict({name: original_state[name] for name in missing}, strict=False)
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return require_same_outputs(original(image), again(image), converted)


def require_same_outputs(expected: Any, actual: Any, converted: Converted) -> float:
    """The relative difference between two nested structures of tensors; CheckpointError if it is too large."""
    pairs = list(zip(tensors_in(expected), tensors_in(actual), strict=True))
    difference = max(((a.double() - b.double()).norm() / a.double().norm().clamp(min=1e-30)).item() for a, b in pairs)
    is_half = any(value.dtype == torch.float16 for value in converted.weights.values())
    if not difference <= (HALF_LIMIT if is_half else 0):
        advice = "; convert without float16" if is_half else ""
        raise CheckpointError(f"outputs with {converted.path} differ from the original's by {difference:.1e}{advice}")
    return difference


def tensors_in(output: Any) -> list[Tensor]:
    """The tensors of nested lists, tuples and dicts, in their order."""
    if isinstance(output, Tensor):
        return [output]
    children = output.values() if isinstance(output, Mapping) else output if isinstance(output, (list, tuple)) else []
    return [tensor for child in children for tensor in tensors_in(child)]


def _halved(name: str, value: Tensor, source: str) -> Tensor:
    if not value.is_floating_point():
        return value
    half = value.half()
    if not torch.equal(half.isfinite(), value.isfinite()):
        raise CheckpointError(f"{source}: {name} has numbers that float16 cannot hold; convert without --half")
    return half


def _metadata(content: Mapping, source: str, backbone_only: bool) -> dict[str, Any]:
    """Nothing that changes from one conversion to the next: equal weights give equal files."""
    from . import __version__

    meta = content.get("meta") if isinstance(content.get("meta"), Mapping) else {}
    path = local_file(source)
    metadata = dict(
        source=path.name,
        source_sha256=sha256_of(path),
        vig_backbone_version=__version__,
        torch_version=str(torch.__version__),
        mmengine_version=meta.get("mmengine_version"),
        epoch=meta.get("epoch", content.get("epoch")),
        iter=meta.get("iter"),
        cfg=None if backbone_only else meta.get("cfg"),
        dataset_meta=None if backbone_only else meta.get("dataset_meta"),
        architecture=(find_variant(select_weights(content, source)) or (None,))[0],
    )
    return {name: value for name, value in metadata.items() if value is not None}


def _dropped(
    content: Mapping, key: str | None, everything: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> dict[str, int]:
    chosen = weights_key(content) if key is None else key
    entries = {} if chosen is None else {str(k): v for k, v in content.items() if k not in (chosen, "meta")}
    kept = {name.removeprefix("backbone.") for name in weights}
    parts: dict[str, list[Tensor]] = {}
    for name, value in everything.items():
        if name.removeprefix("backbone.") not in kept:
            parts.setdefault(f"{name.split('.')[0]}.*", []).append(value)
    return {name: sum(t.nbytes for t in tensors_in(entry)) for name, entry in (entries | parts).items()}


def _write(target: Path, weights: dict[str, Tensor], metadata: dict[str, Any]) -> Path:
    """The file's path, which has the start of its hash in the name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        file = Path(scratch) / target.name
        if target.suffix == ".safetensors":
            write_safetensors(file, weights, metadata)
        else:
            with open(file, "wb") as stream:  # by a stream: torch.save puts the name of a path into the file
                torch.save(dict(meta=metadata, state_dict=weights), stream)
        final = target.with_name(f"{target.stem}-{sha256_of(file)[:8]}{target.suffix}")
        os.replace(file, final)
    return final


def write_safetensors(file: Path, weights: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Weights with metadata, whose values are JSON; CheckpointError if safetensors is not installed."""
    try:
        from safetensors.torch import save
    except ModuleNotFoundError as error:
        raise CheckpointError(f"{file.name} needs the package safetensors: pip install safetensors") from error
    # The format is "pt" as it is, not as JSON.
    texts = {name: json.dumps(value) for name, value in metadata.items()} | {"format": "pt"}
    file.write_bytes(_with_sorted_metadata(save(weights, texts)))


def _with_sorted_metadata(raw: bytes) -> bytes:
    """A file of safetensors, which has its metadata in another order each time; then it has another hash, too."""
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of eight
    return len(text).to_bytes(8, "little") + text + raw[8 + size :]


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
