"""Plans: what an operator allocates and launches, recorded once for all tensors that look alike."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", minversion="3.5")
import triton
import triton.language as tl
from vig_kernels import plans
from vig_kernels.launch import ceil_div


@triton.jit
def _weighted_sum(x, y, out, n, factor, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    tl.store(out + at, tl.load(x + at, mask=mask) + factor * tl.load(y + at, mask=mask), mask=mask)


recordings: list[tuple[int, ...]] = []


def record(plan: plans.Plan, x: Tensor, y: Tensor, z: Tensor | None, factor: float) -> tuple[Tensor]:
    """x + factor (x + factor y); with any z one step more."""
    recordings.append(tuple(x.shape))
    n, total = len(x), y
    for _ in range(2 if z is None else 3):
        buffer = plan.empty(n, dtype=x.dtype)
        plan.launch(_weighted_sum, (ceil_div(n, 16),), x, total, buffer, n, factor, BLOCK=16)
        total = buffer
    return (total,)


@pytest.fixture(autouse=True)
def _no_recordings() -> None:
    recordings.clear()


def numbers(device: str, n: int = 40) -> Tensor:
    return torch.randn(n, device=device)


def test_recorded_once_for_tensors_that_look_alike(device):
    for _ in range(3):
        x, y = numbers(device), numbers(device)
        (out,) = plans.call(record, (x, y, None), 0.5)
        torch.testing.assert_close(out, x + 0.5 * (x + 0.5 * y))
    assert len(recordings) == 1


def test_one_tensor_twice_and_then_two(device):
    x, y = numbers(device), numbers(device)
    torch.testing.assert_close(plans.call(record, (x, x, None), 2.0)[0], 7 * x)
    torch.testing.assert_close(plans.call(record, (x, y, None), 2.0)[0], 3 * x + 4 * y)
    assert len(recordings) == 1


def test_recorded_anew_for_other_sizes_types_strides_alignments_and_numbers(device):
    x, z = numbers(device, 80), numbers(device)
    for inputs, factor in (
        ((x[:40], x[40:], None), 0.5),
        ((x[:39], x[40:79], None), 0.5),
        ((x[:40].double(), x[40:].double(), None), 0.5),
        ((x[1:41], x[40:], None), 0.5),
        ((x[:40], x[40:], None), 0.25),
        ((x[:40], x[40:], z), 0.5),
    ):
        plans.call(record, inputs, factor)
    assert len(recordings) == 6


def test_no_more_plans_than_allowed(device, monkeypatch):
    monkeypatch.setattr(plans, "MAX_PLANS", 2)
    x = numbers(device)
    for n in (40, 30, 20, 30, 40):
        torch.testing.assert_close(plans.call(record, (x[:n], x[:n], None), 2.0)[0], 7 * x[:n])
    assert [n for (n,) in recordings] == [40, 30, 20, 40]


@pytest.mark.gpu
def test_buffers_live_until_their_last_use():
    x = torch.randn(2**20, device="cuda")
    plans.call(record, (x, x, x), 2.0)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = plans.call(record, (x, x, x), 2.0)
    assert torch.cuda.max_memory_allocated() - before == 2 * x.nbytes  # of three
    assert torch.cuda.memory_allocated() - before == x.nbytes
    del out


@pytest.mark.gpu
def test_on_the_stream_of_the_call():
    x, stream = torch.randn(2**20, device="cuda"), torch.cuda.Stream()
    plans.call(record, (x, x, None), 2.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        (out,) = plans.call(record, (x, x, None), 2.0)
    graph.replay()
    torch.testing.assert_close(out, 7 * x)
