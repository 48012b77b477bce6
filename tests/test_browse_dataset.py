"""Browsing a data set: what is drawn and counted is what the training gets, for stock and for light loading."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from vig_backbone.openmmlab.configuration import load_config
from vig_backbone.openmmlab.errors import ConfigError, DataError
from vig_backbone.openmmlab.fast_loading import use_fast_loading
from vig_backbone.openmmlab.report.browse import (
    Steps,
    build_dataset,
    displayable,
    leaf_of,
    load_original,
    pictures,
    view_of,
)
from vig_backbone.openmmlab.report.statistics import detection_statistics, segmentation_statistics

REPOSITORY = Path(__file__).resolve().parents[1]
SEG = "seg_configs/upernet_vig_t.py"
DET = "det_configs/mask_rcnn_hier_vig_t.py"


def toy_config(config: str, toy: Path, split: str = "train", fast: bool = False) -> Config:
    cfg = load_config(REPOSITORY / config, data="toy")
    cfg[f"{split}_dataloader"].dataset.data_root = str(toy / ("coco" if config == DET else "ade"))
    return use_fast_loading(cfg) if fast else cfg


def annotations(toy: Path, split: str) -> dict:
    return json.loads((toy / "coco" / "annotations" / f"instances_{split}2017.json").read_text())


@pytest.mark.parametrize("fast", [False, True])
def test_objects_after_the_pipeline_are_those_that_training_gets(toy_data: Path, fast: bool) -> None:
    cfg = toy_config(DET, toy_data, fast=fast)
    cfg.train_dataloader.dataset.pipeline[2].prob = 1.0  # every image is mirrored
    dataset = build_dataset(cfg, "train")
    for index in range(3):
        view, original = view_of(dataset[index]), view_of(load_original(dataset, index))
        assert view.image.shape == original.image.shape == (64, 64, 3)
        assert (view.image == original.image[:, ::-1]).all()
        assert (view.masks == original.masks[:, :, ::-1]).all()
        assert (view.labels == original.labels).all()
        mirrored = original.boxes.copy()
        mirrored[:, [0, 2]] = 64 - original.boxes[:, [2, 0]]
        np.testing.assert_allclose(view.boxes, mirrored, atol=1e-4)


@pytest.mark.parametrize("fast", [False, True])
def test_labels_after_the_pipeline_are_those_that_training_gets(toy_data: Path, fast: bool) -> None:
    cfg = toy_config(SEG, toy_data, fast=fast)
    pipeline = cfg.train_dataloader.dataset.pipeline
    del pipeline[2:4]  # resizing and cropping
    pipeline[2].prob = 1.0
    dataset = build_dataset(cfg, "train")
    view, original = view_of(dataset[0]), view_of(load_original(dataset, 0))
    assert (view.label_map == original.label_map[:, ::-1]).all()
    assert (view.image == original.image[:, ::-1]).all()
    name = Path(dataset.get_data_info(0)["seg_map_path"]).name
    raw = np.asarray(Image.open(toy_data / "ade" / "annotations" / "training" / name))
    assert (original.label_map == np.where(raw == 0, 255, raw - 1)).all()  # reduce_zero_label


@pytest.mark.parametrize("config", [SEG, DET])
def test_steps_are_those_of_the_pipeline(toy_data: Path, config: str) -> None:
    cfg = toy_config(config, toy_data)
    expected = [transform.type for transform in cfg.train_dataloader.dataset.pipeline]
    dataset = build_dataset(cfg, "train")
    plain = view_of(load_original(dataset, 0))
    steps = Steps(dataset)
    for index in (0, 1, 0):
        taken = steps.of(index)
        assert [title.split()[0] for title, _ in taken] == expected
    first, second = taken[0][1], taken[1][1]
    assert (first.image == plain.image).all()
    assert first.boxes is None
    assert first.label_map is None  # before the annotations are loaded
    assert (second.boxes is not None) == (config == DET)
    assert (second.label_map is not None) == (config == SEG)
    assert all("x" in title for title, _ in taken)


def test_steps_of_a_mosaic_are_those_of_its_first_image_and_its_own(toy_data: Path) -> None:
    cfg = toy_config(DET, toy_data)
    inner = cfg.train_dataloader.dataset
    inner.pipeline = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True)]
    mix = [dict(type="Mosaic", img_scale=(64, 64), pad_val=114.0), dict(type="PackDetInputs")]
    cfg.train_dataloader.dataset = dict(type="MultiImageMixDataset", dataset=inner, pipeline=mix)
    dataset = build_dataset(cfg, "train")
    plain = view_of(load_original(dataset, 5))
    taken = Steps(dataset).of(5)
    names = [title.split()[0] for title, _ in taken]
    assert names == ["LoadImageFromFile", "LoadAnnotations", "Mosaic", "PackDetInputs"]
    assert (taken[0][1].image == plain.image).all()
    assert taken[2][1].image.shape[:2] == (128, 128)
    assert len(taken[2][1].boxes) >= len(taken[1][1].boxes)


def test_sample_is_found_inside_of_wrappers(toy_data: Path) -> None:
    cfg = toy_config(DET, toy_data)
    inner = cfg.train_dataloader.dataset
    twice = dict(type="RepeatDataset", times=2, dataset=inner)
    cfg.train_dataloader.dataset = dict(type="ConcatDataset", datasets=[inner, twice])
    dataset = build_dataset(cfg, "train")
    count = len(annotations(toy_data, "train")["images"])
    assert len(dataset) == 3 * count
    first = leaf_of(dataset, 1)[0].get_data_info(1)["img_path"]
    for index in (1, count + 1, 2 * count + 1):
        leaf, place = leaf_of(dataset, index)
        assert place == 1
        assert leaf.get_data_info(place)["img_path"] == first


def test_objects_of_each_class_are_counted(toy_data: Path) -> None:
    dataset = build_dataset(toy_config(DET, toy_data), "train")
    content, found = annotations(toy_data, "train"), detection_statistics(dataset)
    names = {category["id"]: category["name"] for category in content["categories"]}
    for name, objects, share, images, small, medium, large in found.rows:
        mine = [a for a in content["annotations"] if names[a["category_id"]] == name]
        assert objects == len(mine) == small + medium + large
        assert images == len({a["image_id"] for a in mine})
        assert share == pytest.approx(100 * len(mine) / len(content["annotations"]))
        assert small == sum(a["bbox"][2] * a["bbox"][3] < 32**2 for a in mine)
    assert found.facts["objects"] == len(content["annotations"])
    assert found.facts["median image"] == "64 x 64"


def test_pixels_of_each_class_are_counted(toy_data: Path) -> None:
    dataset = build_dataset(toy_config(SEG, toy_data, "val"), "val")
    found = segmentation_statistics(dataset, most=100)
    maps = [np.asarray(Image.open(file)) for file in (toy_data / "ade" / "annotations" / "validation").glob("*.png")]
    for i, (_, pixels, share, images) in enumerate(found.rows):
        assert pixels == sum((each == i + 1).sum() for each in maps)
        assert images == sum((each == i + 1).any() for each in maps)
        assert 0 <= share <= 100
    assert sum(row[1] for row in found.rows) == len(maps) * 64 * 64
    assert found.facts["label maps read"] == len(maps)
    assert segmentation_statistics(dataset, most=2).facts["label maps read"] == 2


def test_images_of_any_type_can_be_shown() -> None:
    blue = np.zeros((2, 3, 3), dtype=np.uint8)
    blue[..., 0] = 255
    assert displayable(blue)[0, 0].tolist() == [0, 0, 255]
    assert displayable(blue.astype(np.float32))[0, 0].tolist() == [0, 0, 255]
    normalised = displayable(torch.randn(4, 5, 3).numpy())
    assert (normalised.min(), normalised.max()) == (0, 255)
    assert displayable(np.full((2, 3), 7, dtype=np.uint8)).tolist() == np.full((2, 3, 3), 7).tolist()


def test_crowds_are_left_out_of_pictures_but_counted(photos: Path) -> None:
    cfg = load_config(REPOSITORY / DET)
    cfg.val_dataloader.dataset.data_root = str(photos / "coco")
    dataset = build_dataset(cfg, "val")
    infos = [dataset.get_data_info(i)["instances"] for i in range(len(dataset))]
    crowds = [i for i, each in enumerate(infos) if any(instance["ignore_flag"] for instance in each)]
    assert crowds
    assert detection_statistics(dataset).facts["crowd regions"] >= len(crowds)
    view = view_of(load_original(dataset, crowds[0]))
    assert len(view.boxes) == len(view.masks) == sum(not each["ignore_flag"] for each in infos[crowds[0]])


def test_broken_file_is_named(toy_data: Path) -> None:
    dataset = build_dataset(toy_config(DET, toy_data), "train")
    dataset.pipeline.transforms[0] = lambda results: (_ for _ in ()).throw(OSError("cut off"))
    with pytest.raises(DataError, match=r"sample 0 \(.*\.jpg\).*cut off"):
        list(pictures(dataset, [0], "transformed", []))


def test_split_that_is_not_there_is_named(toy_data: Path) -> None:
    cfg = toy_config(DET, toy_data)
    cfg.val_dataloader = None
    with pytest.raises(ConfigError, match="no val_dataloader"):
        build_dataset(cfg, "val")
    cfg.train_dataloader.dataset.data_root = "nowhere"
    with pytest.raises(DataError, match="nowhere"):
        build_dataset(cfg, "train")


@pytest.mark.parametrize("config", [SEG, DET])
def test_tool_writes_pictures_and_numbers(run_python: Callable, toy_data: Path, tmp_path: Path, config: str) -> None:
    root = f"train_dataloader.dataset.data_root={toy_data / ('coco' if config == DET else 'ade')}"
    options = ["--data", "toy", "--count", 2, "--json", tmp_path / "a.json", "--shuffle", "--cfg-options", root]
    process = run_python("tools/browse_dataset.py", config, "--stage", "pipeline", "--out", tmp_path, *options)
    assert "2 pictures" in process.stdout
    assert "circle" in process.stdout
    files = sorted(tmp_path.glob("*.png"))
    assert len(files) == 2
    with Image.open(files[0]) as picture:
        assert picture.width > 3 * 320  # steps side by side
    assert json.loads((tmp_path / "a.json").read_text())["facts"]["images"] == 16
