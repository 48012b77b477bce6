"""Maps of what each block of ViG or HierViG does with an image, by forward hooks on its mixer."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..base import resolve_indices
from ..mixer import GLAMixer
from ..padding import valid_mask
from .mixing import MixerParts, split_mixer
from .modes import evaluation_mode


@dataclass(frozen=True)
class BlockMaps:
    """What a block does at each token: maps [B, H, W], or [B, h, H, W] per head; NaN in the padding.

    Attributes:
        name: of the block, ``blocks.3`` or ``layers.2.blocks.1``, below the model that was recorded.
        memory_forward, memory_backward: tokens that each scan remembers, at least 1: ``1 / (1 - exp(g))`` with g
            the mean of the log-gate over key channels (and heads). Were all gates as here, the state would be the sum
            of all tokens so far with weights exp(g d) at a distance d, and that is the sum of the weights.
        gate: mean of the gate of the locality injection over the channels: 1 all scan, 0 all local branch.
        scan_share: norm of the scan's part of the mixer's output by the sum of the norms of the scan's and of the
            local branch's. After gates, norms and the output projection.
        forward_share: the same of the forward scan's part against the backward scan's. Both have the token itself.
        norms: norm of each part over the channels of the output: forward, backward, scan (their sum), local, and
            output (the sum of all). Per head: of what this head adds to the output.
    """

    name: str
    memory_forward: Tensor
    memory_backward: Tensor
    gate: Tensor
    scan_share: Tensor
    forward_share: Tensor
    norms: dict[str, Tensor]

    def summary(self) -> dict[str, Any]:
        """Numbers for JSON: medians of the memories and means of the rest over images and tokens; per head, lists."""
        maps = dict(gate=self.gate, scan_share=self.scan_share, forward_share=self.forward_share)
        return dict(
            name=self.name,
            tokens=list(self.gate.shape[-2:]),
            memory_forward=_over_tokens(torch.nanmedian, self.memory_forward),
            memory_backward=_over_tokens(torch.nanmedian, self.memory_backward),
            **{name: _over_tokens(torch.nanmean, values) for name, values in maps.items()},
            norms={name: _over_tokens(torch.nanmean, values) for name, values in self.norms.items()},
        )


def explain_blocks(
    backbone: nn.Module,
    images: Tensor,
    blocks: Sequence[int] | None = None,
    per_head: bool = False,
    valid_sizes: Tensor | None = None,
) -> list[BlockMaps]:
    """Maps of the blocks of a backbone, in evaluation mode, for normalised images [B, 3, H, W].

    Args:
        blocks: indices of blocks in their order, ascending; negative ones count from the end; None is all of them.
        per_head: maps [B, h, H, W] instead of [B, H, W].
        valid_sizes: of images that are padded, as for the backbone.

    Raises:
        ValueError: a model without a :class:`GLAMixer`, or without such blocks.
    """
    sizes = () if valid_sizes is None else (valid_sizes,)
    with torch.no_grad(), evaluation_mode(backbone), record_blocks(backbone, blocks, per_head) as records:
        backbone(images, *sizes)
    return records


@contextmanager
def record_blocks(
    model: nn.Module, blocks: Sequence[int] | None = None, per_head: bool = False
) -> Iterator[list[BlockMaps]]:
    """Within it, each run of `model` appends the maps of its blocks to the list that this gives.

    `model` may be a whole detector or segmenter, or its backbone. Its outputs do not change. What torch.compile has
    compiled runs as it was written, since graphs know no hooks. Arguments and errors as in :func:`explain_blocks`.
    Expects mixed precision to be off: under autocast, maps are those of float32 from a rounded input.
    """
    mixers = [(name, module) for name, module in model.named_modules() if isinstance(module, GLAMixer)]
    if not mixers:
        raise ValueError(
            f"{type(model).__name__} has no gated linear attention: expected ViG, HierViG, or a model of it"
        )
    records: list[BlockMaps] = []
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for index in resolve_indices(blocks, len(mixers), "blocks"):
            name, mixer = mixers[index]
            hook = partial(_record, records, name.rpartition(".")[0], per_head)
            stack.callback(mixer.register_forward_hook(hook, with_kwargs=True).remove)
        yield records


def _record(
    records: list[BlockMaps],
    name: str,
    per_head: bool,
    mixer: GLAMixer,
    arguments: tuple[Any, ...],
    named: dict[str, Any],
    output: Tensor,
) -> None:
    """The hook of a mixer, which is called with its input and valid sizes."""
    x, *rest = arguments
    sizes = rest[0] if rest else named.get("sizes")
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        x = x.to(mixer.o_proj.weight.dtype)
        records.append(_block_maps(name, mixer, split_mixer(mixer, x, sizes), x.shape[1:3], sizes, per_head))


def _block_maps(
    name: str, mixer: GLAMixer, parts: MixerParts, grid: torch.Size, sizes: Tensor | None, per_head: bool
) -> BlockMaps:
    def as_map(values: Tensor) -> Tensor:
        """[B, L, h] or [B, L] -> [B, h, H, W] or [B, H, W]."""
        values = values.movedim(1, -1).unflatten(-1, grid)
        if sizes is None:
            return values
        mask = valid_mask(sizes, *grid)
        return values.masked_fill(~(mask[:, None] if per_head else mask), torch.nan)

    scan = parts.forward + parts.backward
    sums = dict(forward=parts.forward, backward=parts.backward, scan=scan, local=parts.local, output=scan + parts.local)
    norms = {part: as_map(_projected_norm(mixer, value, per_head)) for part, value in sums.items()}
    over = (3,) if per_head else (2, 3)
    return BlockMaps(
        name=name,
        memory_forward=as_map(_memory(parts.log_gate_forward.mean(over))),
        memory_backward=as_map(_memory(parts.log_gate_backward.mean(over))),
        gate=as_map(parts.gate.mean(over)),
        scan_share=_share(norms["scan"], norms["local"]),
        forward_share=_share(norms["forward"], norms["backward"]),
        norms=norms,
    )


def _projected_norm(mixer: GLAMixer, part: Tensor, per_head: bool) -> Tensor:
    """Norm of what [B, L, h, V] adds to the output of the mixer: [B, L], or of each head alone, [B, L, h]."""
    if not per_head:
        return mixer.o_proj(part.flatten(-2)).norm(dim=-1)
    heads = torch.eye(mixer.num_heads, dtype=part.dtype, device=part.device)[..., None]  # [h, h, 1]
    return torch.stack([mixer.o_proj((part * head).flatten(-2)).norm(dim=-1) for head in heads], dim=-1)


def _memory(log_gate: Tensor) -> Tensor:
    return -1 / torch.expm1(log_gate)


def _share(one: Tensor, other: Tensor) -> Tensor:
    return one / (one + other).clamp_min(torch.finfo(one.dtype).tiny)


def _over_tokens(function: Any, values: Tensor) -> float | list[float]:
    """A statistic of maps [B, H, W], or a list with that of each head of [B, h, H, W]."""
    if values.dim() == 3:
        return function(values).item()
    return [function(head).item() for head in values.unbind(1)]
