"""Depthwise convolution: the Triton form against the definition, the operator, and bad input."""

import pytest
import torch
from test_gla import relative_error
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from vig_kernels.depthwise import IMPLEMENTATIONS, depthwise_conv3x3

pytest.importorskip("triton", minversion="3.5")
from vig_kernels.depthwise import triton_op

pytestmark = pytest.mark.usefixtures("rounds_to_nearest")
NAMES = ("out", "x", "weight")


def make_inputs(device: str, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, device=device, dtype=dtype), torch.randn(shape[-1], 1, 3, 3, device=device)]


def gradient(shape: torch.Size) -> Tensor:
    """Numbers that all types hold exactly."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(7)) / 4


def run(
    inputs: list[Tensor],
    impl: str = "triton",
    grad: Tensor | None = None,
    activation: bool = False,
    valid_sizes: Tensor | None = None,
) -> list[Tensor]:
    """The output and both gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = depthwise_conv3x3(*leaves, activation, impl, valid_sizes=valid_sizes)
    out.backward((gradient(out.shape) if grad is None else grad).to(out))
    return [out.detach(), *(x.grad for x in leaves)]


def exact(inputs: list[Tensor], **options: bool) -> list[Tensor]:
    return run([x.double() for x in inputs], "naive", **options)


def assert_agrees_with_the_definition(inputs: list[Tensor], **options: bool) -> None:
    for name, a, e in zip(NAMES, run(inputs, **options), exact(inputs, **options)):
        assert a.shape == e.shape
        # The slope of SiLU has a zero, around which a single number loses digits.
        assert relative_error(a, e) < (1e-5 if a.numel() > 16 else 1e-4), name


def test_definition_is_the_sum_in_the_docstring():
    x, weight = torch.randn(2, 4, 5, 3), torch.randn(3, 1, 3, 3)
    expected = torch.zeros_like(x)
    for i, j in ((i, j) for i in range(4) for j in range(5)):
        for m, n in ((m, n) for m in range(3) for n in range(3)):
            if 0 <= i + m - 1 < 4 and 0 <= j + n - 1 < 5:
                expected[:, i, j] += weight[:, 0, m, n] * x[:, i + m - 1, j + n - 1]
    assert relative_error(depthwise_conv3x3(x, weight, impl="naive"), expected) < 1e-6
    silu = expected * expected.sigmoid()
    assert relative_error(depthwise_conv3x3(x, weight, activation=True, impl="naive"), silu) < 1e-6


@pytest.mark.parametrize("activation", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (2, 1, 1, 96), (1, 1, 9, 5), (2, 9, 1, 5), (2, 5, 7, 33), (1, 3, 35, 96), (1, 4, 3, 128)],
    ids=str,
)
def test_agrees_with_the_definition(device, poisoned_memory, shape, activation):
    assert_agrees_with_the_definition(make_inputs(device, *shape), activation=activation)


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_strips_and_blocks(device, poisoned_memory, monkeypatch, rows):
    """Several of both, the last ones not full."""
    monkeypatch.setattr(triton_op, "_strip_rows", lambda H, columns, programs: rows)
    monkeypatch.setattr(triton_op, "CONVOLVE_TILE", 64)
    monkeypatch.setattr(triton_op, "GRADIENTS_TILE", 64)
    monkeypatch.setattr(triton_op, "CHANNELS", 16)
    assert_agrees_with_the_definition(make_inputs(device, 2, 5, 6, 21), activation=True)


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (12, 2), (96, 16), (384, 64), (400, 32), (10**6, 64)])
def test_strips_are_as_many_as_keep_a_gpu_busy(columns, rows):
    """Of 64 rows, for 396 programs at a time."""
    assert triton_op._strip_rows(64, columns, 396) == rows


@pytest.mark.parametrize("impl", ["naive", "triton"])
@pytest.mark.parametrize("activation", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
def test_an_image_in_a_padded_batch_is_convolved_as_it_is_alone(
    device, poisoned_memory, monkeypatch, rows, activation, impl
):
    """Whatever stands in the padding, which gets zeros: in the result and in its gradient."""
    monkeypatch.setattr(triton_op, "_strip_rows", lambda H, columns, programs: rows)
    monkeypatch.setattr(triton_op, "CONVOLVE_TILE", 64)
    monkeypatch.setattr(triton_op, "GRADIENTS_TILE", 64)
    monkeypatch.setattr(triton_op, "CHANNELS", 16)
    sizes = [(6, 7), (1, 3), (4, 5), (5, 1)]
    x, weight = make_inputs(device, len(sizes), 6, 7, 17)
    for image, (h, w) in zip(x, sizes):
        image[h:] = image[:, w:] = float("nan")
    grad = gradient(x.shape).to(device)
    options = dict(impl=impl, activation=activation)
    out, dx, dweight = run([x, weight], grad=grad, valid_sizes=torch.tensor(sizes, device=device), **options)
    expected_dweight = torch.zeros_like(dweight)
    for i, (h, w) in enumerate(sizes):
        alone = run([x[i : i + 1, :h, :w], weight], grad=grad[i : i + 1, :h, :w], **options)
        expected_dweight += alone[2]
        for actual, expected in zip((out[i], dx[i]), alone):
            assert relative_error(actual[:h, :w], expected[0]) < 1e-6
            assert not actual[h:].any()
            assert not actual[:, w:].any()
    assert relative_error(dweight, expected_dweight) < 1e-6


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    memory = torch.empty(3 * 2**30, dtype=torch.bfloat16, device="cuda")
    x = memory.as_strided((1, 3, 4, 8), (0, 2**30, 2**28, 1)).normal_()
    weight = torch.randn(8, 1, 3, 3, device="cuda")
    assert all(torch.equal(a, e) for a, e in zip(run([x, weight]), run([x.contiguous(), weight])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", [False, True])
def test_low_precision_is_the_rounding_of_the_exact_result(device, dtype, activation):
    """But for the gradients of SiLU(conv(x)), which need that of conv(x), itself rounded."""
    inputs = make_inputs(device, 2, 9, 11, 32, dtype=dtype)
    actual = run(inputs, activation=activation)
    assert [x.dtype for x in actual] == [dtype, dtype, torch.float32]
    for name, a, e in zip(NAMES, actual, exact(inputs, activation=activation)):
        rounding = relative_error(e.to(dtype if activation else a.dtype), e)
        limit = 2 if activation and name != "out" else 1.1
        assert relative_error(a, e) <= limit * rounding + 1e-6, name


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)], ids=str)
def test_weights_of_another_type(device, dtypes):
    inputs = [x.to(dtype) for x, dtype in zip(make_inputs(device, 1, 5, 6, 8), dtypes)]
    actual = run(inputs)
    assert [x.dtype for x in actual] == [dtypes[0], *dtypes]
    for name, a, e in zip(NAMES, actual, exact(inputs)):
        assert relative_error(a, e) <= 1.1 * relative_error(e.to(a.dtype), e) + 1e-6, name


def test_naive_form_takes_weights_of_another_type():
    x, weight = make_inputs("cpu", 1, 4, 4, 8, dtype=torch.bfloat16)
    assert weight.dtype == torch.float32
    assert depthwise_conv3x3(x, weight, impl="naive").dtype == torch.bfloat16


@pytest.mark.parametrize("impl", ["naive", "triton"])
def test_an_autocast_region_decides_on_the_type_as_for_any_convolution(device, impl):
    x, weight = (leaf.requires_grad_() for leaf in make_inputs(device, 1, 4, 4, 8))
    with torch.autocast(device, dtype=torch.bfloat16):
        out = depthwise_conv3x3(x, weight, impl=impl)
    assert torch.equal(out, depthwise_conv3x3(x.bfloat16(), weight, impl=impl))
    out.float().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


def test_extreme_numbers(device):
    """Flat and steep parts of SiLU, images of zeros, of large and of tiny numbers."""
    x, weight = make_inputs(device, 5, 4, 6, 8)
    x *= torch.tensor([0, 1e-15, 1, 1e4, 1e15], device=device).view(-1, 1, 1, 1)
    for image in x.split(1):
        assert_agrees_with_the_definition([image, weight], activation=True)


@pytest.mark.parametrize("activation", [False, True])
def test_any_strides_give_the_same(device, activation):
    x, weight = make_inputs(device, 2, 5, 7, 8)
    views = {
        "channels of a wider tensor": torch.cat([x, x, x], dim=-1)[..., 8:16],
        "a part of a larger map": torch.nn.functional.pad(x, (0, 0, 1, 2, 3, 1), value=float("nan"))[:, 3:8, 1:8],
        "rows and columns swapped": x.transpose(1, 2).contiguous().transpose(1, 2),
        "channels first": x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    }
    grad = gradient(x.shape).to(device)
    expected = run([x, weight], grad=grad, activation=activation)
    for name, view in views.items():
        assert all(torch.equal(a, e) for a, e in zip(run([view, weight], activation=activation), expected)), name
    for dims in ((0, 2, 1, 3), (0, 3, 1, 2)):
        strided = grad.permute(dims).contiguous().permute([dims.index(i) for i in range(4)])
        actual = run([x, weight], grad=strided, activation=activation)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected)), dims
    strided_weight = weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    actual = run([x, strided_weight], grad=grad, activation=activation)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected))


def test_gradient_of_a_sum(device):
    """It comes with strides of 0."""
    inputs = make_inputs(device, 1, 3, 4, 8)
    actual = run(inputs, grad=torch.ones((), device=device).expand(inputs[0].shape))
    expected = run([x.double() for x in inputs], "naive", grad=torch.ones(inputs[0].shape, device=device))
    assert all(relative_error(a, e) < 1e-5 for a, e in zip(actual, expected))


@pytest.mark.parametrize("activation", [False, True])
@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("valid_sizes", [None, [[3, 6], [5, 4]]], ids=["whole", "padded"])
def test_one_gradient_without_the_other(device, poisoned_memory, monkeypatch, frozen, activation, valid_sizes):
    inputs = make_inputs(device, 2, 5, 6, 8)
    if valid_sizes is not None:
        valid_sizes = torch.tensor(valid_sizes, device=device)
    expected = run(inputs, activation=activation, valid_sizes=valid_sizes)[2 - frozen]
    if frozen == 1:
        monkeypatch.setattr(triton_op, "_gradients", None)  # nobody asks for those of the weights
    leaves = [x.clone().requires_grad_(i != frozen) for i, x in enumerate(inputs)]
    out = depthwise_conv3x3(*leaves, activation, "triton", valid_sizes=valid_sizes)
    out.backward(gradient(out.shape).to(out))
    assert leaves[frozen].grad is None
    assert relative_error(leaves[1 - frozen].grad, expected) < 1e-6


def test_same_bits_twice(device):
    inputs = make_inputs(device, 2, 20, 30, 16)
    assert all(torch.equal(a, b) for a, b in zip(run(inputs, activation=True), run(inputs, activation=True)))


@pytest.mark.parametrize("activation", [False, True])
def test_opcheck(device, activation):
    leaves = [x.requires_grad_() for x in make_inputs(device, 1, 3, 4, 8)]
    torch.library.opcheck(torch.ops.vig.depthwise_conv3x3, (*leaves, activation))
    torch.library.opcheck(torch.ops.vig.depthwise_conv3x3, (*leaves, activation, torch.tensor([[2, 3]], device=device)))


@pytest.mark.parametrize("weight_gradient", [False, True])
def test_opcheck_backward(device, weight_gradient):
    x, weight = make_inputs(device, 1, 3, 4, 8)
    arguments = x, weight, torch.ones_like(x), True, weight_gradient
    torch.library.opcheck(torch.ops.vig.depthwise_conv3x3_backward, arguments)


def test_compiled_in_one_graph(device):
    def gated(x: Tensor, weight: Tensor) -> Tensor:
        return depthwise_conv3x3(2 * x, weight, activation=True, impl="triton") * x

    def gradients(function) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    inputs = make_inputs(device, 1, 4, 5, 8)
    compiled = torch.compile(gated, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, e) for a, e in zip(gradients(compiled), gradients(gated)))


def test_flops_are_those_of_the_convolution(device):
    """Backward twice as many; PyTorch's own count of that is too large for convolutions in groups."""
    leaves = [x.requires_grad_() for x in make_inputs(device, 1, 4, 5, 8)]
    counts = []
    for impl in ("naive", "triton"):
        with FlopCounterMode(display=False) as counter:
            out = depthwise_conv3x3(*leaves, impl=impl)
        counts.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert [*counts, counter.get_total_flops()] == [2 * 9 * n * 4 * 5 * 8 for n in (1, 1, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_auto_is_the_triton_form_where_it_runs(device, dtype):
    inputs = make_inputs(device, 1, 3, 5, 4, dtype=dtype)
    chosen = "triton" if device == "cuda" and dtype != torch.float64 else "naive"
    assert torch.equal(depthwise_conv3x3(*inputs), depthwise_conv3x3(*inputs, impl=chosen))


def test_float64_is_refused(device):
    with pytest.raises(TypeError, match="no float64 form: use impl='naive'"):
        depthwise_conv3x3(*make_inputs(device, 1, 3, 3, 4, dtype=torch.float64), impl="triton")


@pytest.mark.parametrize(
    ("changed", "value", "message"),
    [
        ("x", torch.zeros(1, 3, 4), r"\[B, H, W, C\]"),
        ("x", torch.zeros(1, 0, 3, 4), "none of them 0"),
        ("x", torch.zeros(1, 3, 3, 4, dtype=torch.int64), "x must be a floating point tensor"),
        ("weight", torch.zeros(5, 1, 3, 3), r"weight must have shape \[4, 1, 3, 3\], as x \[1, 3, 3, 4\] asks for"),
        ("weight", torch.zeros(4, 3, 3), r"weight must have shape \[4, 1, 3, 3\]"),
        ("weight", torch.zeros(4, 1, 5, 5), r"weight must have shape \[4, 1, 3, 3\]"),
        ("weight", torch.zeros(4, 1, 3, 3, device="meta"), "weight is on meta, x on cpu"),
        ("weight", torch.zeros(4, 1, 3, 3, dtype=torch.int32), "weight must be a floating point tensor"),
        ("valid_sizes", torch.tensor([3, 3]), r"valid_sizes must hold .* integers \[1, 2\], got shape \[2\]"),
        ("valid_sizes", torch.ones(1, 2), r"valid_sizes must hold .*, got shape \[1, 2\], torch.float32"),
        ("valid_sizes", torch.ones(1, 2, dtype=torch.int32, device="meta"), "valid_sizes is on meta, x on cpu"),
    ],
)
def test_bad_input_is_named(changed, value, message):
    inputs = dict(zip(("x", "weight"), make_inputs("cpu", 1, 3, 3, 4)))
    with pytest.raises((ValueError, TypeError), match=message):
        depthwise_conv3x3(**{**inputs, changed: value})


@pytest.mark.parametrize("impl", ["no_such_kernel", "triton"])
def test_unregistered_implementation_lists_those_that_exist(monkeypatch, impl):
    monkeypatch.delitem(IMPLEMENTATIONS, impl, raising=False)
    with pytest.raises(ValueError, match=rf"impl='{impl}' is not available: expected 'auto' or one of \['naive'"):
        depthwise_conv3x3(*make_inputs("cpu", 1, 3, 3, 4), impl=impl)
