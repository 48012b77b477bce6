"""Weights, inputs and sampling of the golden outputs in data/golden.npz (made by the official implementation)."""

import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

DATA = Path(__file__).parent / "data"


def golden_weight(name: str, shape: torch.Size) -> Tensor:
    t = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    owner = name.rpartition(".")[0].rpartition(".")[2]
    if "norm" in owner and name.endswith("weight") and t.dim() == 1:
        return 1 + 0.1 * t
    if t.dim() == 1:
        return 0.1 * t
    if t.dim() == 4:
        return t / (shape[1] * shape[2] * shape[3]) ** 0.5
    if name == "pos_embed":
        return 0.2 * t
    return t / shape[1] ** 0.5


def set_golden_weights(model: nn.Module) -> nn.Module:
    state = {name: golden_weight(name, tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    return model.eval()


def golden_image(H: int, W: int) -> Tensor:
    return torch.randn(1, 3, H, W, generator=torch.Generator().manual_seed(H * 10007 + W))


def golden_outputs(prefix: str) -> dict[str, tuple[np.ndarray, list[int]]]:
    """name below `prefix` -> (samples, full shape)."""
    with np.load(DATA / "golden.npz") as file:
        names = [key for key in file if key.startswith(prefix) and not key.endswith(".shape")]
        return {name[len(prefix) :]: (file[name], file[name + ".shape"].tolist()) for name in names}


def sample(x: Tensor) -> np.ndarray:
    flat = x.detach().flatten().numpy()
    return flat[:: max(1, len(flat) // 997)][:997]
