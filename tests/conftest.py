"""Shared fixtures: the embedded data set, the real photos, and running a tool as a user does."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
PHOTOS = REPOSITORY.parent / "shared" / "tiny_coco"
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: kernels then run on the CPU


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_plans() -> None:
    """Tests change what the launches of an operator depend on."""
    if plans := sys.modules.get("vig_kernels.plans"):
        plans.forget()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where Triton kernels run: in the interpreter on the CPU, or on a GPU."""
    from vig_kernels.launch import INTERPRETED

    if (request.param == "cpu") != INTERPRETED:
        pytest.skip("the CPU needs Triton's interpreter, a GPU needs it off")
    return request.param


@pytest.fixture
def rounds_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter truncates float32 to bfloat16; GPUs round."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(x: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(x, source, target, mode)
        bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)  # not all operators of a GPU are
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small easy set of 64 x 64 pixels: root with coco/ and ade/."""
    from vig_backbone.data.toy import make_toy_data

    root = tmp_path_factory.mktemp("data") / "toy"
    make_toy_data(root, num_train=16, num_val=6, size=64)
    return root


@pytest.fixture(scope="session")
def photos() -> Path:
    """53 real COCO photos, annotated in COCO and in ADE20K layout; not part of this repository."""
    if not (PHOTOS / "coco" / "annotations").is_dir():
        pytest.skip(f"the real photos are not at {PHOTOS}")
    return PHOTOS


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess]:
    """Run python with arguments in the repository's root; returns the finished process, output as text."""

    def run(*arguments: object, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
        process = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
        if check and process.returncode:
            raise AssertionError(f"exit code {process.returncode}:\n{process.stdout[-3000:]}\n{process.stderr[-3000:]}")
        return process

    return run


def small_run(data_root: Path, tmp_path: Path) -> list[str]:
    """Options that both tasks share: the small set at `data_root`, no worker processes, every step logged."""
    settings = ("num_workers=0", "persistent_workers=False", f"dataset.data_root={data_root}")
    return [
        *("--data", "toy", "--work-dir", str(tmp_path / "work")),
        "--cfg-options",
        *(f"{split}_dataloader.{setting}" for split in ("train", "val", "test") for setting in settings),
        "train_dataloader.batch_size=2",
        "default_hooks.logger.interval=1",
        "custom_hooks.1.type=CheckDataHook",
    ]


@pytest.fixture
def small_seg(toy_data: Path, tmp_path: Path) -> list[str]:
    """Options that make any segmentation config with `--data toy` train a few seconds on the small set."""
    return [
        *small_run(toy_data / "ade", tmp_path),
        "model.data_preprocessor.size=(64,64)",
        "train_dataloader.dataset.pipeline.3.crop_size=(64,64)",
        "train_cfg.max_iters=4",
        "train_cfg.val_interval=4",
        "default_hooks.checkpoint.interval=2",
    ]


@pytest.fixture
def small_det(toy_data: Path, tmp_path: Path) -> list[str]:
    """The same for detection configs; one epoch is 8 steps of 2 images."""
    coco = toy_data / "coco"
    return [
        *small_run(coco, tmp_path),
        *(f"{split}_evaluator.ann_file={coco}/annotations/instances_val2017.json" for split in ("val", "test")),
        "train_cfg.max_epochs=2",
        "train_cfg.val_interval=2",
        "default_hooks.checkpoint.interval=1",
    ]
