"""Log-gates from their low-rank code: the Triton form against the definition, the operator, and bad input."""

import pytest
import torch
from test_gla import relative_error
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from vig_kernels import log_gates

pytest.importorskip("triton", minversion="3.5")
from vig_kernels.gla import triton_gates

pytestmark = pytest.mark.usefixtures("rounds_to_nearest")
NAMES = ("forward gates", "backward gates", "grad of code", "grad of weight", "grad of bias")


def make_inputs(
    device: str, B: int, L: int, R: int, h: int, K: int, dtype: torch.dtype = torch.float32, spread: float = 1.0
) -> list[Tensor]:
    """Code in `dtype`, weight and bias in float32; logits of about so much spread."""
    code = torch.randn(B, L, R, device=device, dtype=dtype)
    weight = torch.randn(2 * h * K, R, device=device) * spread * R**-0.5
    return [code, weight, torch.randn(2 * h * K, device=device) * spread]


def run(inputs: list[Tensor], h: int, impl: str = "triton", call=log_gates, temperature: float = 16.0) -> list[Tensor]:
    """Both outputs and all gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    gates = call(*leaves, h, temperature, impl=impl)
    generator = torch.Generator().manual_seed(7)
    # numbers that all types hold exactly
    grads = [(torch.randint(-8, 9, x.shape, generator=generator) / 4).to(x) for x in gates]
    torch.autograd.backward(gates, grads)
    return [*(x.detach() for x in gates), *(x.grad for x in leaves)]


def exact(inputs: list[Tensor], h: int, **options: float) -> list[Tensor]:
    return run([x.double() for x in inputs], h, "naive", **options)


@pytest.mark.parametrize(
    ("B", "L", "R", "h", "K"),
    [(1, 1, 1, 1, 1), (2, 7, 3, 2, 5), (1, 65, 16, 3, 32), (1, 130, 16, 2, 64), (2, 3, 20, 1, 100), (1, 2, 64, 1, 8)],
)
def test_agrees_with_the_definition(device, poisoned_memory, B, L, R, h, K):
    inputs = make_inputs(device, B, L, R, h, K)
    for name, a, e in zip(NAMES, run(inputs, h), exact(inputs, h), strict=True):
        assert a.shape == e.shape
        assert relative_error(a, e) < 1e-5, name


@pytest.mark.parametrize("spread", [30.0, 1000.0])
def test_open_and_closed_gates(device, spread):
    """Log-gates from about -0 to far below, each to its own relative precision."""
    inputs = make_inputs(device, 1, 50, 16, 1, 8, spread=spread)
    for a, e in zip(run(inputs, 1)[:2], exact(inputs, 1)):
        # a logit of 30 comes from addends that large
        assert ((a - e).abs() <= 3e-6 * spread * (e.abs() + 1e-30) + 1e-30).all()


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_most_extreme_logits(device, sign):
    inputs = make_inputs(device, 1, 40, 2, 1, 4)
    inputs[1].zero_()
    inputs[2].fill_(sign * torch.finfo(torch.float32).max / 2)
    for name, a, e in zip(NAMES, run(inputs, 1), exact(inputs, 1), strict=True):
        assert a.isfinite().all(), name
        assert relative_error(a, e) < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_the_rounding_of_the_exact_result(device, dtype):
    inputs = make_inputs(device, 2, 50, 16, 2, 32, dtype)
    actual = run(inputs, 2)
    gates = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    assert [x.dtype for x in actual] == [gates, gates, dtype, torch.float32, torch.float32]
    for name, a, e in zip(NAMES, actual, exact(inputs, 2), strict=True):
        assert relative_error(a, e) <= 1.1 * relative_error(e.to(a.dtype), e) + 1e-4, name


def test_more_tiles_than_programs(device, monkeypatch):
    monkeypatch.setattr(triton_gates, "CHANNELS", 16)
    monkeypatch.setattr(triton_gates, "TOKENS", 16)
    inputs = make_inputs(device, 1, 320, 4, 1, 40)
    for name, a, e in zip(NAMES, run(inputs, 1), exact(inputs, 1), strict=True):
        assert relative_error(a, e) < 1e-5, name


def test_any_strides_give_the_same(device):
    code, weight, bias = make_inputs(device, 2, 21, 16, 1, 8)
    expected = run([code, weight, bias], 1)
    wide = torch.randn(2, 21, 40, device=device)
    wide[..., 8:24] = code
    for strided in (
        wide[..., 8:24],
        code.transpose(0, 1).contiguous().transpose(0, 1),
        code.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        for name, a, e in zip(NAMES, run([strided, weight.t().contiguous().t(), bias], 1), expected, strict=True):
            assert torch.equal(a, e), name


def test_gradients_of_one_direction_and_strided_ones(device):
    code, weight, bias = (x.requires_grad_() for x in make_inputs(device, 1, 20, 16, 2, 4))
    grad = torch.randn(1, 20, 4, 2, device=device).transpose(2, 3)
    for impl in ("triton", "naive"):
        gate, _ = log_gates(code, weight, bias, 2, impl=impl)
        gate.backward(grad)
        if impl == "triton":
            actual = [x.grad.clone() for x in (code, weight, bias)]
            code.grad = weight.grad = bias.grad = None
    for a, x in zip(actual, (code, weight, bias)):
        assert relative_error(a, x.grad.double()) < 1e-5


def test_same_bits_twice(device):
    inputs = make_inputs(device, 2, 333, 16, 2, 8)
    assert all(torch.equal(a, b) for a, b in zip(run(inputs, 2), run(inputs, 2)))


def test_as_an_operator(device):
    inputs = [x.requires_grad_() for x in make_inputs(device, 1, 20, 16, 1, 8)]
    torch.library.opcheck(torch.ops.vig.log_gates, (*inputs, 1, 16.0))
    gates = torch.ops.vig.log_gates(*(x.detach() for x in inputs), 1, 16.0)
    torch.library.opcheck(torch.ops.vig.log_gates_backward, (*(x.detach() for x in inputs), *gates, 16.0))


def test_compiled_gives_the_same(device):
    torch._dynamo.reset()
    inputs = make_inputs(device, 1, 20, 16, 1, 8)
    call = torch.compile(log_gates, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    assert all(torch.equal(a, b) for a, b in zip(run(inputs, 1, call=call), run(inputs, 1)))


def test_flops_are_those_of_the_products(device):
    inputs = [x.requires_grad_() for x in make_inputs(device, 2, 10, 16, 1, 8)]
    with FlopCounterMode(display=False) as counter:
        gates = log_gates(*inputs, 1, impl="triton")
        assert counter.get_total_flops() == 2 * 20 * 16 * 16
        sum(gates).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 20 * 16 * 16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(code=torch.zeros(2, 3)), ValueError, r"code must have shape \[B, L, R\]"),
        (dict(weight=torch.zeros(16, 5)), ValueError, r"weight must have shape \[2 h K, 16\].*got \[16, 5\]"),
        (dict(bias=torch.zeros(4)), ValueError, r"bias must have shape \[16\], got \[4\]"),
        (dict(num_heads=3), ValueError, "16 rows, not a multiple of 2 \\* num_heads = 6"),
        (dict(num_heads=0), ValueError, "not a multiple"),
        (dict(temperature=0), ValueError, "temperature must be positive"),
        (dict(temperature=float("nan")), ValueError, "temperature must be positive"),
        (dict(code=torch.zeros(1, 2, 16, dtype=torch.int32)), TypeError, "code must be a floating point tensor"),
        (dict(impl="fast"), ValueError, "impl='fast' is not available"),
        (dict(code=torch.zeros(1, 2, 16, dtype=torch.float64), impl="triton"), TypeError, "no float64 form"),
        (
            dict(code=torch.zeros(1, 2, 65), weight=torch.zeros(16, 65), impl="triton"),
            ValueError,
            "up to 64 numbers, got 65",
        ),
    ],
)
def test_bad_input_is_refused(change, error, message):
    code, weight, bias = make_inputs("cpu", 1, 2, 16, 1, 8)
    arguments = dict(code=code, weight=weight, bias=bias, num_heads=1) | change
    with pytest.raises(error, match=message):
        log_gates(**arguments)
