"""Updates whose gradients are not finite are skipped on the device, reported, and end the run when they go on."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.logging import MessageHub, print_log
from mmengine.optim import OptimWrapper
from torch import Tensor, nn

from .checkpoint_hook import latest_whole_checkpoint

MAX_UNREAD = 100  # updates; for runs without FiniteStepsHook, or with a log that is rarer
COUNTER = "train/skipped_steps"


class NonFiniteError(RuntimeError):
    """Training cannot go on: too many skipped updates in a row, or a model that is no longer finite."""


@dataclass
class _Update:
    """What is known on the device about one update; `norms` are those of the gradients of `params`."""

    iteration: int
    params: list[nn.Parameter]
    norms: Tensor  # [len(params)]
    is_skipped: Tensor  # []
    grad_norm: Tensor | None


class FiniteOptimWrapper(OptimWrapper):
    """mmengine's OptimWrapper, which skips an update if a gradient's norm is not finite.

    A skipped update leaves parameters, optimizer state and the running statistics of batch norms as they were, bit for
    bit. The device decides; the host is told rarely (:meth:`read`, which :class:`FiniteStepsHook` calls when losses are
    logged), and so never waits for a step. Only optimizers without a fused form (`fused=True`), and each
    optimizer's first update, are decided by the host. The log counts `skipped_steps`; a warning names the iteration,
    the losses and the gradients. Data-parallel processes decide alike: they hold the same gradients.

    Args:
        optimizer, accumulative_counts, clip_grad: as for `OptimWrapper`; `grad_norm` is logged when it is read.
        max_in_a_row: so many skipped updates in a row end the run.

    Raises:
        NonFiniteError: after `max_in_a_row` skipped updates; from :meth:`read`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        accumulative_counts: int = 1,
        clip_grad: dict | None = None,
        max_in_a_row: int = 20,
    ) -> None:
        super().__init__(optimizer, accumulative_counts, clip_grad)
        if max_in_a_row < 1:
            raise ValueError(f"{type(self).__name__}: max_in_a_row={max_in_a_row}, expected at least 1")
        self.max_in_a_row = max_in_a_row
        self.skipped = 0
        self._in_a_row: list[int] = []  # iterations
        self._unread: list[_Update] = []
        self._losses: dict[int, dict[str, Tensor]] = {}
        self._model: nn.Module | None = None
        self._normalizers: list[nn.Module] = []
        self._statistics: Tensor | None = None

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """As in mmengine; the running statistics as they are before the first forward pass of an update are kept."""
        if model is not self._model:
            self._model = model
            self._normalizers = [m for m in model.modules() if getattr(m, "running_mean", None) is not None]
        if self._normalizers and self._statistics is None:
            self._statistics = _flat(self._running())
        with super().optim_context(model):
            yield

    def backward(self, loss: Tensor, **kwargs) -> None:
        if len(self._unread) >= MAX_UNREAD:
            self.read()
        super().backward(loss, **kwargs)

    def step(self, **kwargs) -> None:
        """Clip the gradients and update the parameters, unless a gradient is not finite."""
        params = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not params:
            return
        norms = self._norms(params)
        is_skipped = norms.isfinite().all().logical_not()
        grad_norm = self._clip(params)
        self._step_unless(is_skipped, kwargs)
        self._restore_statistics_if(is_skipped)
        self._unread.append(_Update(self.inner_count, params, norms, is_skipped, grad_norm))

    def _norms(self, params: list[nn.Parameter]) -> Tensor:
        return torch.stack(torch._foreach_norm([p.grad for p in params], dtype=torch.float32))  # [len(params)]

    def _clip(self, params: list[nn.Parameter]) -> Tensor | None:
        return self.clip_func(params, **self.clip_grad_kwargs) if self.clip_grad_kwargs else None

    def _step_unless(self, is_skipped: Tensor, kwargs: dict) -> None:
        optimizer = self.optimizer
        is_fused = all(group.get("fused") for group in optimizer.param_groups)
        # In the first update fused SGD takes its momentum, uninitialised, for filled even if it skips.
        if is_fused and optimizer.state and getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.grad_scale, optimizer.found_inf = None, is_skipped.float()
            try:
                optimizer.step(**kwargs)
            finally:
                del optimizer.grad_scale, optimizer.found_inf
        elif not is_skipped:  # the host waits
            optimizer.step(**kwargs)

    def _running(self) -> list[Tensor]:
        return [tensor for m in self._normalizers for tensor in (m.running_mean, m.running_var)]

    def _restore_statistics_if(self, is_skipped: Tensor) -> None:
        if self._statistics is None:
            return
        running = self._running()
        sound = torch.where(is_skipped, self._statistics, _flat(running)).split([x.numel() for x in running])
        torch._foreach_copy_(running, [x.view_as(y) for x, y in zip(sound, running)])
        self._statistics = None

    def remember_losses(self, losses: dict) -> None:
        """Losses of the iteration that was just done, by name; warnings name those that are not finite."""
        tensors = {name: loss.detach() for name, loss in losses.items() if isinstance(loss, Tensor)}
        self._losses[self.inner_count] = tensors

    def read(self) -> None:
        """Read what became of the updates since the last time, log and count it; waits for the device."""
        updates, self._unread = self._unread, []
        if not updates:
            return
        was_skipped = torch.stack([update.is_skipped for update in updates]).tolist()
        norms = [update.grad_norm for update in updates if update.grad_norm is not None]
        grad_norms = torch.stack(norms).tolist() if norms else [None] * len(updates)
        try:
            for update, skipped, grad_norm in zip(updates, was_skipped, grad_norms):
                if skipped:
                    self._count(update)
                    continue
                self._in_a_row.clear()
                if grad_norm is not None:
                    self.message_hub.update_scalar(f"train/{self.grad_name}", grad_norm)
        finally:
            self.message_hub.update_scalar(COUNTER, self.skipped)
        self._losses = {i: losses for i, losses in self._losses.items() if i > updates[-1].iteration}

    def _count(self, update: _Update) -> None:
        self.skipped += 1
        self._in_a_row.append(update.iteration)
        report = f"iteration {update.iteration}: the update was skipped, {self._describe(update)}"
        print_log(report, logger="current", level=logging.WARNING)
        if len(self._in_a_row) >= self.max_in_a_row:
            raise NonFiniteError(
                f"gradients were not finite in {len(self._in_a_row)} updates in a row, iterations {self._in_a_row[0]} "
                f"to {self._in_a_row[-1]}; in the last one {self._describe(update)}. The parameters are those of "
                f"before. {last_checkpoint(self.message_hub)}. Go on from a checkpoint with {self._remedies()}"
            )

    def _describe(self, update: _Update) -> str:
        """Which gradients and losses of a skipped update are not finite; waits for the device."""
        names = {id(p): name for name, p in self._model.named_parameters()} if self._model is not None else {}
        wrong = [p for p, norm in zip(update.params, update.norms.isfinite().tolist()) if not norm]
        first = names.get(id(wrong[0]), f"one of shape {list(wrong[0].shape)}").removeprefix("module.")
        text = f"{len(wrong)} of {len(update.params)} gradients are not finite (the first: {first})"
        iterations = range(update.iteration - self._accumulative_counts + 1, update.iteration + 1)
        losses = [item for i in iterations for item in self._losses.get(i, {}).items()]
        if not losses:
            return text
        values = ", ".join(f"{name}={loss.item()}" for name, loss in losses if not loss.isfinite())
        return f"{text}; losses: {values or f'all finite, {self._cause_if_losses_are_finite()}'}"

    def _cause_if_losses_are_finite(self) -> str:
        return "it came up in the backward pass"

    def _remedies(self) -> str:
        return "a lower learning rate, or with clipped gradients: optim_wrapper.clip_grad=dict(max_norm=…)"

    def state_dict(self) -> dict:
        self.read()
        return {**super().state_dict(), "skipped_steps": self.skipped}

    def load_state_dict(self, state_dict: dict) -> None:
        self.skipped = state_dict.pop("skipped_steps", 0)
        super().load_state_dict(state_dict)


class FiniteAmpOptimWrapper(FiniteOptimWrapper):
    """The same with automatic mixed precision, in place of mmengine's AmpOptimWrapper; on GPUs and on CPUs.

    Losses are scaled in float16 alone: bfloat16 has the range of float32. There, the scale starts high and is halved
    by every skipped update, so that some are usual, at the start above all; they count like any others.

    Args:
        optimizer, accumulative_counts, clip_grad: as for `OptimWrapper`.
        dtype: ``'bfloat16'`` or ``'float16'``.
        loss_scale: ``'dynamic'``, a fixed number, or a dict of options of `torch.amp.GradScaler`.
        max_in_a_row: so many skipped updates in a row end the run. Default: 20, in float16 40 (16 take the scale from
            where it starts, 2**16, to 1).

    Raises:
        ValueError: for another `dtype` or `loss_scale`.
        NonFiniteError: after `max_in_a_row` skipped updates; from :meth:`read`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        dtype: str = "bfloat16",
        loss_scale: str | float | dict = "dynamic",
        accumulative_counts: int = 1,
        clip_grad: dict | None = None,
        max_in_a_row: int | None = None,
    ) -> None:
        if dtype not in ("bfloat16", "float16"):
            raise ValueError(f"{type(self).__name__}: dtype={dtype!r}, expected 'bfloat16' or 'float16'")
        if loss_scale != "dynamic" and not isinstance(loss_scale, (int, float, dict)):
            raise ValueError(
                f"{type(self).__name__}: loss_scale={loss_scale!r}, expected 'dynamic', a number, or a dict of options "
                "of torch.amp.GradScaler"
            )
        is_half = dtype == "float16"
        if max_in_a_row is None:
            max_in_a_row = 40 if is_half else 20
        super().__init__(optimizer, accumulative_counts, clip_grad, max_in_a_row)
        self.dtype = getattr(torch, dtype)
        self.device_type = optimizer.param_groups[0]["params"][0].device.type
        self._fixed_scale = float(loss_scale) if isinstance(loss_scale, (int, float)) else None
        options = loss_scale if isinstance(loss_scale, dict) else {}
        if self._fixed_scale is not None:
            options = dict(init_scale=self._fixed_scale)
        self.loss_scaler = torch.amp.GradScaler(self.device_type, **{"enabled": is_half, **options})

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), torch.autocast(self.device_type, dtype=self.dtype):
            yield

    def backward(self, loss: Tensor, **kwargs) -> None:
        super().backward(self.loss_scaler.scale(loss), **kwargs)

    def step(self, **kwargs) -> None:
        self.loss_scaler.unscale_(self.optimizer)
        super().step(**kwargs)
        self.loss_scaler.update(self._fixed_scale)

    def _cause_if_losses_are_finite(self) -> str:
        if not self.loss_scaler.is_enabled():
            return super()._cause_if_losses_are_finite()
        return f"as usual in float16 until the loss scale fits; it is now {self.loss_scaler.get_scale():g}"

    def _remedies(self) -> str:
        other = "bfloat16 instead of float16, " if self.dtype == torch.float16 else ""
        return other + super()._remedies()

    def state_dict(self) -> dict:
        return {**super().state_dict(), "loss_scaler": self.loss_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        if scaler := state_dict.pop("loss_scaler", None):  # empty after bfloat16
            self.loss_scaler.load_state_dict(scaler)
        super().load_state_dict(state_dict)


def last_checkpoint(message_hub: MessageHub) -> str:
    """A sentence, without its full stop, that names the last checkpoint of the run."""
    announced = message_hub.get_info("last_ckpt")  # perhaps not written: mmengine announces it before
    if announced is None:
        return "No checkpoint has been written yet"
    folder = Path(announced).parent
    found, _ = latest_whole_checkpoint(folder)
    return f"There is no whole checkpoint in {folder}" if found is None else f"The last checkpoint is {found}"


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in tensors])
