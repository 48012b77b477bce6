"""A stock mmdet or mmseg project can use the backbones: their own configs, runner, scripts, heads and necks."""

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.model import revert_sync_batchnorm
from test_configs import build, det_batch, seg_batch, take_training_step

from vig_backbone.__main__ import main
from vig_backbone.data.toy import EASY_CLASSES

RUN = """
import sys
from mmengine.config import Config
from mmengine.runner import Runner
Runner.from_cfg(Config.fromfile(sys.argv[1])).train()
"""
HIER_VIG = "backbone=dict(_delete_=True, type='HierViG', arch='tiny')"
DIMS = [96, 192, 384, 768]

# What the project adds to a stock config: the import, the backbone and the channels that the next part gets. The rest
# is the data set, and sizes for a test. %(base)r, %(root)r and %(work_dir)r are filled in.
DET = f"""
_base_ = %(base)r
custom_imports = dict(imports=["vig_backbone"], allow_failed_imports=False)
model = dict({HIER_VIG}, neck=dict(in_channels={DIMS}))

metainfo = dict(classes={EASY_CLASSES})
model.update(
    roi_head=dict(bbox_head=dict(num_classes=7, fc_out_channels=64), mask_head=dict(num_classes=7)),
    train_cfg=dict(rpn_proposal=dict(max_per_img=50), rcnn=dict(sampler=dict(num=16))),
    test_cfg=dict(rpn=dict(max_per_img=50), rcnn=dict(max_per_img=5)),
)
train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline
train_pipeline[2].scale = test_pipeline[1].scale = (96, 64)
loading = dict(num_workers=0, persistent_workers=False)
data = dict(data_root=%(root)r + "/coco", metainfo=metainfo)
train_dataloader = dict(**loading, dataset=dict(**data, indices=4, pipeline=train_pipeline))
val_dataloader = dict(**loading, dataset=dict(**data, indices=2, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=%(root)r + "/coco/annotations/instances_val2017.json")
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1)
"""
SEG = f"""
_base_ = %(base)r
custom_imports = dict(imports=["vig_backbone"], allow_failed_imports=False)
model = dict(
    pretrained=None,
    {HIER_VIG},
    decode_head=dict(in_channels={DIMS}, channels=64, num_classes=8),
    auxiliary_head=dict(in_channels=384, channels=64, num_classes=8),
    data_preprocessor=dict(size=(64, 64)),
)

train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline
train_pipeline[2].scale = test_pipeline[1].scale = (96, 64)
train_pipeline[3].crop_size = (64, 64)
loading = dict(num_workers=0, persistent_workers=False)
data = dict(
    type="BaseSegDataset",
    data_root=%(root)r + "/ade",
    img_suffix=".jpg",
    seg_map_suffix=".png",
    reduce_zero_label=True,
    metainfo=dict(classes={("background", *EASY_CLASSES)}),
)
train_dataloader = dict(batch_size=2, **loading, dataset=dict(**data, pipeline=train_pipeline))
val_dataloader = dict(**loading, dataset=dict(**data, indices=2, pipeline=test_pipeline))
test_dataloader = val_dataloader
train_cfg = dict(max_iters=2, val_interval=2)
"""
COMMON = """
work_dir = %(work_dir)r
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2, save_optimizer=False))
"""
PROJECTS = {
    "mmdet": ("mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py", DET, "coco/segm_mAP"),
    "mmseg": ("upernet/upernet_r50_4xb4-160k_ade20k-512x512.py", SEG, "mIoU"),
}


def installed(project: str) -> Path:
    """The folder in which the project's wheel ships its configs/ and tools/."""
    return Path(find_spec(project).origin).parent / ".mim"


def write_config(project: str, folder: Path, data: Path, by_name: bool) -> Path:
    """A config of the project's user; inherits from `mmdet::...` or, not by_name, from the file of that config."""
    stock, text, _ = PROJECTS[project]
    base = f"{project}::{stock}" if by_name else str(installed(project) / "configs" / stock)
    file = folder / "mine.py"
    file.write_text((text + COMMON) % dict(base=base, root=str(data), work_dir=str(folder / "work")))
    return file


def logged(work_dir: Path) -> list[dict]:
    """What mmengine wrote down: training steps and evaluations in order, or the scores of a test."""
    (file,) = [*work_dir.glob("*/vis_data/scalars.json")] or work_dir.glob("*/*.json")
    return [json.loads(line) for line in file.read_text().splitlines()]


def assert_trained_and_evaluated(work_dir: Path, score: str) -> None:
    *steps, evaluation = logged(work_dir)
    assert len(steps) == 2
    assert all(math.isfinite(step["loss"]) for step in steps)
    assert score in evaluation


@pytest.mark.parametrize("project", PROJECTS)
def test_stock_runner_needs_no_more_than_custom_imports(project: str, run_python, toy_data: Path, tmp_path) -> None:
    config = write_config(project, tmp_path, toy_data, by_name=False)
    run_python("-c", RUN, config)
    assert_trained_and_evaluated(tmp_path / "work", PROJECTS[project][2])


BUILD = """
import vig_backbone
import sys
from mmengine.config import Config
from mmengine.runner import Runner
for file in sys.argv[1:]:
    print(type(Runner.from_cfg(Config.fromfile(file)).model.backbone).__name__)
"""


def test_configs_inherit_by_package_name_after_the_import(run_python, toy_data: Path, tmp_path: Path) -> None:
    configs = []
    for project in PROJECTS:
        (tmp_path / project).mkdir()
        configs.append(write_config(project, tmp_path / project, toy_data, by_name=True))
    process = run_python("-c", BUILD, *configs)
    assert process.stdout.splitlines().count("HierViG") == 2


@pytest.mark.parametrize("project", PROJECTS)
def test_stock_scripts_run(project: str, run_python, toy_data: Path, tmp_path: Path) -> None:
    config = write_config(project, tmp_path, toy_data, by_name=True)
    tools, score = installed(project) / "tools", PROJECTS[project][2]
    run_python("-m", "vig_backbone", tools / "train.py", config)
    assert_trained_and_evaluated(tmp_path / "work", score)
    if project == "mmdet":  # its test.py imports mmcv.ops before it reads a config
        checkpoint = (tmp_path / "work" / "last_checkpoint").read_text()
        run_python("-m", "vig_backbone", tools / "test.py", config, checkpoint, "--work-dir", tmp_path / "test")
        assert score in logged(tmp_path / "test")[-1]


def stock_model(name: str, **changes) -> tuple[torch.nn.Module, Config]:
    """The model of a stock config with `changes` to it, and the config."""
    cfg = get_config(name)
    cfg.merge_from_dict(dict(model=changes))
    return revert_sync_batchnorm(build(cfg)), cfg


def hier_vig(*out_indices: int) -> dict:
    return dict(_delete_=True, type="HierViG", arch="tiny", out_indices=out_indices)


def test_stock_detector_on_three_maps_trains_and_predicts() -> None:
    model, cfg = stock_model(
        "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py",
        backbone=hier_vig(1, 2, 3),
        neck=dict(in_channels=DIMS[1:], start_level=0),
    )
    losses = take_training_step(model, cfg, det_batch([(64, 96), (50, 70)], [3, 1], 80))
    assert {"loss_cls", "loss_bbox"} <= set(losses)
    found = model.eval().test_step(det_batch([(45, 70)], [1], 80))[0].pred_instances
    assert torch.isfinite(found.bboxes).all()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (
            "sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py",
            dict(pretrained=None, backbone=hier_vig(0, 1, 2, 3), neck=dict(in_channels=DIMS)),
        ),
        (
            "segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py",
            dict(backbone=hier_vig(0, 1, 2, 3), decode_head=dict(in_channels=DIMS)),
        ),
        (
            "vit/vit_vit-b16_mln_upernet_8xb2-80k_ade20k-512x512.py",
            dict(
                pretrained=None,
                backbone=dict(_delete_=True, type="ViG", arch="tiny", out_indices=(2, 5, 8, 11)),
                neck=dict(_delete_=True, type="Feature2Pyramid", embed_dim=192, rescales=[4, 2, 1, 0.5]),
                decode_head=dict(in_channels=[192] * 4, channels=64),
                auxiliary_head=dict(in_channels=192),
            ),
        ),
    ],
    ids=["fpn_head", "segformer_head", "feature2pyramid_uper_head"],
)
def test_stock_segmenter_trains_and_predicts(name: str, changes: dict) -> None:
    model, cfg = stock_model(f"mmseg::{name}", **changes, data_preprocessor=dict(size=(64, 96)))
    losses = take_training_step(model, cfg, seg_batch([(64, 96), (50, 70)], 150))
    assert "decode.loss_ce" in losses
    found = model.eval().test_step(seg_batch([(45, 70)], 150))[0]
    assert found.pred_sem_seg.data.shape == (1, 45, 70)
    assert torch.isfinite(found.seg_logits.data).all()


SHOW = """
import json, os, sys
from beside import NAME
imported = "vig_backbone" in sys.modules
shown = [os.environ.get("RANK"), NAME, __name__, __file__, sys.argv, sys.path[0], imported]
os.write(1, (json.dumps(shown) + "\\n").encode())  # one call, so that two processes cannot mix their lines
sys.exit(len(sys.argv))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A script that imports a neighbour, shows what it sees and exits with as many as its arguments plus one."""
    folder = tmp_path / "project" / "tools"
    folder.mkdir(parents=True)
    (folder / "beside.py").write_text("NAME = 'beside'\n")
    (folder / "show.py").write_text(SHOW)
    return folder / "show.py"


def test_script_runs_as_python_would_run_it(run_python, script: Path) -> None:
    process = run_python("-m", "vig_backbone", script, "--help", "a b", check=False)
    assert process.returncode == 3
    shown = json.loads(process.stdout)
    assert shown == [None, "beside", "__main__", str(script), [str(script), "--help", "a b"], str(script.parent), True]


def test_script_runs_under_torchrun(run_python, script: Path) -> None:
    script.write_text(SHOW.replace("len(sys.argv)", "0"))
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    process = run_python(*launch, "-m", "vig_backbone", script, "--launcher", "none", OMP_NUM_THREADS="1")
    shown = [json.loads(line) for line in process.stdout.splitlines()]
    assert sorted(line[0] for line in shown) == ["0", "1"]
    assert all(line[4] == [str(script), "--launcher", "none"] and line[-1] for line in shown)


@pytest.mark.parametrize("arguments", [[], ["--launcher", "none"], ["tools/nothing.py", "config.py"]])
def test_wrong_command_line_shows_the_usage(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: python -m vig_backbone SCRIPT [ARGS...]" in capsys.readouterr().err
