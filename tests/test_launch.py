"""The launch scripts, with programs in their place that say how they were called; torchrun also as it is."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vig_backbone.openmmlab.checkpoint_hook import is_whole

REPOSITORY = Path(__file__).resolve().parents[1]
TORCHRUN, SLURM = "tools/launch/torchrun.sh", "tools/launch/slurm.sh"
SEG = "seg_configs/upernet_vig_t.py"

CALLED = 'echo "$(basename "$0") $* [$OMP_NUM_THREADS]"\n'
STUBS = {
    "torchrun": CALLED,
    "python": "echo ${VISIBLE_GPUS-4}\n",  # what torch.cuda.device_count() says
    "srun": CALLED + 'echo "$MASTER_ADDR:$MASTER_PORT ${SRUN_CPUS_PER_TASK-}"; exit ${STEP_FAILS-0}\n',
    "scontrol": "printf 'node7\\nnode8\\n'\n",
}
JOB = dict(
    SLURM_JOB_ID="1234567",
    SLURM_JOB_NODELIST="node[7-8]",
    SLURM_GPUS_ON_NODE="8",
    SLURM_NTASKS_PER_NODE="8",
    SLURM_CPUS_PER_TASK="6",
    SLURM_SUBMIT_DIR=str(REPOSITORY),
)


def put_stub(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{script}")
    (folder / name).chmod(0o755)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """PATH with the stubs first, and nothing that this machine may say about Slurm."""
    for name, script in STUBS.items():
        put_stub(tmp_path, name, script)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_", "OMP_"))}
    return {**kept, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture
def launch(environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess]:
    def call(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        command = ["bash", script, *arguments]
        variables = {**environment, **variables}
        return subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=60)

    return call


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("train C", "--standalone --nproc_per_node 4 T C --launcher pytorch [1]"),
        ("--gpus 2 train C --resume", "--standalone --nproc_per_node 2 T C --resume --launcher pytorch [1]"),
        (
            "--nodes 2 --node-rank 1 --master a train C --cfg-options x=1",
            "--nnodes 2 --node_rank 1 --master_addr a --master_port 29500 --nproc_per_node 4 "
            "T C --cfg-options x=1 --launcher pytorch [1]",
        ),
        (
            "--master a:99 --node-rank 0 --nodes 3 --gpus 1 train C",
            "--nnodes 3 --node_rank 0 --master_addr a --master_port 99 --nproc_per_node 1 T C --launcher pytorch [1]",
        ),
    ],
)
def test_torchrun_is_called_with(launch, options: str, expected: str) -> None:
    process = launch(TORCHRUN, *options.split())
    assert process.stdout.strip() == "torchrun " + expected.replace(" T ", " tools/launch/../train.py ")


def test_arguments_are_passed_on_as_they_are_and_threads_stay_as_set(launch) -> None:
    process = launch(TORCHRUN, "test", "my config.py", "A  B", "--out", "x.pkl", OMP_NUM_THREADS="3")
    assert "test.py my config.py A  B --out x.pkl --launcher pytorch [3]" in process.stdout


@pytest.mark.parametrize(
    ("script", "options", "variables", "message"),
    [
        (TORCHRUN, "", {}, "expected train or test, got ''"),
        (TORCHRUN, "benchmark", {}, "expected train or test, got 'benchmark'"),
        (TORCHRUN, "train", {}, "train needs a config"),
        (TORCHRUN, "--gpus 0 train C", {}, "--gpus 0: expected a whole number, at least 1"),
        (TORCHRUN, "--gpus two train C", {}, "--gpus two: expected a whole number"),
        (TORCHRUN, "--gpus", {}, "--gpus needs a value"),
        (TORCHRUN, "--gpu 2 train C", {}, "unknown option --gpu"),
        (TORCHRUN, "--nodes 2 train C", {}, "needs --node-rank and --master"),
        (TORCHRUN, "--nodes 2 --node-rank 2 --master a train C", {}, "numbered from 0 to 1"),
        (TORCHRUN, "--master a train C", {}, "add --nodes N"),
        (TORCHRUN, "train C", {"VISIBLE_GPUS": "0"}, "say how many: --gpus 2"),
        (SLURM, "", JOB, "expected train or test"),
        (SLURM, "test", JOB, "test needs a config"),
        (SLURM, "train C", {}, "not a Slurm job"),
        (SLURM, "train C", {**JOB, "SLURM_GPUS_ON_NODE": ""}, "the job has no GPU"),
        (SLURM, "train C", {**JOB, "SLURM_GPUS_ON_NODE": "4"}, "--ntasks-per-node is 4, not 8"),
        (SLURM, "train C", {**JOB, "SLURM_SUBMIT_DIR": "/"}, "submit the job from the repository"),
    ],
)
def test_wrong_use_is_named(launch, script: str, options: str, variables: dict, message: str) -> None:
    process = launch(script, *options.split(), **variables)
    assert process.returncode == 2
    assert message in process.stderr
    assert not process.stdout


@pytest.mark.parametrize("script", [TORCHRUN, SLURM])
def test_help_has_examples(launch, script: str) -> None:
    process = launch(script, "--help")
    assert process.returncode == 0
    assert "examples:" in process.stdout


def test_slurm_starts_one_process_per_gpu_and_agrees_on_a_meeting_point(launch) -> None:
    process = launch(SLURM, "train", "C", "--amp", **JOB)
    called, meeting = process.stdout.splitlines()
    step = "srun --gpu-bind=none --kill-on-bad-exit=1 python tools/train.py"
    assert called == f"{step} C --amp --launcher slurm [1]"
    assert meeting == "node7:24567 6"
    assert "node9:1 6" in launch(SLURM, "train", "C", **JOB, MASTER_ADDR="node9", MASTER_PORT="1").stdout


def test_slurm_job_fails_when_its_step_does(launch) -> None:
    assert launch(SLURM, "train", "C", **JOB, STEP_FAILS="7").returncode == 7


def test_slurm_job_that_starts_again_resumes_training(launch) -> None:
    again = {**JOB, "SLURM_RESTART_COUNT": "1"}
    assert "train.py C --resume --launcher" in launch(SLURM, "train", "C", **again).stdout
    assert "--resume" not in launch(SLURM, "test", "C", "CHECKPOINT", **again).stdout


def test_slurm_job_goes_back_into_the_queue_when_its_time_is_nearly_over(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """The stub of srun runs until that of scontrol has been told; then Slurm would end the job."""
    put_stub(tmp_path, "srun", 'touch "$STATE/started"; until [ -e "$STATE/requeued" ]; do sleep 0.05; done; exit 3\n')
    put_stub(tmp_path, "scontrol", 'if [ $1 = requeue ]; then echo "$2" > "$STATE/requeued"; fi; echo node7\n')
    variables = {**environment, **JOB, "STATE": str(tmp_path)}
    job = subprocess.Popen(["bash", SLURM, "train", "C"], cwd=REPOSITORY, env=variables)
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "started").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=30) == 3  # the status of the step, waited for to its end
    finally:
        job.kill()
    assert (tmp_path / "requeued").read_text().strip() == JOB["SLURM_JOB_ID"]


@pytest.mark.slow
def test_torchrun_trains_and_tests_on_two_processes(small_seg: list[str], tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # as in an active environment
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PATH": path}
    options = [*small_seg, "train_cfg.max_iters=2"]
    checkpoint = tmp_path / "work" / "iter_2.pth"
    for arguments in (["train", SEG, *options], ["test", SEG, str(checkpoint), *options]):
        command = ["bash", TORCHRUN, "--gpus", "2", *arguments]
        process = subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=300)
        assert process.returncode == 0, process.stderr[-3000:]
        assert "Distributed launcher: pytorch" in process.stdout + process.stderr
    assert is_whole(checkpoint)
    assert (tmp_path / "work" / "metrics.json").is_file()
