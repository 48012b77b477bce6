"""The embedded data set: exact masks, two layouts of the same scenes, never half made."""

import colorsys
import json
import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from vig_backbone.data import toy, toy_scene
from vig_backbone.data.rle import decode_rle, encode_rle
from vig_backbone.data.toy import EASY_CLASSES, HARD_CLASSES, PALETTE, class_names, make_toy_data
from vig_backbone.data.toy_photos import photo_crop

TOOL = Path(__file__).parents[1] / "tools/make_toy_data.py"
SPLITS = [("train2017", "training"), ("val2017", "validation")]


@pytest.fixture(scope="module", params=["easy", "hard"])
def summary(request, tmp_path_factory):
    return make_toy_data(tmp_path_factory.mktemp("toy") / request.param, 20, 16, (64, 96), request.param)


def _files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture
def tool(monkeypatch, capsys):
    """Run the tool as a script of this process (a new one imports torch first); returns exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(TOOL), run_name="__main__")
        return exit_.value.code, *capsys.readouterr()

    return run


def test_names_and_palette_fit_each_other():
    assert class_names("easy") == EASY_CLASSES == toy.EASY_CLASSES
    assert len(EASY_CLASSES) == 7
    assert len(HARD_CLASSES) == 16
    assert class_names("hard", semantic=True) == ("background", *HARD_CLASSES)
    assert len(PALETTE) == len(set(PALETTE)) == 17
    with pytest.raises(ValueError, match="unknown difficulty 'medium'"):
        class_names("medium")


def test_same_seed_same_bytes(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make_toy_data(tmp_path / name, 4, 3, 64, "hard", seed)
    a, b, c = (_files(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert a["coco/train2017/000000000001.jpg"] != c["coco/train2017/000000000001.jpg"]


def test_scene_does_not_depend_on_the_number_of_images(tmp_path):
    make_toy_data(tmp_path / "few", 2, 1, 64)
    make_toy_data(tmp_path / "more", 3, 2, 64)
    few, more = _files(tmp_path / "few"), _files(tmp_path / "more")
    assert all(few[name] == more[name] for name in few if name.endswith((".jpg", ".png")))


@pytest.mark.parametrize(("coco_split", "ade_split"), SPLITS)
def test_coco_masks_agree_with_the_semantic_map(summary, coco_split, ade_split):
    coco = COCO(summary.coco / f"annotations/instances_{coco_split}.json")
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(summary.things)
    for image in coco.loadImgs(coco.getImgIds()):
        stem = Path(image["file_name"]).stem
        semantic = np.asarray(Image.open(summary.ade / f"annotations/{ade_split}/{stem}.png"))
        assert (image["height"], image["width"]) == semantic.shape == (64, 96)
        expected, covered = np.ones_like(semantic), np.zeros(semantic.shape, int)
        for annotation in coco.imgToAnns[image["id"]]:
            mask = coco.annToMask(annotation).astype(bool)
            expected[mask] = annotation["category_id"] + 1
            covered += mask
            assert mask.sum() == annotation["area"] >= 30
            assert annotation["bbox"] == coco_mask.toBbox(annotation["segmentation"]).tolist()
            assert annotation["iscrowd"] == 0
        assert covered.max() == 1  # visible parts: disjoint
        np.testing.assert_array_equal(expected, semantic)


@pytest.mark.parametrize(("coco_split", "ade_split"), SPLITS)
def test_both_layouts_show_the_same_images(summary, coco_split, ade_split):
    names = sorted(p.name for p in (summary.coco / coco_split).iterdir())
    assert names == sorted(p.name for p in (summary.ade / "images" / ade_split).iterdir())
    for name in names:
        with Image.open(summary.coco / coco_split / name) as image:
            assert (image.size, image.mode, image.format) == ((96, 64), "RGB", "JPEG")
        assert (summary.coco / coco_split / name).samefile(summary.ade / "images" / ade_split / name)


def test_every_class_occurs_and_objects_overlap(summary):
    for split in ("train", "val"):
        assert set(summary.instances[split]) == set(summary.things)
        assert min(summary.instances[split].values()) > 0
    content = json.loads((summary.coco / "annotations/instances_train2017.json").read_text())
    pairs = [
        (a["bbox"], b["bbox"])
        for a in content["annotations"]
        for b in content["annotations"]
        if a["id"] < b["id"] and a["image_id"] == b["image_id"]
    ]
    assert sum(coco_mask.iou([a], [b], [0])[0, 0] > 0.05 for a, b in pairs) >= 5


def test_object_counts_follow_the_difficulty(summary):
    low, high = (1, 4) if summary.things == EASY_CLASSES else (3, 12)
    content = json.loads((summary.coco / "annotations/instances_train2017.json").read_text())
    counts = np.bincount([a["image_id"] for a in content["annotations"]], minlength=21)[1:]
    assert low <= counts.min()
    assert counts.max() <= high


def test_labels_say_what_is_painted():
    """In the easy set a class has a hue: the pixels of a mask show it, those of no other class do."""
    hues = dict(zip(EASY_CLASSES, toy._SETTINGS["easy"].hues))
    for index in range(14):
        scene = toy.make_scene(index, "train", (96, 96))
        for number, label in enumerate(scene.labels, start=1):
            red, green, blue = np.median(scene.image[scene.instances == number], axis=0) / 255
            hue, saturation, _ = colorsys.rgb_to_hsv(red, green, blue)
            distance = {name: abs((hue - h + 0.5) % 1 - 0.5) for name, h in hues.items()}
            assert min(distance, key=distance.get) == EASY_CLASSES[label]
            assert saturation > 0.4


def test_mask_holds_the_pixels_whose_centre_is_inside():
    setting = toy._SETTINGS["easy"]
    rng = np.random.default_rng(0)
    for _ in range(5):
        item = toy_scene._make_object(rng, EASY_CLASSES.index("circle"), setting, "train", (128, 128), light=0.0)
        rows, columns = np.nonzero(item.mask)
        radius = np.sqrt(item.mask.sum() / np.pi)
        distance = np.hypot(rows - rows.mean(), columns - columns.mean())
        assert distance.max() < radius + 1  # a disc, without holes and whole
        assert np.array_equal(item.mask, item.alpha >= 0.5)


def test_run_lengths_match_pycocotools():
    rng = np.random.default_rng(0)
    masks = [rng.random((37, 53)) < p for p in (0.0, 0.02, 0.5, 1.0)]
    masks.append(np.kron(rng.random((3, 2)) < 0.5, np.ones((40, 90), bool)))
    for mask in masks:
        expected = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        encoded = encode_rle(mask)
        assert encoded == {"size": expected["size"], "counts": expected["counts"].decode()}
        np.testing.assert_array_equal(decode_rle(encoded), mask)


def _instance_items(coco: Path, names: tuple[str, ...]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(masks [n, H, W], labels [n]) of the validation set: read by mmdet where it imports, else by pycocotools."""
    annotations = "annotations/instances_val2017.json"
    try:
        from vig_backbone.openmmlab import mmcv_ext

        mmcv_ext.install()
        from mmdet.datasets import CocoDataset
        from mmdet.datasets.transforms import LoadAnnotations
    except ImportError:
        api = COCO(coco / annotations)
        found = [api.imgToAnns[i] for i in sorted(api.imgs)]
        return [(np.stack([api.annToMask(a) for a in x]), np.array([a["category_id"] - 1 for a in x])) for x in found]
    dataset = CocoDataset(
        data_root=str(coco),
        ann_file=annotations,
        data_prefix={"img": "val2017/"},
        metainfo={"classes": names, "palette": PALETTE[1 : len(names) + 1]},
        pipeline=[{"type": "LoadImageFromFile"}, LoadAnnotations(with_bbox=True, with_mask=True)],
        test_mode=True,
    )
    items = [dataset[i] for i in range(len(dataset))]
    return [(item["gt_masks"].masks, item["gt_bboxes_labels"]) for item in items]


def test_detection_loader_reads_the_masks(summary):
    items = _instance_items(summary.coco, summary.things)
    assert len(items) == 16
    difficulty = "easy" if summary.things == EASY_CLASSES else "hard"
    for index, (masks, labels) in enumerate(items):
        scene = toy.make_scene(index, "val", (64, 96), difficulty)
        assert labels.tolist() == scene.labels
        for number, mask in enumerate(masks, start=1):
            np.testing.assert_array_equal(mask, scene.instances == number)


def _semantic_items(ade: Path, names: tuple[str, ...]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(image, labels with 255 = unlabelled) of the validation set: read by mmseg where it imports, else by Pillow."""
    try:
        from vig_backbone.openmmlab import mmcv_ext

        mmcv_ext.install()
        from mmseg.datasets import BaseSegDataset
        from mmseg.datasets.transforms import LoadAnnotations
    except ImportError:
        images = sorted((ade / "images/validation").iterdir())
        maps = [ade / "annotations/validation" / f"{path.stem}.png" for path in images]
        return [(np.asarray(Image.open(i)), np.asarray(Image.open(m)) - np.uint8(1)) for i, m in zip(images, maps)]
    from mmcv.transforms import LoadImageFromFile

    dataset = BaseSegDataset(
        data_root=str(ade),
        data_prefix={"img_path": "images/validation", "seg_map_path": "annotations/validation"},
        metainfo={"classes": names, "palette": PALETTE[: len(names)]},
        img_suffix=".jpg",
        seg_map_suffix=".png",
        reduce_zero_label=True,
        pipeline=[LoadImageFromFile(), LoadAnnotations(reduce_zero_label=True)],
    )
    items = [dataset[i] for i in range(len(dataset))]
    return [(item["img"][..., ::-1], item["gt_seg_map"]) for item in items]


def test_segmentation_loader_reads_the_maps(summary):
    items = _semantic_items(summary.ade, summary.semantic_classes)
    assert len(items) == 16
    difficulty = "easy" if summary.things == EASY_CLASSES else "hard"
    for index, (image, labels) in enumerate(items):
        scene = toy.make_scene(index, "val", (64, 96), difficulty)
        np.testing.assert_array_equal(labels, scene.semantic - 1)  # 0 = background
        assert np.abs(image.astype(int) - scene.image).mean() < 4  # JPEG
    assert tuple(json.loads((summary.ade / "classes.json").read_text())) == summary.semantic_classes


def test_train_and_val_share_no_photo_region():
    rng = np.random.default_rng(0)
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (100, 1))).convert("RGB")  # value = column
    for _ in range(20):
        train, val = (photo_crop(rng, split, 40, 40, photo=ramp) for split in ("train", "val"))
        assert train.max() * 255 <= 116 <= val.min() * 255


def test_progress_counts_every_image(tmp_path):
    calls = []
    make_toy_data(tmp_path / "toy", 3, 2, 32, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 5) for i in range(1, 6)]


def test_existing_set_is_kept_replaced_or_refused(tmp_path):
    root = tmp_path / "toy"
    assert not make_toy_data(root, 2, 1, 32).already_there
    before = (root / "toy.json").stat().st_mtime_ns
    again = make_toy_data(root, 2, 1, 32)
    assert again.already_there
    assert (root / "toy.json").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="made with other arguments"):
        make_toy_data(root, 3, 1, 32)
    assert make_toy_data(root, 3, 1, 32, overwrite=True).images == {"train": 3, "val": 1}
    (root / "coco/train2017/000000000001.jpg").unlink()
    with pytest.raises(FileExistsError, match="lost some of its files"):
        make_toy_data(root, 3, 1, 32)
    make_toy_data(root, 3, 1, 32, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["toy"]


@pytest.mark.parametrize("without", [["link"], ["link", "symlink"]])
def test_file_systems_without_links(tmp_path, monkeypatch, without):
    def refuse(*_: object, **__: object) -> None:
        raise OSError("not supported")

    for name in without:
        monkeypatch.setattr(os, name, refuse)
    root = make_toy_data(tmp_path / "toy", 1, 1, 32).root
    monkeypatch.undo()
    image = root / "ade/images/training/000000000001.jpg"
    assert image.is_symlink() == ("symlink" not in without)
    assert image.read_bytes() == (root / "coco/train2017/000000000001.jpg").read_bytes()


def test_other_content_is_never_deleted(tmp_path):
    (tmp_path / "precious.txt").write_text("keep")
    with pytest.raises(FileExistsError, match=r"no toy data set.*another folder"):
        make_toy_data(tmp_path, 2, 1, 32, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


def test_interrupted_run_leaves_nothing(tmp_path):
    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_toy_data(tmp_path / "toy", 4, 2, 32, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_killed_run_leaves_nothing_at_the_root(tmp_path):
    def kill(done: int, total: int) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(
        target=make_toy_data, args=(tmp_path / "toy", 4, 2, 32), kwargs={"progress": kill}
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "toy").exists()
    assert not list(tmp_path.rglob("toy.json"))
    assert not make_toy_data(tmp_path / "toy", 4, 2, 32).already_there


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_train": 0}, "num_train is 0: expected at least 1"),
        ({"size": 16}, "at least 32 pixels"),
        ({"size": (64, 64, 3)}, "size"),
        ({"difficulty": "medium"}, "unknown difficulty"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_toy_data(tmp_path / "toy", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_tool_writes_a_set_and_a_preview(tmp_path, tool):
    root, preview = tmp_path / "toy", tmp_path / "preview.png"
    code, out, err = tool(root, "--train", 3, "--val", 2, "--size", "32x48", "--preview", preview)
    assert code == 0, err
    assert "train: 3 images" in out
    assert "5/5 (100%)" in err
    assert Image.open(preview).size[0] > 500
    code, _, err = tool(root, "--train", 4)
    assert code == 2
    assert "--overwrite" in err
    assert "Traceback" not in err
