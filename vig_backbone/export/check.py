"""Whether an exported model computes what the model computes, and how long each takes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from .formats import ImageSize, Run

LIMIT = 1e-4  # relative, of the difference of float32 outputs


@dataclass(frozen=True)
class Difference:
    """Of the outputs for a random image of one size."""

    height: int
    width: int
    largest: float  # absolute; of labels 1 if any differs
    relative: float  # norm of the difference over norm of the output, the worst of all outputs; of labels: share

    @property
    def is_small(self) -> bool:
        return self.relative <= LIMIT


def sizes_to_check(size: ImageSize) -> list[tuple[int, int]]:
    """Its own, and if it is dynamic smaller and odd ones, and one of other proportions."""
    own = (size.height, size.width)
    if not size.dynamic:
        return [own]
    smallest = size.smallest
    return [own, (smallest, smallest), (smallest + 1, 2 * smallest + 7), (size.width + 32, size.height // 2 + 33)]


def compare_outputs(model: nn.Module, run: Run, size: ImageSize) -> list[Difference]:
    """The differences between a model, itself not prepared, and its exported form, for each size to check."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    differences = []
    for height, width in sizes_to_check(size):
        images = torch.randn(1, 3, height, width, generator=generator).to(device)
        pairs = list(zip(_outputs(model, images), run(images), strict=True))
        differences.append(
            Difference(height, width, max(_largest(a, b) for a, b in pairs), max(_relative(a, b) for a, b in pairs))
        )
    return differences


def _outputs(model: nn.Module, images: Tensor) -> Sequence[Tensor]:
    with torch.no_grad():
        return model(images)


def _largest(a: Tensor, b: Tensor) -> float:
    return (a.cpu().double() - b.cpu().double()).abs().max().item()


def _relative(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    a, b = a.cpu(), b.cpu()
    if not a.is_floating_point():
        return (a != b).double().mean().item()
    a, b = a.double(), b.double()
    return ((a - b).norm() / a.norm().clamp(min=1e-30)).item()


def measure_latency(run: Run, images: Tensor, seconds: float = 3.0) -> float:
    """Median milliseconds of a call: as many as fit into `seconds` (three at least), after two that do not count."""
    for _ in range(2):
        run(images)
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        _synchronize(images)
        start = time.perf_counter()
        run(images)
        _synchronize(images)
        times.append(time.perf_counter() - start)
    return 1e3 * median(times)


def _synchronize(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize()
