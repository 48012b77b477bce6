"""Instance masks kept as run lengths through the data pipeline, and made into bitmaps where they are needed.

mmdet rasterises every polygon in the worker, resizes and mirrors the bitmaps, and sends a megabyte a mask. Here a mask
stays the few hundred places where its run lengths end. Resizing with the nearest pixel, mirroring and cropping only say
which row and column of the annotated image a row and column of the result comes from: two lists of integers. The
bitmaps are made from them in one pass on the device, equal to mmdet's to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import mmcv
import numpy as np
import torch
from torch import Tensor

from .tensor_masks import Index, TensorMasks


def run_ends(counts: str | bytes | Sequence[int]) -> np.ndarray:
    """Where each run of a mask ends, [R] int64: run lengths added up.

    counts: of COCO's RLE, compressed (five bits a character, from the fourth run on the difference to the run before
    the last one) or not.
    """
    if not isinstance(counts, str | bytes):
        return np.cumsum(np.asarray(counts, dtype=np.int64))
    if not counts:
        return np.zeros(0, dtype=np.int64)
    codes = np.frombuffer(counts.encode() if isinstance(counts, str) else counts, dtype=np.uint8).astype(np.int64) - 48
    last = np.flatnonzero((codes & 32) == 0)  # the last character of each number
    first = np.concatenate([[0], last[:-1] + 1])
    place = np.arange(len(codes)) - np.repeat(first, last - first + 1)
    runs = np.add.reduceat((codes & 31) << (5 * place), first)
    negative = (codes[last] & 16) != 0
    runs[negative] -= 1 << (5 * (place[last] + 1)[negative])
    for start in (1, 2):
        runs[start::2] = np.cumsum(runs[start::2])
    return np.cumsum(runs)


def nearest_pixels(old: int, new: int) -> Tensor:
    """The pixel that each of `new` pixels is taken from when mmcv resizes `old` ones to the nearest, [new]."""
    if max(old, new) > 2**15 - 1:
        raise ValueError(f"masks of {old} pixels a side resized to {new}: OpenCV resizes sides below 32,768 pixels")
    pixels = np.arange(old, dtype=np.int16)[None]
    return torch.from_numpy(mmcv.imresize(pixels, (new, 1), interpolation="nearest", backend="cv2")[0]).long()


class RunMasks(TensorMasks):
    """TensorMasks whose `data` is made when it is first asked for, on the device that they are on.

    edges: [T] int64, where the value changes in the N masks, columns one after the other, masks one after the other.
    lengths: how many of them belong to each mask.
    shape: height and width of the annotated image.
    rows: [H], columns: [W]: those of the annotated image that the masks show; by default all of them.
    """

    def __init__(
        self,
        edges: Tensor,
        lengths: Sequence[int],
        shape: tuple[int, int],
        rows: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> None:
        self.edges = edges
        self.lengths = tuple(lengths)
        self.shape = shape
        self.rows = torch.arange(shape[0]) if rows is None else rows
        self.columns = torch.arange(shape[1]) if columns is None else columns

    @classmethod
    def from_counts(cls, counts: Sequence[str | bytes | Sequence[int]], shape: tuple[int, int]) -> RunMasks:
        """COCO's run lengths of masks of one height and width."""
        pixels = shape[0] * shape[1]
        ends = [run_ends(each) for each in counts]
        for each in ends:
            if len(each) and each[-1] != pixels:
                raise ValueError(f"run lengths add up to {each[-1]} pixels in an image of {shape[0]} x {shape[1]}")
        # A mask that ends on a 1 has its last edge where the next mask begins: the sum of edges is even for each mask.
        edges = [each if len(each) % 2 == 0 else each[:-1] for each in ends]
        flat = [each + i * pixels for i, each in enumerate(edges)]
        lengths = [len(each) for each in edges]
        return cls(torch.from_numpy(np.concatenate(flat)) if flat else torch.zeros(0).long(), lengths, shape)

    @cached_property
    def data(self) -> Tensor:
        """The bitmaps, [N, H, W] uint8 0 or 1."""
        N, (h, w) = len(self), self.shape
        if not N:
            return torch.zeros((0, self.height, self.width), dtype=torch.uint8, device=self.device)
        flips = torch.zeros(N * h * w + 1, dtype=torch.uint8, device=self.device)
        flips.index_add_(0, self.edges, torch.ones_like(self.edges, dtype=torch.uint8))
        inside = flips.cumsum(0, dtype=torch.uint8).bitwise_and_(1)  # wraps around, which leaves the last bit right
        shown = inside[:-1].view(N, w, h).index_select(1, self.columns)  # [N, W, h]
        return shown.transpose(1, 2).contiguous().index_select(1, self.rows)  # whole rows: a CPU is quicker so

    @property
    def height(self) -> int:
        return len(self.rows)

    @property
    def width(self) -> int:
        return len(self.columns)

    @property
    def device(self) -> torch.device:
        return self.edges.device

    def __len__(self) -> int:
        return len(self.lengths)

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "data"}

    def __getitem__(self, index: Index) -> RunMasks:
        kept = np.arange(len(self))[index.cpu().numpy() if isinstance(index, Tensor) else index].reshape(-1).tolist()
        if kept == list(range(len(self))):
            return self
        pixels, parts = self.shape[0] * self.shape[1], self.edges.split(self.lengths)
        edges = [parts[old] + (new - old) * pixels for new, old in enumerate(kept)]
        flat = torch.cat(edges) if edges else self.edges[:0]
        return RunMasks(flat, [self.lengths[i] for i in kept], self.shape, self.rows, self.columns)

    def __repr__(self) -> str:
        return super().__repr__().replace("TensorMasks", "RunMasks")

    def _moved(self, move: Callable[[Tensor], Tensor]) -> RunMasks:
        return RunMasks(move(self.edges), self.lengths, self.shape, move(self.rows), move(self.columns))

    def _showing(self, rows: Tensor, columns: Tensor) -> RunMasks:
        return RunMasks(self.edges, self.lengths, self.shape, rows, columns)

    def to(self, *args, **kwargs) -> RunMasks:
        """As Tensor.to for a device; integers stay integers."""
        device, _, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        return self._moved(lambda x: x.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> RunMasks:
        return self._moved(Tensor.pin_memory)

    def rescale(self, scale: tuple[int, int], interpolation: str = "nearest") -> TensorMasks:
        """As large as fits into `scale`, whatever the order of its sides."""
        width, height = mmcv.rescale_size((self.width, self.height), scale)
        return self.resize((height, width), interpolation)

    def resize(self, out_shape: tuple[int, int], interpolation: str = "nearest") -> TensorMasks:
        if interpolation != "nearest":
            return super().resize(out_shape, interpolation)
        height, width = out_shape
        return self._showing(
            self.rows[nearest_pixels(self.height, height)], self.columns[nearest_pixels(self.width, width)]
        )

    def flip(self, flip_direction: str = "horizontal") -> RunMasks:
        if flip_direction not in ("horizontal", "vertical", "diagonal"):
            raise ValueError(f"flip_direction={flip_direction!r}, expected horizontal, vertical or diagonal")
        rows = self.rows if flip_direction == "horizontal" else self.rows.flip(0)
        columns = self.columns if flip_direction == "vertical" else self.columns.flip(0)
        return self._showing(rows, columns)

    def crop(self, bbox: np.ndarray) -> RunMasks:
        """bbox: integers x1, y1, x2, y2; clipped to the masks, and at least one pixel a side."""
        x1, x2 = np.clip(bbox[0::2], 0, self.width).tolist()
        y1, y2 = np.clip(bbox[1::2], 0, self.height).tolist()
        return self._showing(self.rows[y1 : max(y2, y1 + 1)], self.columns[x1 : max(x2, x1 + 1)])
