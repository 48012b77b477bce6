"""On 53 real COCO photos, with a config as a user with an own data set writes it: odd sizes, real masks, crowds."""

import json
import math
from pathlib import Path

import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]

# %(...)r are filled in: the recipe to inherit from, the root of the photos, the indices of the photos to test on.
SEG = """
_base_ = %(recipe)r
classes = %(classes)r
photos = %(photos)r
model = dict(
    data_preprocessor=dict(size=(96, 96)),
    decode_head=dict(num_classes=len(classes), channels=32),
    auxiliary_head=dict(num_classes=len(classes), channels=32),
    test_cfg=dict(crop_size=(96, 96), stride=(64, 64)),
)
data = dict(
    _delete_=True,
    type="BaseSegDataset",
    data_root=photos + "/ade",
    img_suffix=".jpg",
    seg_map_suffix=".png",
    reduce_zero_label=True,
    metainfo=dict(classes=classes),
)
training = dict(img_path=photos + "/coco/train2017", seg_map_path="annotations/training")
validation = dict(img_path=photos + "/coco/val2017", seg_map_path="annotations/validation")
load = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", reduce_zero_label=True)]
resize, pack = dict(type="Resize", scale=(160, 128), keep_ratio=True), dict(type="PackSegInputs")
augment = [
    dict(type="RandomResize", scale=(160, 128), ratio_range=(0.8, 1.5), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(96, 96), cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
]
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(**data, data_prefix=training, pipeline=[*load, *augment, pack]),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    # Ground truth stays at full size: load after resizing.
    dataset=dict(**data, data_prefix=validation, indices=%(indices)r, pipeline=[load[0], resize, load[1], pack]),
)
test_dataloader = val_dataloader
train_cfg = dict(max_iters=4, val_interval=4)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=4))
"""
# Both tasks small: channels as in det_configs/_base_/data_toy.py.
DET = """
_base_ = %(recipe)r
photos = %(photos)r
channels = 64
model = dict(
    neck=dict(out_channels=channels),
    rpn_head=dict(in_channels=channels, feat_channels=channels),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels),
        bbox_head=dict(in_channels=channels, fc_out_channels=256),
        mask_roi_extractor=dict(out_channels=channels),
        mask_head=dict(num_convs=2, in_channels=channels, conv_out_channels=channels),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=300, max_per_img=100), rcnn=dict(sampler=dict(num=64))),
    # Untrained, no score reaches the usual threshold, and CocoMetric reports nothing where nothing is found.
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100), rcnn=dict(score_thr=0.0, max_per_img=20)),
)
train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline
train_pipeline[2].scale = test_pipeline[1].scale = (160, 128)
loading = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(**loading, dataset=dict(data_root=photos + "/coco", indices=8, pipeline=train_pipeline))
val_dataloader = dict(
    **loading, dataset=dict(data_root=photos + "/coco", indices=%(indices)r, pipeline=test_pipeline)
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=photos + "/coco/annotations/instances_val2017.json")
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=1))
"""


def annotations(photos: Path, split: str) -> dict:
    return json.loads((photos / "coco" / "annotations" / f"instances_{split}2017.json").read_text())


def different_shapes(photos: Path, count: int) -> list[str]:
    """File names of `count` validation photos, from the most upright to the widest."""
    images = sorted(annotations(photos, "val")["images"], key=lambda image: image["width"] / image["height"])
    chosen = [images[round(i * (len(images) - 1) / (count - 1))] for i in range(count)]
    assert len({(image["width"], image["height"]) for image in chosen}) > 2
    return [image["file_name"] for image in chosen]


def write_seg(file: Path, photos: Path, names: list[str]) -> None:
    every = sorted(path.name for path in (photos / "coco" / "val2017").iterdir())
    file.write_text(
        SEG
        % dict(
            recipe=str(REPOSITORY / "seg_configs" / "upernet_vig_t.py"),
            photos=str(photos),
            classes=json.loads((photos / "ade" / "classes.json").read_text()),
            indices=[every.index(name) for name in names],
        )
    )


def write_det(file: Path, photos: Path, names: list[str]) -> None:
    every = [image["file_name"] for image in annotations(photos, "val")["images"]]
    file.write_text(
        DET
        % dict(
            recipe=str(REPOSITORY / "det_configs" / "mask_rcnn_hier_vig_t.py"),
            photos=str(photos),
            indices=[every.index(name) for name in names],
        )
    )


def losses(work_dir: Path) -> list[float]:
    (file,) = work_dir.glob("*/vis_data/scalars.json")
    return [step["loss"] for step in map(json.loads, file.read_text().splitlines()) if "loss" in step]


@pytest.mark.parametrize(
    ("write", "steps", "metrics"),
    [(write_seg, 4, {"aAcc", "mIoU", "mAcc"}), (write_det, 4, {"coco/bbox_mAP", "coco/segm_mAP"})],
    ids=["segmentation", "detection"],
)
def test_photos_train_test_and_are_drawn(
    write, steps: int, metrics: set[str], run_python, photos: Path, tmp_path: Path
) -> None:
    config, work, overlays = tmp_path / "mine.py", tmp_path / "work", tmp_path / "overlays"
    names = different_shapes(photos, 5)
    write(config, photos, names)
    run_python(
        "tools/train.py",
        config,
        "--work-dir",
        work,
        "--cfg-options",
        "val_cfg=None",
        "val_dataloader=None",
        "val_evaluator=None",
    )
    assert len(losses(work)) == steps
    assert all(math.isfinite(loss) for loss in losses(work))
    checkpoint = (work / "last_checkpoint").read_text()
    run_python("tools/test.py", config, checkpoint, "--work-dir", tmp_path / "test", "--show-dir", overlays)
    found = json.loads((tmp_path / "test" / "metrics.json").read_text())
    assert metrics <= set(found)
    assert all(math.isfinite(found[name]) for name in metrics)
    pictures = {path.stem: path for path in overlays.rglob("*.png")}
    assert set(pictures) == {Path(name).stem for name in names}
    for name in names:
        with Image.open(photos / "coco" / "val2017" / name) as photo, Image.open(pictures[Path(name).stem]) as picture:
            assert picture.size == (2 * photo.width, photo.height)  # at full size, ground truth beside prediction


# Laid over the two configs above: the same few photos for training and testing, nothing random about them.
SEG_OVERFIT = """
model.update(data_preprocessor=dict(size=(128, 128)), test_cfg=dict(_delete_=True, mode="whole"))
model.update(backbone=dict(drop_path_rate=0.0))
for head in ("decode_head", "auxiliary_head"):
    model[head].update(dropout_ratio=0.0)
few = %(few)r
resize["scale"] = (128, 96)
train_dataloader["dataset"].update(indices=few, pipeline=[*load, resize, pack])
train_dataloader["batch_size"] = 4
val_dataloader["dataset"].update(indices=few, data_prefix=training)
optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=0.0), clip_grad=dict(max_norm=10))
train_cfg = dict(max_iters=%(steps)d, val_interval=%(steps)d)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=10),
    dict(type="PolyLR", eta_min=1e-5, power=1.0, by_epoch=False, begin=10, end=%(steps)d),
]
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=%(steps)d, save_best=None))
randomness = dict(seed=%(seed)d)
"""
DET_OVERFIT = """
model.update(backbone=dict(drop_path_rate=0.0))
few = %(few)r  # an annotation file: CocoMetric counts every photo in it, whatever the indices of the data set
train_pipeline[3].prob = 0.0
train_dataloader["dataset"].update(indices=None, ann_file=few)
train_dataloader.update(batch_size=2)
val_dataloader["dataset"].update(indices=None, ann_file=few, data_prefix=dict(img="train2017/"))
val_evaluator.update(ann_file=few)
optim_wrapper = dict(optimizer=dict(lr=5e-4, weight_decay=0.0), clip_grad=dict(max_norm=10))
train_cfg = dict(max_epochs=%(steps)d // 2, val_interval=%(steps)d)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=10),
    dict(type="CosineAnnealingLR", by_epoch=False, begin=10, end=%(steps)d, eta_min=1e-5),
]
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=%(steps)d // 2, save_best=None))
randomness = dict(seed=%(seed)d)
"""


def large_objects(photos: Path, count: int) -> list[str]:
    """File names of the training photos whose smallest object takes the largest part of the photo."""
    content = annotations(photos, "train")
    smallest: dict[int, float] = {}
    for entry in content["annotations"]:
        smallest[entry["image_id"]] = min(entry["area"], smallest.get(entry["image_id"], math.inf))
    images = [image for image in content["images"] if image["id"] in smallest]
    images.sort(key=lambda image: -smallest[image["id"]] / (image["width"] * image["height"]))
    return [image["file_name"] for image in images[:count]]


def write_annotation(file: Path, photos: Path, names: list[str]) -> None:
    """The part of the training annotation that is about the photos `names`."""
    content = annotations(photos, "train")
    content["images"] = [image for image in content["images"] if image["file_name"] in names]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in ids]
    file.write_text(json.dumps(content))


def train_and_score(run_python, config: Path) -> dict[str, float]:
    work = config.with_name("work")
    run_python("tools/train.py", config, "--work-dir", work)
    run_python("tools/test.py", config, (work / "last_checkpoint").read_text(), "--work-dir", work)
    return json.loads((work / "metrics.json").read_text())


@pytest.mark.slow
def test_segmenter_learns_four_photos_by_heart(run_python, photos: Path, tmp_path: Path) -> None:
    config = tmp_path / "mine.py"
    write_seg(config, photos, different_shapes(photos, 5))
    every = sorted(path.name for path in (photos / "coco" / "train2017").iterdir())
    few = [every.index(name) for name in large_objects(photos, 4)]
    config.write_text(config.read_text() + SEG_OVERFIT % dict(few=few, steps=120, seed=0))
    scores = train_and_score(run_python, config)
    assert scores["aAcc"] > 80  # untrained: below 1
    assert scores["mIoU"] > 40


@pytest.mark.slow
def test_detector_learns_four_photos_by_heart(run_python, photos: Path, tmp_path: Path) -> None:
    config, few = tmp_path / "mine.py", tmp_path / "few.json"
    write_det(config, photos, different_shapes(photos, 5))
    write_annotation(few, photos, large_objects(photos, 4))
    config.write_text(config.read_text() + DET_OVERFIT % dict(few=str(few), steps=160, seed=0))
    scores = train_and_score(run_python, config)
    assert scores["coco/bbox_mAP_50"] > 0.3  # untrained: 0
