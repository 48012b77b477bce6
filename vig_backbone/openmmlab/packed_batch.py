"""A batch as one block of memory: one message from the worker, one pinned copy, one transfer to the device.

PyTorch's loader sends each tensor of a batch through a file descriptor of its own, pickles NumPy arrays through a pipe,
and pins only tensors that it finds in lists and dicts, which mmengine's data samples are not. In a config:

    train_dataloader = dict(collate_fn=dict(type="packed_collate"), pin_memory=True)

with a data preprocessor that unpacks on the device (`FastDetPreprocessor`, `FastSegPreprocessor`). Others see a dict.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from mmengine.dataset import pseudo_collate
from torch import Tensor
from torch.utils.data import get_worker_info

ALIGNMENT = 64  # bytes


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the block, in bytes."""

    start: int
    length: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def view(self, block: Tensor) -> Tensor:
        part = block[self.start : self.start + self.length].view(self.dtype)
        return part.as_strided(self.shape, self.strides)


class _Pickler(pickle.Pickler):
    """Leaves tensors out: their numbers stand for them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        if type(value) is not Tensor or value.layout is not torch.strided:
            return None
        self.tensors.append(value.detach())
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, skeleton: bytes, tensors: list[Tensor]) -> None:
        super().__init__(io.BytesIO(skeleton))
        self.tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self.tensors[number]


class OnDevice(dict):
    """A batch that need not be moved any more."""


@dataclass(frozen=True, eq=False)
class PackedBatch(Mapping):
    """What `pseudo_collate` gives, its tensors in one block.

    skeleton: the batch, pickled, without its tensors.
    places: those of the tensors in the block.
    block: [bytes] uint8.

    As a mapping it is the batch itself, unpacked where the block lies; the tensors share its memory.
    """

    skeleton: bytes
    places: tuple[Place, ...]
    block: Tensor

    @classmethod
    def pack(cls, batch: Mapping, shared: bool = False) -> PackedBatch:
        """`shared`: in memory that other processes can use."""
        pickler = _Pickler(file := io.BytesIO())
        pickler.dump(batch)
        places, end = [], 0
        for tensor in pickler.tensors:
            length = tensor.numel() * tensor.element_size()
            places.append(Place(end, length, tensor.dtype, tuple(tensor.shape), dense_strides(tensor)))
            end += -(-length // ALIGNMENT) * ALIGNMENT
        block = shared_bytes(end) if shared else torch.empty(end, dtype=torch.uint8)
        for tensor, place in zip(pickler.tensors, places):
            place.view(block).copy_(tensor)
        return cls(file.getvalue(), tuple(places), block)

    @cached_property
    def batch(self) -> dict:
        return self._unpacked(self.block)

    def unpacked_on(self, device: torch.device) -> OnDevice:
        """A new batch on the device; on the host its tensors share this one's memory."""
        return OnDevice(self._unpacked(self.block.to(device, non_blocking=True)))

    def _unpacked(self, block: Tensor) -> dict:
        return _Unpickler(self.skeleton, [place.view(block) for place in self.places]).load()

    def pin_memory(self) -> PackedBatch:
        """Called by PyTorch's loader where `pin_memory=True`."""
        return replace(self, block=self.block.pin_memory())

    def __getitem__(self, key: str) -> Any:
        return self.batch[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.batch)

    def __len__(self) -> int:
        return len(self.batch)


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Those of a tensor without gaps, dimensions in the order that they have in memory."""
    strides, step = [0] * tensor.dim(), 1
    for i in sorted(range(tensor.dim()), key=tensor.stride):
        strides[i], step = step, step * max(tensor.shape[i], 1)
    return tuple(strides)


def shared_bytes(count: int) -> Tensor:
    """Made in shared memory, as PyTorch's own collate function does: Tensor.share_memory_ copies."""
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(count), 0, (count,), (1,))


def packed_collate(samples: Sequence[Mapping]) -> PackedBatch:
    """mmengine's pseudo_collate, packed; in shared memory where a worker process calls it."""
    return PackedBatch.pack(pseudo_collate(samples), shared=get_worker_info() is not None)
