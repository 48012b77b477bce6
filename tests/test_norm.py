"""Residual sum and normalisation: the Triton form against the definition, the operator, and bad input."""

import pytest
import torch
from test_gla import relative_error
from torch import Tensor
from vig_kernels import add_norm
from vig_kernels.norm import IMPLEMENTATIONS

pytest.importorskip("triton", minversion="3.5")
from vig_kernels.norm import triton_op

pytestmark = pytest.mark.usefixtures("rounds_to_nearest")
NAMES = ("x", "branch", "weight", "bias")
KINDS = pytest.mark.parametrize(("branch", "bias"), [(False, False), (True, False), (False, True), (True, True)])


def make_inputs(
    device: str, *shape: int, branch: bool = True, bias: bool = True, dtype: torch.dtype = torch.float32
) -> list[Tensor | None]:
    """x in float32, branch in `dtype`; a mean that is not small beside the spread."""
    x = torch.randn(shape, device=device) + 1
    b = torch.randn(shape, device=device, dtype=dtype) if branch else None
    return [x, b, torch.rand(shape[-1], device=device) + 0.5, torch.randn(shape[-1], device=device) if bias else None]


def gradient(shape: torch.Size) -> Tensor:
    """Numbers that all types hold exactly."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(7)) / 4


def run(inputs: list[Tensor | None], impl: str = "triton", call=add_norm, **options) -> list[Tensor | None]:
    """Norm, sum and all gradients, with one that comes in through the sum."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    y, total = call(*leaves, impl=impl, **options)
    torch.autograd.backward((y, total), (gradient(y.shape).to(y), gradient(y.shape).flip(-1).to(total)))
    return [y.detach(), total.detach(), *(None if x is None else x.grad for x in leaves)]


def exact(inputs: list[Tensor | None]) -> list[Tensor | None]:
    return run([None if x is None else x.double() for x in inputs], "naive")


def assert_agrees(actual: list[Tensor | None], expected: list[Tensor | None], limit: float = 1e-5) -> None:
    for name, a, e in zip(("norm", "sum", *NAMES), actual, expected, strict=True):
        assert (a is None) == (e is None), name
        assert a is None or (a.shape == e.shape and relative_error(a, e) < limit), name


@KINDS
@pytest.mark.parametrize("shape", [(1, 2), (3, 7, 5), (2, 3, 5, 96), (70, 192), (5, 1000)], ids=str)
def test_agrees_with_the_definition(device, poisoned_memory, shape, branch, bias):
    inputs = make_inputs(device, *shape, branch=branch, bias=bias)
    assert_agrees(run(inputs), exact(inputs))


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_get_their_type_and_the_stream_keeps_its_own(device, dtype, branch, bias):
    inputs = make_inputs(device, 50, 64, branch=branch, bias=bias, dtype=dtype)
    actual = run(inputs, dtype=dtype)
    assert [x.dtype for x in actual[:2]] == [dtype, torch.float32]
    for name, a, e in zip(("norm", "sum", *NAMES), actual, exact(inputs), strict=True):
        assert a is None or relative_error(a, e) <= 1.1 * relative_error(e.to(a.dtype), e) + 1e-6, name


def test_a_stream_of_low_precision(device):
    """The norm is that of the sum as it is stored."""
    x, branch, weight, bias = make_inputs(device, 50, 64, dtype=torch.bfloat16)
    y, total = add_norm(x.bfloat16(), branch, weight, bias, impl="triton")
    assert torch.equal(total, x.bfloat16() + branch)
    assert torch.equal(y, add_norm(total, None, weight, bias, impl="triton")[0])


def test_large_mean_small_and_constant_rows(device):
    """LayerNorm takes the mean off before it squares."""
    inputs = make_inputs(device, 4, 64, branch=False)
    inputs[0][0] += 1000
    inputs[0][1] *= 1e-4
    inputs[0][2] = 3
    actual, expected = run(inputs), exact(inputs)
    assert relative_error(actual[0], expected[0]) < 1e-4
    assert all(x is None or x.isfinite().all() for x in actual)


def test_more_rows_than_the_programs_of_the_backward_kernel_take_at_once(device, monkeypatch):
    monkeypatch.setattr(triton_op, "TILE", 64)
    monkeypatch.setattr(triton_op, "PROGRAMS", 1)
    inputs = make_inputs(device, 45, 24)
    assert_agrees(run(inputs), exact(inputs))


def test_strided_tensors(device):
    inputs = make_inputs(device, 4, 6, 8)
    x, branch = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in inputs[:2])
    assert_agrees(run([x, branch, *inputs[2:]]), exact(inputs))


@pytest.mark.parametrize("used", ["norm", "sum"])
@pytest.mark.parametrize("branch", [False, True])
def test_gradient_of_one_output(device, branch, used):
    grads = []
    for impl in ("triton", "naive"):
        torch.manual_seed(0)
        leaves = [None if x is None else x.requires_grad_() for x in make_inputs(device, 9, 16, branch=branch)]
        y, total = add_norm(*leaves, impl=impl)
        (y if used == "norm" else total).square().sum().backward()
        grads.append([None if x is None else x.grad for x in leaves])
    for name, a, e in zip(NAMES, *grads):
        assert (a is None) == (e is None), name
        assert a is None or relative_error(a, e.double()) < 1e-5, name


def test_same_bits_twice(device):
    inputs = make_inputs(device, 500, 48)
    assert all(torch.equal(a, b) for a, b in zip(run(inputs), run(inputs)))


@KINDS
def test_opcheck(device, branch, bias):
    leaves = [None if x is None else x.requires_grad_() for x in make_inputs(device, 5, 8, branch=branch, bias=bias)]
    torch.library.opcheck(torch.ops.vig.add_norm, (*leaves, 1e-6, torch.float32))


def test_compiled_gives_the_same(device):
    torch._dynamo.reset()
    inputs = make_inputs(device, 20, 16)
    call = torch.compile(add_norm, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(run(inputs, call=call), run(inputs)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_auto_is_the_triton_form_where_it_runs(device, dtype):
    inputs = [x.to(dtype) for x in make_inputs(device, 3, 4)]
    chosen = "triton" if device == "cuda" and dtype != torch.float64 else "naive"
    assert torch.equal(add_norm(*inputs)[0], add_norm(*inputs, impl=chosen)[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=torch.zeros(())), ValueError, r"x must have shape \[..., C\]"),
        (dict(x=torch.zeros(0, 4)), ValueError, "none of them 0"),
        (dict(branch=torch.zeros(4)), ValueError, r"branch must have shape \[3, 4\].*got \[4\]"),
        (dict(weight=torch.zeros(3)), ValueError, r"weight must have shape \[4\]"),
        (dict(bias=torch.zeros(3)), ValueError, r"bias must have shape \[4\]"),
        (dict(x=torch.zeros(3, 4, dtype=torch.int32)), TypeError, "x must be a floating point tensor"),
        (dict(impl="fast"), ValueError, "impl='fast' is not available"),
        (dict(x=torch.zeros(3, 4, dtype=torch.float64), impl="triton"), TypeError, "no float64 form"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    arguments = dict(zip(NAMES, make_inputs("cpu", 3, 4))) | change
    with pytest.raises(error, match=message):
        add_norm(**arguments)


def test_too_many_channels_are_refused(device):
    with pytest.raises(ValueError, match="up to 4096 channels, got 5000"):
        add_norm(torch.zeros(1, 5000, device=device), None, torch.ones(5000, device=device), impl="triton")


def test_unregistered_implementation_lists_those_that_exist(monkeypatch):
    monkeypatch.delitem(IMPLEMENTATIONS, "triton", raising=False)
    with pytest.raises(ValueError, match=r"one of \['naive'\].*Triton 3.5"):
        add_norm(*make_inputs("cpu", 3, 4), impl="triton")
