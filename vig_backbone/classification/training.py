"""What mmengine's runner trains and measures: a classifier with its loss, accuracy, and learning rates by layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import METRICS, MODELS
from torch import Tensor

from ..classifier import Classifier, build_classifier, load_classifier
from .evaluation import TOP, hits


@MODELS.register_module()
class ImageClassifier(BaseModel):
    """A classifier under the name `backbone`, as in checkpoints of detectors, and cross-entropy.

    Args:
        name: as for :func:`build_classifier`.
        num_classes: at least 2.
        checkpoint: path or URL that training starts from.
        new_head: the last layer is not taken from there.
        label_smoothing: share of the target that is spread over all classes.
        drop_path_rate, with_cp, gla_impl, compile: see :class:`ViG`.

    Raises:
        ValueError: for an unknown name, or fewer than two classes.
        CheckpointError: from `init_weights`, if the checkpoint cannot be read or does not fit.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        checkpoint: str | None = None,
        new_head: bool = True,
        label_smoothing: float = 0.1,
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
        gla_impl: str = "auto",
        compile: bool | dict = False,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes}: expected at least 2 folders of images")
        self.checkpoint, self.new_head, self.label_smoothing = checkpoint, new_head, label_smoothing
        options = dict(drop_path_rate=drop_path_rate, with_cp=with_cp, gla_impl=gla_impl, compile=compile)
        self.backbone: Classifier = build_classifier(name, num_classes=num_classes, **options)

    def init_weights(self) -> None:
        """Called by the runner before training: the weights of the checkpoint, if there is one."""
        if self.checkpoint is not None:
            load_classifier(self.backbone, self.checkpoint, self.new_head)

    def forward(self, inputs: Tensor, labels: Tensor | None = None, mode: str = "tensor") -> Tensor | dict[str, Tensor]:
        """Images [B, 3, H, W] -> logits [B, num_classes]; the loss with `labels` [B] where `mode` is 'loss'."""
        logits = self.backbone(inputs)
        if mode != "loss":
            return logits
        return dict(loss=F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing))


@METRICS.register_module()
class TopAccuracy(BaseMetric):
    """Percent of the images whose class is the first, ``accuracy/top1``, and with more than five, among five."""

    default_prefix = "accuracy"

    def process(self, data_batch: Mapping[str, Any], data_samples: Sequence[Tensor]) -> None:
        """Take in the logits of a batch, a row an image."""
        logits = torch.stack(list(data_samples)).cpu()
        counted = [i for i, k in enumerate(TOP) if k == 1 or k < logits.shape[1]]
        self.results += hits(logits, data_batch["labels"])[:, counted].tolist()

    def compute_metrics(self, results: list[list[bool]]) -> dict[str, float]:
        return {f"top{k}": 100 * sum(column) / len(results) for k, column in zip(TOP, zip(*results))}
