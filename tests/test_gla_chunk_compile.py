"""The chunked form in one graph: torch.compile(fullgraph=True), any length, autocast, torch.export."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from vig_kernels import bidirectional_gla
from vig_kernels.gla import chunk


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_inputs(L: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(L)
    q, k, v, fwd, bwd = (torch.randn(2, L, 2, D, generator=generator, dtype=dtype) for D in (4, 4, 6, 4, 4))
    return [x.requires_grad_() for x in (q, k, v, F.logsigmoid(fwd) / 16, -10 * bwd.abs())]


def gla(*inputs: Tensor) -> Tensor:
    return bidirectional_gla(*inputs, impl="chunk")


def run(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """The output and the gradients of all five inputs."""
    out = function(*inputs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(99)).to(out.dtype)
    return (out, *torch.autograd.grad(out, inputs, grad))


def assert_like_eager(function: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    for compiled, eager in zip(run(function, inputs), run(gla, inputs), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("L", [1, 63, 200, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_one_graph_with_the_gradients_of_eager(L, dtype):
    assert_like_eager(torch.compile(gla, fullgraph=True, backend="aot_eager"), make_inputs(L, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_graph_inside_autocast(dtype):
    compiled = torch.compile(gla, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert_like_eager(compiled, make_inputs(200, dtype))


@pytest.mark.parametrize("dynamic", ["everything", "length"])
def test_one_graph_serves_every_length(dynamic):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gla, fullgraph=True, backend=counter, dynamic=dynamic == "everything" or None)
    for L in (63, 64, 200, 700, 1500):
        inputs = make_inputs(L)
        for x in inputs:
            if dynamic == "length":
                torch._dynamo.mark_dynamic(x, 1)
        assert_like_eager(compiled, inputs)
    assert counter.frame_count == 1


@pytest.mark.parametrize("L", [64, 100])
def test_operators_do_what_they_tell_the_compiler(L):
    inputs = [x.detach() for x in make_inputs(L)]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.vig.chunk_bidirectional_gla, (*inputs, 0.5), test_utils=checks)
    backward = torch.ops.vig.chunk_bidirectional_gla_backward
    strided = torch.ones(2, 2, 6).expand(L, -1, -1, -1).transpose(0, 1)
    torch.library.opcheck(backward, (strided, *inputs, 0.5), test_utils=checks)


class Projected(nn.Module):
    """The operator behind one fused projection."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(8, 5 * 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, fwd, bwd = self.projection(x).unflatten(-1, (5, 2, 4)).unbind(2)
        return gla(q, k, v, F.logsigmoid(fwd), F.logsigmoid(bwd))


def test_export_serves_a_range_of_lengths_and_needs_no_operator_of_ours(monkeypatch):
    monkeypatch.setattr(chunk, "MAX_CHUNK", 8)  # fewer halvings, a smaller graph
    module, x = Projected(), torch.randn(2, 83, 8)
    exported = torch.export.export(module, (x,), dynamic_shapes=({1: torch.export.Dim.AUTO},), strict=False)
    for L in (83, 86, 94):  # 11 and 12 chunks
        x = torch.randn(2, L, 8)
        torch.testing.assert_close(exported.module()(x), module(x))
    assert not any("vig" in str(node.target) for m in exported.graph_module.modules() for node in m.graph.nodes)


def test_export_of_one_length():
    module, x = Projected(), torch.randn(2, 200, 8)
    exported = torch.export.export(module, (x,), strict=False)
    torch.testing.assert_close(exported.module()(x), module(x))


def test_traced_graph_grows_with_the_logarithm_of_the_length(monkeypatch):
    monkeypatch.setattr(chunk, "MAX_CHUNK", 8)

    def num_nodes(num_chunks: int) -> int:
        inputs = [x.detach() for x in make_inputs(8 * num_chunks)]
        return len(make_fx(gla, tracing_mode="fake")(*inputs).graph.nodes)

    few, many, most = (num_nodes(N) for N in (16, 128, 1024))
    assert most - many <= many - few < 200
