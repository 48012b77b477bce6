"""mmdet's RandomSampler and PseudoSampler for all images at once, in tensors of fixed size."""

from typing import NamedTuple

import torch
from mmdet.models.task_modules.samplers import BaseSampler, PseudoSampler, RandomSampler
from torch import Tensor

from ..errors import ConfigError


class Samples(NamedTuple):
    """K places per image; the valid ones are the sample."""

    index: Tensor  # [B, K], which candidate; any one where not valid
    valid: Tensor  # [B, K]
    positive: Tensor  # [B, K], valid and assigned to an object
    heads: int  # positives are found in the first so many places only
    avg_factor: Tensor  # [], what mmdet divides the losses of dense heads by


class BatchedSampler:
    """Draws as a RandomSampler does, or takes everything as a PseudoSampler does.

    The same distribution as mmdet's: uniform without replacement, at most `num * pos_fraction` positives, the rest
    negatives. But other draws from the same seed: random keys from the device's generator, where mmdet permutes on
    the host, and positives before negatives in no order, where mmdet sorts each by place.

    Args:
        sampler: the sampler that mmdet built.
        stock: the class to name where the sampler is one that this one cannot replace.

    Raises:
        ConfigError: the sampler is of another class.
    """

    def __init__(self, sampler: BaseSampler, stock: str) -> None:
        if type(sampler) not in (RandomSampler, PseudoSampler):
            name = type(sampler).__name__
            raise ConfigError(f"train_cfg.sampler must be a RandomSampler or PseudoSampler, not {name}; use {stock}")
        self.takes_all = type(sampler) is PseudoSampler
        self.adds_objects = not self.takes_all and sampler.add_gt_as_proposals
        self.rule = sampler

    @torch.no_grad()
    def __call__(self, assigned: Tensor) -> Samples:
        """`assigned` [B, N]: an object's number from 1, 0 for background, -1 for not to be taken."""
        return _everything(assigned) if self.takes_all else self._draw(assigned)

    def _draw(self, assigned: Tensor) -> Samples:
        num, candidates = self.rule.num, assigned.size(1)
        heads = min(int(num * self.rule.pos_fraction), candidates)
        keys = torch.rand(assigned.shape, device=assigned.device)
        key, first = torch.where(assigned > 0, keys, -1.0).topk(heads)
        positives = (key >= 0).sum(1, keepdim=True)  # [B, 1]
        key, second = torch.where(assigned == 0, keys, -1.0).topk(min(num, candidates))
        negatives = torch.minimum((key >= 0).sum(1, keepdim=True), num - positives)
        if self.rule.neg_pos_ub >= 0:
            # In float64, as Python computes it.
            bound = (positives.clamp(min=1).double() * self.rule.neg_pos_ub).long()
            negatives = torch.minimum(negatives, bound)
        place = torch.arange(num, device=assigned.device).expand(len(assigned), -1)
        positive = place < positives
        drawn = torch.cat((first, second), 1)
        column = torch.where(positive, place, heads + place - positives).clamp(max=drawn.size(1) - 1)
        avg_factor = (positives.clamp(min=1) + negatives.clamp(min=1)).sum()
        return Samples(drawn.gather(1, column), place < positives + negatives, positive, heads, avg_factor)


def _everything(assigned: Tensor) -> Samples:
    index = torch.arange(assigned.size(1), device=assigned.device).expand_as(assigned)
    positive = assigned > 0
    return Samples(index, assigned >= 0, positive, assigned.size(1), positive.sum(1).clamp(min=1).sum())
