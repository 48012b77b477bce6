"""The Triton form against the definition, and as an operator: autograd, autocast, compile, export, cost.

Without a GPU the kernels run in Triton's interpreter (conftest.py), on small shapes; `-m gpu` runs them for real.
"""

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from test_gla import ARRANGEMENTS, GATES, NAMES, assert_all_close, make_inputs, rearranged, relative_error
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from vig_kernels import bidirectional_gla

pytest.importorskip("triton", minversion="3.5")
from vig_kernels.gla import triton_kernels, triton_launches, triton_op

OUTPUTS = ("out", *(f"grad of {name}" for name in NAMES))
IMPLS = ("naive", "chunk", "triton")
gpu = pytest.mark.gpu
# Chunks that one kernel leaves to another one overflow in the first.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.usefixtures("rounds_to_nearest"),
]


@pytest.fixture
def chunk(device: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens of a chunk; few in the interpreter, so that short sequences have many chunks."""
    if device == "cpu":
        monkeypatch.setattr(triton_launches, "CHUNK", 16)
    return triton_launches.CHUNK


def inputs_on(device: str, *args: Any, **kwargs: Any) -> list[Tensor]:
    return [x.to(device) for x in make_inputs(*args, **kwargs)]


def leaves_of(inputs: list[Tensor]) -> list[Tensor]:
    """Strides and all."""
    return [x.detach().requires_grad_() for x in inputs]


def out_gradient(inputs: list[Tensor]) -> Tensor:
    v = inputs[2]
    return torch.randn(v.shape, generator=torch.Generator().manual_seed(99)).to(v.dtype).to(v.device)


def run(
    inputs: list[Tensor],
    impl: str = "triton",
    grad: Tensor | None = None,
    call: Callable[..., Tensor] = bidirectional_gla,
    **options: Any,
) -> tuple[Tensor, ...]:
    """The output and the gradients of all five inputs, on the CPU."""
    leaves = leaves_of(inputs)
    out = call(*leaves, impl=impl, **options)
    out.backward(out_gradient(inputs) if grad is None else grad)
    return tuple(x.detach().cpu() for x in (out, *(x.grad for x in leaves)))


def exact(inputs: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    """The same in float64: by the definition; on a GPU, for speed, by the chunked form, which is tested against it."""
    impl = "chunk" if inputs[0].is_cuda else "naive"
    return run([x.double() for x in inputs], impl, out_gradient(inputs).double(), **options)


def assert_same_bits(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for name, a, e in zip(OUTPUTS, actual, expected, strict=True):
        assert torch.equal(a, e), name


def mild_and_steep_gates(inputs: list[Tensor], length: int) -> None:
    """Every other stretch of `length` tokens gets strong gates, in some channels only."""
    tokens = torch.arange(inputs[0].shape[1], device=inputs[0].device)
    for gates in inputs[3:]:
        gates[:, tokens // length % 2 == 1, :, ::2] = -5.0


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("gates", GATES)
def test_agrees_with_the_definition_for_all_gates(device, gates):
    inputs = inputs_on(device, 1, 70, 1, 5, 12, gates)
    assert_all_close(run(inputs), exact(inputs), 1e-5)


@pytest.mark.parametrize(
    ("shape", "gates"),
    [
        ((1, 1, 2, 5, 12), "usual"),
        ((1, 2, 1, 8, 16), "mixed"),
        ((1, 63, 2, 12, 5), "usual"),
        ((1, 64, 1, 8, 16), "usual"),
        ((1, 65, 1, 16, 16), "mixed"),
        ((1, 65, 1, 32, 16), "usual"),
        ((1, 200, 1, 5, 12), "usual"),
    ],
    ids=str,
)
def test_agrees_with_the_definition_for_all_shapes(device, shape, gates):
    inputs = inputs_on(device, *shape, gates)
    assert_all_close(run(inputs), exact(inputs), 1e-5)


def test_several_images_heads_and_chunks_mild_and_steep(device, chunk):
    inputs = inputs_on(device, 2, chunk + 5, 2, 5, 12)
    mild_and_steep_gates(inputs, chunk)
    assert_all_close(run(inputs), exact(inputs), 1e-5)


def test_more_than_one_tile_of_channels(device, chunk):
    """Wider than the kernels for mild chunks take: all chunks go to the others, tile by tile."""
    K, V = 5, 70
    assert not triton_launches.is_one_tile(K, V, torch.float32, torch.float32, torch.device(device))
    inputs = inputs_on(device, 1, 2 * chunk + 3, 1, K, V)
    assert_all_close(run(inputs), exact(inputs), 1e-5)


def test_less_shared_memory_than_a_tile_needs(device, chunk, monkeypatch):
    """As on GPUs with 99 KB a program: all chunks go to the kernels that work tile by tile."""
    K, V = 32, 64
    inputs = inputs_on(device, 1, chunk + 3, 1, K, V)
    expected = run(inputs)
    monkeypatch.setattr(triton_launches, "shared_memory", lambda device: 48 * 1024)
    assert not triton_launches.is_one_tile(K, V, torch.float32, torch.float32, torch.device(device))
    assert triton_launches.is_one_tile(16, 32, torch.bfloat16, torch.float32, torch.device(device))
    assert_all_close(run(inputs), expected, 1e-5)


@pytest.mark.parametrize("kind", ["plain", "packed", "padded"])
@pytest.mark.parametrize("processors", [1, 2, 8])
def test_stretches_of_chunks(device, chunk, monkeypatch, poisoned_memory, processors, kind):
    """Walks are cut into 1 to 11 stretches; the states that enter them reach mild and steep chunks."""
    monkeypatch.setattr(triton_launches, "multiprocessors", lambda device: processors)
    L = 11 * chunk - 5
    inputs = inputs_on(device, 1, L, 2, 5, 12)
    mild_and_steep_gates(inputs, 3 * chunk)
    inputs[3], inputs[4] = inputs[3] / 64, inputs[4] / 64  # so that much passes through many chunks
    mild_and_steep_gates([x[:, : 2 * chunk] for x in inputs], chunk)
    options = {}
    if kind == "packed":
        options = dict(cu_seqlens=torch.tensor([0, 3, 4 * chunk + 2, L], device=device))
    elif kind == "padded":
        options = dict(valid_sizes=torch.tensor([[L - 2 * chunk, 1]], device=device), width=1)
    expected = exact(inputs, **options)
    assert_all_close(run(inputs, **options), expected, 1e-5)
    with torch.no_grad():  # then `outputs` adds what enters a stretch
        out = bidirectional_gla(*inputs, impl="triton", **options).cpu()
    assert relative_error(out, expected[0]) < 1e-5


@pytest.mark.parametrize("gate", [-1.0, -1.1])
def test_gates_around_the_limit_of_mild_chunks(device, gate):
    inputs = inputs_on(device, 1, 70, 1, 5, 12)
    inputs[3:] = [torch.full_like(x, gate) for x in inputs[3:]]
    assert_all_close(run(inputs), exact(inputs), 1e-5)


def test_one_strong_gate_in_a_mild_chunk(device):
    inputs = inputs_on(device, 1, 64, 1, 5, 12)
    for gates in inputs[3:]:
        gates[:, 30, :, 0] = -50.0
    assert_all_close(run(inputs), exact(inputs), 1e-5)


def test_the_most_negative_gates_give_each_token_its_own_value(device):
    q, k, v, _, _ = inputs_on(device, 1, 70, 1, 5, 12)
    closed = torch.full_like(q, torch.finfo(q.dtype).min)
    out, *grads = run([q, k, v, closed, closed])
    own = (q * k).sum(-1, keepdim=True) * v * 5**-0.5
    assert relative_error(out, own.cpu()) < 1e-6
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert not grads[3].any()
    assert not grads[4].any()


def test_scale(device):
    inputs = inputs_on(device, 1, 20, 1, 5, 12)
    assert_all_close(run(inputs, scale=0.3), exact(inputs, scale=0.3), 1e-5)


def random_gates(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A kind of gate for each stretch of tokens and channel."""
    B, L, h, K = shape
    kinds = torch.stack([gates(torch.randn(shape, generator=generator)) for gates in GATES.values()])
    stretch = int(torch.randint(1, 100, (), generator=generator))
    choice = torch.randint(len(GATES), (B, L // stretch + 1, h, K), generator=generator)
    choice = choice.repeat_interleave(stretch, 1)[:, :L]
    return kinds.gather(0, choice[None])[0]


def random_case(kind: str, seed: int, device: str) -> tuple[list[Tensor], dict[str, Any]]:
    """Inputs of a random shape."""
    generator = torch.Generator().manual_seed(seed)

    def up_to(*largest: int) -> list[int]:
        return [int(torch.randint(1, x + 1, (), generator=generator)) for x in largest]

    if device == "cpu":
        B, L, h, K, V = up_to(2, 60, 2, 12, 12)
    else:  # few sizes of channels: each is compiled
        B, L, h, size = up_to(4, 2000, 4, 3)
        K, V = ((5, 12), (32, 64), (80, 64))[size - 1]
    options: dict[str, Any] = {}
    if kind == "packed":
        B = 1
        borders = torch.randint(L + 1, (min(L, 4),), generator=generator).sort().values.tolist()
        options["cu_seqlens"] = torch.tensor([0, *borders, L], device=device)
    if kind == "padded":
        height, width = L // 10 + 1, 10
        L = height * width
        rows = torch.randint(height + 1, (B,), generator=generator)
        columns = torch.randint(width + 1, (B,), generator=generator)
        options.update(valid_sizes=torch.stack((rows, columns), 1).to(device), width=width)
    q, k, v = (torch.randn(B, L, h, D, generator=generator) for D in (K, K, V))
    gates = [random_gates(q.shape, generator) for _ in range(2)]
    return [x.to(device) for x in (q, k, v, *gates)], options


@pytest.mark.parametrize("kind", ["plain", "packed", "padded"])
def test_random_cases(device, kind):
    first = random.SystemRandom().randrange(2**31)
    worst = 0.0
    for seed in range(first, first + (1 if device == "cpu" else 40)):
        inputs, options = random_case(kind, seed, device)
        shape = (*inputs[0].shape, inputs[2].shape[-1])
        for name, a, e in zip(OUTPUTS, run(inputs, **options), exact(inputs, **options)):
            error = relative_error(a, e)
            assert error < 1e-4, f"random_case({kind!r}, {seed}, {device!r}), {shape}: {name} is off by {error}"
            worst = max(worst, error)
    print(f"worst error of the random {kind} cases: {worst:.1e}")  # shown by pytest -rP


def assert_at_most_twice_the_rounding(inputs: list[Tensor]) -> None:
    """No number is off by more than twice what the chunked form, exact but for rounding its results, is off by."""
    # float16 cannot hold the gradients of strong gates; subnormal ones carry an absolute error.
    smallest = torch.finfo(inputs[0].dtype).smallest_normal * torch.finfo(inputs[0].dtype).eps
    for name, a, c, e in zip(OUTPUTS, run(inputs), run(inputs, "chunk"), exact(inputs)):
        error, chunk_error = ((x.double() - e).norm().item() for x in (a, c))
        assert error <= 2 * chunk_error + smallest * e.numel() ** 0.5, (
            f"{name} is off by {error}, chunk by {chunk_error}"
        )


@pytest.mark.parametrize("gates", ["usual", "weak", "mixed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(device, dtype, gates):
    assert_at_most_twice_the_rounding(inputs_on(device, 2, 70, 1, 8, 16, gates, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_with_gates_in_float32(device, dtype):
    inputs = inputs_on(device, 1, 70, 1, 5, 12, dtype=dtype)
    inputs[3:] = [gate.float() for gate in inputs[3:]]
    actual = run(inputs)
    assert [x.dtype for x in actual] == [dtype, *(x.dtype for x in inputs)]
    assert_all_close(actual, exact(inputs), 5e-3)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("K", "V"), [*((K, V) for K in (8, 16, 32, 64, 128) for V in (16, 32, 64, 128)), (48, 80)], ids=str
)
def test_sizes_and_types(K, V, dtype):
    """float32 is exact; lower precision loses no more than twice what rounding does in the chunked form."""
    for B, L, gates in ((100, 2, "usual"), (2, 100, "mixed"), (2, 200, "strong"), (2, 333, "weak"), (2, 1000, "usual")):
        inputs = inputs_on("cuda", B, L, 2, K, V, gates, dtype)
        if dtype == torch.float32:
            assert_all_close(run(inputs), exact(inputs), 1e-5)
        else:
            assert_at_most_twice_the_rounding(inputs)


@gpu
def test_long_sequence():
    inputs = inputs_on("cuda", 1, 300_000, 1, 32, 64, dtype=torch.bfloat16)
    expected = run([x.float() for x in inputs], "chunk", out_gradient(inputs).float())
    assert_all_close(run(inputs), expected, 1e-2)


@gpu
def test_offsets_beyond_32_bits():
    """Keys 2**20 numbers apart."""
    L, K = 4096, 32
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    inputs = inputs_on("cuda", 1, L, 1, K, 32, dtype=torch.bfloat16)
    expected = run(inputs)
    far = torch.empty(L, 2**20, device="cuda", dtype=torch.bfloat16)[:, :K].view(1, L, 1, K)
    inputs[1] = far.copy_(inputs[1])
    assert_same_bits(run(inputs), expected)


def test_same_bits_twice(device, chunk):
    inputs = inputs_on(device, 1, chunk + 2, 1, 5, 12)
    mild_and_steep_gates(inputs, chunk)
    assert_same_bits(run(inputs), run(inputs))


def test_gates_of_different_types(device):
    inputs = inputs_on(device, 1, 20, 1, 5, 12)
    inputs[4] = inputs[4].bfloat16()
    actual = run(inputs)
    assert actual[5].dtype == torch.bfloat16
    for name, a, e in zip(OUTPUTS[:5], actual, exact(inputs)):
        assert relative_error(a, e) < 1e-5, name


# ---------------------------------------------------------------------------------------------------------------------
# Memory: what is read and written


@pytest.mark.parametrize("kind", ["plain", "packed", "padded"])
def test_uninitialised_memory_is_not_read(device, chunk, kind, poisoned_memory):
    L = 3 * chunk
    inputs = inputs_on(device, 1, L, 1, 5, 12)
    mild_and_steep_gates(inputs, chunk)
    options: dict[str, Any] = {}
    if kind == "packed":
        options["cu_seqlens"] = torch.tensor([0, 1, chunk, chunk + 3, L], device=device)
    if kind == "padded":
        options.update(valid_sizes=torch.tensor([[chunk + 1, 2]], device=device), width=3)
    assert_all_close(run(inputs, **options), exact(inputs, **options), 1e-5)


def test_memory_around_the_inputs_is_not_read(device, chunk):
    inputs = inputs_on(device, 1, chunk + 5, 1, 5, 12)
    mild_and_steep_gates(inputs, chunk)
    grad = out_gradient(inputs)
    inside = []
    for x in (*inputs, grad):
        B, L, h, D = x.shape
        around = x.new_full((B + 2, L + 2 * chunk, h + 2, D + 16), torch.nan)
        inside.append(around[1:-1, chunk:-chunk, 1:-1, 8:-8].copy_(x))
    assert_same_bits(run(inside[:5], grad=inside[5]), run(inputs))


def test_views_of_fused_projections_give_the_same(device):
    B, L, h, K, V = 1, 20, 2, 5, 12
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(B, L, 2 * h * K + h * V, generator=generator).to(device)
    gates = F.logsigmoid(torch.randn(B, L, 2, h, K, generator=generator)).to(device)
    q, k, v = (x.unflatten(-1, (h, -1)) for x in fused.split((h * K, h * K, h * V), dim=-1))
    views = [q, k, v, *gates.unbind(2)]
    assert not any(x.is_contiguous() for x in views)
    before = [x.clone() for x in views]
    assert_same_bits(run(views), run([x.contiguous() for x in views]))
    assert all(torch.equal(x, b) for x, b in zip(views, before))


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_any_strides_give_the_same(device, arrangement):
    views = rearranged(inputs_on(device, 2, 20, 1, 5, 12), arrangement, dim=3)
    assert all(x.stride() != x.contiguous().stride() for x in views)
    assert_same_bits(run(views), run([x.contiguous() for x in views]))


def test_gradient_of_the_output_may_have_any_strides(device):
    inputs = inputs_on(device, 1, 20, 1, 5, 12)
    grad = torch.ones_like(inputs[2])
    leaves = leaves_of(inputs)
    out = bidirectional_gla(*leaves, impl="triton")
    out.sum().backward()  # strides of 0
    assert_same_bits(tuple(x.detach().cpu() for x in (out, *(x.grad for x in leaves))), run(inputs, grad=grad))
    grad = out_gradient(inputs)
    transposed = grad.transpose(1, 3).contiguous().transpose(1, 3)
    assert_same_bits(run(inputs, grad=transposed), run(inputs, grad=grad))


# ---------------------------------------------------------------------------------------------------------------------
# Packed and padded batches


@pytest.mark.parametrize("gates", ["usual", "mixed"])
@pytest.mark.parametrize("impl", IMPLS)
def test_packed_sequences_are_as_if_alone(device, chunk, impl, gates):
    """Borders inside and at the borders of chunks; sequences of one token, across chunks, of just one chunk."""
    lengths = [1, chunk - 1, 3, 1, 2 * chunk - 2, 1, chunk - 3, chunk]
    borders = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    inputs = inputs_on(device, 1, borders[-1], 1, 5, 12, gates)
    actual = run(inputs, impl, cu_seqlens=torch.tensor(borders, device=device))

    doubles, grad = [x.double().cpu() for x in inputs], out_gradient(inputs).double().cpu()
    alone = [
        run([x[:, start:end] for x in doubles], "naive", grad[:, start:end])
        for start, end in itertools.pairwise(borders)
    ]
    assert_all_close(actual, tuple(torch.cat(parts, 1) for parts in zip(*alone)), 1e-5)
    # No gate acts before the first token of its direction.
    starts, ends = torch.tensor(borders[:-1]), torch.tensor(borders[1:]) - 1
    assert not actual[4][:, starts].any()
    assert not actual[5][:, ends].any()
    assert actual[4][:, ends[1]].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_packed_int32_and_empty_sequences(device, impl):
    inputs = inputs_on(device, 1, 20, 1, 5, 12)
    once = run(inputs, impl, cu_seqlens=torch.tensor([0, 7, 20], device=device))
    again = run(inputs, impl, cu_seqlens=torch.tensor([0, 0, 7, 7, 20, 20], dtype=torch.int32, device=device))
    assert_same_bits(again, once)


@pytest.mark.parametrize("gates", ["usual", "mixed"])
@pytest.mark.parametrize("impl", IMPLS)
def test_padded_images_are_as_if_cropped(device, chunk, impl, gates):
    height, width = 3, chunk // 2 + 1
    sizes = [(3, 2), (2, width), (0, 4)]
    inputs = inputs_on(device, len(sizes), height * width, 1, 5, 12, gates)
    actual = run(inputs, impl, valid_sizes=torch.tensor(sizes, device=device), width=width)

    def crop(x: Tensor, image: int) -> Tensor:
        rows, columns = sizes[image]
        return x[image : image + 1].unflatten(1, (height, width))[:, :rows, :columns].flatten(1, 2)

    doubles, grad = [x.double().cpu() for x in inputs], out_gradient(inputs).double().cpu()
    for image in range(2):
        expected = run([crop(x, image) for x in doubles], "naive", crop(grad, image))
        assert_all_close(tuple(crop(x, image) for x in actual), expected, 1e-5)
    for image, (rows, columns) in enumerate(sizes):
        for name, x in zip(OUTPUTS, actual):
            grid = x[image].unflatten(0, (height, width)).clone()
            grid[:rows, :columns] = 0
            assert not grid.any(), f"{name} of image {image} is not 0 in the padding"


@pytest.mark.parametrize("impl", IMPLS)
def test_padding_may_hold_anything(device, impl):
    options = dict(valid_sizes=torch.tensor([[3, 2], [2, 5]], device=device), width=5)
    inputs = inputs_on(device, 2, 20, 1, 5, 12)
    padding = torch.ones(2, 4, 5, dtype=torch.bool, device=device)
    padding[0, :3, :2] = padding[1, :2, :5] = False
    filled = [x.masked_fill(padding.flatten(1)[..., None, None], 1e30) for x in inputs]
    assert_same_bits(run(filled, impl, **options), run(inputs, impl, **options))


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
@pytest.mark.parametrize(
    ("B", "borders", "message"),
    [
        (2, [0, 9], "cu_seqlens packs the sequences into one row: expected B = 1, got 2"),
        (1, [0, 4, 8], r"cu_seqlens must ascend from 0 to L = 9, got \[0, 4, 8\]"),
        (1, [1, 9], "cu_seqlens must ascend from 0 to L = 9"),
        (1, [0, 5, 4, 9], "cu_seqlens must ascend from 0 to L = 9"),
        (1, [0.0, 9.0], r"cu_seqlens must hold the integers \[0, .., L\].*torch.float32"),
        (1, [[0, 9]], r"cu_seqlens must hold the integers .*shape \[1, 2\]"),
        (1, [0], r"cu_seqlens must hold the integers .*shape \[1\]"),
    ],
    ids=str,
)
def test_wrong_cu_seqlens_are_named(B, borders, message, impl):
    with pytest.raises(ValueError, match=message):
        bidirectional_gla(*make_inputs(B, 9, 1, 5, 12), impl=impl, cu_seqlens=torch.tensor(borders))


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
@pytest.mark.parametrize(
    ("sizes", "width", "message"),
    [
        ([[3, 3]], 3, r"valid_sizes must hold .* integers \[2, 2\], got shape \[1, 2\]"),
        ([[3.0, 3.0]] * 2, 3, r"valid_sizes must hold .* integers \[2, 2\], .*torch.float32"),
        ([3, 3], 3, "valid_sizes must hold"),
        ([[3, 3]] * 2, None, "valid_sizes needs the width of the grid, a divisor of L = 9, got width=None"),
        ([[3, 3]] * 2, 2, "a divisor of L = 9, got width=2"),
        ([[3, 3]] * 2, 0, "a divisor of L = 9, got width=0"),
        (None, 3, "width is the width of the grid of valid_sizes: give both or neither"),
    ],
    ids=str,
)
def test_wrong_valid_sizes_are_named(sizes, width, message, impl):
    sizes = None if sizes is None else torch.tensor(sizes)
    with pytest.raises(ValueError, match=message):
        bidirectional_gla(*make_inputs(2, 9, 1, 5, 12), impl=impl, valid_sizes=sizes, width=width)


def test_borders_and_sizes_must_lie_with_the_inputs():
    inputs = make_inputs(1, 9, 1, 5, 12)
    with pytest.raises(ValueError, match="cu_seqlens is on meta, q on cpu"):
        bidirectional_gla(*inputs, cu_seqlens=torch.tensor([0, 9], device="meta"))
    with pytest.raises(ValueError, match="valid_sizes is on meta, q on cpu"):
        bidirectional_gla(*inputs, valid_sizes=torch.tensor([[3, 3]], device="meta"), width=3)


# ---------------------------------------------------------------------------------------------------------------------
# As an operator


def op_arguments(device: str, L: int, restricted: bool = False, **kwargs: Any) -> tuple[Any, ...]:
    """Arguments of torch.ops.vig.bidirectional_gla; restricted: packed and padded."""
    segments = torch.arange(L, dtype=torch.int32, device=device) // 5 if restricted else None
    sizes = torch.tensor([[2, 4]], device=device) if restricted else None
    return *inputs_on(device, 1, L, 1, 4, 6, **kwargs), segments, sizes, 6, 0.5, True


@pytest.mark.parametrize("restricted", [False, True], ids=["plain", "restricted"])
def test_opcheck(device, chunk, restricted):
    *inputs, segments, sizes, width, scale, keep = op_arguments(device, 12 if restricted else chunk + 2, restricted)
    options = segments, sizes, width, scale
    torch.library.opcheck(torch.ops.vig.bidirectional_gla, (*leaves_of(inputs), *options, keep))
    out, states = torch.ops.vig.bidirectional_gla(*inputs, *options, keep)
    torch.library.opcheck(torch.ops.vig.bidirectional_gla_backward, (*inputs, states, torch.ones_like(out), *options))


def test_fake_states_have_the_shape_and_type_of_the_real_ones(device):
    for dtype, keep in ((torch.bfloat16, True), (torch.float16, True), (torch.bfloat16, False)):
        *arguments, _ = op_arguments(device, 12, dtype=dtype)
        torch.library.opcheck(torch.ops.vig.bidirectional_gla, (*arguments, keep), test_utils="test_faketensor")


@pytest.fixture
def compiler(device: str) -> str:
    """Backend for torch.compile."""
    torch._dynamo.reset()
    return "aot_eager" if device == "cpu" else "inductor"


@pytest.mark.parametrize("kind", ["plain", "packed", "padded"])
def test_compiled_gives_the_same(device, chunk, compiler, kind):
    inputs = inputs_on(device, 1, 12, 1, 4, 6)
    options: dict[str, Any] = {}
    if kind == "packed":
        options["cu_seqlens"] = torch.tensor([0, 5, 12], device=device)
    if kind == "padded":
        options.update(valid_sizes=torch.tensor([[2, 4]], device=device), width=6)
    compiled = torch.compile(bidirectional_gla, fullgraph=True, backend=compiler)
    assert_same_bits(run(inputs, call=compiled, **options), run(inputs, **options))


def test_compiled_once_for_all_lengths(device, chunk, compiler):
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(bidirectional_gla, fullgraph=True, dynamic=True, backend=counter)
    for L in (chunk + 2, 2 * chunk):
        inputs = inputs_on(device, 1, L, 1, 4, 6)
        assert_same_bits(run(inputs, call=compiled), run(inputs))
    assert counter.frame_count == 1


class Mixer(nn.Module):
    """A layer of two heads around the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 2 * (4 * 4 + 6))

    def forward(self, x: Tensor) -> Tensor:
        q, k, fwd, bwd, v = self.project(x).unflatten(-1, (2, -1)).split((4, 4, 4, 4, 6), dim=-1)
        return bidirectional_gla(q, k, v, F.logsigmoid(fwd), F.logsigmoid(bwd), impl="triton").flatten(2)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_exported_gives_the_same(device, chunk, dynamic):
    mixer, x = Mixer().to(device), torch.randn(1, chunk + 2 if dynamic else 12, 8, device=device)
    # torch makes a case of its own of sizes of 1, here of one chunk.
    shapes = ({1: torch.export.Dim("L", min=chunk + 1)},) if dynamic else None
    exported = torch.export.export(mixer, (x,), dynamic_shapes=shapes)
    if dynamic:
        x = torch.randn(1, 2 * chunk + 1, 8, device=device)
    assert torch.equal(exported.module()(x), mixer(x))


def test_checkpointing_gives_the_same(device):
    def recompute(*leaves: Tensor, impl: str) -> Tensor:
        return checkpoint(bidirectional_gla, *leaves, impl=impl, use_reentrant=False)

    inputs = inputs_on(device, 1, 20, 1, 5, 12)
    assert_same_bits(run(inputs, call=recompute), run(inputs))


def train_step(rank: int, device: str, rendezvous: str, results: Path) -> None:
    """One of two processes, each with an image of its own."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = DistributedDataParallel(Mixer().to(device))
    images = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(1)).to(device)
    model(images[rank : rank + 1]).square().mean().backward()
    torch.save({name: x.grad.cpu() for name, x in model.module.named_parameters()}, results / f"{rank}.pth")
    dist.destroy_process_group()


def test_distributed_data_parallel_averages_the_gradients(device, tmp_path):
    mp.spawn(train_step, (device, tmp_path / "rendezvous", tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pth") for rank in range(2))
    torch.manual_seed(0)
    model = Mixer().to(device)
    images = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(1)).to(device)
    model(images).square().mean().backward()
    for name, x in model.named_parameters():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], x.grad.cpu())


def test_gradients_only_where_asked_for(device):
    inputs = inputs_on(device, 1, 20, 1, 5, 12)
    expected = run(inputs)
    for i in (0, 4):
        leaves = [x.clone().requires_grad_(j == i) for j, x in enumerate(inputs)]
        bidirectional_gla(*leaves, impl="triton").backward(out_gradient(inputs))
        assert torch.equal(leaves[i].grad.cpu(), expected[1 + i])
        assert all(x.grad is None for j, x in enumerate(leaves) if j != i)
    assert not bidirectional_gla(*inputs, impl="triton").requires_grad


def test_second_derivatives_are_refused_not_wrong(device):
    leaves = leaves_of(inputs_on(device, 1, 9, 1, 5, 12))
    out = bidirectional_gla(*leaves, impl="triton")
    (grad,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


@gpu
def test_cuda_graph_of_forward_and_backward():
    inputs = inputs_on("cuda", 2, 200, 2, 32, 64, dtype=torch.bfloat16)
    leaves, grad = leaves_of(inputs), out_gradient(inputs)

    def step() -> tuple[Tensor, ...]:
        out = bidirectional_gla(*leaves, impl="triton")
        return out, *torch.autograd.grad(out, leaves, grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for seed, gates in ((1, "usual"), (2, "mixed")):
        changed = inputs_on("cuda", 2, 200, 2, 32, 64, gates, torch.bfloat16, seed)
        with torch.no_grad():
            for leaf, x in zip(leaves, changed):
                leaf.copy_(x)
        graph.replay()
        assert_same_bits(tuple(x.detach().cpu() for x in results), run(changed, grad=grad))


@gpu
def test_lengths_share_one_compiled_kernel():
    def compiled() -> int:
        return sum(len(cache[0]) for cache in triton_kernels.outputs.device_caches.values())

    counts = []
    for L in (192, 777, 64, 1):
        run(inputs_on("cuda", 2, L, 2, 32, 64, dtype=torch.bfloat16))
        counts.append(compiled())
    assert counts[0] > 0
    assert counts == counts[:1] * 4


# ---------------------------------------------------------------------------------------------------------------------
# Types and choice of implementation


@pytest.mark.parametrize("backward_inside", [True, False])
def test_autocast_changes_nothing_for_inputs_of_one_type(device, backward_inside):
    inputs = inputs_on(device, 1, 20, 1, 5, 12)
    leaves = leaves_of(inputs)
    with torch.autocast(device, torch.bfloat16):
        out = bidirectional_gla(*leaves, impl="triton")
        if backward_inside:
            out.backward(out_gradient(inputs))
    if not backward_inside:
        out.backward(out_gradient(inputs))
    assert out.dtype == torch.float32
    assert_same_bits(tuple(x.detach().cpu() for x in (out, *(x.grad for x in leaves))), run(inputs))


def test_autocast_brings_mixed_types_to_one(device):
    q, k, v, fwd, bwd = inputs_on(device, 1, 20, 1, 5, 12)
    mixed = leaves_of([q, k.bfloat16(), v.bfloat16(), fwd, bwd])
    with torch.autocast(device, torch.bfloat16):
        out = bidirectional_gla(*mixed, impl="triton")
    assert out.dtype == torch.bfloat16
    out.backward(out_gradient(mixed))
    assert [x.grad.dtype for x in mixed] == [x.dtype for x in mixed]
    expected = run([q.bfloat16(), k.bfloat16(), v.bfloat16(), fwd, bwd])
    for name, a, e in zip(OUTPUTS, (out, *(x.grad for x in mixed)), expected):
        assert torch.equal(a.detach().cpu(), e.to(a.dtype)), name


def test_autocast_stays_on_for_the_operations_after(device):
    inputs = inputs_on(device, 1, 5, 1, 5, 12)
    with torch.autocast(device, torch.bfloat16):
        out = bidirectional_gla(*inputs, impl="triton")
        assert (out @ out.mT).dtype == torch.bfloat16


def test_mixed_types_are_refused_outside_of_autocast(device):
    q, k, v, fwd, bwd = inputs_on(device, 1, 5, 1, 5, 12)
    message = r"q, k and v must have one type, got torch\.float32, torch\.bfloat16 and torch\.float16"
    with pytest.raises(TypeError, match=message):
        bidirectional_gla(q, k.bfloat16(), v.half(), fwd, bwd, impl="triton")


def test_float64_is_refused(device):
    inputs = inputs_on(device, 1, 5, 1, 5, 12, dtype=torch.float64)
    with pytest.raises(TypeError, match="no float64 form: use impl='chunk'"):
        bidirectional_gla(*inputs, impl="triton")


def test_cpu_tensors_are_refused_outside_of_the_interpreter(run_python):
    prepare = "import torch, vig_kernels; x = torch.zeros(1, 5, 1, 2); gla = vig_kernels.bidirectional_gla"
    calls = "gla(x, x, x, x, x); print('auto runs'); gla(x, x, x, x, x, impl='triton')"
    refused = run_python("-c", f"{prepare}; {calls}", check=False, TRITON_INTERPRET="0")
    assert "auto runs" in refused.stdout
    assert refused.returncode
    assert "RuntimeError: impl='triton' needs CUDA tensors, got cpu: use impl='chunk'" in refused.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_auto_is_the_triton_form_where_it_runs(device, dtype):
    inputs = inputs_on(device, 1, 20, 1, 5, 12, dtype=dtype)
    chosen = "triton" if device == "cuda" and dtype != torch.float64 else "chunk"
    assert_same_bits(run(inputs, "auto"), run(inputs, chosen))


@gpu
def test_auto_takes_mixed_types_as_the_chunked_form_does():
    q, k, v, *gates = inputs_on("cuda", 1, 20, 1, 5, 12)
    mixed = [q, k.bfloat16(), v, *gates]
    assert torch.equal(bidirectional_gla(*mixed), bidirectional_gla(*mixed, impl="chunk"))


@gpu
def test_auto_compiles_in_one_graph():
    inputs = inputs_on("cuda", 1, 20, 1, 5, 12)
    compiled = torch.compile(bidirectional_gla, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*inputs), bidirectional_gla(*inputs, impl="triton"))


# ---------------------------------------------------------------------------------------------------------------------
# Cost


def test_flops_are_those_of_the_recurrence(device):
    B, L, h, K, V = 1, 20, 2, 5, 12
    inputs = inputs_on(device, B, L, h, K, V)
    leaves = leaves_of(inputs)
    with FlopCounterMode(display=False) as counter:
        out = bidirectional_gla(*leaves, impl="triton")
        assert counter.get_total_flops() == 8 * B * L * h * K * V
        out.backward(out_gradient(inputs))
    assert counter.get_total_flops() == 3 * 8 * B * L * h * K * V


def test_flops_for_mmengine(device):
    analysis = pytest.importorskip("mmengine.analysis")
    mixer, x = Mixer().to(device).eval(), torch.randn(1, 12, 8, device=device)
    counter = analysis.FlopAnalyzer(mixer, x)
    counter.set_op_handle("vig::bidirectional_gla", triton_op.gla_flop_handle)
    assert counter.by_operator()["bidirectional_gla"] == 4 * 12 * 2 * 4 * 6
    assert not any("vig" in name for name in counter.unsupported_ops())


@pytest.mark.parametrize(
    ("L", "K", "V", "dtype"), [(256, 32, 64, torch.bfloat16), (20, 32, 32, torch.float16)], ids=str
)
def test_backward_keeps_little_more_than_the_inputs(device, monkeypatch, L, K, V, dtype):
    if L == 20:  # many states, in float32: too many to be kept
        monkeypatch.setattr(triton_launches, "CHUNK", 16)
    leaves = leaves_of(inputs_on(device, 1, L, 1, K, V, dtype=dtype))
    leaves[3:] = leaves_of([x.float() for x in leaves[3:]])
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        bidirectional_gla(*leaves, impl="triton")
    size = sum(x.nbytes for x in leaves)
    assert size <= sum(kept.values()) <= 1.5 * size
