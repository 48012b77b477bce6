"""The lighter data loading gives what mmdet's and mmseg's own gives: samples, batches, inputs of the model."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import vig_backbone  # noqa: F401 - mmcv's operators

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
import pycocotools.mask
from mmengine.config import Config, ConfigDict
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, TRANSFORMS, init_default_scope
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import Tensor

from vig_backbone.openmmlab.configuration import load_config
from vig_backbone.openmmlab.errors import ConfigError
from vig_backbone.openmmlab.fast_loading import use_fast_loading, use_stock_loading
from vig_backbone.openmmlab.image_tensors import contiguous, image_tensor

DET, SEG = "det_configs/mask_rcnn_vig_t.py", "seg_configs/upernet_vig_t.py"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def numbers(value: Any) -> Any:
    """Boxes, masks and tensors as arrays; others as they are."""
    if hasattr(value, "to_ndarray"):
        return value.to_ndarray()
    value = getattr(value, "tensor", value)
    return value.numpy() if isinstance(value, Tensor) else value


def assert_same(found: Any, expected: Any, widen: bool = False) -> None:
    """Equal to the bit, through dicts, lists and data elements; `widen`: 8-bit labels stand for 64-bit ones."""
    if isinstance(expected, BaseDataElement):
        assert_same(dict(found.metainfo_items()), dict(expected.metainfo_items()))
        assert_same(dict(found.items()), dict(expected.items()), widen)
    elif isinstance(expected, dict):
        assert set(found) == set(expected)
        for key in expected:
            assert_same(found[key], expected[key], widen)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected):
            assert_same(*pair, widen)
    else:
        found, expected = numbers(found), numbers(expected)
        if isinstance(expected, np.ndarray):
            assert found.dtype == (
                np.uint8 if widen and expected.dtype == np.int64 and expected.ndim == 3 else expected.dtype
            )
        np.testing.assert_array_equal(found, expected)


def both(cfg: Config) -> tuple[Config, Config]:
    init_default_scope(cfg.default_scope)
    return use_stock_loading(copy.deepcopy(cfg)), use_fast_loading(copy.deepcopy(cfg))


# ---- real photos


@pytest.fixture
def photo_configs(photos: Path) -> Callable[[str], Config]:
    def config(recipe: str) -> Config:
        cfg = load_config(recipe)
        dataset = cfg.train_dataloader.dataset
        if recipe == DET:
            dataset.update(data_root=str(photos / "coco"), filter_cfg=None, indices=12)
            return cfg
        folders = dict(img_path=str(photos / "coco/train2017"), seg_map_path="annotations/training")
        classes = json.loads((photos / "ade" / "classes.json").read_text())
        dataset.update(data_root=str(photos / "ade"), data_prefix=folders, metainfo=dict(classes=classes), indices=12)
        dataset.type, dataset.img_suffix, dataset.seg_map_suffix = "BaseSegDataset", ".jpg", ".png"
        dataset.reduce_zero_label = True
        return cfg

    return config


@pytest.mark.parametrize("recipe", [DET, SEG])
def test_samples_of_photos_are_equal(recipe: str, photo_configs: Callable) -> None:
    stock, fast = (DATASETS.build(cfg.train_dataloader.dataset) for cfg in both(photo_configs(recipe)))
    flips = set()
    for i in range(len(stock)):
        np.random.seed(i)
        expected = stock[i]
        np.random.seed(i)
        found = fast[i]
        flips.add(expected["data_samples"].flip)
        assert_same(found, expected, widen=True)
    assert flips == {True, False}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("recipe", [DET, SEG])
def test_inputs_of_the_model_are_equal(recipe: str, workers: int, photo_configs: Callable) -> None:
    inputs = []
    for cfg in both(photo_configs(recipe)):
        cfg.train_dataloader.update(num_workers=workers, persistent_workers=False, batch_size=3)
        cfg.train_dataloader.sampler = dict(type="DefaultSampler", shuffle=False)
        preprocessor = MODELS.build(cfg.model.data_preprocessor)
        np.random.seed(0)
        inputs.append([preprocessor(batch, True) for batch in Runner.build_dataloader(cfg.train_dataloader, seed=0)])
    stock, fast = inputs
    assert len(stock) >= 4
    assert_same(fast, stock)
    assert {each["inputs"].is_contiguous() for each in fast} == {True}


# ---- the step of a whole model


@pytest.mark.parametrize("recipe", [DET, SEG])
def test_losses_are_equal(recipe: str, toy_data: Path) -> None:
    cfg = load_config(recipe, "toy")
    cfg.train_dataloader.dataset.data_root = str(toy_data / ("coco" if recipe == DET else "ade"))
    cfg.train_dataloader.update(num_workers=0, persistent_workers=False, batch_size=2)
    losses = []
    for variant in both(cfg):
        torch.manual_seed(0)
        np.random.seed(0)
        model = revert_sync_batchnorm(MODELS.build(variant.model)).train()
        wrapper = build_optim_wrapper(model, variant.optim_wrapper)
        batch = next(iter(Runner.build_dataloader(variant.train_dataloader, seed=0)))
        losses.append({name: float(loss) for name, loss in model.train_step(batch, wrapper).items()})
    assert losses[0] == losses[1]
    assert losses[0]["loss"] > 0


# ---- transforms on what photos do not have


def run(transforms: list[dict], sample: dict, seed: int = 0) -> dict:
    np.random.seed(seed)
    sample = copy.deepcopy(sample)
    for transform in transforms:
        sample = TRANSFORMS.build(transform)(sample)
    return sample


def encoded(mask: np.ndarray) -> dict:
    rle = pycocotools.mask.encode(np.asfortranarray(mask))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


def det_sample(size: tuple[int, int], masks: list) -> dict:
    rng = np.random.default_rng(0)
    instances = [
        dict(bbox=[1.0 + i, 2.0, size[1] - 2.5 - i, size[0] - 0.5], bbox_label=i, ignore_flag=int(i == 2), mask=mask)
        for i, mask in enumerate(masks)
    ]
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    return dict(img=image, img_shape=size, ori_shape=size, height=size[0], width=size[1], instances=instances)


def masks_of_every_kind(size: tuple[int, int]) -> list:
    """Polygons (one of two parts, one invalid), a crowd, both kinds of run lengths, a broken RLE."""
    H, W = size
    blob = np.zeros(size, dtype=np.uint8)
    blob[H // 4 : H // 2, W // 3 :] = 1
    triangle = [1.0, 1.5, W - 2.0, H / 3, 4.0, H - 1.0]
    return [
        [triangle],
        [triangle, [0.0, 0.0, 5.0, 0.0, 5.0, 5.0, 0.0, 5.0]],
        encoded(1 - blob),
        [[1.0, 2.0, 3.0, 4.0]],
        encoded(blob),
        {"size": list(size), "counts": [H * W - 7, 7]},
        {"size": list(size)},
    ]


DET_CHANGES = {
    "resized": [dict(type="Resize", scale=(133, 80), keep_ratio=True)],
    "squeezed": [dict(type="Resize", scale=(60, 99), keep_ratio=False)],
    "one of several sizes": [dict(type="RandomChoiceResize", scales=[(90, 70), (120, 66)], keep_ratio=True)],
    "mirrored": [dict(type="RandomFlip", prob=1.0)],
    "upside down": [dict(type="RandomFlip", prob=1.0, direction="vertical")],
    "turned": [dict(type="RandomFlip", prob=1.0, direction="diagonal")],
    "cropped": [dict(type="RandomCrop", crop_size=(20, 30), allow_negative_crop=True)],
    "boxes from crops": [dict(type="RandomCrop", crop_size=(30, 30), allow_negative_crop=True, recompute_bbox=True)],
    "padded": [dict(type="Pad", size=(99, 120))],
    "filtered": [dict(type="FilterAnnotations", min_gt_bbox_wh=(1, 1), by_mask=True, min_gt_mask_area=8)],
}


@pytest.mark.parametrize("name", DET_CHANGES)
@pytest.mark.parametrize("objects", [7, 0])
@pytest.mark.parametrize("size", [(47, 61), (7, 33)])
def test_detection_transforms_are_equal(name: str, objects: int, size: tuple[int, int]) -> None:
    init_default_scope("mmdet")
    sample = det_sample(size, masks_of_every_kind(size)[:objects])
    found, expected = (
        run([dict(type=load, with_bbox=True, with_mask=True), *DET_CHANGES[name], dict(type=pack)], sample)
        for load, pack in (("FastLoadDetAnnotations", "FastPackDetInputs"), ("LoadAnnotations", "PackDetInputs"))
    )
    assert_same(found, expected)
    assert (len(expected["data_samples"].gt_instances) > 0) == (objects > 0)


def test_run_lengths_of_another_image_are_refused() -> None:
    init_default_scope("mmdet")
    sample = det_sample((20, 30), [encoded(np.ones((30, 20), dtype=np.uint8))])
    with pytest.raises(ValueError, match=r"a mask of \[30, 20\] \(height, width\) in an image of \[20, 30\]"):
        run([dict(type="FastLoadDetAnnotations", with_mask=True)], sample)


def test_polygons_can_stay_polygons() -> None:
    init_default_scope("mmdet")
    sample = det_sample((20, 30), masks_of_every_kind((20, 30)))
    found = run([dict(type="FastLoadDetAnnotations", with_mask=True, poly2mask=False)], sample)
    assert type(found["gt_masks"]).__name__ == "PolygonMasks"


def seg_sample(size: tuple[int, int], classes: int = 4, dtype: type = np.uint8) -> dict:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    labels = cv2.resize(rng.integers(0, classes, (3, 3), dtype=np.uint8), size[::-1], interpolation=cv2.INTER_NEAREST)
    labels[: size[0] // 5] = 255
    return dict(img=image, img_shape=size, ori_shape=size, gt_seg_map=labels.astype(dtype), seg_fields=["gt_seg_map"])


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
@pytest.mark.parametrize("size", [(90, 71), (30, 41), (32, 200)], ids=["larger", "smaller", "wider"])
@pytest.mark.parametrize("seed", range(8))
def test_segmentation_transforms_are_equal(seed: int, size: tuple[int, int], dtype: type) -> None:
    init_default_scope("mmseg")
    steps = ("RandomCrop", "RandomFlip", "PhotoMetricDistortion", "PackSegInputs")
    options = (dict(crop_size=(32, 48), cat_max_ratio=0.75), dict(prob=0.5, direction="vertical"), {}, {})
    stock = [dict(type=step, **option) for step, option in zip(steps, options)]
    fast = [dict(step, type=step["type"] if "Flip" in step["type"] else "Fast" + step["type"]) for step in stock]
    sample = seg_sample(size, dtype=dtype)
    expected, next_number = run(stock, sample, seed), np.random.randint(1 << 30)
    assert_same(run(fast, sample, seed), expected, widen=dtype == np.uint8)
    assert np.random.randint(1 << 30) == next_number


@pytest.mark.parametrize(("classes", "ratio"), [(1, 0.75), (2, 0.5), (4, 0.3), (4, 1.0)])
def test_crops_are_tried_equally_often(classes: int, ratio: float) -> None:
    init_default_scope("mmseg")
    sample = seg_sample((120, 150), classes)
    for ignore in (255, 0, -100):
        options = dict(crop_size=(40, 40), cat_max_ratio=ratio, ignore_index=ignore)
        for seed in range(10):
            found, expected = (run([dict(type=t, **options)], sample, seed) for t in ("FastRandomCrop", "RandomCrop"))
            np.testing.assert_array_equal(found["img"], expected["img"])


def test_colours_of_every_pair_of_changes_are_equal() -> None:
    init_default_scope("mmseg")
    sample = seg_sample((64, 65))
    changed = 0
    for seed in range(40):
        names = ("FastPhotoMetricDistortion", "PhotoMetricDistortion")
        found, expected = (run([dict(type=name)], sample, seed)["img"] for name in names)
        np.testing.assert_array_equal(found, expected)
        changed += not np.array_equal(expected, sample["img"])
    assert changed > 20


def test_colours_of_floating_point_images_are_refused() -> None:
    sample = dict(img=np.zeros((4, 4, 3), np.float32))
    with pytest.raises(TypeError, match="changes uint8 images, not float32"):
        run([dict(type="FastPhotoMetricDistortion")], sample)


@pytest.mark.parametrize("shape", [(5, 7, 3), (5, 7), (5, 7, 1), (1, 1, 3), (0, 4, 3)])
def test_mirrored_and_cropped_views_become_contiguous(shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for view in (image, image[::-1], image[:, ::-1], image[::-1, ::-1], image[1:4, 2:], image[1:4, 2:][:, ::-1]):
        np.testing.assert_array_equal(contiguous(view), view)
        assert contiguous(view).flags.c_contiguous
        assert image_tensor(view).shape == (shape[2] if len(shape) == 3 else 1, *view.shape[:2])


# ---- into and out of a config


def types(cfg: Config) -> list[str]:
    return [transform.type for transform in cfg.train_dataloader.dataset.pipeline]


@pytest.mark.parametrize("recipe", [DET, SEG])
def test_config_is_changed_and_changed_back(recipe: str) -> None:
    before = use_stock_loading(load_config(recipe))
    cfg = use_fast_loading(copy.deepcopy(before))
    assert cfg.model.data_preprocessor.type.startswith("Fast")
    assert cfg.train_dataloader.collate_fn == dict(type="packed_collate")
    assert cfg.train_dataloader.pin_memory == torch.cuda.is_available()
    assert types(cfg)[-1].startswith("FastPack")
    assert "vig_backbone" in cfg.custom_imports.imports
    assert cfg.val_dataloader == before.val_dataloader
    once = cfg.pretty_text
    assert use_fast_loading(cfg).pretty_text == once
    assert types(use_stock_loading(cfg)) == types(before)
    assert cfg.model == before.model
    assert cfg.train_dataloader.collate_fn == dict(type="pseudo_collate")


def test_masks_stay_bitmaps_where_a_transform_reads_them() -> None:
    cfg = use_stock_loading(load_config(DET))
    cfg.train_dataloader.dataset.pipeline.insert(2, ConfigDict(type="CopyPaste"))
    assert types(use_fast_loading(cfg))[1] == "LoadAnnotations"
    assert types(cfg)[-1] == "FastPackDetInputs"


def test_labels_stay_wide_for_another_preprocessor() -> None:
    cfg = use_stock_loading(load_config(SEG))
    cfg.model.data_preprocessor.type = cfg.data_preprocessor.type = "MyPreprocessor"
    use_fast_loading(cfg)
    assert types(cfg)[-1] == "PackSegInputs"
    assert "FastRandomCrop" in types(cfg)
    assert cfg.train_dataloader.collate_fn.type == "pseudo_collate"


def test_wrapped_data_sets_and_inner_pipelines_are_found() -> None:
    cfg = use_stock_loading(load_config(DET))
    inner = cfg.train_dataloader.dataset
    choices = [[dict(type="RandomFlip", prob=0.5), dict(type="mmdet.PackDetInputs")]]
    inner.pipeline = [*inner.pipeline[:2], dict(type="RandomChoice", transforms=choices)]
    cfg.train_dataloader.dataset = ConfigDict(
        type="RepeatDataset", times=2, dataset=dict(type="ConcatDataset", datasets=[inner])
    )
    use_fast_loading(cfg)
    (found,) = cfg.train_dataloader.dataset.dataset.datasets
    assert found.pipeline[1].type == "FastLoadDetAnnotations"
    assert found.pipeline[2].transforms[0][1].type == "FastPackDetInputs"


def test_names_are_there_without_the_packages_behind_them(run_python: Callable) -> None:
    code = """
import sys
import vig_backbone
from mmengine.registry import FUNCTIONS, MODELS, TRANSFORMS
assert TRANSFORMS.get("FastLoadDetAnnotations") and TRANSFORMS.get("FastPackSegInputs")
assert MODELS.get("FastDetPreprocessor") and FUNCTIONS.get("packed_collate")
assert not {"mmdet", "mmseg"} & set(sys.modules), "mmdet and mmseg take seconds to import"
"""
    run_python("-c", code)


def test_own_collate_function_stays() -> None:
    cfg = use_stock_loading(load_config(DET))
    cfg.train_dataloader.collate_fn = dict(type="default_collate")
    assert use_fast_loading(cfg).train_dataloader.collate_fn.type == "default_collate"


@pytest.mark.parametrize("recipe", [DET, SEG])
def test_recipes_have_it(recipe: str) -> None:
    """Their pipelines are the stock ones in lighter transforms."""
    cfg = load_config(recipe)
    fast = use_fast_loading(copy.deepcopy(cfg))
    assert fast.train_dataloader.dataset == cfg.train_dataloader.dataset
    assert fast.model == cfg.model
    package = "mmdet::_base_/datasets/coco_instance.py" if recipe == DET else "mmseg::_base_/datasets/ade20k.py"
    stock = Config.fromstring(f"_base_ = [{package!r}]", ".py").train_dataloader.dataset.pipeline

    def settings(pipeline: list) -> list[dict]:
        return [{k: v for k, v in step.items() if k != "backend_args"} for step in pipeline]

    assert settings(use_stock_loading(cfg).train_dataloader.dataset.pipeline) == settings(stock)


def test_unknown_scope_is_refused() -> None:
    cfg = load_config(DET)
    cfg.default_scope = "mmpose"
    with pytest.raises(ConfigError, match="default_scope='mmpose': there is data loading for mmdet and mmseg"):
        use_fast_loading(cfg)
