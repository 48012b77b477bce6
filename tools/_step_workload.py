"""A detector or segmenter with random weights, its optimizer, its batches, and the step that mmengine's loops run."""

import copy
import random
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from _models import INFERENCE, LATENCY, TRAINING, Size
from _step_configs import Variant, drop_pretrained, set_image_size, set_precision
from _step_data import Batch, Feed, real_feed, synthetic_feed
from _step_parts import DATA, LOG, Part, parts_of, replaced
from mmengine.config import Config
from mmengine.hooks import LoggerHook, RuntimeInfoHook
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import HOOKS, MODELS, init_default_scope
from torch import Tensor, nn

MODES = (TRAINING, INFERENCE, LATENCY)
SIZES = {"mmseg": (512, 512), "mmdet": (800, 1344)}
PASSING_SCORES = 100  # class scores of an image above the threshold


@dataclass(frozen=True)
class Setup:
    device: torch.device
    dtype: torch.dtype
    size: Size | None  # the scope's own without one
    batch: int | None  # the config's own without one
    real_data: bool
    smaller: float = 0.0  # see `synthetic_feed`

    def image_size(self, scope: str) -> Size | None:
        """Of all images; None for real ones."""
        return None if self.real_data else self.size or SIZES[scope]


@dataclass
class Workload:
    """Built when first used."""

    variant: Variant
    cfg: Config
    mode: str
    setup: Setup
    steps: int = 0

    def __post_init__(self) -> None:
        self.cfg = copy.deepcopy(self.cfg)
        drop_pretrained(self.cfg.model)
        if self.setup.batch:
            self.cfg.train_dataloader.batch_size = self.setup.batch
        if self.size:
            set_image_size(self.cfg, self.size)

    @property
    def training(self) -> bool:
        return self.mode == TRAINING

    @property
    def size(self) -> Size | None:
        return self.setup.image_size(self.cfg.default_scope)

    @property
    def batch(self) -> int:
        return 1 if self.mode == LATENCY else self.cfg.train_dataloader.batch_size

    @cached_property
    def model(self) -> nn.Module:
        enter_scope(self.cfg.default_scope)
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(0)
        torch.backends.cudnn.benchmark = bool(self.cfg.get("env_cfg", {}).get("cudnn_benchmark"))
        with redirect_stdout(StringIO()):  # some stock classes announce that they load no weights
            model = MODELS.build(self.cfg.model)
            model.init_weights()
        return revert_sync_batchnorm(model.to(self.setup.device)).train(self.training)

    @cached_property
    def optim_wrapper(self) -> OptimWrapper:
        """At a learning rate of 0: every step does the same work, and no model diverges."""
        set_precision(self.cfg, self.setup.dtype, self.setup.device)
        optim_wrapper = build_optim_wrapper(self.model, self.cfg.optim_wrapper)
        for group in optim_wrapper.param_groups:
            group["lr"] = 0.0
        return optim_wrapper

    @cached_property
    def feed(self) -> Feed:
        enter_scope(self.cfg.default_scope)
        if self.setup.real_data:
            return real_feed(self.cfg)
        num_classes = self.num_classes if self.training else None
        return synthetic_feed(
            self.cfg, self.size, self.batch, num_classes, self.setup.device, smaller=self.setup.smaller
        )

    @property
    def num_classes(self) -> int:
        """The RPN has one; all other heads have the same number."""
        heads = [module for name, module in self.model.named_modules() if not name.startswith("backbone")]
        return max(getattr(head, "num_classes", 1) for head in heads)

    # ---- the step

    def prepare(self) -> None:
        if self.training:
            _ = self.optim_wrapper  # built now
        else:
            set_score_threshold(self.model, self.feed.next(), self.autocast)

    def step(self) -> tuple[Tensor, ...]:
        return self.train() if self.training else self.infer()

    def train(self) -> tuple[Tensor, ...]:
        self.log(self.model.train_step(self.feed.next(), self.optim_wrapper))
        return ()

    def infer(self) -> tuple[Tensor, ...]:
        with torch.no_grad(), self.autocast():
            self.model.test_step(self.feed.next())
        return ()

    def log(self, losses: dict[str, Tensor]) -> None:
        """What the config's RuntimeInfoHook does after each step: mmengine's reads every loss and waits for that."""
        self.info_hook.after_train_iter(self.runner, self.steps, None, losses)
        self.steps += 1

    @cached_property
    def info_hook(self) -> RuntimeInfoHook:
        return HOOKS.build(self.cfg.default_hooks.get("runtime_info", dict(type="RuntimeInfoHook")))

    @cached_property
    def runner(self) -> SimpleNamespace:
        """What that hook looks at: an epoch without end."""
        interval = self.cfg.default_hooks.get("logger", {}).get("interval", 10)
        hub = MessageHub.get_instance("benchmark_step")
        return SimpleNamespace(message_hub=hub, hooks=[LoggerHook(interval)], train_dataloader=range(sys.maxsize))

    def without_update(self) -> AbstractContextManager:
        """Steps that leave out what the optimizer itself does."""
        return replaced(self.optim_wrapper.optimizer, "step", lambda: None) if self.training else nullcontext()

    def autocast(self) -> AbstractContextManager:
        full = self.setup.dtype == torch.float32
        return nullcontext() if full else torch.autocast(self.setup.device.type, self.setup.dtype)

    def parts(self) -> list[Part]:
        parts = parts_of(self.model, self.optim_wrapper if self.training else None)
        if self.training:
            parts.append(Part(LOG, self, "log"))
        return [*parts, Part(DATA, self.feed, "next")] if self.setup.real_data else parts


def enter_scope(scope: str) -> None:
    """Names in a config are from now on those of mmdet or mmseg."""
    init_default_scope(scope)
    if scope == "mmseg":
        import mmseg.datasets
        import mmseg.models  # noqa: F401
    else:
        import mmdet.datasets
        import mmdet.models  # noqa: F401


def set_score_threshold(model: nn.Module, batch: Batch, autocast: Callable[[], AbstractContextManager]) -> None:
    """Give an untrained box head, which is sure of nothing, a threshold that some scores pass, as a trained one's do.

    Otherwise nothing would be detected, and no mask predicted. Models without such a head stay as they are.
    """
    head = getattr(getattr(model, "roi_head", None), "bbox_head", None)
    if not hasattr(head, "predict_by_feat") or getattr(head, "custom_cls_channels", True):
        return
    predict, found = head.predict_by_feat, []

    def predict_by_feat(rois: Any, cls_scores: tuple[Tensor, ...], *args: Any, **kwargs: Any) -> list:
        found.extend(cls_scores)
        return predict(rois, cls_scores, *args, **kwargs)

    with torch.no_grad(), autocast(), replaced(head, "predict_by_feat", predict_by_feat):
        model.test_step(batch)
    if not found:
        return
    scores = torch.cat(found).float().softmax(-1)[:, :-1].flatten()
    model.roi_head.test_cfg.score_thr = scores.topk(min(PASSING_SCORES * len(found), len(scores)))[0][-1].item()
