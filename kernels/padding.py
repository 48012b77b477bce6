"""Padded batches: which part of each map is image. Valid sizes are rows and columns, counted from the upper left."""

import torch
from torch import Tensor


def check_valid_sizes(valid_sizes: Tensor | None, name: str, x: Tensor) -> None:
    """Refuse sizes that are not two integers for each image of x [B, ..], called `name`, on its device.

    Raises:
        ValueError: saying what they are.
    """
    if valid_sizes is None:
        return
    if valid_sizes.shape != (len(x), 2) or valid_sizes.is_floating_point():
        raise ValueError(
            f"valid_sizes must hold the rows and columns of each image, integers [{len(x)}, 2], got "
            f"shape {list(valid_sizes.shape)}, {valid_sizes.dtype}"
        )
    if valid_sizes.device != x.device:
        raise ValueError(f"valid_sizes is on {valid_sizes.device}, {name} on {x.device}: move them to one device")


def valid_mask(sizes: Tensor, H: int, W: int) -> Tensor:
    """Where maps of H x W are image, [B, H, W]."""
    rows = torch.arange(H, device=sizes.device)[:, None] < sizes[:, :1, None]
    columns = torch.arange(W, device=sizes.device) < sizes[:, 1:, None]
    return rows & columns


def clear_padding_tokens(x: Tensor, sizes: Tensor | None) -> Tensor:
    """Tokens [B, H, W, C] with zeros in the padding; themselves where `sizes` is None."""
    if sizes is None:
        return x
    return x.masked_fill(~valid_mask(sizes, *x.shape[1:3])[..., None], 0.0)
