"""Every config builds, trains a step and predicts; recipes say what they should."""

from pathlib import Path

import mmengine.config.config as config_module
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData

from vig_backbone.data.toy import EASY_CLASSES, PALETTE, class_names
from vig_backbone.openmmlab.configuration import load_config

REPOSITORY = Path(__file__).resolve().parents[1]
SEG = sorted((REPOSITORY / "seg_configs").glob("*.py"))
DET = sorted((REPOSITORY / "det_configs").glob("*.py"))
SIZES = ("t", "s", "b")
SCHEDULES = {  # of detectors: epochs, where the learning rate falls, total batch
    "": (12, [8, 11], 16),
    "_3x_ms": (36, [27, 33], 16),
    "_lsj_100e": (100, [89, 96], 64),
}


def tiny(paths: list[Path]) -> list[Path]:
    """The larger models differ in numbers; that they build is tested with their FLOPs."""
    return [path for path in paths if "_t" in path.stem.replace("_3x", "")]


def build(cfg: Config) -> torch.nn.Module:
    init_default_scope(cfg.default_scope)
    if cfg.default_scope == "mmseg":
        import mmseg.models  # noqa: F401
    else:
        import mmdet.models  # noqa: F401
    cfg.model.pop("init_cfg", None)
    cfg.model.backbone.pop("init_cfg", None)
    return MODELS.build(cfg.model)


def build_for_a_step(cfg: Config) -> torch.nn.Module:
    """For one process, and every parameter with a gradient: an adapter's are 0 in front of what starts at 0."""
    model = revert_sync_batchnorm(build(cfg))
    for name, p in model.backbone.named_parameters():
        if name.startswith("adapter.") and not p.any():
            p.data.normal_(std=0.1)
    return model


def seg_batch(sizes: list[tuple[int, int]], num_classes: int) -> dict:
    from mmseg.structures import SegDataSample

    samples = []
    for H, W in sizes:
        sample = SegDataSample(metainfo=dict(img_shape=(H, W), ori_shape=(H, W), pad_shape=(H, W)))
        labels = torch.randint(0, num_classes, (1, H, W))
        labels[:, :5] = 255
        sample.gt_sem_seg = PixelData(data=labels)
        samples.append(sample)
    return dict(inputs=[torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes], data_samples=samples)


def det_batch(sizes: list[tuple[int, int]], objects: list[int], num_classes: int) -> dict:
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    samples = []
    for (H, W), count in zip(sizes, objects):
        corners = torch.rand(count, 2) * torch.tensor([W / 2, H / 2])
        boxes = torch.cat((corners, corners + 16), -1)
        masks = np.zeros((count, H, W), np.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
            mask[y1:y2, x1:x2] = 1
        sample = DetDataSample(
            metainfo=dict(img_shape=(H, W), ori_shape=(H, W), scale_factor=(1.0, 1.0), img_id=len(samples))
        )
        sample.gt_instances = InstanceData(
            bboxes=boxes, labels=torch.randint(0, num_classes, (count,)), masks=BitmapMasks(masks, H, W)
        )
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        samples.append(sample)
    return dict(inputs=[torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes], data_samples=samples)


def take_training_step(model: torch.nn.Module, cfg: Config, batch: dict) -> dict[str, float]:
    """One step with the config's own optimizer; asserts that every parameter got a finite gradient and moved."""
    model.train()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    for group in wrapper.param_groups:
        group["lr"] = 1e-3
    before = {name: p.detach().clone() for name, p in model.backbone.named_parameters()}
    losses = model.train_step(batch, wrapper)
    assert all(torch.isfinite(torch.as_tensor(value)).all() for value in losses.values())
    for name, p in model.backbone.named_parameters():
        assert not torch.equal(before[name], p), f"{name} did not move"
    return {name: float(value) for name, value in losses.items()}


def test_every_recipe_exists_for_every_backbone() -> None:
    families = ("hier_vig", "vig", "vig_adapter")
    seg = {f"upernet_{family}_{size}" for family in families for size in (*SIZES, "b_640")}
    det = {
        *(f"mask_rcnn_{family}_{size}" for family in families for size in SIZES),
        *(
            f"{model}_{family}_{size}_3x_ms"
            for model in ("mask_rcnn", "cascade_mask_rcnn")
            for family in ("hier_vig", "vig_adapter")
            for size in SIZES
        ),
        *(f"mask_rcnn_vig_{size}_lsj_100e" for size in SIZES),
    }
    assert {p.stem for p in SEG} == seg
    assert {p.stem for p in DET} == det


@pytest.mark.parametrize("path", tiny(SEG), ids=lambda p: p.stem)
def test_segmentation_config_trains_and_predicts(path: Path) -> None:
    cfg = load_config(path)
    cfg.model.data_preprocessor.size = (64, 96)
    cfg.model.test_cfg.update(mode="whole", with_scores=True)
    cfg.model.backbone.drop_path_rate = 0.0  # every parameter takes part in one step
    model = build_for_a_step(cfg)
    losses = take_training_step(model, cfg, seg_batch([(64, 96), (50, 70)], 150))
    assert {"decode.loss_ce", "aux.loss_ce"} <= set(losses)
    model.eval()
    H, W = 45, 70
    result = model.test_step(seg_batch([(H, W)], 150))[0]
    assert result.pred_sem_seg.data.shape == (1, H, W)
    assert result.pred_sem_seg.data.max() < 150
    assert torch.isfinite(result.seg_scores.data).all()


@pytest.mark.parametrize("path", tiny(DET), ids=lambda p: p.stem)
def test_detection_config_trains_and_predicts(path: Path) -> None:
    cfg = load_config(path)
    cfg.model.backbone.drop_path_rate = 0.0
    cfg.model.train_cfg.rpn_proposal.update(nms_pre=100, max_per_img=50)
    stages = cfg.model.train_cfg.rcnn
    for stage in stages if isinstance(stages, list) else [stages]:
        stage.sampler.num = 16
    cfg.model.test_cfg.rpn.update(nms_pre=100, max_per_img=20)
    model = build_for_a_step(cfg)
    # Two sizes, and an image without any object.
    losses = take_training_step(model, cfg, det_batch([(64, 96), (50, 70)], [3, 0], 80))
    prefix = "s0." if isinstance(stages, list) else ""
    assert {"loss_rpn_cls", "loss_rpn_bbox"} <= set(losses)
    assert {f"{prefix}loss_cls", f"{prefix}loss_bbox", f"{prefix}loss_mask"} <= set(losses)
    model.eval()
    H, W = 45, 70
    found = model.test_step(det_batch([(H, W)], [1], 80))[0].pred_instances
    assert found.masks.shape == (len(found), H, W)
    assert torch.isfinite(found.scores).all()


@pytest.mark.parametrize("path", [*SEG, *DET], ids=lambda p: p.stem)
def test_recipe_is_the_published_one(path: Path) -> None:
    cfg = load_config(path)
    assert cfg.optim_wrapper.optimizer.type == "AdamW"
    if cfg.default_scope == "mmseg":
        assert cfg.train_cfg.max_iters == 160_000
        side = 640 if path.stem.endswith("_640") else 512
        assert tuple(cfg.crop_size) == (side, side) == tuple(cfg.model.data_preprocessor.size)
        crop = next(step for step in cfg.train_dataloader.dataset.pipeline if step.type == "FastRandomCrop")
        assert tuple(crop.crop_size) == (side, side)
        assert cfg.model.test_cfg.get("crop_size", (side, side)) == (side, side)
        assert cfg.train_dataloader.dataset.type == "ADE20KDataset"
        assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes == 150
    else:
        epochs, steps, batch = next(SCHEDULES[end] for end in reversed(SCHEDULES) if path.stem.endswith(end))
        assert cfg.train_cfg.max_epochs == cfg.param_scheduler[1].end == epochs
        assert (cfg.param_scheduler[1].milestones, cfg.auto_scale_lr.base_batch_size) == (steps, batch)
        assert cfg.train_dataloader.dataset.pipeline == cfg.train_pipeline
        assert cfg.train_dataloader.dataset.type == "CocoDataset"
        heads = cfg.model.roi_head.bbox_head
        assert all(head.num_classes == 80 for head in (heads if isinstance(heads, list) else [heads]))


@pytest.mark.parametrize("folder", ["seg_configs", "det_configs"])
def test_toy_override_names_the_classes_of_the_embedded_set(folder: str) -> None:
    cfg = Config.fromfile(REPOSITORY / folder / "_base_" / "data_toy.py")
    if folder == "seg_configs":
        assert tuple(cfg.classes) == class_names("easy", semantic=True)
        assert [tuple(color) for color in cfg.palette] == [tuple(color) for color in PALETTE[:8]]
    else:
        assert tuple(cfg.classes) == EASY_CLASSES
        assert [tuple(color) for color in cfg.palette] == [tuple(color) for color in PALETTE[1:8]]


@pytest.mark.parametrize("path", [*SEG, *DET], ids=lambda p: p.stem)
def test_toy_data_fits_over_every_config(path: Path) -> None:
    cfg = load_config(path, data="toy")
    heads = cfg.model.decode_head if cfg.default_scope == "mmseg" else cfg.model.roi_head.bbox_head
    for head in heads if isinstance(heads, list) else [heads]:
        assert head.num_classes == len(cfg.train_dataloader.dataset.metainfo.classes)
    assert cfg.model.backbone.arch == load_config(path).model.backbone.arch


def test_formatting_a_config_again_is_free_and_gives_the_same_text() -> None:
    cfg = load_config(SEG[0])
    first = cfg.pretty_text
    known = config_module.FormatCode.remembered.cache_info().misses
    assert cfg.pretty_text == first
    assert config_module.FormatCode.remembered.cache_info().misses == known
    assert Config.fromstring(first, ".py").model == cfg.model
