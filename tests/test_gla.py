"""Bidirectional gated linear attention: the chunked form against its definition, and what every form must satisfy."""

from functools import cache
from importlib.metadata import PackageNotFoundError

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vig_kernels import arguments, bidirectional_gla
from vig_kernels.gla import IMPLEMENTATIONS

NAMES = ("q", "k", "v", "log_gate_fwd", "log_gate_bwd")
# B, L, h, K, V: one token, around a chunk of 64 tokens, several chunks, a rest; K != V, not powers of two.
SHAPES = [
    (2, 1, 2, 5, 12),
    (2, 2, 2, 8, 16),
    (1, 63, 2, 5, 12),
    (1, 64, 2, 12, 5),
    (2, 65, 1, 16, 32),
    (1, 100, 3, 16, 32),
    (1, 196, 2, 5, 12),
    (1, 300, 1, 32, 64),
    (1, 1000, 1, 4, 6),
]
# Log-gates from random numbers of the same shape.
GATES = {
    "zero": lambda r: torch.zeros_like(r),
    "negative_zero": lambda r: torch.full_like(r, -0.0),
    "weak": lambda r: torch.full_like(r, -1e-3),
    "usual": lambda r: F.logsigmoid(r) / 16,
    "strong": lambda r: torch.full_like(r, -20.0),
    "extreme": lambda r: torch.full_like(r, -1e4),
    "mixed": lambda r: r.new_tensor([0.0, -0.0, -1e-3, -0.04, -1.0, -20.0, -1e4])[(r.abs() * 1000).long() % 7],
}
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12}


def make_inputs(
    B: int, L: int, h: int, K: int, V: int, gates: str = "usual", dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    """q, k, v, log_gate_fwd, log_gate_bwd; the same numbers in every type, as far as it can hold them."""
    generator = torch.Generator().manual_seed(seed + 31 * L + K)
    q, k, v, fwd, bwd = (torch.randn(B, L, h, D, generator=generator) for D in (K, K, V, K, K))
    return [x.to(dtype) for x in (q, k, v, GATES[gates](fwd), GATES[gates](bwd))]


def run(inputs: list[Tensor], impl: str, scale: float | None = None) -> tuple[Tensor, ...]:
    """The output and the gradients of all five inputs, for a fixed random gradient of the output."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = bidirectional_gla(*leaves, scale=scale, impl=impl)
    generator = torch.Generator().manual_seed(99)
    out.backward(torch.randn(out.shape, generator=generator).to(out.dtype))
    return (out.detach(), *(x.grad for x in leaves))


@cache
def reference(shape: tuple[int, ...], gates: str) -> tuple[Tensor, ...]:
    return run([x.double() for x in make_inputs(*shape, gates)], "naive")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Ratio of norms; where the expected value is zero everywhere (underflow, one token), the norm itself."""
    norm = expected.double().norm().item()
    return (actual.double() - expected.double()).norm().item() / (norm or 1.0)


def assert_all_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    for name, a, e in zip(("out", *NAMES), actual, expected, strict=True):
        assert a.shape == e.shape
        assert torch.isfinite(a).all(), f"{name} is not finite"
        assert relative_error(a, e) < tolerance, name


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"L{shape[1]}")
def test_chunk_agrees_with_the_definition(shape, gates, dtype):
    actual = run(make_inputs(*shape, gates, dtype), "chunk")
    assert actual[0].dtype == dtype
    assert_all_close(actual, reference(shape, gates), TOLERANCES[dtype])


@pytest.mark.parametrize("L", [*range(3, 20), 31, 33, 72, 127, 129, 160])
def test_chunk_agrees_with_the_definition_at_every_chunk_size(L):
    shape = (1, L, 1, 3, 2)
    actual = run(make_inputs(*shape, "mixed", torch.float64), "chunk")
    assert_all_close(actual, reference(shape, "mixed"), 1e-12)


def test_strong_gates_keep_their_tiny_gradients():
    """Gradients of gates around exp(-20) = 2e-9 have full relative precision, not just absolute."""
    expected = reference((1, 100, 3, 16, 32), "strong")
    assert 0 < expected[4].norm() < 1e-6 * expected[1].norm()
    actual = run(make_inputs(1, 100, 3, 16, 32, "strong"), "chunk")
    assert relative_error(actual[4], expected[4]) < 1e-5
    assert relative_error(actual[5], expected[5]) < 1e-5


def test_the_most_negative_gates_give_each_token_its_own_value():
    q, k, v, _, _ = make_inputs(1, 100, 2, 5, 12)
    closed = torch.full_like(q, torch.finfo(q.dtype).min)
    out, *grads = run([q, k, v, closed, closed], "chunk")
    own = (q * k).sum(-1, keepdim=True) * v * 5**-0.5
    assert relative_error(out, own) < 1e-6
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert not grads[3].any()
    assert not grads[4].any()


def test_open_gates_give_plain_linear_attention():
    q, k, v, gate, _ = make_inputs(2, 70, 2, 5, 12, "zero", torch.float64)
    # Every token sees every other one once in one of the two directions, and itself in both.
    everything = torch.einsum("blhk,bmhk,bmhv->blhv", q, k, v)
    own = (q * k).sum(-1, keepdim=True) * v
    expected = (everything + own) / 2 * 5**-0.5
    assert relative_error(bidirectional_gla(q, k, v, gate, gate, impl="chunk"), expected) < 1e-12


@pytest.mark.parametrize("impl", ["naive", "chunk"])
def test_scale_is_a_factor_and_defaults_to_the_root_of_the_key_size(impl):
    inputs = make_inputs(1, 20, 2, 5, 12, dtype=torch.float64)
    default, scaled = run(inputs, impl), run(inputs, impl, scale=2 * 5**-0.5)
    assert_all_close(scaled, tuple(2 * x for x in default), 1e-14)


@pytest.mark.parametrize("gate_dtype", ["same", torch.float32], ids=["gates_alike", "gates_float32"])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-10)], ids=str)
@pytest.mark.parametrize("gates", ["usual", "strong", "mixed"])
def test_low_precision_costs_no_more_than_rounding_the_result(dtype, rounding, gates, gate_dtype):
    inputs = make_inputs(1, 100, 2, 16, 32, gates, dtype)
    if gate_dtype != "same":
        inputs[3:] = [gate.to(gate_dtype) for gate in inputs[3:]]
    actual = run(inputs, "chunk")
    assert [x.dtype for x in actual] == [dtype, *(x.dtype for x in inputs)]
    # The gradient of the output is rounded as well: the reference gets the rounded one.
    leaves = [x.double().requires_grad_() for x in inputs]
    out = bidirectional_gla(*leaves, impl="naive")
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(99)).to(dtype).double())
    # float16 cannot hold the gradients of strong gates; subnormal ones carry an absolute error.
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for name, a, e in zip(("out", *NAMES), actual, (out, *(x.grad for x in leaves))):
        assert torch.isfinite(a).all(), name
        error = (a.double() - e).norm()
        assert error < rounding * e.norm() + smallest * e.numel() ** 0.5, name


@pytest.mark.parametrize("backward_inside", [True, False])
def test_autocast_changes_nothing_for_float32_inputs(backward_inside):
    inputs = make_inputs(1, 200, 2, 16, 32)
    expected = run(inputs, "chunk")
    leaves = [x.clone().requires_grad_() for x in inputs]
    grad = torch.randn(expected[0].shape, generator=torch.Generator().manual_seed(99))
    with torch.autocast("cpu", torch.bfloat16):
        out = bidirectional_gla(*leaves, impl="chunk")
        if backward_inside:
            out.backward(grad)
    if not backward_inside:
        out.backward(grad)
    assert out.dtype == torch.float32
    for name, a, e in zip(("out", *NAMES), (out, *(x.grad for x in leaves)), expected):
        assert torch.equal(a, e), name


def test_views_of_fused_projections_give_the_same():
    B, L, h, K, V = 2, 100, 3, 5, 12
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(B, L, h * (2 * K + V), generator=generator).requires_grad_()
    logits = torch.randn(B, L, 2 * h * K, generator=generator).requires_grad_()

    def split() -> list[Tensor]:
        q, k, v = fused.split((h * K, h * K, h * V), dim=-1)
        gates = F.logsigmoid(logits).unflatten(-1, (2, h, K)).unbind(2)
        return [q.unflatten(-1, (h, K)), k.unflatten(-1, (h, K)), v.unflatten(-1, (h, V)), *gates]

    assert not any(x.is_contiguous() for x in split())
    results = []
    for arrange in (lambda x: x, lambda x: x.contiguous()):
        fused.grad = logits.grad = None
        out = bidirectional_gla(*(arrange(x) for x in split()), impl="chunk")
        out.square().sum().backward()
        results.append((out.detach(), fused.grad, logits.grad))
    for view, contiguous in zip(*results):
        assert torch.equal(view, contiguous)


ARRANGEMENTS = ("expanded", "transposed", "strided")


def rearranged(inputs: list[Tensor], arrangement: str, dim: int = 2) -> list[Tensor]:
    """Views of the same shapes with other strides; transposed, dimension 1 has changed places with `dim` in memory."""
    if arrangement == "expanded":
        return [x[:1].expand(2, -1, -1, -1) for x in inputs]
    if arrangement == "transposed":
        return [x.transpose(1, dim).contiguous().transpose(1, dim) for x in inputs]
    return [torch.stack((x, x + 1), -1)[..., 0] for x in inputs]


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_any_strides_give_the_same_and_inputs_stay_as_they_are(arrangement):
    views = rearranged(make_inputs(2, 70, 3, 5, 12), arrangement)
    before = [x.clone() for x in views]
    out = bidirectional_gla(*views, impl="chunk")
    assert torch.equal(out, bidirectional_gla(*(x.contiguous() for x in views), impl="chunk"))
    assert all(torch.equal(x, b) for x, b in zip(views, before))


def test_same_bits_twice():
    first, second = (run(make_inputs(2, 300, 2, 16, 32), "chunk") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("L", [1, 5, 17])
@pytest.mark.parametrize("gates", ["zero", "usual", "random"])
def test_gradcheck(L, gates):
    if gates == "random":
        inputs = make_inputs(1, L, 1, 2, 3, dtype=torch.float64)
        inputs[3:] = [-gate.abs() * 16 for gate in inputs[3:]]
    else:
        inputs = make_inputs(1, L, 1, 2, 3, gates, torch.float64)
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: bidirectional_gla(*x, impl="chunk"), leaves)


def test_gradients_only_where_asked_for():
    inputs = make_inputs(1, 70, 2, 5, 12)
    expected = run(inputs, "chunk")
    generator = torch.Generator().manual_seed(99)
    for i in range(5):
        leaves = [x.clone().requires_grad_(j == i) for j, x in enumerate(inputs)]
        out = bidirectional_gla(*leaves, impl="chunk")
        out.backward(torch.randn(out.shape, generator=generator.manual_seed(99)))
        assert torch.equal(leaves[i].grad, expected[1 + i])
        assert all(x.grad is None for j, x in enumerate(leaves) if j != i)


def test_second_derivatives_are_refused_not_wrong():
    leaves = [x.requires_grad_() for x in make_inputs(1, 9, 1, 2, 3)]
    out = bidirectional_gla(*leaves, impl="chunk")
    (grad,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("impl", ["naive", "chunk"])
@pytest.mark.parametrize("L", [2, 64, 100])
def test_directions_are_mirror_images(L, impl):
    q, k, v, fwd, bwd = make_inputs(2, L, 2, 5, 12, dtype=torch.float64)
    out = bidirectional_gla(q, k, v, fwd, bwd, impl=impl)
    mirrored = bidirectional_gla(*(x.flip(1) for x in (q, k, v, bwd, fwd)), impl=impl)
    assert relative_error(mirrored.flip(1), out) < 1e-12
    # The two directions differ, or the test would say nothing.
    assert relative_error(bidirectional_gla(q, k, v, bwd, fwd, impl=impl), out) > 1e-3


@pytest.mark.parametrize("impl", ["naive", "chunk"])
@pytest.mark.parametrize("t", [0, 50, 63, 64, 99])
def test_a_token_reaches_all_others_through_open_gates(t, impl):
    q, k, v, fwd, bwd = make_inputs(1, 100, 2, 5, 12, "zero")
    changed = v.clone()
    changed[:, t] += 1
    difference = bidirectional_gla(q, k, v, fwd, bwd, impl=impl) - bidirectional_gla(q, k, changed, fwd, bwd, impl=impl)
    assert (difference.abs().amax((0, 2, 3)) > 1e-4).all()


@pytest.mark.parametrize("impl", ["naive", "chunk"])
@pytest.mark.parametrize("t", [0, 50, 63, 64, 99])
def test_a_token_reaches_no_other_through_closed_gates(t, impl):
    """Gates closed just after token t (forward) and just before it (backward): its value stays with it, exactly."""
    q, k, v, fwd, bwd = make_inputs(1, 100, 2, 5, 12, "zero")
    fwd[:, t + 1 :] = -1e4
    bwd[:, :t] = -1e4
    changed = v.clone()
    changed[:, t] += 1
    before, after = (bidirectional_gla(q, k, x, fwd, bwd, impl=impl) for x in (v, changed))
    touched = (before != after).any(-1).any(-1)[0]
    assert touched.nonzero().flatten().tolist() == [t]


@pytest.mark.parametrize("closed", ["fwd", "bwd"])
def test_one_closed_gate_stops_its_own_direction_only(closed):
    q, k, v, fwd, bwd = make_inputs(1, 100, 1, 5, 12, "zero")
    (fwd if closed == "fwd" else bwd)[:, 70] = -1e4
    changed = v.clone()
    changed[:, 50 if closed == "fwd" else 90] += 1
    before, after = (bidirectional_gla(q, k, x, fwd, bwd, impl="chunk") for x in (v, changed))
    touched = (before - after).abs().amax((0, 2, 3)) > 1e-4
    stopped = torch.arange(100) >= 70 if closed == "fwd" else torch.arange(100) <= 70
    assert torch.equal(touched, ~stopped)


@pytest.mark.parametrize("impl", ["naive", "chunk"])
@pytest.mark.parametrize("L", [1, 50, 64, 100])
@pytest.mark.parametrize("padding", [1, 70])
def test_padding_by_empty_keys_changes_nothing(L, padding, impl):
    inputs = make_inputs(1, L, 2, 5, 12, dtype=torch.float64)
    padded = [F.pad(x, (0, 0, 0, 0, 0, padding)) for x in inputs]
    padded[0][:, L:] = 3.0  # what the padding asks for is its own affair
    expected = bidirectional_gla(*inputs, impl=impl)
    assert relative_error(bidirectional_gla(*padded, impl=impl)[:, :L], expected) < 1e-13


def test_samples_and_heads_are_independent():
    inputs = make_inputs(3, 100, 4, 5, 12, dtype=torch.float64)
    whole = bidirectional_gla(*inputs, impl="chunk")
    part = bidirectional_gla(*(x[1:2, :, 2:3] for x in inputs), impl="chunk")
    assert relative_error(whole[1:2, :, 2:3], part) < 1e-14


@pytest.mark.parametrize("L", [64, 300])
def test_autograd_keeps_the_inputs_and_nothing_else(L):
    leaves = [x.requires_grad_() for x in make_inputs(2, L, 3, 16, 32)]
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        bidirectional_gla(*leaves, impl="chunk")
    assert sorted(x.data_ptr() for x in kept) == sorted(x.data_ptr() for x in leaves)
    assert sum(x.nbytes for x in kept) == sum(x.nbytes for x in leaves)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("q", (2, 9, 15), r"q must have shape \[B, L, h, K\], got \[2, 9, 15\]"),
        ("k", (2, 8, 3, 5), r"k must have the shape of q, \[2, 9, 3, 5\], got \[2, 8, 3, 5\]"),
        ("k", (2, 9, 3, 1), "k must have the shape of q"),
        ("v", (2, 9, 2, 12), r"v must have shape \[B, L, h, V\] with \[2, 9, 3\] in front, got \[2, 9, 2, 12\]"),
        ("v", (2, 9, 36), "v must have shape"),
        ("log_gate_fwd", (2, 9, 3, 1), "log_gate_fwd must have the shape of q"),
        ("log_gate_bwd", (1, 9, 3, 5), "log_gate_bwd must have the shape of q"),
        ("v", (2, 9, 3, 0), r"empty input: .*v \[2, 9, 3, 0\]"),
    ],
)
def test_wrong_shapes_are_named(name, shape, message):
    tensors = dict(zip(NAMES, make_inputs(2, 9, 3, 5, 12)))
    tensors[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        bidirectional_gla(**tensors)


@pytest.mark.parametrize("shape", [(0, 9, 3, 5), (2, 0, 3, 5), (2, 9, 0, 5), (2, 9, 3, 0)], ids=["B", "L", "h", "K"])
def test_empty_tensors_are_refused(shape):
    q, v = torch.zeros(shape), torch.zeros(*shape[:3], 12)
    with pytest.raises(ValueError, match="empty input"):
        bidirectional_gla(q, q, v, q, q)


@pytest.mark.parametrize("name", NAMES)
def test_integers_are_refused(name):
    tensors = dict(zip(NAMES, make_inputs(2, 9, 3, 5, 12)))
    tensors[name] = tensors[name].long()
    with pytest.raises(TypeError, match=rf"{name} must be a floating point tensor, got torch\.int64"):
        bidirectional_gla(**tensors)


def test_devices_must_agree():
    q, k, v, fwd, bwd = make_inputs(2, 9, 3, 5, 12)
    with pytest.raises(ValueError, match="v is on meta, q on cpu"):
        bidirectional_gla(q, k, v.to("meta"), fwd, bwd)


@pytest.mark.parametrize("impl", ["no_such_kernel", "triton", "Chunk", ""])
def test_unregistered_implementation_lists_those_that_exist(monkeypatch, impl):
    monkeypatch.delitem(IMPLEMENTATIONS, impl, raising=False)
    with pytest.raises(ValueError, match="is not available") as error:
        bidirectional_gla(*make_inputs(1, 4, 1, 2, 3), impl=impl)
    assert repr(impl) in str(error.value)
    assert all(name in str(error.value) for name in ("auto", *IMPLEMENTATIONS))


@pytest.mark.parametrize(
    ("installed", "enough"), [("3.4.0", False), ("3.5.1", True), ("4.0.0+git1", True), (None, True)]
)
def test_triton_that_does_not_compile_the_kernels_counts_as_none(monkeypatch, installed, enough):
    def version(name: str) -> str:
        if installed is None:
            raise PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(arguments, "find_spec", lambda name: "found")
    monkeypatch.setattr(arguments, "version", version)
    assert arguments.has_triton() == enough


def test_no_triton_at_all(monkeypatch):
    monkeypatch.setattr(arguments, "find_spec", lambda name: None)
    assert not arguments.has_triton()


def test_auto_is_the_default_and_needs_no_triton(monkeypatch):
    monkeypatch.delitem(IMPLEMENTATIONS, "triton", raising=False)
    inputs = make_inputs(1, 70, 2, 5, 12)
    chunk = bidirectional_gla(*inputs, impl="chunk")
    assert torch.equal(bidirectional_gla(*inputs), chunk)
    assert torch.equal(bidirectional_gla(*inputs, impl="auto"), chunk)
