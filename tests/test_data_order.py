"""The order of the images and the random numbers, in whole runs and in resumed ones."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import Dataset

import vig_backbone  # noqa: F401

COUNT = 12


class Numbers(Dataset):
    """Stands for images: gives its index, and a number that the process, or the worker, draws."""

    is_checked = False

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> dict:
        return dict(inputs=torch.tensor([index, np.random.rand(), self.is_checked]))


class Checks(Hook):
    """Does something to the data set, as CheckDataHook does."""

    priority = "VERY_HIGH"

    def before_train(self, runner: Runner) -> None:
        runner.train_dataloader.dataset.is_checked = True


class Remembers(BaseModel):
    """A model of one weight that keeps what it was given, and draws as drop path does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.order: list[int] = []
        self.draws: list[float] = []
        self.dropped: list[float] = []
        self.checked: set[bool] = set()

    def forward(self, inputs: list, mode: str) -> dict:
        self.order += [int(x[0]) for x in inputs]
        self.draws += [x[1].item() for x in inputs]
        self.checked |= {bool(x[2]) for x in inputs}
        self.dropped.append(torch.rand(()).item())
        return dict(loss=self.weight * torch.stack(inputs).sum())


def run(
    folder: Path,
    loop: dict,
    seed: int | None = None,
    resume: Path | None = None,
    workers: int = 0,
    diff_rank_seed: bool = False,
) -> Remembers:
    by_epoch = loop["by_epoch"]
    runner = Runner(
        model=Remembers(),
        work_dir=str(folder),
        experiment_name=folder.name,
        train_dataloader=dict(
            dataset=Numbers(),
            sampler=dict(type="DefaultSampler" if by_epoch else "InfiniteSampler", shuffle=True),
            batch_size=2,
            num_workers=workers,
            persistent_workers=workers > 0,
        ),
        train_cfg=loop,
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=1e-6)),
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=1 if by_epoch else 3, by_epoch=by_epoch)),
        custom_hooks=[Checks(), dict(type="DataOrderHook")],
        randomness=dict(seed=seed, diff_rank_seed=diff_rank_seed),
        load_from=None if resume is None else str(resume),
        resume=resume is not None,
        cfg=Config(dict()),
    )
    runner.train()
    if workers:  # now: while other runs' workers live, they may not end
        runner.train_dataloader._iterator._shutdown_workers()
    return runner.model


EPOCHS = dict(by_epoch=True, max_epochs=3)
ITERATIONS = dict(by_epoch=False, max_iters=9)  # one and a half times over the data


@pytest.mark.parametrize("diff_rank_seed", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("loop", "part"), [(EPOCHS, "epoch_1.pth"), (ITERATIONS, "iter_3.pth")], ids=["epoch", "iter"])
def test_a_resumed_run_has_the_order_of_the_whole_one(
    tmp_path: Path, loop: dict, part: str, workers: int, diff_rank_seed: bool
) -> None:
    """No config states a seed: mmengine draws one for the first run, and the checkpoint knows it."""
    options = dict(loop=loop, workers=workers, diff_rank_seed=diff_rank_seed)
    whole = run(tmp_path / "whole", **options)
    rest = run(tmp_path / "rest", resume=tmp_path / "whole" / part, **options)
    assert sorted(whole.order[:COUNT]) == list(range(COUNT))
    assert rest.order == whole.order[-len(rest.order) :]
    assert len(rest.order) == {"epoch_1.pth": 24, "iter_3.pth": 12}[part]
    assert set(rest.dropped).isdisjoint(whole.dropped)


@pytest.mark.parametrize("loop", [EPOCHS, ITERATIONS], ids=["epoch", "iter"])
def test_what_hooks_do_to_the_data_set_reaches_worker_processes(tmp_path: Path, loop: dict) -> None:
    assert run(tmp_path / "run", loop, workers=1).checked == {True}


@pytest.mark.parametrize("loop", [EPOCHS, ITERATIONS], ids=["epoch", "iter"])
def test_the_seed_alone_decides(tmp_path: Path, loop: dict) -> None:
    first, again, other = (
        run(tmp_path / name, loop, seed=seed, workers=1) for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    for field in ("order", "draws", "dropped"):
        assert getattr(first, field) == getattr(again, field), field
        assert getattr(first, field) != getattr(other, field), field


def test_the_order_does_not_depend_on_seeds_of_processes(tmp_path: Path) -> None:
    """With `diff_rank_seed`, mmengine's samplers draw a seed, another one for another number of processes."""
    runs = [run(tmp_path / str(flag), ITERATIONS, seed=5, diff_rank_seed=flag) for flag in (False, True)]
    assert runs[0].order == runs[1].order
