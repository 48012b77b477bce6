"""The tools from end to end on the embedded set: train, test, be killed, resume, several processes."""

import json
import os
import pickle
import re
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from vig_backbone.openmmlab.checkpoint_hook import is_whole, latest_whole_checkpoint

SEG = "seg_configs/upernet_vig_t.py"
DET = "det_configs/mask_rcnn_hier_vig_t.py"

# A module for `custom_imports` that kills the process at a chosen moment; %s says which.
KILLER = """
import os, signal
from vig_backbone.openmmlab import checkpoint_hook
def die():
    os.kill(os.getpid(), signal.SIGKILL)
%s
"""
KILL_WHILE_WRITING = """
writes = []
def fsync(fd, real=os.fsync):
    real(fd)
    writes.append(fd)
    if len(writes) == 2:  # the second checkpoint: cut it in half, as if the disk had got no further
        os.ftruncate(fd, os.fstat(fd).st_size // 2)
        die()
os.fsync = fsync
"""
KILL_IN_A_STEP = """
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
@HOOKS.register_module()
class Killer(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 2:  # the third step; a checkpoint was written after the second
            die()
"""


def work_dir(options: list[str]) -> Path:
    return Path(options[options.index("--work-dir") + 1])


def test_segmentation_trains_tests_and_draws(run_python, small_seg: list[str], tmp_path: Path) -> None:
    run_python("tools/train.py", SEG, *small_seg, "--tensorboard")
    checkpoint = work_dir(small_seg) / "iter_4.pth"
    overlays, maps = tmp_path / "overlays", tmp_path / "maps"
    run_python("tools/test.py", SEG, checkpoint, "--show-dir", overlays, "--out", maps, *small_seg)
    metrics = json.loads((work_dir(small_seg) / "metrics.json").read_text())
    assert 0 <= metrics["mIoU"] <= 100
    assert list(work_dir(small_seg).glob("*/vis_data/events.out.tfevents.*"))
    pictures = list(overlays.rglob("*.png"))
    assert len(pictures) == 6
    with Image.open(pictures[0]) as picture:
        assert picture.width == 2 * picture.height  # ground truth beside prediction
    assert len(list(maps.glob("*.png"))) == 6


def test_detection_trains_tests_and_draws(run_python, small_det: list[str], tmp_path: Path) -> None:
    run_python("tools/train.py", DET, *small_det, "train_cfg.max_epochs=1")
    checkpoint = work_dir(small_det) / "epoch_1.pth"
    overlays, detections = tmp_path / "overlays", tmp_path / "detections.pkl"
    run_python("tools/test.py", DET, checkpoint, "--show-dir", overlays, "--out", detections, *small_det)
    metrics = json.loads((work_dir(small_det) / "metrics.json").read_text())
    assert {"coco/bbox_mAP", "coco/segm_mAP"} <= set(metrics)
    assert len(list(overlays.rglob("*.png"))) == 6
    with open(detections, "rb") as file:
        assert len(pickle.load(file)) == 6


@pytest.mark.parametrize("moment", [KILL_WHILE_WRITING, KILL_IN_A_STEP], ids=["writing_a_checkpoint", "in_a_step"])
def test_killed_run_resumes_from_the_last_whole_checkpoint(
    run_python, small_seg: list[str], tmp_path: Path, moment: str
) -> None:
    (tmp_path / "killer.py").write_text(KILLER % moment)
    options = [*small_seg, "custom_imports.imports=[vig_backbone,killer]"]
    if moment is KILL_IN_A_STEP:
        options += ["custom_hooks.1.type=Killer"]
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    killed = run_python("tools/train.py", SEG, *options, check=False, PYTHONPATH=path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    found, damaged = latest_whole_checkpoint(work_dir(small_seg))
    assert found is not None
    assert found.name == "iter_2.pth"
    assert not damaged  # the half-written file never got the name of a checkpoint

    resumed = run_python("tools/train.py", SEG, *small_seg[:4], "--resume", *small_seg[4:])
    steps = [int(step) for step in re.findall(r"Iter\(train\)\s+\[\s*(\d+)/4\]", resumed.stdout + resumed.stderr)]
    assert steps == [3, 4]
    assert is_whole(work_dir(small_seg) / "iter_4.pth")
    assert not list(work_dir(small_seg).glob("*.partial"))


def test_resume_passes_over_a_damaged_checkpoint(run_python, small_seg: list[str]) -> None:
    run_python("tools/train.py", SEG, *small_seg)
    last = work_dir(small_seg) / "iter_4.pth"
    last.write_bytes(last.read_bytes()[:-1000])
    resumed = run_python("tools/train.py", SEG, *small_seg[:4], "--resume", *small_seg[4:])
    output = resumed.stdout + resumed.stderr
    assert "iter_4.pth is damaged" in output
    assert re.search(r"Iter\(train\)\s+\[\s*3/4\]", output)
    assert is_whole(last)


def test_outdated_checkpoints_go_only_after_the_new_one_is_there(run_python, small_seg: list[str]) -> None:
    run_python("tools/train.py", SEG, *small_seg, "default_hooks.checkpoint.max_keep_ckpts=1")
    assert [path.name for path in work_dir(small_seg).glob("iter_*.pth")] == ["iter_4.pth"]
    assert not list(work_dir(small_seg).glob("*.partial"))


def test_resumed_checkpoint_is_read_with_the_safety_check_on(run_python, small_seg: list[str]) -> None:
    run_python("tools/train.py", SEG, *small_seg, "train_cfg.max_iters=2")
    content = torch.load(work_dir(small_seg) / "iter_2.pth", weights_only=True)
    assert {"state_dict", "optimizer", "message_hub", "meta"} <= set(content)


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_two_processes_train_data_parallel_with_accumulated_gradients(
    run_python, small_seg: list[str], small_det: list[str], task: str
) -> None:
    if task == "segmentation":
        config, options, metric, file = SEG, [*small_seg, "train_cfg.max_iters=2"], "mIoU", "iter_2.pth"
    else:
        config, options = DET, [*small_det, "train_cfg.max_epochs=1", "train_cfg.val_interval=1"]
        metric, file = "coco/bbox_mAP", "epoch_1.pth"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options += ["optim_wrapper.accumulative_counts=2"]
    process = run_python(*launch, "tools/train.py", config, "--launcher", "pytorch", *options, OMP_NUM_THREADS="1")
    output = process.stdout + process.stderr
    assert "Distributed launcher: pytorch" in output
    assert "GPU number: 2" in output or "world_size" in output.lower()
    assert metric in output
    assert (work_dir(options) / file).is_file()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_mixed_precision_trains(run_python, small_seg: list[str], small_det: list[str], task: str, dtype: str) -> None:
    config, options = (SEG, small_seg) if task == "segmentation" else (DET, [*small_det, "train_cfg.max_epochs=1"])
    process = run_python("tools/train.py", config, "--amp", dtype, *options, CUDA_VISIBLE_DEVICES="0")
    losses = [float(loss) for loss in re.findall(r" loss: (\S+)", process.stdout + process.stderr)]
    assert len(losses) >= 4
    assert all(0 < loss < 100 for loss in losses)


def test_test_time_augmentation_runs_for_both_tasks(run_python, small_seg: list[str], small_det: list[str]) -> None:
    for config, options, name, score in ((SEG, small_seg, "iter_2.pth", "mIoU"), (DET, small_det, "", "coco/bbox_mAP")):
        if config == SEG:
            run_python("tools/train.py", config, *options, "train_cfg.max_iters=2")
            checkpoint = work_dir(options) / name
        else:
            checkpoint = work_dir(options) / "untrained.pth"
            run_python("-c", UNTRAINED, config, checkpoint)
        run_python("tools/test.py", config, checkpoint, "--tta", *options)
        assert score in json.loads((work_dir(options) / "metrics.json").read_text())


UNTRAINED = """
import sys, torch, vig_backbone, mmdet.models
from mmengine.registry import MODELS, init_default_scope
from vig_backbone.openmmlab.configuration import load_config
cfg = load_config(sys.argv[1], data="toy")
init_default_scope(cfg.default_scope)
torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict(), meta={}), sys.argv[2])
"""
