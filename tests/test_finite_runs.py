"""Runs with updates that are skipped: they go on, stop in time, resume, and never save a broken model."""

import json
from pathlib import Path

import pytest
import torch
from mmengine.dataset import DefaultSampler
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from test_finite_steps import ADAMW, NAN, Net

from vig_backbone.openmmlab.finite_steps import NonFiniteError


def train(tmp_path: Path, factors: list[float], wrapper: dict | None = None, **options) -> Runner:
    """Iteration i gets the i-th factor; a checkpoint and a line of the log after each."""
    torch.manual_seed(0)
    runner = Runner(
        model=Net(),
        work_dir=str(tmp_path),
        train_dataloader=dict(
            dataset=[dict(x=torch.randn(4), factor=torch.tensor(f)) for f in factors for _ in range(4)],
            batch_size=4,
            sampler=dict(type=DefaultSampler, shuffle=False),
            collate_fn=dict(type="default_collate"),
        ),
        train_cfg=dict(by_epoch=False, max_iters=len(factors)),
        optim_wrapper=dict(optimizer=ADAMW, **(wrapper or dict(type="FiniteOptimWrapper", max_in_a_row=3))),
        default_hooks=dict(
            runtime_info=dict(type="DeferredRuntimeInfoHook"),
            logger=dict(type="LoggerHook", interval=1),
            checkpoint=dict(type="AtomicCheckpointHook", interval=1, by_epoch=False, max_keep_ckpts=1),
        ),
        custom_hooks=[dict(type="FiniteStepsHook")],
        experiment_name=f"{tmp_path.name}_{len(factors)}",
        default_scope="mmengine",
        **options,
    )
    runner.train()
    return runner


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.pth"))


def test_a_run_goes_on_after_a_bad_step_and_logs_it(tmp_path: Path) -> None:
    runner = train(tmp_path, [1.0, NAN, 1.0, 1.0])
    assert runner.iter == 4
    history = runner.message_hub.get_scalar("train/skipped_steps").data[0]
    assert history[-4:].tolist() == [0, 1, 1, 1]
    log = next(tmp_path.rglob("*.log")).read_text()
    assert "iteration 2: the update was skipped" in log
    assert "loss_fit=nan" in log
    assert "skipped_steps: 1" in log
    assert all(x.isfinite().all() for x in runner.model.state_dict().values())


def test_a_run_stops_after_so_many_and_keeps_a_good_checkpoint_to_resume(tmp_path: Path) -> None:
    with pytest.raises(
        NonFiniteError, match=r"iterations 3 to 5; .*loss_fit=nan.* The last checkpoint is .*iter_4\.pth"
    ):
        train(tmp_path, [1.0, 1.0, NAN, NAN, NAN, 1.0])
    assert checkpoints(tmp_path) == ["iter_4.pth"]
    content = torch.load(tmp_path / "iter_4.pth", weights_only=True)
    assert content["optimizer"]["skipped_steps"] == 2
    assert all(x.isfinite().all() for x in content["state_dict"].values())

    resumed = train(tmp_path, [1.0] * 6, resume=True, load_from=str(tmp_path / "iter_4.pth"))
    assert resumed.iter == 6
    assert resumed.optim_wrapper.skipped == 2
    assert checkpoints(tmp_path) == ["iter_6.pth"]


@pytest.mark.parametrize("kind", ["OptimWrapper", "FiniteOptimWrapper"])
def test_a_broken_model_is_not_saved_over_the_last_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Whatever the wrapper: here a buffer is spoilt by something other than a step."""
    train_step = Net.train_step

    def spoil(self: Net, data: dict, optim_wrapper: OptimWrapper) -> dict:
        losses = train_step(self, data, optim_wrapper)
        if data["factor"][0] == 2:
            self.norm.running_var.fill_(NAN)
        return losses

    monkeypatch.setattr(Net, "train_step", spoil)
    message = r"iteration 3: no checkpoint was written, 1 of 9 .*norm\.running_var\. .*iter_2\.pth"
    with pytest.raises(NonFiniteError, match=message):
        train(tmp_path, [1.0, 1.0, 2.0, 1.0], dict(type=kind))
    assert checkpoints(tmp_path) == ["iter_2.pth"]


TWO_PROCESSES = """
import json, sys, torch, torch.distributed as dist
sys.path.insert(0, "tests")
import test_finite_steps as test
from vig_backbone.openmmlab.distributed import GlooDataParallel
dist.init_process_group("gloo")
rank = dist.get_rank()
model, wrapper = test.make(type="FiniteOptimWrapper")
parallel = GlooDataParallel(model)
torch.manual_seed(rank)
changed = []
for factor in (1.0, test.NAN if rank == 1 else 1.0, 1.0):
    before = test.state(model, wrapper)
    parallel.train_step(test.batch(factor), wrapper)
    after = test.state(model, wrapper)
    changed.append(any(name not in before or not torch.equal(x, before[name]) for name, x in after.items()))
wrapper.read()
with open(f"{sys.argv[1]}/{rank}.json", "w") as file:
    json.dump(dict(changed=changed, skipped=wrapper.skipped, weight=model.stem.weight.tolist()), file)
dist.destroy_process_group()
"""


def test_two_processes_skip_the_same_update(run_python, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run_python(*launch, tmp_path / "script.py", tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["changed"] == [True, False, True]
    assert first["skipped"] == 1
