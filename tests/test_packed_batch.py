"""A batch in one block of memory: what comes out is what went in, it is pinned and moved once; the preprocessors."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch

import vig_backbone

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks
from mmengine.dataset import pseudo_collate
from mmengine.registry import FUNCTIONS, MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

import vig_backbone.openmmlab.fast_loading  # noqa: F401 - registers the preprocessors
from vig_backbone.openmmlab.packed_batch import PackedBatch, packed_collate
from vig_backbone.openmmlab.tensor_masks import TensorMasks

SIZES = [(33, 47), (40, 31), (32, 64)]


def images(sizes: list[tuple[int, int]], channels: int = 3) -> list[Tensor]:
    """Some stored with the channels beside each other, as the light transforms give them."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randint(0, 256, (*size, channels), dtype=torch.uint8, generator=generator) for size in sizes]
    return [image.permute(2, 0, 1) if i % 2 else image.permute(2, 0, 1).contiguous() for i, image in enumerate(made)]


def det_samples(sizes: list[tuple[int, int]] = SIZES, tensors: bool = True) -> list[dict]:
    """Two objects an image, none in the second."""
    generator, batch = torch.Generator().manual_seed(0), []
    for i, (image, (H, W)) in enumerate(zip(images(sizes), sizes)):
        count = 0 if i == 1 else 2
        masks = torch.randint(0, 2, (count, H, W), dtype=torch.uint8, generator=generator)
        sample = DetDataSample(metainfo=dict(img_shape=(H, W), img_id=i))
        boxes = HorizontalBoxes(torch.rand(count, 4, generator=generator))
        sample.gt_instances = InstanceData(
            bboxes=boxes,
            labels=torch.arange(count),
            masks=TensorMasks(masks) if tensors else BitmapMasks(masks.numpy(), H, W),
        )
        sample.ignored_instances = InstanceData(bboxes=HorizontalBoxes(torch.zeros(0, 4)))
        batch.append(dict(inputs=image, data_samples=sample))
    return batch


def seg_samples(sizes: list[tuple[int, int]], dtype: torch.dtype) -> list[dict]:
    generator, batch = torch.Generator().manual_seed(0), []
    for image, size in zip(images(sizes), sizes):
        labels = torch.randint(0, 150, (1, *size), generator=generator)
        labels[:, :3] = 255
        sample = SegDataSample(metainfo=dict(img_shape=size), gt_sem_seg=PixelData(data=labels.to(dtype)))
        batch.append(dict(inputs=image, data_samples=sample))
    return batch


def plain(value: Any) -> Any:
    """A batch as lists, dicts and arrays."""
    if isinstance(value, DetDataSample | SegDataSample | InstanceData | PixelData):
        return {**dict(value.metainfo_items()), **{key: plain(item) for key, item in value.items()}}
    if isinstance(value, BitmapMasks | TensorMasks):
        return value.to_ndarray()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    value = getattr(value, "tensor", value)
    return value.numpy() if isinstance(value, Tensor) else value


def assert_same(found: Any, expected: Any) -> None:
    np.testing.assert_equal(plain(found), plain(expected))


# ---- packing


@pytest.mark.parametrize("shared", [False, True])
def test_batch_comes_out_as_it_went_in(shared: bool) -> None:
    batch = {
        "inputs": images(SIZES),
        "others": [torch.tensor(3.5), torch.zeros(0, 4), torch.ones(2, 1, 3, dtype=torch.bfloat16), torch.tensor(True)],
        "strided": [torch.arange(60).view(5, 12)[:, ::3], torch.arange(3).expand(4, 3), torch.arange(9).view(3, 3).T],
        "nested": {"text": "name", "array": np.arange(4), "nothing": None, "pair": (torch.arange(2.0), 7)},
    }
    packed = PackedBatch.pack(batch, shared=shared)
    assert packed.block.is_shared() == shared
    for key in ("inputs", "others", "strided"):
        for found, expected in zip(packed[key], batch[key]):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert packed["inputs"][1].stride() == batch["inputs"][1].stride()
    assert_same(packed["nested"], batch["nested"])
    assert list(packed) == list(batch)


@pytest.mark.parametrize("shared", [False, True])
def test_batch_without_tensors_comes_out(shared: bool) -> None:
    assert dict(PackedBatch.pack({"names": ["a", "b"]}, shared=shared)) == {"names": ["a", "b"]}


def test_data_samples_come_out_as_they_went_in() -> None:
    samples = det_samples()
    assert_same(dict(packed_collate(samples)), pseudo_collate(samples))


def test_collate_function_is_found_by_its_name() -> None:
    for scope in ("mmdet", "mmseg"):
        with FUNCTIONS.switch_scope_and_registry(scope) as registry:
            assert registry.get("packed_collate") is packed_collate


def test_every_tensor_lies_in_the_block() -> None:
    block = (packed := packed_collate(det_samples())).block
    start, end = block.data_ptr(), block.data_ptr() + block.numel()
    sample = packed["data_samples"][0]
    for tensor in (*packed["inputs"], sample.gt_instances.bboxes.tensor, sample.gt_instances.masks.data):
        assert start <= tensor.data_ptr() < end
        assert tensor.data_ptr() % 64 == 0
    assert len(pickle.dumps(packed.skeleton)) < 5000


def test_workers_send_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = DataLoader(det_samples(), batch_size=3, num_workers=1, collate_fn=packed_collate)
    (batch,) = loader
    assert isinstance(batch, PackedBatch)
    assert batch.block.is_shared()
    assert "batch" not in vars(batch)  # not unpacked before it is asked for
    assert_same(dict(batch), pseudo_collate(det_samples()))


def test_pinning_takes_the_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = []

    def stand_in(tensor: Tensor) -> Tensor:  # pinning itself needs a GPU
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(Tensor, "pin_memory", stand_in)
    batch = pin_memory(packed_collate(det_samples()))
    assert len(pinned) == 1
    assert batch.block is pinned[0]
    assert_same(dict(batch), pseudo_collate(det_samples()))
    assert batch["inputs"][0].untyped_storage().data_ptr() == pinned[0].untyped_storage().data_ptr()


@pytest.mark.parametrize("tensors", [True, False], ids=["tensors", "bitmaps"])
def test_masks_alone_are_pinned_and_moved(tensors: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = det_samples(tensors=True)[0]["data_samples"].gt_instances.masks
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)
    assert_same(pin_memory(masks), masks)
    assert masks.to("meta").device.type == "meta"


def test_unpacking_on_a_device_moves_everything_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    moves, to = [], Tensor.to

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        moves.append((args, kwargs))
        return to(tensor, *args, **kwargs)

    packed = packed_collate(det_samples())
    monkeypatch.setattr(Tensor, "to", counted)
    batch = packed.unpacked_on(torch.device("meta"))
    assert moves == [((torch.device("meta"),), {"non_blocking": True})]
    sample = batch["data_samples"][0].gt_instances
    devices = {x.device.type for x in (*batch["inputs"], sample.bboxes.tensor, sample.labels, sample.masks)}
    assert devices == {"meta"}


# ---- preprocessors

NORM = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
DET_OPTIONS = {
    "of Mask R-CNN": dict(**NORM, bgr_to_rgb=True, pad_mask=True, pad_size_divisor=32),
    "padded with 114": dict(**NORM, pad_size_divisor=16, pad_value=114.0),
    "as they are": dict(),
    "reversed only": dict(rgb_to_bgr=True, pad_size_divisor=8),
    "one mean": dict(mean=[100.0], std=[50.0]),
}


@pytest.mark.parametrize("name", DET_OPTIONS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("sizes", [SIZES, [(32, 64)] * 3], ids=["sizes differ", "one size"])
def test_detection_preprocessors_are_equal(name: str, training: bool, sizes: list) -> None:
    init_default_scope("mmdet")
    stock, fast = (
        MODELS.build(dict(type=t, **DET_OPTIONS[name])) for t in ("DetDataPreprocessor", "FastDetPreprocessor")
    )
    expected = stock(pseudo_collate(det_samples(sizes, tensors=False)), training)
    for batch in (pseudo_collate(det_samples(sizes)), packed_collate(det_samples(sizes))):
        found = fast(batch, training)
        assert_same(found, expected)
        assert found["inputs"].dtype == torch.float32
        assert found["inputs"].is_contiguous()


def test_stock_preprocessor_takes_a_packed_batch() -> None:
    init_default_scope("mmdet")
    stock = MODELS.build(dict(type="DetDataPreprocessor", **DET_OPTIONS["of Mask R-CNN"]))
    expected = stock(pseudo_collate(det_samples(tensors=False)), True)
    assert_same(stock(packed_collate(det_samples()), True), expected)


def test_preprocessor_leaves_a_packed_batch_as_it_was() -> None:
    init_default_scope("mmdet")
    preprocessor = MODELS.build(dict(type="FastDetPreprocessor", **DET_OPTIONS["of Mask R-CNN"]))
    batch = packed_collate(det_samples())
    first = copy.deepcopy(plain(preprocessor(batch, True)))
    assert_same(preprocessor(batch, True), first)
    assert_same(dict(batch), pseudo_collate(det_samples()))


def test_mean_of_other_channels_is_refused() -> None:
    preprocessor = MODELS.build(dict(type="FastDetPreprocessor", **NORM))
    with pytest.raises(ValueError, match="mean has 3 values for images of 1 channels"):
        preprocessor(dict(inputs=images(SIZES, channels=1), data_samples=None))


def test_stacked_images_are_taken() -> None:
    init_default_scope("mmdet")
    stock, fast = (MODELS.build(dict(type=t, **NORM)) for t in ("DetDataPreprocessor", "FastDetPreprocessor"))
    batch = dict(inputs=torch.stack(images([(9, 8)] * 2)), data_samples=None)
    torch.testing.assert_close(fast(dict(batch))["inputs"], stock(dict(batch))["inputs"], rtol=0, atol=0)


SEG_OPTIONS = {
    "of UperNet": dict(**NORM, bgr_to_rgb=True, size=(64, 64)),
    "padded with 7": dict(**NORM, size=(48, 80), pad_val=7, seg_pad_val=254),
    "to a divisor": dict(size_divisor=32),
}


@pytest.mark.parametrize("name", SEG_OPTIONS)
@pytest.mark.parametrize("sizes", [SIZES, [(40, 50)] * 3, [(64, 64)] * 2], ids=["differ", "one", "full"])
def test_segmentation_preprocessors_are_equal(name: str, sizes: list) -> None:
    init_default_scope("mmseg")
    if name == "padded with 7" and sizes[0] == (64, 64):
        sizes = [(48, 80)] * 2
    stock, fast = (
        MODELS.build(dict(type=t, **SEG_OPTIONS[name])) for t in ("SegDataPreProcessor", "FastSegPreprocessor")
    )
    expected = stock(pseudo_collate(seg_samples(sizes, torch.int64)), True)
    for dtype in (torch.uint8, torch.int64):
        for collate in (pseudo_collate, packed_collate):
            found = fast(collate(seg_samples(sizes, dtype)), True)
            assert_same(found, expected)
            assert found["data_samples"][0].gt_sem_seg.data.dtype == torch.int64


@pytest.mark.parametrize("test_cfg", [None, dict(size_divisor=32)])
def test_segmentation_preprocessors_are_equal_in_tests(test_cfg: dict | None) -> None:
    init_default_scope("mmseg")
    options = dict(**NORM, bgr_to_rgb=True, size=(64, 64), test_cfg=test_cfg)
    stock, fast = (MODELS.build(dict(type=t, **options)) for t in ("SegDataPreProcessor", "FastSegPreprocessor"))
    expected = stock(pseudo_collate(seg_samples([(40, 50)] * 2, torch.int64)), False)
    assert_same(fast(packed_collate(seg_samples([(40, 50)] * 2, torch.uint8)), False), expected)


def test_training_without_labels_is_refused() -> None:
    preprocessor = MODELS.build(dict(type="FastSegPreprocessor", **SEG_OPTIONS["of UperNet"]))
    with pytest.raises(ValueError, match="needs data_samples with labels"):
        preprocessor(dict(inputs=images(SIZES)), True)


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 1])
def test_loader_pins_and_the_preprocessor_moves_without_waiting(workers: int) -> None:
    init_default_scope("mmdet")
    options = DET_OPTIONS["of Mask R-CNN"]
    preprocessor = MODELS.build(dict(type="FastDetPreprocessor", **options)).cuda()
    expected = MODELS.build(dict(type="DetDataPreprocessor", **options))(pseudo_collate(det_samples()), True)
    (batch,) = DataLoader(det_samples(), batch_size=3, num_workers=workers, collate_fn=packed_collate, pin_memory=True)
    assert batch.block.is_pinned()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = preprocessor(batch, True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found["inputs"].is_cuda
    torch.testing.assert_close(found["inputs"].cpu(), expected["inputs"], rtol=0, atol=0)
    for sample, other in zip(found["data_samples"], expected["data_samples"]):
        assert sample.gt_instances.masks.device.type == "cuda"
        np.testing.assert_array_equal(sample.gt_instances.masks.to_ndarray(), other.gt_instances.masks.to_ndarray())
