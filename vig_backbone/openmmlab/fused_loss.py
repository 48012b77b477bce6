"""The loss of mmseg's decode heads without logits of the labels' resolution."""

import torch
from mmengine.model import BaseModule
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.losses import CrossEntropyLoss
from mmseg.structures import OHEMPixelSampler, SegDataSample
from torch import Tensor, nn
from vig_kernels import resized_cross_entropy

EPS = torch.finfo(torch.float32).eps  # what mmseg adds to numbers that it divides by


def reason_against(head: BaseModule) -> str | None:
    """Why a head must compute its loss by itself, or None if :func:`fused_loss` gives the same."""
    losses = _losses(head) if isinstance(head, BaseDecodeHead) else []
    for method in ("loss", "loss_by_feat"):
        if getattr(type(head), method, None) is not getattr(BaseDecodeHead, method):
            return f"it has a {method} of its own"
    if any(type(loss) is not CrossEntropyLoss or loss.use_sigmoid or loss.use_mask for loss in losses):
        return "loss_decode is not CrossEntropyLoss over softmax alone"
    if head.out_channels == 1:
        return "out_channels is 1"
    if head.ignore_index is None:
        return "ignore_index is None"
    if head.sampler is not None and type(head.sampler) is not OHEMPixelSampler:
        return f"its sampler is {type(head.sampler).__name__}"
    return None


def fused_loss(
    head: BaseDecodeHead, features: tuple[Tensor, ...], data_samples: list[SegDataSample]
) -> dict[str, Tensor]:
    """What ``head.loss(features, data_samples, train_cfg)`` returns, for heads that nothing speaks against.

    Equal to mmseg 1.2's up to rounding, except where that one fails: with class weights, pixels of the ignored label
    weigh nothing in the mean.
    """
    logits = head(features)
    labels = head._stack_batch_gt(data_samples).squeeze(1)
    entropy, hits = resized_cross_entropy(logits, labels, head.ignore_index, head.align_corners)
    counts = labels != head.ignore_index
    losses = _losses(head)
    class_weights = [_class_weights(loss, labels, counts) for loss in losses]
    weight = None if head.sampler is None else _hard_pixels(head, entropy.detach(), class_weights, counts)
    result: dict[str, Tensor] = {}
    for loss, of_classes in zip(losses, class_weights):
        value = _reduced(loss, entropy, of_classes, weight, counts)
        name = loss.loss_name
        result[name] = result[name] + value if name in result else value
    result["acc_seg"] = ((hits.sum() + EPS) * 100 / (counts.sum() + EPS))[None]
    return result


def _losses(head: BaseDecodeHead) -> list[nn.Module]:
    return list(head.loss_decode) if isinstance(head.loss_decode, nn.ModuleList) else [head.loss_decode]


def _class_weights(loss: CrossEntropyLoss, labels: Tensor, counts: Tensor) -> Tensor | None:
    """Of every pixel, 0 where it is ignored; None if all classes weigh the same."""
    if loss.class_weight is None:
        return None
    weights = torch.as_tensor(loss.class_weight, dtype=torch.float32, device=labels.device)
    return weights[labels.masked_fill(~counts, 0).long()] * counts


def _times(values: Tensor, weights: Tensor | None) -> Tensor:
    return values if weights is None else values * weights


def _reduced(
    loss: CrossEntropyLoss, entropy: Tensor, of_classes: Tensor | None, weight: Tensor | None, counts: Tensor
) -> Tensor:
    """As mmseg's ``cross_entropy`` and ``weight_reduce_loss`` do, without waiting for a number of the device."""
    values = _times(_times(entropy, of_classes), weight)
    if loss.reduction == "sum":
        values = values.sum()
    elif loss.reduction == "mean":
        if of_classes is not None:
            divisor = of_classes.sum()
        else:
            divisor = counts.sum() if loss.avg_non_ignore else counts.numel()
        values = values.sum() / (divisor + EPS)
    return loss.loss_weight * values


def _hard_pixels(head: BaseDecodeHead, entropy: Tensor, class_weights: list[Tensor | None], counts: Tensor) -> Tensor:
    """1 for the pixels that online hard example mining keeps, else 0; as OHEMPixelSampler chooses them.

    It looks for pixels whose label has a low probability, or, without a threshold, a high loss.
    """
    sampler, kept = head.sampler, head.sampler.min_kept * len(counts)
    if sampler.thresh is not None:
        probability = torch.exp(-entropy)
        sorted_ones = probability[counts].sort().values
        limit = probability.new_tensor(sampler.thresh)
        if len(sorted_ones):
            limit = limit.maximum(sorted_ones[min(kept, len(sorted_ones) - 1)])
        return ((probability < limit) & counts).to(entropy)
    pairs = zip(_losses(head), class_weights)
    losses = sum(loss.loss_weight * _times(entropy, weights) for loss, weights in pairs)
    candidates = losses[counts]
    chosen = torch.zeros_like(candidates)
    chosen[candidates.argsort(descending=True)[:kept]] = 1
    return torch.zeros_like(losses).masked_scatter(counts, chosen)
