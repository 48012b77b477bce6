"""Predictions for a user's images and videos: any kind of file, in order, past broken ones, as pictures and files."""

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import cv2
import mmcv
import numpy as np
import pytest
import torch
from inference_models import CONFIGS, REPOSITORY, picture, saved, write_checkpoints
from mmengine.registry import DefaultScope
from PIL import Image, ImageOps

from vig_backbone import CheckpointError
from vig_backbone.openmmlab.complexity.run import build_model
from vig_backbone.openmmlab.configuration import load_config
from vig_backbone.openmmlab.errors import ConfigError, DataError
from vig_backbone.openmmlab.inference import (
    Detections,
    Failure,
    ImageError,
    LabelMap,
    Painter,
    Predictor,
    find_sources,
    predict_sources,
    read_image,
)
from vig_backbone.openmmlab.inference.drawing import MAP_OPACITY
from vig_backbone.openmmlab.inference.model import _metainfo, _num_classes, distinct_colors
from vig_backbone.openmmlab.inference.video import VideoReader, VideoWriter

Predictors = dict[str, Predictor]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def predictors(checkpoints: dict[str, Path]) -> Predictors:
    return {task: Predictor(CONFIGS[task], checkpoints[task], data="toy", device="cpu") for task in CONFIGS}


@pytest.fixture(params=list(CONFIGS))
def predictor(request: pytest.FixtureRequest, predictors: Predictors) -> Predictor:
    return predictors[request.param]


@pytest.fixture
def tool() -> Iterator[ModuleType]:
    sys.path.insert(0, str(REPOSITORY / "tools"))  # as for a script
    yield importlib.import_module("infer")
    sys.path.remove(str(REPOSITORY / "tools"))


def video(path: Path, frames: int = 5, size: tuple[int, int] = (64, 96)) -> Path:
    writer = VideoWriter(path, 10.0, size)
    for seed in range(frames):
        writer.write(picture(*size, seed=seed))
    writer.close()
    return path


def equal(one: Detections | LabelMap, other: Detections | LabelMap) -> bool:
    """To rounding, which decides between classes whose logits are almost the same."""
    if isinstance(one, LabelMap):
        return one.size == other.size and bool((one.labels == other.labels).mean() > 0.995)
    return len(one) == len(other) and bool(
        np.allclose(one.boxes, other.boxes, atol=0.05)
        and np.allclose(one.scores, other.scores, atol=1e-4)
        and np.array_equal(one.labels, other.labels)
    )


# ---- the predictor


def test_results_are_those_of_mmdet_and_mmseg(predictors: Predictors, tmp_path: Path) -> None:
    from mmdet.apis import inference_detector
    from mmseg.apis import inference_model

    file = saved(tmp_path / "a.png", 90, 70)
    for task, infer in (("detection", inference_detector), ("segmentation", inference_model)):
        predictor = predictors[task]
        predictor.model.cfg = load_config(CONFIGS[task], data="toy")
        with DefaultScope.overwrite_default_scope(predictor.model.cfg.default_scope):
            expected = infer(predictor.model, str(file))
        (result,) = predictor(file)
        if task == "segmentation":
            assert np.array_equal(result.labels, expected.pred_sem_seg.data[0].numpy())
        else:
            found = expected.pred_instances
            order = found.scores.argsort(descending=True, stable=True)
            assert len(result) > 0
            assert np.allclose(result.boxes, found.bboxes[order].numpy())
            assert np.array_equal(result.labels, found.labels[order].numpy())
            assert np.array_equal(result.masks, found.masks[order].numpy())


def test_batches_of_any_sizes_give_the_results_of_each_image_alone_in_order(predictor: Predictor) -> None:
    images = [picture(64, 96, 0), picture(80, 64, 1), picture(64, 96, 2), picture(72, 72, 3), picture(80, 64, 4)]
    alone = [predictor(image)[0] for image in images]
    assert [result.size for result in alone] == [image.shape[:2] for image in images]
    assert not equal(alone[0], alone[2])
    for batch_size in (2, 5, 8):
        together = predictor(images, batch_size)
        assert len(together) == len(images)
        assert all(map(equal, alone, together))


def test_arrays_are_rgb(predictor: Predictor, tmp_path: Path) -> None:
    file = saved(tmp_path / "a.png")
    of_file, of_array, of_bgr = predictor([file, picture(), picture()[..., ::-1]])
    assert equal(of_file, of_array)
    assert not equal(of_file, of_bgr)


@pytest.mark.parametrize("shape", [(64, 64, 2), (64,), (0, 64, 3)], ids=str)
def test_arrays_that_are_no_images_are_refused(predictors: Predictors, shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match=re.escape(str(shape))):
        predictors["segmentation"](np.zeros(shape, np.uint8))


def test_arrays_of_fractions_are_refused(predictors: Predictors) -> None:
    with pytest.raises(ImageError, match="float64, expected uint8"):
        predictors["segmentation"](picture() / 255)


def test_image_smaller_than_a_patch_is_refused(predictors: Predictors) -> None:
    with pytest.raises(ImageError, match="9 x 8 pixels"):
        predictors["segmentation"](picture(8, 9))


def test_detections_are_sorted_named_and_cut_at_a_threshold(predictors: Predictors) -> None:
    (result,) = predictors["detection"](picture())
    assert len(result) > 1
    assert list(result.scores) == sorted(result.scores, reverse=True)
    assert result.names[0] == result.classes[result.labels[0]]
    assert result.masks.shape == (len(result), 64, 96)
    threshold = float(result.scores[len(result) // 2])
    kept = result.above(threshold)
    assert 0 < len(kept) < len(result)
    assert kept.scores.min() >= threshold
    assert np.array_equal(kept.masks, result.masks[: len(kept)])
    none = result.above(1.1)
    assert len(none) == 0
    assert none.masks.shape == (0, 64, 96)


def test_mixed_precision_and_test_time_augmentation_change_little(
    predictors: Predictors, checkpoints: dict[str, Path]
) -> None:
    make = {task: partial(Predictor, CONFIGS[task], checkpoints[task], data="toy", device="cpu") for task in CONFIGS}
    (plain,) = predictors["segmentation"](picture())
    (half,) = make["segmentation"](amp="bfloat16")(picture())
    assert (plain.labels == half.labels).mean() > 0.9
    (merged,) = make["segmentation"](tta=True)(picture())
    assert merged.size == plain.size
    (boxes,) = make["detection"](tta=True)(picture())
    assert boxes.size == (64, 96)
    assert boxes.rles is None  # mmdet merges boxes alone
    assert boxes.masks is None


def test_window_segments_at_full_resolution(checkpoints: dict[str, Path]) -> None:
    cfg = load_config(CONFIGS["segmentation"], data="toy")
    cfg.test_dataloader.dataset.pipeline.insert(1, dict(type="Resize", scale=(64, 64), keep_ratio=True))
    image = picture(80, 200)
    shapes = []
    for window in (None, 64):
        predictor = Predictor(cfg, checkpoints["segmentation"], device="cpu", window=window)
        shapes.append(tuple(predictor.prepare(image)["inputs"].shape[1:]))
        assert predictor(image)[0].size == (80, 200)
    assert shapes == [(26, 64), (80, 200)]
    assert predictor.model.test_cfg.crop_size == (64, 64)
    assert predictor.model.test_cfg.stride == (43, 43)
    assert "crop_size" not in cfg.model.test_cfg  # the caller's config stays as it is


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(window=512), "detectors see an image as a whole"),
        (dict(amp="int8"), "amp='int8': expected one of 'bfloat16', 'float16'"),
        (dict(device="gpu9"), "--device gpu9"),
        (dict(data="cityscapes"), "there is no .*data_cityscapes"),
    ],
)
def test_settings_that_cannot_work_are_named(checkpoints: dict[str, Path], settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Predictor(CONFIGS["detection"], checkpoints["detection"], **{"data": "toy", **settings})


def test_options_for_a_loaded_config_are_refused(checkpoints: dict[str, Path]) -> None:
    cfg = load_config(CONFIGS["detection"], data="toy")
    with pytest.raises(ConfigError, match="this one is loaded already"):
        Predictor(cfg, checkpoints["detection"], data="toy")


def test_pipeline_that_reads_something_else_is_named(checkpoints: dict[str, Path]) -> None:
    cfg = load_config(CONFIGS["segmentation"], data="toy")
    cfg.test_dataloader.dataset.pipeline[0] = dict(type="LoadBiomedicalImageFromFile")
    with pytest.raises(ConfigError, match="LoadBiomedicalImageFromFile"):
        Predictor(cfg, checkpoints["segmentation"], device="cpu")


def test_memory_that_runs_out_says_what_helps(predictors: Predictors, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(data: dict) -> list:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(predictors["segmentation"].model, "test_step", full)
    with pytest.raises(DataError, match=r"--batch-size.*--amp.*--window"):
        predictors["segmentation"](picture())


# ---- checkpoints and classes


def changed(source: Path, target: Path, change: Callable[[dict], None]) -> Path:
    content = torch.load(source, weights_only=True)
    change(content)
    torch.save(content, target)
    return target


def test_checkpoint_of_another_number_of_classes_names_both(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    file = checkpoints["segmentation"]
    with pytest.raises(CheckpointError, match=r"trained on 8 classes \(background, circle.*has 150.*--data"):
        Predictor(CONFIGS["segmentation"], file, device="cpu")
    nameless = changed(file, tmp_path / "nameless.pth", lambda content: content.pop("meta"))
    with pytest.raises(CheckpointError, match=r"of another shape: \(.*decode_head"):
        Predictor(CONFIGS["segmentation"], nameless, device="cpu")


def test_checkpoint_with_a_weight_missing_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    file = changed(checkpoints["detection"], tmp_path / "half.pth", lambda content: content["state_dict"].popitem())
    with pytest.raises(CheckpointError, match=r"half\.pth does not fit the BatchedMaskRCNN.*1 missing"):
        Predictor(CONFIGS["detection"], file, data="toy", device="cpu")
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nothing\.pth"):
        Predictor(CONFIGS["detection"], tmp_path / "nothing.pth", data="toy", device="cpu")


def test_classes_come_from_the_checkpoint_then_from_the_config(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    def renamed(content: dict) -> None:
        content["meta"]["dataset_meta"] = dict(classes=tuple("abcdefgh"))

    load = partial(Predictor, CONFIGS["segmentation"], data="toy", device="cpu")
    own = load(changed(checkpoints["segmentation"], tmp_path / "own.pth", renamed))
    assert own.classes == tuple("abcdefgh")
    assert len(set(own.palette)) == 8  # not those of the config's classes, which are others
    configured = load_config(CONFIGS["segmentation"], data="toy").test_dataloader.dataset.metainfo
    assert list(own.palette) != list(configured.palette)
    nameless = load(changed(checkpoints["segmentation"], tmp_path / "b.pth", lambda content: content["meta"].clear()))
    assert list(nameless.classes) == list(configured.classes)
    assert [list(color) for color in nameless.palette] == [list(color) for color in configured.palette]


@pytest.mark.parametrize(("task", "count", "name"), [("detection", 80, "person"), ("segmentation", 150, "wall")])
def test_data_sets_know_their_classes_without_their_data(task: str, count: int, name: str) -> None:
    importlib.import_module({"detection": "mmdet.datasets", "segmentation": "mmseg.datasets"}[task])
    metainfo = _metainfo(load_config(CONFIGS[task]))
    assert metainfo["classes"][0] == name
    assert len(metainfo["classes"]) == len(metainfo["palette"]) == count


@pytest.mark.parametrize(
    ("config", "count"),
    [("det_configs/cascade_mask_rcnn_vig_adapter_t_3x_ms.py", 80), ("det_configs/mask_rcnn_hier_vig_t.py", 80),
     ("seg_configs/upernet_vig_b_640.py", 150)],
)  # fmt: skip
def test_heads_that_name_what_is_found_are_known(config: str, count: int) -> None:
    assert _num_classes(build_model(load_config(REPOSITORY / config), "meta")) == count


# ---- files of any kind


def write_kind(kind: str, path: Path) -> np.ndarray:
    """Write `picture()` in some kind of file; returns what is to be read, RGB."""
    rgb, image = picture(), Image.fromarray(picture())
    grey = np.asarray(image.convert("L"))
    if kind == "grey":
        Image.fromarray(grey).save(path)
    elif kind == "grey 16 bit":
        Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    elif kind == "RGB 16 bit":
        cv2.imwrite(str(path), rgb[..., ::-1].astype(np.uint16) * 257)
        return rgb
    elif kind == "black and white":
        grey = np.where(grey > 127, 255, 0).astype(np.uint8)
        Image.fromarray(grey).convert("1", dither=Image.Dither.NONE).save(path)
    elif kind == "palette":
        image = image.quantize(64)
        image.save(path)
        return np.asarray(image.convert("RGB"))
    else:
        image = {"RGBA": lambda: image.putalpha(77) or image, "CMYK": lambda: image.convert("CMYK")}.get(
            kind, lambda: image
        )()
        image.save(path, quality=95)
        return rgb
    return np.repeat(grey[..., None], 3, axis=2)


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        *(("grey", suffix) for suffix in ("png", "jpg", "tif")),
        *(("grey 16 bit", suffix) for suffix in ("png", "tif")),
        *(("RGB 16 bit", suffix) for suffix in ("png", "tiff")),
        *(("CMYK", suffix) for suffix in ("jpg", "tif")),
        *(("RGBA", suffix) for suffix in ("png", "webp")),
        *(("palette", suffix) for suffix in ("png", "gif")),
        ("black and white", "png"),
        *(("RGB", suffix) for suffix in ("jpg", "png", "bmp", "webp", "ppm")),
    ],
)
def test_every_kind_of_image_is_read_as_rgb(kind: str, suffix: str, tmp_path: Path, predictors: Predictors) -> None:
    path = tmp_path / f"image.{suffix}"
    expected = write_kind(kind, path)
    image = read_image(path)
    assert image.shape == (64, 96, 3)
    assert image.dtype == np.uint8
    assert np.abs(image.astype(int) - expected).mean() < 4  # what lossy kinds lose
    assert np.array_equal(image[..., ::-1], mmcv.imread(str(path)))  # what models were trained on
    assert predictors["segmentation"](path)[0].size == (64, 96)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_as_their_exif_says(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture()).save(tmp_path / "a.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    image = read_image(tmp_path / "a.jpg")
    assert image.shape == upright.shape == ((96, 64, 3) if orientation > 4 else (64, 96, 3))
    assert np.abs(image.astype(int) - upright).mean() < 2


def test_damaged_files_say_why(tmp_path: Path) -> None:
    whole = saved(tmp_path / "a.png").read_bytes()
    for name, content, reason in (
        ("empty.png", b"", "empty file"),
        ("cut.png", whole[: len(whole) // 2], "truncated, damaged"),
        ("text.jpg", b"hello", "truncated, damaged or no image"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=reason):
            read_image(tmp_path / name)
    with pytest.raises(ImageError, match="No such file"):
        read_image(tmp_path / "nothing.png")


# ---- what to read


def names(sources: list) -> list[str]:
    return [source.name for source in sources]


def test_folders_are_searched_to_any_depth_in_order(tmp_path: Path) -> None:
    touched(tmp_path, "b/2.jpg", "b/1.JPG", "a/x/3.png", "c.webp", "notes.txt", "b/clip.mp4")
    touched(tmp_path, ".hidden/4.jpg", "b/.5.jpg")
    sources = find_sources([tmp_path])
    assert names(sources) == ["c", "a/x/3", "b/1", "b/2", "b/clip"]
    assert [source.is_video for source in sources] == [False] * 4 + [True]
    assert [source.path.name for source in find_sources([tmp_path], left_out=tmp_path / "b")] == ["c.webp", "3.png"]


def touched(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return [folder / name for name in names]


def test_globs_files_and_folders_keep_their_order_and_each_file_comes_once(tmp_path: Path) -> None:
    touched(tmp_path, "p/1.jpg", "p/2.jpg", "q/deep/1.jpg", "odd.name")
    given = [tmp_path / "p/2.jpg", tmp_path / "odd.name", f"{tmp_path}/**/1.jpg", tmp_path / "p"]
    assert names(find_sources(given)) == ["2", "odd", "p/1", "q/deep/1"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["x/a.jpg", "y/b.jpg"], ["a", "b"]),
        (["x/a.jpg", "y/a.jpg", "y/b.jpg"], ["x/a", "y/a", "b"]),
        (["y/a.jpg", "y/a.png"], ["a_jpg", "a_png"]),
        (["x/a.jpg", "y/a.jpg", "y/a.png"], ["x/a", "y/a_jpg", "y/a_png"]),
        (["y/a.jpg", "y/a.png", "y/a_png.jpg"], ["a_jpg", "a_png", "a_png_2"]),
        (["y/b.c.jpg", "y/b.jpg"], ["b.c", "b"]),
    ],
)
def test_names_are_short_and_never_collide(files: list[str], expected: list[str], tmp_path: Path) -> None:
    assert names(find_sources(touched(tmp_path, *files))) == expected


def test_paths_stay_as_they_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touched(tmp_path, "x/a.jpg", "x/s/b.jpg")
    monkeypatch.chdir(tmp_path)
    found = find_sources(["x/a.jpg", "*/s/*.jpg", tmp_path / "x"])
    assert [str(source.path) for source in found] == ["x/a.jpg", "x/s/b.jpg"]
    assert names(found) == ["a", "x/s/b"]
    assert names(find_sources(["."])) == ["x/a", "x/s/b"]


def test_names_of_two_folders_with_the_same_files_do_not_collide(tmp_path: Path) -> None:
    touched(tmp_path, "x/s/a.jpg", "y/s/a.jpg", "y/b.jpg")
    assert names(find_sources([tmp_path / "x", tmp_path / "y"])) == ["x/s/a", "b", "y/s/a"]


@pytest.mark.parametrize(
    ("given", "message"),
    [("nothing.jpg", "no such file or folder"), ("none*.jpg", "no image or video matches"), (".", "in this folder")],
)
def test_inputs_without_images_are_named(given: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        find_sources([tmp_path / given])


# ---- many files


def test_broken_files_are_reported_in_their_place_and_the_others_go_on(predictor: Predictor, tmp_path: Path) -> None:
    files = [saved(tmp_path / f"{i}.png", seed=i) for i in range(7)]
    for i in (0, 3, 4):
        files[i].write_bytes(b"broken")
    outcomes = list(predict_sources(predictor, find_sources(files), batch_size=2))
    assert [isinstance(outcome, Failure) for outcome in outcomes] == [i in (0, 3, 4) for i in range(7)]
    for i in (1, 2, 5, 6):
        frame, result = outcomes[i]
        assert frame.source.path == files[i]
        assert equal(result, predictor(files[i])[0])
    assert "damaged" in outcomes[3].reason


def test_nothing_but_broken_files_is_no_crash(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"broken")
    (outcome,) = predict_sources(predictor, find_sources([tmp_path]), batch_size=3)
    assert isinstance(outcome, Failure)


def test_videos_are_predicted_frame_by_frame_between_images(predictor: Predictor, tmp_path: Path) -> None:
    files = [saved(tmp_path / "a.png"), video(tmp_path / "b.mp4", frames=5), saved(tmp_path / "c.png")]
    outcomes = list(predict_sources(predictor, find_sources(files), batch_size=2))
    frames = [frame for frame, _ in outcomes]
    assert [frame.number for frame in frames] == [None, 0, 1, 2, 3, 4, None]
    assert frames[1].rate == pytest.approx(10)
    assert equal(outcomes[3][1], predictor(frames[3].image)[0])


@pytest.mark.parametrize("size", [(64, 96), (63, 97)], ids=str)
def test_videos_keep_rate_size_and_pictures(size: tuple[int, int], tmp_path: Path) -> None:
    reader = VideoReader(video(tmp_path / "a.mp4", frames=3, size=size))
    assert reader.rate == pytest.approx(10)
    frames = list(reader)
    H, W = (side - side % 2 for side in size)  # the codec drops an odd row and column
    assert [frame.shape for frame in frames] == [(H, W, 3)] * 3
    assert np.abs(frames[1].astype(int) - picture(*size, seed=1)[:H, :W]).mean() < 12


def test_truncated_video_cannot_be_opened(tmp_path: Path) -> None:
    whole = video(tmp_path / "a.avi.mp4", frames=4)
    assert len(list(VideoReader(whole))) == 4
    whole.write_bytes(whole.read_bytes()[:200])
    with pytest.raises(ImageError, match="cannot be opened as a video"):
        VideoReader(whole)


def test_video_that_ends_early_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = VideoReader(video(tmp_path / "a.mp4", frames=4))

    class Ending:
        frames = 2

        def read(self) -> tuple[bool, np.ndarray]:
            self.frames -= 1
            return self.frames >= 0, picture()

        def get(self, field: int) -> float:
            return 4.0

        def release(self) -> None:
            pass

    monkeypatch.setattr(reader, "_capture", Ending())
    with pytest.raises(ImageError, match="2 frames could be read, 4 are announced"):
        list(reader)


# ---- pictures


def detections(boxes: list, labels: list[int], classes: tuple[str, ...] = ("cat", "dog")) -> Detections:
    from pycocotools import mask

    full = np.zeros((64, 96, len(boxes)), np.uint8, order="F")
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        full[max(y1, 0) : y2, max(x1, 0) : x2, i] = 1
    scores = np.linspace(0.9, 0.5, len(boxes), dtype=np.float32)
    return Detections(np.array(boxes, np.float32), scores, np.array(labels), mask.encode(full), (64, 96), classes)


def test_objects_are_drawn_in_the_colour_of_their_class_above_the_threshold() -> None:
    painter = Painter(("cat", "dog"), [(255, 0, 0), (0, 255, 0)])
    image = np.full((64, 96, 3), 100, np.uint8)
    found = detections([[4, 20, 30, 60], [50, 20, 90, 60]], [0, 1])
    drawn = painter.draw(image, found)
    assert drawn.shape == (256, 384, 3)  # enlarged four times
    assert (image == 100).all()  # not drawn into
    red, green = drawn[160, 60].astype(int), drawn[160, 280].astype(int)
    assert red[0] > 100 > red[1]
    assert green[1] > 100 > green[0]
    assert (drawn[20, 380] == 100).all()
    only_cat = painter.draw(image, found, threshold=0.7)
    assert (only_cat[160, 280] == 100).all()
    assert np.array_equal(only_cat[160, 60], drawn[160, 60])


@pytest.mark.parametrize("boxes", [[], [[-20, -20, 5, 5]], [[90, 60, 200, 300]], [[10, 10, 10, 10]]], ids=str)
def test_odd_boxes_are_drawn_without_a_crash(boxes: list) -> None:
    painter = Painter(("Ωμέγα — длинное имя " * 5, "b"), [(255, 0, 0), (0, 255, 0)])
    found = detections(boxes, [0] * len(boxes), painter.classes)
    assert painter.draw(np.zeros((64, 96, 3), np.uint8), found).shape == (256, 384, 3)


def test_boxes_without_masks_are_drawn_and_written() -> None:
    painter = Painter(("cat", "dog"), [(255, 0, 0), (0, 255, 0)])
    found = replace(detections([[4, 20, 30, 60]], [0]), rles=None)
    drawn = painter.draw(np.full((64, 96, 3), 100, np.uint8), found)
    assert (drawn[160, 16] == (255, 0, 0)).all()  # the box
    assert (drawn[160, 60] == 100).all()  # and nothing in it
    assert found.to_dict()["instances"] == [{"label": 0, "class": "cat", "score": 0.9, "box": [4, 20, 30, 60]}]


def test_label_map_is_blended_and_its_legend_lists_the_classes_present() -> None:
    classes = tuple(f"class number {i}" for i in range(60))
    painter = Painter(classes, distinct_colors(60))
    image = np.full((400, 400, 3), 100, np.uint8)
    two = np.zeros((400, 400), np.uint8)
    two[:, 300:] = 7
    drawn = painter.draw(image, LabelMap(two, classes))
    expected = MAP_OPACITY * painter.palette[7] + (1 - MAP_OPACITY) * 100
    assert np.abs(drawn[200, 350] - expected).max() <= 1
    legend = drawn[:, 400:]
    assert (legend == painter.palette[7]).all(-1).any()
    assert not (legend == painter.palette[8]).all(-1).any()
    many = np.arange(60, dtype=np.uint8).repeat(400)[: 400 * 60].reshape(60, 400)
    many = np.concatenate((many, np.zeros((340, 400), np.uint8)))
    assert painter.draw(image, LabelMap(many, classes)).shape == drawn.shape  # as the frames of a video must


def test_shares_of_classes_add_up_largest_first() -> None:
    labels = np.array([[2, 2, 2], [0, 0, 1]], np.uint8)
    found = LabelMap(labels, ("a", "b", "c", "d"))
    assert list(found.shares()) == [2, 0, 1]
    assert sum(found.shares().values()) == pytest.approx(1)
    assert found.to_dict()["classes"][0] == {"label": 2, "class": "c", "share": 0.5}


# ---- the command


def run_tool(tool: ModuleType, capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str]:
    """Exit code and everything printed."""
    try:
        code = tool.run_command(tool.main, tool.parse_args([*map(str, arguments)]))
    except SystemExit as error:
        code = error.code
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_command_writes_pictures_and_json_of_detections(
    tool: ModuleType, capsys: pytest.CaptureFixture, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    from pycocotools import mask

    photos, out, file = tmp_path / "photos", tmp_path / "photos" / "out", tmp_path / "found.jsonl"
    inputs = [saved(photos / "a.jpg"), saved(photos / "sub" / "a.jpg", 80, 80), video(photos / "clip.mp4", 3)]
    command = ("detection", photos, "--json", file, "--score-threshold", "0.15", "--batch-size", "2")
    for _ in range(2):  # pictures of the first run are no inputs of the second
        code, printed = run_tool(
            tool, capsys, CONFIGS[command[0]], checkpoints[command[0]], *command[1:], "--out", out, "--data", "toy",
            "--device", "cpu",
        )  # fmt: skip
        assert code == 0, printed
    assert "images and frames: 5 in " in printed
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.*")) == [
        "overlays/a.jpg", "overlays/clip.mp4", "overlays/sub/a.jpg"
    ]  # fmt: skip
    assert [frame.shape for frame in VideoReader(out / "overlays" / "clip.mp4")] == [(256, 384, 3)] * 3
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["image"], line.get("frame"), line.get("time")) for line in lines] == [
        (str(inputs[0]), None, None),
        *((str(inputs[2]), i, i / 10) for i in range(3)),
        (str(inputs[1]), None, None),
    ]
    assert lines[-1]["size"] == [80, 80]
    instances = [instance for line in lines for instance in line["instances"]]
    assert instances
    for instance in instances:
        assert instance["score"] >= 0.15
        assert instance["class"] == load_config(CONFIGS["detection"], data="toy").classes[instance["label"]]
        assert mask.decode(instance["mask"]).shape == tuple(instance["mask"]["size"])


def test_command_writes_label_maps_reports_failures_and_goes_on(
    tool: ModuleType, capsys: pytest.CaptureFixture, checkpoints: dict[str, Path], predictors: Predictors,
    tmp_path: Path,
) -> None:  # fmt: skip
    files = [saved(tmp_path / "in" / f"{i}.png", seed=i) for i in range(4)]
    files[1].write_bytes(b"broken")
    out, file = tmp_path / "out", tmp_path / "new" / "shares.jsonl"
    code, printed = run_tool(
        tool, capsys, CONFIGS["segmentation"], checkpoints["segmentation"], tmp_path / "in", "--out", out,
        "--data", "toy", "--device", "cpu", "--label-maps", "--json", file, "--format", "png", "--batch-size", "3",
    )  # fmt: skip
    assert code == 1
    assert "1 of 4 files could not be used" in printed
    assert f"{files[1]}: truncated, damaged" in printed
    assert sorted(path.name for path in (out / "overlays").iterdir()) == ["0.png", "2.png", "3.png"]
    for number in (0, 2, 3):
        with Image.open(out / "label_maps" / f"{number}.png") as image:
            assert image.mode == "P"
            (expected,) = predictors["segmentation"](files[number])
            assert np.array_equal(np.asarray(image), expected.labels)
            assert tuple(image.getpalette()[3:6]) == predictors["segmentation"].palette[1]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [Path(line["image"]).name for line in lines] == ["0.png", "2.png", "3.png"]
    assert sum(each["share"] for each in lines[0]["classes"]) == pytest.approx(1, abs=1e-3)


def test_command_names_mistakes_with_exit_code_2(
    tool: ModuleType, capsys: pytest.CaptureFixture, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    image = saved(tmp_path / "a.png")
    det = (CONFIGS["detection"], checkpoints["detection"])
    for arguments, message in (
        ((*det, tmp_path / "nothing.png"), "no such file or folder"),
        ((*det, image, "--data", "toy", "--label-maps"), "--label-maps: is for segmentation"),
        ((*det, image), "trained on 7 classes"),
        ((*det, image, "--no-overlay"), "nothing is left to write"),
        ((*det, image, "--batch-size", "0"), "--batch-size 0"),
        ((*det, image, "--score-threshold", "30"), "--score-threshold 30"),
        ((*det, image, "--data", "toy", "--json", tmp_path), "cannot be written"),
    ):
        code, printed = run_tool(tool, capsys, *arguments, *(() if "--device" in arguments else ("--device", "cpu")))
        assert code == 2, printed
        assert message in printed
        assert "Traceback" not in printed


def test_interrupted_command_keeps_what_it_has(
    tool: ModuleType, capsys: pytest.CaptureFixture, checkpoints: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def interrupted(*args: object) -> Iterator:
        yield next(predict_sources(*args))
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, "predict_sources", interrupted)
    saved(tmp_path / "a.png")
    saved(tmp_path / "b.png")
    code, printed = run_tool(
        tool, capsys, CONFIGS["segmentation"], checkpoints["segmentation"], tmp_path, "--out", tmp_path / "out",
        "--data", "toy", "--device", "cpu", "--json", tmp_path / "found.jsonl",
    )  # fmt: skip
    assert code == 130
    assert "interrupted; what was done until then is in" in printed
    assert len((tmp_path / "found.jsonl").read_text().splitlines()) == 1
    assert [path.name for path in (tmp_path / "out").rglob("*.jpg")] == ["a.jpg"]


def test_command_line_runs_by_itself_with_windows(run_python, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    saved(tmp_path / "a.png")
    process = run_python(
        *("tools/infer.py", CONFIGS["segmentation"], checkpoints["segmentation"], tmp_path / "*.png"),
        *(
            "--data",
            "toy",
            "--work-dir",
            tmp_path / "work",
            "--window",
            "64",
            "--cfg-options",
            "model.test_cfg.blend=linear",
        ),
    )
    assert "images: 1 in " in process.stdout
    assert (tmp_path / "work" / "infer" / "upernet_vig_t" / "overlays" / "a.jpg").is_file()


def test_example_of_the_documentation_runs(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (REPOSITORY / "docs" / "inference.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "det_configs").symlink_to(REPOSITORY / "det_configs")
    (tmp_path / "epoch_12.pth").symlink_to(checkpoints["detection"])
    for name in ("street.jpg", "beach.jpg"):
        saved(tmp_path / name)
    exec(compile(code, "docs/inference.md", "exec"), {})
    assert (tmp_path / "street_found.png").is_file()
