"""Cross-entropy of resized logits: chunked and Triton form against the definition in float64, and bad input."""

import pytest
import torch
from test_gla import relative_error
from torch import Tensor
from vig_kernels import resampling, resized_cross_entropy
from vig_kernels.resized_loss import IMPLEMENTATIONS

pytest.importorskip("triton", minversion="3.5")
pytestmark = pytest.mark.usefixtures("rounds_to_nearest")
FORMS = pytest.mark.parametrize("impl", ["chunk", "triton"])
ALIGN = pytest.mark.parametrize("align_corners", [False, True])
# B, C, size of the logits, size of the labels
SIZES = [
    (2, 5, (4, 6), (16, 24)),  # four times as large
    (1, 19, (6, 5), (14, 23)),  # odd
    (2, 150, (3, 4), (5, 9)),
    (1, 3, (9, 11), (4, 5)),  # smaller
    (1, 37, (8, 40), (31, 1)),
    (1, 7, (1, 1), (5, 6)),
    (2, 4, (5, 6), (5, 6)),  # as large
]


def make_inputs(
    device: str, B: int, C: int, source: tuple[int, int], target: tuple[int, int], ignored: float = 0.2
) -> tuple[Tensor, Tensor]:
    logits = 3 * torch.randn(B, C, *source)
    labels = torch.randint(0, C, (B, *target))
    labels[torch.rand(labels.shape) < ignored] = 255
    return logits.to(device), labels.to(device)


def run(logits: Tensor, labels: Tensor, impl: str, **options) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, hits and the gradient of the logits."""
    leaf = logits.detach().clone().requires_grad_()
    loss, hits = resized_cross_entropy(leaf, labels, impl=impl, **options)
    weights = torch.rand(loss.shape, generator=torch.Generator().manual_seed(7)) - 0.3
    (loss * weights.to(loss)).sum().backward()
    return loss.detach(), hits, leaf.grad


def exact(logits: Tensor, labels: Tensor, **options) -> tuple[Tensor, Tensor, Tensor]:
    return run(logits.double(), labels, "naive", **options)


def assert_agrees(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], limit: float = 2e-6) -> None:
    (loss, hits, grad), (exact_loss, exact_hits, exact_grad) = actual, expected
    assert relative_error(loss, exact_loss) < limit
    assert relative_error(grad, exact_grad) < limit
    assert (hits != exact_hits).sum() <= 1e-3 * hits.numel()  # ties, to rounding


@FORMS
@ALIGN
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_agrees_with_the_definition(device, poisoned_memory, impl, align_corners, sizes):
    inputs = make_inputs(device, *sizes)
    assert_agrees(run(*inputs, impl, align_corners=align_corners), exact(*inputs, align_corners=align_corners))


@FORMS
def test_random_sizes(device, impl):
    """Whatever the ratio of the sizes: no pixel is left out of a gradient, none counts twice."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(10):
        B, C, *sizes = (int(n) for n in torch.randint(1, 14, (6,), generator=generator))
        inputs = make_inputs(device, min(B, 2), C + 1, tuple(sizes[:2]), tuple(sizes[2:]))
        align_corners = bool(torch.randint(2, (), generator=generator))
        assert_agrees(run(*inputs, impl, align_corners=align_corners), exact(*inputs, align_corners=align_corners))


@FORMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_interpolated_in_float32(device, impl, dtype):
    logits, labels = make_inputs(device, 2, 21, (5, 4), (11, 9))
    logits = logits.to(dtype)
    loss, hits, grad = run(logits, labels, impl)
    expected = exact(logits, labels)
    assert loss.dtype == torch.float32
    assert grad.dtype == dtype
    assert_agrees((loss, hits, expected[2]), expected)
    assert relative_error(grad, expected[2]) < 1.1 * relative_error(expected[2].to(dtype), expected[2])


@FORMS
def test_an_autocast_region_changes_nothing(device, impl):
    logits, labels = make_inputs(device, 2, 21, (5, 4), (11, 9))
    expected = run(logits, labels, impl)
    with torch.autocast(device, torch.bfloat16):
        actual = run(logits, labels, impl)
    assert_agrees(actual, expected)


def test_float64_in_chunks():
    inputs = make_inputs("cpu", 2, 5, (4, 6), (15, 24))
    logits = inputs[0].double()
    assert_agrees(run(logits, inputs[1], "chunk"), exact(*inputs), 1e-14)
    labels = inputs[1]
    assert torch.autograd.gradcheck(
        lambda x: resized_cross_entropy(x, labels, impl="chunk")[0], logits.requires_grad_()
    )


@pytest.mark.parametrize("numbers", [1, 5 * 24 * 3, 5 * 24 * 15, 5 * 24 * 15 * 2])
def test_any_size_of_chunks(monkeypatch, numbers):
    """A row at a time, a few, an image, two images of three."""
    inputs = make_inputs("cpu", 3, 5, (4, 6), (15, 24))
    monkeypatch.setitem(resampling.BLOCK_NUMBERS, "cpu", numbers)
    assert_agrees(run(*inputs, "chunk"), exact(*inputs))


@FORMS
def test_all_pixels_ignored(device, impl):
    logits, _ = make_inputs(device, 2, 5, (4, 6), (16, 24))
    loss, hits, grad = run(logits, torch.full((2, 16, 24), 255, device=device), impl)
    assert not loss.any()
    assert not hits.any()
    assert not grad.any()


@FORMS
def test_one_class(device, impl):
    loss, hits, grad = run(*make_inputs(device, 1, 1, (3, 3), (7, 7), ignored=0), impl)
    assert loss.abs().max() < 1e-6
    assert hits.all()
    assert grad.abs().max() < 1e-5


@FORMS
def test_ignore_index_may_be_a_class(device, impl):
    inputs = make_inputs(device, 2, 5, (4, 6), (16, 24), ignored=0)
    assert_agrees(run(*inputs, impl, ignore_index=2), exact(*inputs, ignore_index=2))


@FORMS
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=str)
def test_labels_of_any_integer_type(device, impl, dtype):
    logits, labels = make_inputs(device, 2, 5, (4, 6), (16, 24))
    assert_agrees(run(logits, labels.to(dtype), impl), run(logits, labels, impl))


@FORMS
def test_strided_logits_and_a_gradient_that_is_one_number(device, impl):
    """Channels-last logits, as a convolution leaves them; the gradient of a mean is an expanded scalar."""
    logits, labels = make_inputs(device, 2, 19, (5, 4), (11, 9))
    leaves = [logits.double(), logits.to(memory_format=torch.channels_last), logits.mT.contiguous().mT]
    for leaf, form in zip(leaves, ("naive", impl, impl)):
        leaf.requires_grad_()
        resized_cross_entropy(leaf, labels, impl=form)[0].mean().backward()
    for leaf in leaves[1:]:
        assert relative_error(leaf.grad, leaves[0].grad) < 2e-6


@FORMS
def test_large_logits(device, impl):
    """No overflow where probabilities are 0 and 1; those in between feel the rounding of the logits."""
    logits, labels = make_inputs(device, 1, 9, (4, 6), (16, 24))
    inputs = 1e4 * logits, labels
    (loss, _, grad), (expected, _, expected_grad) = run(*inputs, impl), exact(*inputs)
    assert relative_error(loss, expected) < 1e-5
    assert relative_error(grad, expected_grad) < 1e-2


@FORMS
def test_is_deterministic(device, impl):
    if (device, impl) == ("cuda", "chunk"):
        pytest.skip("the chunked form has PyTorch's gradient of an interpolation, which is not deterministic on a GPU")
    inputs = make_inputs(device, 2, 21, (5, 4), (11, 9))
    for a, b in zip(run(*inputs, impl), run(*inputs, impl)):
        assert torch.equal(a, b)


@FORMS
def test_passes_torchs_checks_of_an_operator(device, impl):
    logits, labels = make_inputs(device, 1, 3, (3, 4), (7, 9))
    from vig_kernels.resized_loss.op import _forward

    torch.library.opcheck(_forward, (logits.requires_grad_(), labels, 255, False, impl))


def test_compiles_into_one_graph():
    logits, labels = make_inputs("cpu", 1, 3, (3, 4), (7, 9))
    compiled = torch.compile(lambda x: resized_cross_entropy(x, labels)[0].mean(), fullgraph=True, backend="aot_eager")
    leaf = logits.requires_grad_()
    (grad,) = torch.autograd.grad(compiled(leaf), leaf)
    (expected,) = torch.autograd.grad(resized_cross_entropy(leaf, labels)[0].mean(), leaf)
    assert torch.equal(grad, expected)


def test_chunks_hold_a_few_rows_of_full_resolution(monkeypatch):
    """The largest tensor of a step."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            outs = out if isinstance(out, tuple | list) else [out]
            self.numbers = max([self.numbers, *(x.numel() for x in outs if isinstance(x, Tensor))])
            return out

    monkeypatch.setitem(resampling.BLOCK_NUMBERS, "cpu", 50 * 64 * 4)
    inputs = make_inputs("cpu", 2, 50, (16, 16), (64, 64))
    with Largest() as largest:
        run(*inputs, "chunk")
    assert 50 * 64 * 4 <= largest.numbers <= inputs[0].numel() < 50 * 64 * 64


@pytest.mark.parametrize(
    ("logits", "labels", "error", "words"),
    [
        ((2, 3, 4), (2, 8, 8), ValueError, r"logits must have shape \[B, C, h, w\]"),
        ((2, 0, 4, 4), (2, 8, 8), ValueError, "none of them 0"),
        ((2, 3, 4, 4), (1, 8, 8), ValueError, r"labels must have shape \[2, H, W\]"),
        ((2, 3, 4, 4), (2, 1, 8, 8), ValueError, r"labels must have shape \[2, H, W\]"),
    ],
)
def test_shapes_that_do_not_fit(logits, labels, error, words):
    with pytest.raises(error, match=words):
        resized_cross_entropy(torch.zeros(logits), torch.zeros(labels, dtype=torch.int64))


def test_bad_types_and_labels():
    logits, labels = torch.zeros(1, 3, 4, 4), torch.zeros(1, 8, 8, dtype=torch.int64)
    with pytest.raises(TypeError, match="labels must be integers"):
        resized_cross_entropy(logits, labels.float())
    with pytest.raises(TypeError, match="logits must be a floating point tensor"):
        resized_cross_entropy(logits.int(), labels)
    with pytest.raises(ValueError, match="impl='fast' is not available"):
        resized_cross_entropy(logits, labels, impl="fast")
    for label in (3, -1, 254):
        with pytest.raises(IndexError, match="neither a class, 0 to 2, nor ignore_index=255"):
            resized_cross_entropy(logits, labels + label)
    with pytest.raises(TypeError, match="use impl='chunk'"):
        resized_cross_entropy(logits.double(), labels, impl="triton")


def test_names_of_the_forms():
    assert set(IMPLEMENTATIONS) == {"naive", "chunk", "triton"}
