"""Losses in the log: the same as with mmengine's own hook, without waiting for the device after every step."""

import pytest
import torch
from mmengine.dataset import DefaultSampler
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import Dataset

from vig_backbone.openmmlab.runtime_info_hook import DeferredRuntimeInfoHook


class Numbers(Dataset):
    def __len__(self) -> int:
        return 7

    def __getitem__(self, i: int) -> Tensor:
        return torch.full((2,), float(i))


class Line(BaseModel):
    """Logs two losses, and a number that is no tensor."""

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(()))
        self.shape = shape

    def forward(self, x: Tensor, mode: str) -> dict[str, Tensor]:
        return dict(loss_a=(self.slope * x).square().mean(), acc=x.mean())

    def train_step(self, data: Tensor, optim_wrapper) -> dict:
        losses = super().train_step(data, optim_wrapper)
        losses["acc"] = losses["acc"].expand(self.shape)
        return {**losses, "plain": 3}


class Spy(Hook):
    """What a step read from the device, and the log that a checkpoint held."""

    priority = "LOWEST"

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.saved: list[int] = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        history = runner.message_hub.log_scalars.get("train/loss")
        self.counts.append(0 if history is None else len(history.data[0]))

    def before_save_checkpoint(self, runner, checkpoint) -> None:
        self.saved.append(len(checkpoint["message_hub"]["log_scalars"]["train/loss"].data[0]))


def train(tmp_path, hook: str, name: str, shape: tuple[int, ...] = ()) -> tuple[Runner, Spy]:
    torch.manual_seed(0)
    spy = Spy()
    runner = Runner(
        model=Line(shape),
        work_dir=str(tmp_path / name),
        train_dataloader=dict(dataset=Numbers(), batch_size=1, sampler=dict(type=DefaultSampler, shuffle=False)),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=1e-3)),
        default_hooks=dict(
            runtime_info=dict(type=hook),
            logger=dict(type="LoggerHook", interval=3),
            checkpoint=dict(type="CheckpointHook", interval=1),
        ),
        custom_hooks=[spy],
        experiment_name=f"{name}_{tmp_path.name}",
        default_scope="mmengine",
    )
    runner.train()
    return runner, spy


def test_the_log_is_that_of_mmengine(tmp_path) -> None:
    runners = [train(tmp_path, hook, name)[0] for hook, name in (("RuntimeInfoHook", "stock"), (NAME, "ours"))]
    stock, ours = (runner.message_hub.log_scalars for runner in runners)
    assert set(ours) == set(stock)
    for name in ("train/loss", "train/loss_a", "train/acc", "train/plain", "train/lr"):
        for expected, actual in zip(stock[name].data, ours[name].data, strict=True):
            assert len(actual) == 14
            assert actual == pytest.approx(expected, rel=1e-6), name


def test_losses_are_read_when_they_are_logged(tmp_path) -> None:
    """Every third step of an epoch, and its last one; checkpoints hold all of them."""
    _, spy = train(tmp_path, NAME, "ours")
    assert spy.counts == [0, 0, 3, 3, 3, 6, 7, 7, 7, 10, 10, 10, 13, 14]
    assert spy.saved == [7, 14]


def test_a_loss_of_many_numbers_is_an_error(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"acc of a training step must be one number, got a tensor of shape \[4\]"):
        train(tmp_path, NAME, "ours", shape=(4,))


NAME = DeferredRuntimeInfoHook.__name__
