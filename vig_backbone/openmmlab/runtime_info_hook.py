"""Losses reach the log without the host waiting for the device after every step."""

from typing import Any

import torch
from mmengine.hooks import LoggerHook, RuntimeInfoHook
from mmengine.runner import Runner
from mmengine.utils import apply_to
from torch import Tensor


class DeferredRuntimeInfoHook(RuntimeInfoHook):
    """mmengine's RuntimeInfoHook, which reads losses when they are logged, all at once.

    The stock hook turns every loss into a number after every step, and so waits until the device has done the step;
    only then does the next one begin to queue. The log is the same: each step's losses enter it, later.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[list[str], Tensor]] = []

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        losses = {name: value for name, value in (outputs or {}).items() if isinstance(value, Tensor)}
        others = {name: value for name, value in (outputs or {}).items() if name not in losses}
        if others:
            super().after_train_iter(runner, batch_idx, data_batch, others)
        if losses:
            self._pending.append((list(losses), torch.stack([_number(*item) for item in losses.items()])))
        if self._is_logged(runner, batch_idx):
            self._flush(runner)

    def _is_logged(self, runner: Runner, batch_idx: int) -> bool:
        intervals = [hook.interval for hook in runner.hooks if isinstance(hook, LoggerHook)]
        is_last = self.end_of_epoch(runner.train_dataloader, batch_idx)
        return is_last or any(self.every_n_inner_iters(batch_idx, interval) for interval in intervals)

    def _flush(self, runner: Runner) -> None:
        """Hand over all losses, in their order; waits for the device."""
        if not self._pending:
            return
        names = [name for names, _ in self._pending for name in names]
        numbers = torch.cat([values for _, values in self._pending]).tolist()
        self._pending.clear()
        for name, number in zip(names, numbers):
            runner.message_hub.update_scalar(f"train/{name}", number)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self._flush(runner)
        log = runner.message_hub.state_dict()  # the checkpoint's was taken before
        checkpoint["message_hub"] = apply_to(log, lambda x: hasattr(x, "cpu"), lambda x: x.cpu())

    def after_train(self, runner: Runner) -> None:
        self._flush(runner)
        super().after_train(runner)


def _number(name: str, value: Tensor) -> Tensor:
    if value.numel() != 1:
        raise ValueError(f"{name} of a training step must be one number, got a tensor of shape {list(value.shape)}")
    return value.detach().float().reshape(())
