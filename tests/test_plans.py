"""Plans: what an operator allocates and launches, recorded once for all tensors that look alike."""

import inspect
from collections.abc import Callable
from typing import Any

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


class Kernel:
    """Stands for a kernel of Triton's on a GPU: the first launch gives the compiled one, which takes all arguments."""

    def __init__(self, name: str, launches: list[tuple]) -> None:
        self.name, self.launches = name, launches
        self.signature = inspect.signature(lambda x, y, out, n, factor, BLOCK, WIDE: None)

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., "Kernel"]:
        def launch(*args: Any, **constants: Any) -> "Kernel":
            self.launches.append((self.name, grid, args, constants))
            return Kernel("compiled", self.launches)

        return launch

    def warmup(self, *args: Any, **constants: Any) -> None:
        self.launches.append(("warmup", constants.pop("grid"), args, constants))


def test_compiled_kernels_get_their_arguments_in_order(monkeypatch):
    launches: list[tuple] = []
    kernel = Kernel("new", launches)

    def record_two(plan: plans.Plan, x: Tensor, y: None) -> tuple[Tensor]:
        outs = plan.empty(3, dtype=x.dtype), plan.empty(3, dtype=x.dtype)
        plan.launch(kernel, (2,), x, y, outs[0], 3, 0.5, WIDE=True, BLOCK=16, num_warps=4)
        plan.launch(kernel, (2,), x, outs[0], outs[1], 3, 0.5, WIDE=True, BLOCK=16, num_warps=4)
        return (outs[1],)

    monkeypatch.setattr(plans, "INTERPRETED", False)
    monkeypatch.setattr(plans, "_compiled", set())
    for _ in range(2):
        x = torch.zeros(3)
        (out,) = plans.call(record_two, (x, None))
    constants = dict(WIDE=True, BLOCK=16, num_warps=4)
    names = [name for name, *_ in launches]
    assert names == ["warmup", "warmup", "new", "new", "compiled", "compiled"]
    assert all(grid == (2, 1, 1) for _, grid, _, _ in launches)
    assert all(given == constants for _, _, _, given in launches[:4])
    _, _, args, given = launches[-1]
    assert args[0] is x
    assert args[1] is launches[-2][2][2]  # what the launch before writes
    assert args[2] is out
    assert args[3:] == (3, 0.5, 16, True)
    assert not given
    assert launches[-2][2][1] is None


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
