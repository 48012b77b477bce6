"""Linear maps along one axis of an image, in which every output is a weighted sum of a few inputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

# Numbers of full resolution that the chunked forms of operators hold at a time: 16 MB of float32, 256 on a GPU.
BLOCK_NUMBERS = {"cpu": 1 << 22, "cuda": 1 << 26}


def block_numbers(x: Tensor) -> int:
    return BLOCK_NUMBERS.get(x.device.type, BLOCK_NUMBERS["cpu"])


@dataclass(frozen=True)
class Resampling:
    """``output[n] = sum over t of weight[n, t] * input[index[n, t]]``.

    Interpolation, crops, mirroring and averages over overlapping windows are such maps, and so is one after another: a
    kernel that knows this form computes a chain of them at once. Held on the CPU, in float64.

    size: number of inputs; index: ``[N, T]``, int64, below `size`; weight: ``[N, T]``, 0 for entries that fill up.
    """

    size: int
    index: Tensor
    weight: Tensor

    def __len__(self) -> int:
        """Number of outputs."""
        return len(self.index)

    @staticmethod
    @lru_cache(maxsize=256)
    def bilinear(size: int, target: int, align_corners: bool = False) -> "Resampling":
        """One axis of `torch.nn.functional.interpolate(mode='bilinear')`, without antialiasing, from and to a size."""
        position = torch.arange(target, dtype=torch.float64)
        if align_corners:
            source = position * ((size - 1) / (target - 1) if target > 1 else 0)
        else:
            source = ((position + 0.5) * (size / target) - 0.5).clamp(min=0)
        first = source.floor().long().clamp(max=size - 1)
        second = (first + 1).clamp(max=size - 1)
        share = torch.where(first < size - 1, source - first, 0)
        return Resampling(size, torch.stack((first, second), 1), torch.stack((1 - share, share), 1))._merged()

    def crop(self, first: int, last: int) -> "Resampling":
        """Outputs from `first` to `last`, which is not one of them."""
        return Resampling(self.size, self.index[first:last], self.weight[first:last])

    def flip(self) -> "Resampling":
        """Outputs in reverse order."""
        return Resampling(self.size, self.index.flip(0), self.weight.flip(0))

    def then(self, following: "Resampling") -> "Resampling":
        """This one, then another one of its outputs.

        Raises:
            ValueError: if that takes another number of inputs.
        """
        if following.size != len(self):
            raise ValueError(f"{len(self)} outputs cannot be the inputs of a map of {following.size}")
        index = self.index[following.index].flatten(1)
        weight = (self.weight[following.index] * following.weight[..., None]).flatten(1)
        return Resampling(self.size, index, weight)._merged()

    @staticmethod
    def average(
        windows: Sequence["Resampling"],
        starts: Sequence[int],
        target: int,
        shares: Sequence[Tensor] | None = None,
    ) -> "Resampling":
        """Windows' outputs, laid over an axis of `target` outputs, averaged where they overlap.

        Args:
            windows: their inputs follow each other in the input of the average.
            starts: of the windows' outputs on the axis.
            shares: how much each output of each window counts, above 0; all the same without.

        Raises:
            ValueError: if the windows leave a gap.
        """
        taps = sum(window.index.shape[1] for window in windows)
        index, weight = torch.zeros(target, taps, dtype=torch.int64), torch.zeros(target, taps, dtype=torch.float64)
        covers = torch.zeros(target, 1, dtype=torch.float64)
        size = tap = 0
        for i, (window, start) in enumerate(zip(windows, starts)):
            stop, next_tap = start + len(window), tap + window.index.shape[1]
            share = 1.0 if shares is None else shares[i].double()[:, None]
            index[start:stop, tap:next_tap] = window.index + size
            weight[start:stop, tap:next_tap] = window.weight * share
            covers[start:stop] += share
            size, tap = size + window.size, next_tap
        if not covers.all():
            raise ValueError(f"no window covers output {int((covers == 0).nonzero()[0, 0])} of {target}")
        return Resampling(size, index, weight / covers)._merged()

    def matrix(self) -> Tensor:
        """``[N, size]``, float64."""
        matrix = torch.zeros(len(self), self.size, dtype=torch.float64)
        return matrix.scatter_add_(1, self.index, self.weight)

    def _merged(self) -> "Resampling":
        """The same map, each input once an output, with the fewest entries."""
        # Entries of weight 0 go last, behind all inputs.
        index, order = self.index.masked_fill(self.weight == 0, self.size).sort(1)
        weight = self.weight.gather(1, order)
        starts = torch.ones_like(index, dtype=torch.bool)
        starts[:, 1:] = index[:, 1:] != index[:, :-1]
        place = starts.cumsum(1) - 1
        merged = torch.full_like(index, self.size).scatter_(1, place, index)
        weight = torch.zeros_like(weight).scatter_add_(1, place, weight)
        taps = max(1, int((merged < self.size).sum(1).max()))
        return Resampling(self.size, merged[:, :taps] % self.size, weight[:, :taps])
