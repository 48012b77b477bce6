"""The definition of gating locality injection, in PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def naive_locality_injection(
    scan: Tensor,
    local: Tensor,
    gate_logits: Tensor,
    gate_bias: Tensor | None,
    scan_weight: Tensor,
    local_weight: Tensor,
    eps: float,
    activation: bool,
) -> Tensor:
    """The definition that every other form must agree with; some twenty kernels on a GPU.

    Shapes as in :func:`vig_kernels.locality_injection`. Computes in float32, or in float64 where `scan` is.
    """
    dtype = torch.promote_types(scan.dtype, torch.float32)
    scanned = F.rms_norm(scan.to(dtype), scan.shape[-1:], scan_weight.to(dtype), eps)
    injected = F.rms_norm(local.to(dtype), local.shape[-1:], local_weight.to(dtype), eps)
    logits = gate_logits.to(dtype) if gate_bias is None else gate_logits.to(dtype) + gate_bias.to(dtype)
    y = injected + logits.sigmoid() * (scanned - injected)
    return (F.silu(y) if activation else y).to(scan.dtype)
