"""Numbers of the host on their way to the device."""

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(values: Sequence, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Numbers of the host as a tensor; to a GPU from pinned memory, because any other copy waits for its queue."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
