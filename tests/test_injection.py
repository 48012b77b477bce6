"""Gating locality injection: the Triton form against the definition, the operator, and bad input."""

import pytest
import torch
from test_gla import relative_error
from torch import Tensor
from vig_kernels import bidirectional_gla, locality_injection
from vig_kernels.injection import IMPLEMENTATIONS

pytest.importorskip("triton", minversion="3.5")
from vig_kernels.injection import triton_op

pytestmark = pytest.mark.usefixtures("rounds_to_nearest")
NAMES = ("scan", "local", "gate_logits", "scan_weight", "local_weight")


def make_inputs(device: str, B: int, L: int, h: int, V: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    tokens = [torch.randn(B, L, h, V, device=device, dtype=dtype) for _ in range(3)]
    weights = [torch.rand(V, device=device) + 0.5 for _ in range(2)]
    return [*tokens, *weights]


def gradient(shape: torch.Size) -> Tensor:
    """Numbers that all types hold exactly."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(7)) / 4


def run(inputs: list[Tensor], impl: str = "triton", grad: Tensor | None = None, **options: bool) -> list[Tensor]:
    """The output and all gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = locality_injection(*leaves, impl=impl, **options)
    if grad is None:
        grad = gradient(out.shape)
    out.backward(grad.to(out))
    return [out.detach(), *(x.grad for x in leaves)]


def exact(inputs: list[Tensor], **options: bool) -> list[Tensor]:
    return run([x.double() for x in inputs], "naive", **options)


@pytest.mark.parametrize("activation", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 7, 3, 5), (1, 40, 2, 12), (2, 33, 1, 64), (1, 3, 1, 100)], ids=str)
def test_agrees_with_the_definition(device, poisoned_memory, shape, activation):
    inputs = make_inputs(device, *shape)
    for name, a, e in zip(("out", *NAMES), run(inputs, activation=activation), exact(inputs, activation=activation)):
        assert a.shape == e.shape
        assert relative_error(a, e) < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_the_rounding_of_the_exact_result(device, dtype):
    inputs = make_inputs(device, 2, 50, 2, 32, dtype)
    actual = run(inputs, activation=True)
    assert [x.dtype for x in actual] == [dtype, *(x.dtype for x in inputs)]
    for name, a, e in zip(("out", *NAMES), actual, exact(inputs, activation=True)):
        assert relative_error(a, e) <= 1.1 * relative_error(e.to(a.dtype), e) + 1e-6, name


def test_extreme_numbers(device):
    """Closed and open gates, rows of zeros, large and tiny rows."""
    inputs = make_inputs(device, 1, 8, 1, 16)
    inputs[0][:, 0], inputs[1][:, 1] = 0, 0
    inputs[0][:, 2] *= 1e15
    inputs[1][:, 3] *= 1e-15
    inputs[2][:, 4:6] = 1e4
    inputs[2][:, 6:] = -1e4
    for name, a, e in zip(("out", *NAMES), run(inputs, activation=True), exact(inputs, activation=True)):
        assert relative_error(a, e) < 1e-5, name


def test_more_rows_than_the_programs_of_the_backward_kernel_take_at_once(device, monkeypatch):
    monkeypatch.setattr(triton_op, "TILE", 64)
    monkeypatch.setattr(triton_op, "PROGRAMS", 2)
    inputs = make_inputs(device, 2, 45, 3, 16)
    for name, a, e in zip(("out", *NAMES), run(inputs), exact(inputs)):
        assert relative_error(a, e) < 1e-5, name


def test_any_strides_give_the_same(device):
    B, L, h, V = 2, 9, 3, 8
    contiguous = make_inputs(device, B, L, h, V)
    fused = torch.cat([x.flatten(2) for x in contiguous[:3]], dim=-1).split(h * V, dim=-1)
    views = [x.unflatten(-1, (h, V)) for x in fused]
    transposed = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in contiguous[:3]]
    expected = run(contiguous)
    for tokens in (views, transposed):
        assert all(torch.equal(a, e) for a, e in zip(run([*tokens, *contiguous[3:]]), expected))
    grad = gradient(contiguous[0].shape).to(device).transpose(1, 2).contiguous()
    assert all(torch.equal(a, e) for a, e in zip(run(contiguous, grad=grad.transpose(1, 2)), expected))


def test_same_bits_twice(device):
    inputs = make_inputs(device, 2, 300, 2, 16)
    assert all(torch.equal(a, b) for a, b in zip(run(inputs), run(inputs)))


@pytest.mark.parametrize("impl", ["naive", "triton"])
def test_a_bias_of_the_gate_is_added_to_its_logits(device, poisoned_memory, impl):
    inputs = make_inputs(device, 2, 21, 3, 12)
    bias = torch.randn(3, 12, device=device)
    leaves = [x.double().requires_grad_() for x in (*inputs, bias)]
    expected = locality_injection(*leaves[:2], leaves[2] + leaves[5], *leaves[3:5], impl="naive")
    expected.backward(gradient(expected.shape).to(expected))
    actual_leaves = [x.detach().requires_grad_() for x in (*inputs, bias)]
    actual = locality_injection(*actual_leaves[:5], gate_bias=actual_leaves[5], impl=impl)
    actual.backward(gradient(actual.shape).to(actual))
    assert relative_error(actual, expected) < 1e-5
    for name, a, e in zip((*NAMES, "gate_bias"), actual_leaves, leaves):
        assert relative_error(a.grad, e.grad) < 1e-5, name


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(device, bias):
    scan, local, logits, *weights = (x.requires_grad_() for x in make_inputs(device, 1, 5, 2, 4))
    gate_bias = torch.randn(2, 4, device=device, requires_grad=True) if bias else None
    arguments = scan, local, logits, gate_bias, *weights, 1e-6, True
    torch.library.opcheck(torch.ops.vig.locality_injection, arguments)


def test_compiled_with_the_scan_in_one_graph(device):
    def mixed(x: Tensor) -> Tensor:
        q, k, fwd, bwd, v, u, logits = x.unflatten(-1, (2, -1)).split((4, 4, 4, 4, 6, 6, 6), dim=-1)
        scan = bidirectional_gla(q, k, v, -fwd.square(), -bwd.square(), impl="triton")
        return locality_injection(scan, u, logits, x.new_ones(6), x.new_ones(6), impl="triton")

    x = torch.randn(1, 9, 2 * 34, device=device)
    compiled = torch.compile(mixed, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), mixed(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_auto_is_the_triton_form_where_it_runs(device, dtype):
    inputs = make_inputs(device, 1, 3, 1, 4, dtype)
    chosen = "triton" if device == "cuda" and dtype != torch.float64 else "naive"
    assert torch.equal(locality_injection(*inputs), locality_injection(*inputs, impl=chosen))


def test_float64_is_refused(device):
    with pytest.raises(TypeError, match="no float64 form: use impl='naive'"):
        locality_injection(*[x.double() for x in make_inputs(device, 1, 3, 1, 4)], impl="triton")


@pytest.mark.parametrize(
    ("changed", "value", "message"),
    [
        ("scan", torch.zeros(1, 3, 4), r"\[B, L, h, V\]"),
        ("scan", torch.zeros(1, 0, 1, 4), "none of them 0"),
        ("local", torch.zeros(1, 2, 1, 4), r"local must have shape \[1, 3, 1, 4\]"),
        ("gate_logits", torch.zeros(1, 3, 4), r"gate_logits must have shape \[1, 3, 1, 4\]"),
        ("gate_bias", torch.zeros(4), r"gate_bias must have shape \[1, 4\]"),
        ("local_weight", torch.zeros(3), r"local_weight must have shape \[4\]"),
        ("scan_weight", torch.zeros(4, device="meta"), "scan_weight is on meta, scan on cpu"),
        ("local", torch.zeros(1, 3, 1, 4, dtype=torch.int64), "local must be a floating point tensor"),
    ],
)
def test_bad_input_is_named(changed, value, message):
    inputs = dict(zip(NAMES, make_inputs("cpu", 1, 3, 1, 4)))
    with pytest.raises((ValueError, TypeError), match=message):
        locality_injection(**{**inputs, changed: value})


@pytest.mark.parametrize("impl", ["no_such_kernel", "triton"])
def test_unregistered_implementation_lists_those_that_exist(monkeypatch, impl):
    monkeypatch.delitem(IMPLEMENTATIONS, impl, raising=False)
    with pytest.raises(ValueError, match=rf"impl='{impl}' is not available: expected 'auto' or one of \['naive'"):
        locality_injection(*make_inputs("cpu", 1, 3, 1, 4), impl=impl)
