"""Argument checks and the choice of implementation."""

from collections.abc import Callable

from torch import Tensor

from ..arguments import HAS_TRITON, check_types_and_devices, named_implementation, triton_runs_on
from .naive import naive_locality_injection


def _triton_locality_injection(*args: Tensor | float | bool | None) -> Tensor:
    """The Triton form; Triton itself is imported when it is first used."""
    from .triton_op import triton_locality_injection

    return triton_locality_injection(*args)


# Each implementation takes (scan, local, gate_logits, gate_bias, scan_weight, local_weight, eps, activation), checked.
IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {"naive": naive_locality_injection}
if HAS_TRITON:
    IMPLEMENTATIONS["triton"] = _triton_locality_injection


def locality_injection(
    scan: Tensor,
    local: Tensor,
    gate_logits: Tensor,
    scan_weight: Tensor,
    local_weight: Tensor,
    eps: float = 1e-6,
    activation: bool = False,
    impl: str = "auto",
    gate_bias: Tensor | None = None,
) -> Tensor:
    """2D gating locality injection (ViG, arXiv 2405.18425, section 3), between the scan and the output projection.

    ``G = sigmoid(gate_logits); y = G * RMSNorm(scan) + (1 - G) * RMSNorm(local)``, the norms over the channels of each
    head, and ``SiLU(y)`` with `activation` (ViG-T only). The official code does the same in three modules (`g_norm`,
    `l_norm`, `g_proj`).

    Args:
        scan: output of the bidirectional scan, ``[B, L, h, V]``; any strides, float16, bfloat16, float32 or float64.
        local: output of the depthwise convolution, ``[B, L, h, V]``.
        gate_logits: before the sigmoid, ``[B, L, h, V]``.
        scan_weight, local_weight: weights of the two norms, ``[V]``, shared by all heads.
        eps: added to the mean squares.
        activation: SiLU at the end.
        gate_bias: ``[h, V]``, added to `gate_logits`; here it costs nothing, with the product that makes the logits it
            may cost as much as half of that.
        impl: ``'naive'`` (PyTorch), ``'triton'`` (one kernel for NVIDIA GPUs, another one backward) or ``'auto'``: the
            Triton form where it runs (a GPU of compute capability 8.0 or higher, torch 2.9 or newer, any type but
            float64), else PyTorch.

    Returns:
        ``[B, L, h, V]`` in the type of `scan`; computed in float32 (float64 for float64). Gradients exist for all
        tensors.

    Raises:
        ValueError: for an unknown `impl`, or shapes that do not fit each other.
        TypeError: for tensors that are not floating point, or a type that an implementation does not take.
    """
    _check_arguments(scan, local, gate_logits, gate_bias, scan_weight, local_weight)
    if impl == "auto":
        impl = "triton" if triton_runs_on(scan) else "naive"
    function = named_implementation(impl, IMPLEMENTATIONS)
    return function(scan, local, gate_logits, gate_bias, scan_weight, local_weight, eps, activation)


def _check_arguments(
    scan: Tensor, local: Tensor, gate_logits: Tensor, gate_bias: Tensor | None, scan_weight: Tensor,
    local_weight: Tensor,
) -> None:  # fmt: skip
    if scan.dim() != 4 or 0 in scan.shape:
        raise ValueError(f"scan must have shape [B, L, h, V], none of them 0, got {list(scan.shape)}")
    expected = {
        "local": (local, scan.shape),
        "gate_logits": (gate_logits, scan.shape),
        "scan_weight": (scan_weight, scan.shape[-1:]),
        "local_weight": (local_weight, scan.shape[-1:]),
    }
    if gate_bias is not None:
        expected["gate_bias"] = (gate_bias, scan.shape[2:])
    for name, (x, shape) in expected.items():
        if x.shape != shape:
            raise ValueError(
                f"{name} must have shape {list(shape)}, as scan {list(scan.shape)} asks for, got {list(x.shape)}"
            )
    check_types_and_devices({"scan": scan, **{name: x for name, (x, _) in expected.items()}})
