"""Two processes give what one gives, also where the other left off; sharded models."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from vig_backbone.openmmlab.configuration import load_config
from vig_backbone.openmmlab.distributed import prepare_processes
from vig_backbone.openmmlab.errors import ConfigError
from vig_backbone.openmmlab.fsdp import use_fsdp

REPOSITORY = Path(__file__).resolve().parents[1]
SEG = "seg_configs/upernet_vig_t.py"
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


class Runs:
    """What the runs of distributed_runs.py recorded, and their checkpoints."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data

    def start(self, *names: str, processes: int = 1) -> None:
        start = TWO if processes == 2 else ()
        process = subprocess.run(
            [sys.executable, *start, "tests/distributed_runs.py", str(self.folder), str(self.data), *names],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]

    def of(self, name: str, processes: int = 1, rank: int = 0) -> dict:
        return torch.load(self.folder / f"{name}_{rank}_of_{processes}.pt", weights_only=False)

    def checkpoint(self, name: str, iteration: int = 4) -> dict:
        return torch.load(self.folder / name / f"iter_{iteration}.pth")


@pytest.fixture(scope="module")
def runs(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("runs"), toy_data)
    runs.start("plain", "detections")
    two = ("plain", "repeated_with_separate_buckets", "other_seed", "detections", "evaluated", "two_resume_one")
    runs.start(*two, processes=2)
    runs.start("evaluated", "one_resumes_two")
    return runs


@pytest.fixture(scope="module")
def sharded_runs(runs: Runs) -> Runs:
    runs.start("sharded", "sharded_resume_one", "sharded_in_bfloat16", processes=2)
    runs.start("one_resumes_sharded")
    return runs


def assert_same_state(found: dict, expected: dict) -> None:
    """Weights and optimizer state equal to rounding, both of single precision."""
    torch.testing.assert_close(found["state_dict"], expected["state_dict"], rtol=0, atol=1e-6)
    assert found["optimizer"]["state"].keys() == expected["optimizer"]["state"].keys()
    for number, state in expected["optimizer"]["state"].items():
        torch.testing.assert_close(found["optimizer"]["state"][number], state, rtol=1e-4, atol=1e-6)
    assert [s["last_step"] for s in found["param_schedulers"]] == [s["last_step"] for s in expected["param_schedulers"]]
    assert found["meta"]["iter"] == expected["meta"]["iter"]


def test_a_batch_split_over_two_processes_trains_as_the_whole_one_does(runs: Runs) -> None:
    whole, halves = runs.of("plain"), [runs.of("plain", 2, rank) for rank in (0, 1)]
    assert halves[0]["wrapper"] == "GlooDataParallel"
    for step in range(4):
        assert sorted(whole["images"][step]) == sorted(halves[0]["images"][step] + halves[1]["images"][step])
        assert whole["losses"][step] == pytest.approx(sum(half["losses"][step] for half in halves) / 2, rel=1e-6)
    assert_same_state(runs.checkpoint("plain_2"), runs.checkpoint("plain_1"))


def test_a_seed_repeats_a_run_bit_for_bit_with_gradients_in_buckets_of_their_own_too(runs: Runs) -> None:
    for rank in (0, 1):
        first, again = runs.of("plain", 2, rank), runs.of("repeated_with_separate_buckets", 2, rank)
        assert (first["views"], again["views"]) == (True, False)
        for field in ("images", "draws", "losses", "dice"):
            assert again[field] == first[field], field
    weights = runs.checkpoint("repeated")["state_dict"]
    assert all(torch.equal(x, weights[name]) for name, x in runs.checkpoint("plain_2")["state_dict"].items())


def test_another_seed_is_another_order_and_other_losses(runs: Runs) -> None:
    first, other = runs.of("plain", 2), runs.of("other_seed", 2)
    assert other["images"] != first["images"][:2]
    assert other["losses"][0] != first["losses"][0]


@pytest.mark.parametrize("run", ["plain", "other_seed"], ids=["no_workers", "two_workers"])
def test_processes_and_their_workers_draw_different_augmentations(runs: Runs, run: str) -> None:
    draws = [draw for rank in (0, 1) for batch in runs.of(run, 2, rank)["draws"] for draw in batch]
    assert len(set(draws)) == len(draws)


def test_processes_draw_different_random_numbers_in_the_model(runs: Runs) -> None:
    assert runs.of("plain", 2, 0)["dice"][0] != runs.of("plain", 2, 1)["dice"][0]


@pytest.mark.parametrize(("name", "processes"), [("two_resume_one", 2), ("one_resumes_two", 1)])
def test_a_run_goes_on_with_another_number_of_processes(runs: Runs, name: str, processes: int) -> None:
    """The configs of the resumed runs state no seed: order and seed come from the checkpoint."""
    for rank in range(processes):
        whole, rest = runs.of("plain", processes, rank), runs.of(name, processes, rank)
        assert rest["images"] == whole["images"][2:]
        assert rest["rates"] == whole["rates"][2:]
        assert rest["losses"] == pytest.approx(whole["losses"][2:], rel=1e-6)
    assert_same_state(runs.checkpoint(name), runs.checkpoint("plain_1"))


def test_a_resumed_run_loads_no_image_that_it_has_done(runs: Runs) -> None:
    assert runs.of("one_resumes_two")["loaded"] == 2 * 4


def test_a_resumed_run_does_not_draw_the_same_random_numbers_again(runs: Runs) -> None:
    assert set(runs.of("one_resumes_two")["dice"]).isdisjoint(runs.of("plain")["dice"])


def test_metrics_are_those_of_one_process(runs: Runs) -> None:
    """Five images in batches of two: one process has an image less, and the last batches are smaller."""
    for name in ("evaluated", "detections"):
        one = runs.of(name)
        assert runs.of(name, 2, 0) == runs.of(name, 2, 1) == one
        assert 0 < one["mIoU" if name == "evaluated" else "coco/segm_mAP"] < 100
    assert 0 < runs.of("detections")["coco/bbox_mAP"] < 1


@pytest.mark.slow
def test_sharded_training_goes_on_from_any_checkpoint_and_trains_as_data_parallel_does(sharded_runs: Runs) -> None:
    for rank in (0, 1):
        expected, found = (sharded_runs.of(name, 2, rank) for name in ("two_resume_one", "sharded_resume_one"))
        assert found["wrapper"].startswith("FSDP")
        assert found["images"] == expected["images"]
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert_same_state(sharded_runs.checkpoint("sharded_resume_one"), sharded_runs.checkpoint("plain_1"))


@pytest.mark.slow
def test_checkpoints_of_sharded_runs_are_whole_and_resume_in_one_process(sharded_runs: Runs) -> None:
    assert_same_state(sharded_runs.checkpoint("one_resumes_sharded"), sharded_runs.checkpoint("sharded"))


@pytest.mark.slow
def test_an_update_that_is_not_finite_in_one_process_is_skipped_in_all(sharded_runs: Runs) -> None:
    for rank in (0, 1):
        run = sharded_runs.of("sharded_in_bfloat16", 2, rank)
        assert run["skipped"] == 1
        assert torch.tensor(run["losses"]).isfinite().tolist() == [True, rank == 0, True]


@pytest.mark.parametrize(
    ("launcher", "change", "message"),
    [
        ("none", {}, "several processes"),
        ("pytorch", {"optim_wrapper.type": "OptimWrapper"}, "expected 'FiniteOptimWrapper'"),
        ("pytorch", {"optim_wrapper.dtype": "float16"}, "bfloat16 instead"),
        ("pytorch", {"model.backbone.compile": True}, "compile"),
        ("pytorch", {"custom_hooks": [dict(type="EMAHook")]}, "EMAHook"),
    ],
)
def test_what_does_not_go_with_a_sharded_model_is_refused(launcher: str, change: dict, message: str) -> None:
    cfg = load_config(REPOSITORY / SEG)
    cfg.merge_from_dict(change)
    with pytest.raises(ConfigError, match=message):
        use_fsdp(cfg, launcher)


def test_a_config_of_its_own_for_data_parallel_training_goes_before_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg = Config(dict(find_unused_parameters=True))
    prepare_processes(cfg, "pytorch")
    assert cfg.model_wrapper_cfg.type == "MMDistributedDataParallel"
    assert cfg.model_wrapper_cfg.gradient_as_bucket_view
    assert cfg.model_wrapper_cfg.find_unused_parameters
    assert not cfg.model_wrapper_cfg.broadcast_buffers

    cfg = Config(dict(model_wrapper_cfg=dict(type="Mine", broadcast_buffers=True)))
    prepare_processes(cfg, "slurm")
    assert cfg.model_wrapper_cfg.type == "Mine"
    assert cfg.model_wrapper_cfg.broadcast_buffers

    cfg = Config(dict())
    prepare_processes(cfg, "none")
    assert "model_wrapper_cfg" not in cfg
