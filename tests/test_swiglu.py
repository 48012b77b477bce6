"""Gated linear layer: the Triton form against the definition, the operator, and bad input."""

import pytest
import torch
from test_gla import relative_error
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from vig_kernels.swiglu import IMPLEMENTATIONS, linear_swiglu

pytest.importorskip("triton", minversion="3.5")
from vig_kernels.swiglu import triton_op

pytestmark = pytest.mark.usefixtures("rounds_to_nearest")
NAMES = ("out", "x", "weight")


def make_inputs(device: str, *leading: int, C: int, D: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    x = torch.randn(*leading, C, device=device, dtype=dtype)
    return [x, (torch.randn(2 * D, C, device=device) * (2 / C**0.5)).to(dtype)]


def gradient(shape: torch.Size) -> Tensor:
    """Numbers that all types hold exactly."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(7)) / 4


def run(inputs: list[Tensor], impl: str = "triton", grad: Tensor | None = None) -> list[Tensor]:
    """The output and both gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = linear_swiglu(*leaves, impl)
    out.backward((gradient(out.shape) if grad is None else grad).to(out))
    return [out.detach(), *(x.grad for x in leaves)]


def exact(inputs: list[Tensor]) -> list[Tensor]:
    return run([x.double() for x in inputs], "naive")


def assert_agrees_with_the_definition(inputs: list[Tensor]) -> None:
    for name, a, e in zip(NAMES, run(inputs), exact(inputs)):
        assert a.shape == e.shape
        # The slope of SiLU has a zero, around which a single number loses digits.
        assert relative_error(a, e) < (1e-5 if a.numel() > 16 else 1e-4), name


def test_definition_is_the_formula_in_the_docstring():
    x, weight = make_inputs("cpu", 7, C=5, D=3)
    gates, values = (torch.einsum("mc,dc->md", x, w) for w in weight.split(3))
    assert relative_error(linear_swiglu(x, weight, "naive"), gates * gates.sigmoid() * values) < 1e-6


@pytest.mark.parametrize("M", [1, 7, 200])
@pytest.mark.parametrize("C", [1, 5, 96, 100])
@pytest.mark.parametrize("D", [1, 12, 96, 130])
def test_agrees_with_the_definition(device, poisoned_memory, M, C, D):
    assert_agrees_with_the_definition(make_inputs(device, M, C=C, D=D))


@pytest.mark.parametrize("tile", triton_op.TILES, ids=str)
def test_tiles(device, poisoned_memory, monkeypatch, tile):
    """Several of each, the last ones not full."""
    monkeypatch.setattr(triton_op, "TILES", (tile,))
    monkeypatch.setattr(triton_op, "GRADIENT_TILE", 64)
    assert_agrees_with_the_definition(make_inputs(device, 2 * tile[0] + 5, C=40, D=2 * tile[1] + 3))


@pytest.mark.parametrize(
    ("M", "C", "D", "tile"),
    [
        (32768, 192, 512, (128, 64, 64)),
        (131072, 96, 256, (64, 64, 32)),  # the depth divides the channels
        (2048, 768, 2048, (128, 64, 64)),
        (2048, 100, 512, (64, 64, 64)),
        (196, 384, 1024, (64, 32, 64)),
        (1, 8, 1, (64, 32, 32)),
    ],
    ids=str,
)
def test_tiles_are_as_large_as_keep_a_gpu_busy(monkeypatch, M, C, D, tile):
    """Of 132 multiprocessors."""
    monkeypatch.setattr(triton_op, "multiprocessors", lambda device: 132)
    blocks = triton_op._blocks(torch.empty(M, C, dtype=torch.bfloat16, device="meta"), D)
    assert (blocks["BM"], blocks["BN"], blocks["BK"]) == tile


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    """Of the kernel forward: cuBLAS, in the backward pass, does not take rows that far apart either."""
    memory = torch.empty(3 * 2**30, dtype=torch.bfloat16, device="cuda")
    x = memory.as_strided((3, 64), (2**30, 1)).normal_()
    weight = torch.randn(32, 64, dtype=torch.bfloat16, device="cuda")
    assert torch.equal(linear_swiglu(x, weight, impl="triton"), linear_swiglu(x.contiguous(), weight, impl="triton"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_the_rounding_of_the_exact_result(device, dtype):
    """But for the gradients: their products take rounded numbers, made from gates and values that are rounded too."""
    inputs = make_inputs(device, 150, C=96, D=64, dtype=dtype)
    actual = run(inputs)
    assert all(x.dtype == dtype for x in actual)
    for name, a, e in zip(NAMES, actual, exact(inputs)):
        limit = 1.1 if name == "out" else 2
        assert relative_error(a, e) <= limit * relative_error(e.to(dtype), e), name


@pytest.mark.gpu
def test_tf32_where_pytorch_has_it():
    inputs = make_inputs("cuda", 300, C=192, D=128)
    errors = {}
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            errors[precision] = relative_error(linear_swiglu(*inputs, "triton"), exact(inputs)[0])
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert errors["ieee"] < 1e-6 < 1e-5 < errors["tf32"] < 2e-3


@pytest.mark.parametrize("impl", ["naive", "triton"])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)], ids=str)
def test_weight_of_another_type(device, dtypes, impl):
    x, weight = (x.to(dtype) for x, dtype in zip(make_inputs(device, 20, C=16, D=8), dtypes))
    actual, expected = run([x, weight], impl), run([x, weight.to(x.dtype)], impl)
    assert [x.dtype for x in actual] == [dtypes[0], *dtypes]
    assert all(torch.equal(a, e.to(a.dtype)) for a, e in zip(actual, expected))


@pytest.mark.parametrize("impl", ["naive", "triton"])
def test_an_autocast_region_decides_on_the_type_as_for_any_linear_layer(device, impl):
    leaves = [x.requires_grad_() for x in make_inputs(device, 9, C=16, D=8)]
    with torch.autocast(device, dtype=torch.bfloat16):
        out = linear_swiglu(*leaves, impl)
    assert torch.equal(out, linear_swiglu(*(x.bfloat16() for x in leaves), impl))
    out.float().sum().backward()
    assert [x.grad.dtype for x in leaves] == [torch.float32] * 2


def test_a_backward_pass_in_an_autocast_region_keeps_the_types_of_the_forward_pass(device):
    leaves = [x.requires_grad_() for x in make_inputs(device, 9, C=16, D=8)]
    out = linear_swiglu(*leaves, "triton")
    with torch.autocast(device, dtype=torch.bfloat16):
        grads = torch.autograd.grad(out, leaves, gradient(out.shape).to(out))
    assert all(torch.equal(a, e) for a, e in zip(grads, run(leaves)[1:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_numbers(device, dtype):
    """Open and closed gates, rows of zeros, of tiny and of large numbers."""
    x, weight = make_inputs(device, 6, C=16, D=24, dtype=dtype)
    x *= torch.tensor([0, 1e-15, 1, 1e2, 1e4, 1e15], device=device, dtype=dtype).view(-1, 1)
    for row in x.split(1):
        for name, a, e in zip(NAMES, run([row, weight]), exact([row, weight])):
            assert relative_error(a, e) < (1e-4 if dtype == torch.float32 else 0.02), name


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 3, 4), (2, 1, 3, 2)], ids=str)
def test_any_leading_dimensions(device, leading):
    x, weight = make_inputs(device, *leading, C=8, D=12)
    out, dx, dweight = run([x, weight])
    assert (out.shape, dx.shape) == ((*leading, 12), x.shape)
    expected = run([x.reshape(-1, 8), weight], grad=gradient(out.shape).view(-1, 12))
    assert torch.equal(out.view(-1, 12), expected[0])
    assert torch.equal(dx.view(-1, 8), expected[1])
    assert torch.equal(dweight, expected[2])


def test_any_strides_give_the_same(device):
    x, weight = make_inputs(device, 3, 7, C=16, D=12)
    views = {
        "a part of a wider tensor": torch.cat([x, x, x], dim=-1)[..., 16:32],
        "not aligned": torch.cat([x[..., :5], x], dim=-1)[..., 5:],
        "a part of a longer tensor": torch.nn.functional.pad(x, (0, 0, 1, 2), value=float("nan"))[:, 1:8],
        "dimensions swapped": x.transpose(0, 1).contiguous().transpose(0, 1),
        "channels first": x.transpose(1, 2).contiguous().transpose(1, 2),
    }
    grad = gradient(torch.Size((3, 7, 12))).to(device)
    expected = run([x, weight], grad=grad)
    for name, view in views.items():
        actual = run([view, weight], grad=grad)
        assert relative_error(actual[0], expected[0]) == 0, name
        assert all(relative_error(a, e) < 1e-6 for a, e in zip(actual, expected)), name
    strided_weight = weight.t().contiguous().t()
    strided_grad = torch.cat([grad, grad], dim=-1)[..., 12:]
    for actual in (run([x, strided_weight], grad=grad), run([x, weight], grad=strided_grad)):
        assert all(relative_error(a, e) < 1e-6 for a, e in zip(actual, expected))


def test_gradient_of_a_sum(device):
    """It comes with strides of 0."""
    inputs = make_inputs(device, 4, 5, C=8, D=6)
    actual = run(inputs, grad=torch.ones((), device=device).expand(4, 5, 6))
    expected = run([x.double() for x in inputs], "naive", grad=torch.ones(4, 5, 6, device=device))
    assert all(relative_error(a, e) < 1e-5 for a, e in zip(actual, expected))


@pytest.mark.parametrize("frozen", [0, 1])
def test_one_gradient_without_the_other(device, poisoned_memory, frozen):
    inputs = make_inputs(device, 9, C=8, D=6)
    leaves = [x.clone().requires_grad_(i != frozen) for i, x in enumerate(inputs)]
    out = linear_swiglu(*leaves, "triton")
    out.backward(gradient(out.shape).to(out))
    assert leaves[frozen].grad is None
    assert torch.equal(leaves[1 - frozen].grad, run(inputs)[2 - frozen])


def test_keeps_only_what_it_was_given(device):
    leaves = [x.requires_grad_() for x in make_inputs(device, 9, C=8, D=6)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        linear_swiglu(*leaves, "triton")
    assert kept == [x.data_ptr() for x in leaves]


def test_same_bits_twice(device):
    inputs = make_inputs(device, 300, C=96, D=40)
    assert all(torch.equal(a, b) for a, b in zip(run(inputs), run(inputs)))


def test_opcheck(device):
    leaves = [x.requires_grad_() for x in make_inputs(device, 2, 3, C=8, D=4)]
    torch.library.opcheck(torch.ops.vig.linear_swiglu, leaves)


@pytest.mark.parametrize("asked", [(True, True), (True, False), (False, True)], ids=str)
def test_opcheck_backward(device, asked):
    x, weight = make_inputs(device, 2, 3, C=8, D=4)
    arguments = x, weight, torch.ones(2, 3, 4, device=device), *asked
    torch.library.opcheck(torch.ops.vig.linear_swiglu_backward, arguments)


def test_compiled_in_one_graph(device):
    def residual(x: Tensor, weight: Tensor) -> Tensor:
        return linear_swiglu(2 * x, weight, "triton") + x

    def gradients(function) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    inputs = make_inputs(device, 2, 5, C=8, D=8)
    compiled = torch.compile(residual, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, e) for a, e in zip(gradients(compiled), gradients(residual)))


def test_auto_compiles_in_an_autocast_region(device):
    x, weight = make_inputs(device, 5, C=8, D=4)
    with torch.autocast(device, dtype=torch.bfloat16):
        compiled = torch.compile(linear_swiglu, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, weight), linear_swiglu(x, weight))


@pytest.mark.parametrize("frozen", [None, 0, 1])
def test_flops_are_those_of_the_products(device, frozen):
    """Backward one product more than there are gradients."""
    leaves = [x.requires_grad_(i != frozen) for i, x in enumerate(make_inputs(device, 4, 5, C=8, D=6))]
    counts = []
    for impl in ("naive", "triton"):
        with FlopCounterMode(display=False) as counter:
            out = linear_swiglu(*leaves, impl=impl)
        counts.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    products = 3 if frozen is None else 2
    assert [*counts, counter.get_total_flops()] == [2 * 20 * 8 * 12 * n for n in (1, 1, products)]


@pytest.mark.parametrize("region", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_auto_is_the_triton_form_where_it_is_faster(device, monkeypatch, dtype, region):
    called = []
    for impl in ("naive", "triton"):
        monkeypatch.setitem(IMPLEMENTATIONS, impl, lambda *args, impl=impl: called.append(impl))
    with torch.autocast(device, dtype=region, enabled=region is not None):
        linear_swiglu(*make_inputs(device, 3, C=8, D=4, dtype=dtype))
    faster = dtype == torch.bfloat16 or (dtype == torch.float32 and region is not None)
    assert called == ["triton" if device == "cuda" and faster else "naive"]


def test_float64_is_refused(device):
    with pytest.raises(TypeError, match="no float64 form: use impl='naive'"):
        linear_swiglu(*make_inputs(device, 3, C=8, D=4, dtype=torch.float64), "triton")


@pytest.mark.parametrize(
    ("changed", "value", "message"),
    [
        ("x", torch.zeros(()), r"x must have shape \[\.\., C\]"),
        ("x", torch.zeros(0, 4), "none of them 0"),
        ("x", torch.zeros(3, 4, dtype=torch.int64), "x must be a floating point tensor"),
        ("weight", torch.zeros(6, 5), r"weight must have shape \[2 D, 4\], as x \[3, 4\] asks for, got \[6, 5\]"),
        ("weight", torch.zeros(5, 4), r"weight must have shape \[2 D, 4\]"),
        ("weight", torch.zeros(0, 4), r"weight must have shape \[2 D, 4\]"),
        ("weight", torch.zeros(4), r"weight must have shape \[2 D, 4\]"),
        ("weight", torch.zeros(6, 4, device="meta"), "weight is on meta, x on cpu"),
        ("weight", torch.zeros(6, 4, dtype=torch.int32), "weight must be a floating point tensor"),
    ],
)
def test_bad_input_is_named(changed, value, message):
    inputs = dict(zip(("x", "weight"), make_inputs("cpu", 3, C=4, D=3)))
    with pytest.raises((ValueError, TypeError), match=message):
        linear_swiglu(**{**inputs, changed: value})


@pytest.mark.parametrize("impl", ["no_such_kernel", "triton"])
def test_unregistered_implementation_lists_those_that_exist(monkeypatch, impl):
    monkeypatch.delitem(IMPLEMENTATIONS, impl, raising=False)
    with pytest.raises(ValueError, match=rf"impl='{impl}' is not available: expected 'auto' or one of \['naive'"):
        linear_swiglu(*make_inputs("cpu", 3, C=4, D=3), impl=impl)
