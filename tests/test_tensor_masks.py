"""Masks as tensors and as run lengths give what mmdet's bitmaps give."""

import pickle
from collections.abc import Callable

import cv2
import numpy as np
import pytest
import torch

import vig_backbone  # noqa: F401 - mmcv's operators

pytest.importorskip("mmdet")
import pycocotools.mask
from mmdet.structures.mask import BitmapMasks, mask_target
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData

from vig_backbone.openmmlab.run_masks import RunMasks, nearest_pixels, run_ends
from vig_backbone.openmmlab.tensor_masks import TensorMasks

SIZE = (37, 53)


def bitmaps(count: int, size: tuple[int, int] = SIZE, seed: int = 0) -> BitmapMasks:
    """Blobs, and where there are several a mask of zeros, one of ones and one that ends on a one."""
    rng = np.random.default_rng(seed)
    coarse = (rng.random((count, 5, 6)) < 0.5).astype(np.uint8)
    masks = np.stack([cv2.resize(x, size[::-1], interpolation=cv2.INTER_NEAREST) for x in coarse]) if count else []
    if count > 3:
        masks[0], masks[1], masks[2, -1, -1] = 0, 1, 1
    return BitmapMasks(masks, *size)


def as_runs(masks: BitmapMasks) -> RunMasks:
    encoded = [pycocotools.mask.encode(np.asfortranarray(mask)) for mask in masks.masks]
    return RunMasks.from_counts([each["counts"] for each in encoded], (masks.height, masks.width))


KINDS = pytest.mark.parametrize("kind", [TensorMasks.from_bitmaps, as_runs], ids=["tensor", "runs"])


def assert_same(found: TensorMasks, expected: BitmapMasks) -> None:
    assert isinstance(found, TensorMasks)
    assert (found.height, found.width) == (expected.height, expected.width)
    assert len(found) == len(expected)
    np.testing.assert_array_equal(found.to_ndarray(), expected.to_ndarray())


CHANGES: dict[str, Callable] = {
    "none": lambda m: m,
    "horizontal": lambda m: m.flip(),
    "vertical": lambda m: m.flip("vertical"),
    "diagonal": lambda m: m.flip("diagonal"),
    "rescaled": lambda m: m.rescale((133, 80)),
    "made smaller": lambda m: m.resize((11, 29)),
    "resized to one row": lambda m: m.resize((1, 200)),
    "resized bilinearly": lambda m: m.resize((50, 40), "bilinear"),
    "cropped": lambda m: m.crop(np.array([5, 3, 40, 70])),
    "cropped to nothing": lambda m: m.crop(np.array([7, 9, 7, 9])),
    "padded": lambda m: m.pad((64, 96), 1),
    "expanded": lambda m: m.expand(60, 70, 4, 9),
    "translated": lambda m: m.translate(SIZE, 6),
    "sheared": lambda m: m.shear(SIZE, 0.3),
    "rotated": lambda m: m.rotate(SIZE, 30),
    "resized, mirrored, cropped, chosen": lambda m: (
        m.rescale((90, 120)).flip().crop(np.array([10, 20, 60, 60])).flip("vertical")[np.array([3, 0])]
    ),
}


@KINDS
@pytest.mark.parametrize("name", CHANGES)
def test_changes_equal_those_of_bitmaps(kind: Callable, name: str) -> None:
    masks = bitmaps(5)
    assert_same(CHANGES[name](kind(masks)), CHANGES[name](masks))


@KINDS
@pytest.mark.parametrize("name", [name for name in CHANGES if "chosen" not in name])
def test_changes_of_no_masks(kind: Callable, name: str) -> None:
    masks = bitmaps(0)
    assert_same(CHANGES[name](kind(masks)), CHANGES[name](masks))


@KINDS
@pytest.mark.parametrize(
    "index",
    [2, slice(1, 4), [4, 1], np.array([0, 0, 3]), np.array([True, False, True, True, False]), np.array([], dtype=int)],
    ids=["integer", "slice", "list", "array", "booleans", "none"],
)
def test_indexing(kind: Callable, index: object) -> None:
    masks = bitmaps(5)
    assert_same(kind(masks)[index], masks[index])
    if isinstance(index, np.ndarray):
        assert_same(kind(masks)[torch.from_numpy(index)], masks[index])


@KINDS
def test_instances_choose_and_join_masks(kind: Callable) -> None:
    masks = bitmaps(5)
    instances = InstanceData(masks=kind(masks), labels=torch.arange(5))
    chosen = instances[torch.tensor([True, False, False, True, True])]
    assert_same(InstanceData.cat([chosen, instances]).masks, masks[np.array([0, 3, 4, 0, 1, 2, 3, 4])])


@KINDS
def test_areas_boxes_and_tensors(kind: Callable) -> None:
    masks = bitmaps(5)
    np.testing.assert_array_equal(kind(masks).areas, masks.areas)
    torch.testing.assert_close(kind(masks).get_bboxes("hbox").tensor, masks.get_bboxes("hbox").tensor)
    copy = kind(masks).to_tensor(torch.float32, "cpu")
    torch.testing.assert_close(copy, masks.to_tensor(torch.float32, "cpu"), rtol=0, atol=0)


# ---- mask targets


def boxes_in(count: int, seed: int = 0) -> np.ndarray:
    """Some of them reach over the border, one is empty."""
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.uniform(-5, 60, (count, 2, 2)), axis=1).reshape(count, 4).astype(np.float32)
    corners[0, 2:] = corners[0, :2]
    return corners


@KINDS
@pytest.mark.parametrize("binarize", [True, False])
@pytest.mark.parametrize("wrap", [np.asarray, torch.from_numpy], ids=["arrays", "tensors"])
def test_crops_equal_those_of_bitmaps(kind: Callable, binarize: bool, wrap: Callable) -> None:
    masks, boxes, inds = bitmaps(5), boxes_in(40), np.random.default_rng(1).integers(0, 5, 40)
    options = dict(out_shape=(28, 14), device="cpu", binarize=binarize)
    expected = masks.crop_and_resize(boxes, inds=inds, **options).to_ndarray()
    found = kind(masks).crop_and_resize(wrap(boxes), inds=wrap(inds), **options)
    assert found.to_ndarray().dtype == expected.dtype
    np.testing.assert_array_equal(found.to_ndarray(), expected)


@pytest.mark.parametrize(("masks", "boxes"), [(0, 3), (4, 0), (0, 0)])
def test_crops_of_nothing_are_empty(masks: int, boxes: int) -> None:
    arguments = (boxes_in(3)[:boxes], (28, 28), np.zeros(boxes, dtype=np.int64))
    found = TensorMasks.from_bitmaps(bitmaps(masks)).crop_and_resize(*arguments)
    assert_same(found, bitmaps(masks).crop_and_resize(*arguments))


@KINDS
def test_mask_targets_of_mmdet_take_them(kind: Callable) -> None:
    masks = [bitmaps(5), bitmaps(0), bitmaps(4, (40, 30), seed=1)]
    proposals = [torch.from_numpy(boxes_in(n, seed)) for seed, n in enumerate((7, 1, 9))]
    proposals[1] = proposals[1][:0]
    inds = [torch.arange(len(p)) % max(len(m), 1) for p, m in zip(proposals, masks)]
    cfg = ConfigDict(mask_size=28)
    expected = mask_target(proposals, inds, masks, cfg)
    torch.testing.assert_close(mask_target(proposals, inds, [kind(m) for m in masks], cfg), expected, rtol=0, atol=0)


# ---- run lengths


@pytest.mark.parametrize("density", [0.0, 0.01, 0.3, 0.99, 1.0])
def test_run_lengths_of_pycocotools_are_read(density: float) -> None:
    rng = np.random.default_rng(0)
    for shape in [(1, 1), (1, 70), (70, 1), (33, 65), (300, 200)]:
        mask = (rng.random(shape) < density).astype(np.uint8)
        encoded = pycocotools.mask.encode(np.asfortranarray(mask))["counts"]
        changes = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=0))
        assert run_ends(encoded).tolist() == [*changes.tolist(), mask.size]
        assert run_ends(encoded.decode()).tolist() == run_ends(encoded).tolist()
        np.testing.assert_array_equal(RunMasks.from_counts([encoded, encoded], shape).data.numpy(), [mask, mask])


def test_uncompressed_run_lengths_are_read() -> None:
    masks = RunMasks.from_counts([[1, 2, 3], [0, 6], [6]], (2, 3))
    assert masks.data.tolist() == [[[0, 1, 0], [1, 0, 0]], [[1, 1, 1]] * 2, [[0, 0, 0]] * 2]


def test_run_lengths_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="add up to 6 pixels in an image of 3 x 3"):
        RunMasks.from_counts([[1, 2, 3]], (3, 3))


def test_nearest_pixels_are_those_of_opencv() -> None:
    rng = np.random.default_rng(0)
    for old, new in [(1, 5), (5, 1), (480, 800), (427, 1333), (1000, 999), *rng.integers(1, 3000, (200, 2)).tolist()]:
        row = rng.integers(0, 256, (1, old), dtype=np.uint8)
        expected = cv2.resize(row, (new, 1), interpolation=cv2.INTER_NEAREST)[0]
        np.testing.assert_array_equal(row[0, nearest_pixels(old, new).numpy()], expected)


def test_run_lengths_travel_without_bitmaps() -> None:
    masks = as_runs(bitmaps(5)).rescale((1333, 800))
    before = len(pickle.dumps(masks))
    assert masks.data.numel() > 10 * before
    assert len(pickle.dumps(masks)) == before
    assert_same(pickle.loads(pickle.dumps(masks)), bitmaps(5).rescale((1333, 800)))


@KINDS
def test_instances_move_their_masks(kind: Callable) -> None:
    instances = InstanceData(masks=kind(bitmaps(5))).to("meta")
    assert instances.masks.device.type == "meta"
    assert len(instances.masks) == 5


@pytest.mark.gpu
@KINDS
def test_masks_and_crops_on_a_gpu(kind: Callable) -> None:
    masks, boxes, inds = bitmaps(5), torch.from_numpy(boxes_in(40)), torch.arange(40) % 5
    moved = CHANGES["resized, mirrored, cropped, chosen"](kind(masks)).to("cuda")
    assert moved.data.is_cuda
    assert_same(moved, CHANGES["resized, mirrored, cropped, chosen"](masks))
    found = kind(masks).to("cuda").crop_and_resize(boxes.cuda(), (28, 28), inds.cuda())
    assert found.device.type == "cuda"
    expected = masks.crop_and_resize(boxes, (28, 28), inds, device="cpu").to_ndarray()
    assert (found.to_ndarray() != expected).mean() < 1e-3  # averages of exactly a half round either way


# ---- bad input


@pytest.mark.parametrize(
    ("data", "message"), [(torch.zeros(3, 4), r"not a tensor \(3, 4\)"), (bitmaps(1), "TensorMasks.from_bitmaps")]
)
def test_what_is_no_stack_of_masks_is_refused(data: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TensorMasks(data)


@KINDS
def test_unknown_direction_is_refused(kind: Callable) -> None:
    with pytest.raises(ValueError, match="flip_direction='left', expected"):
        kind(bitmaps(1)).flip("left")
