"""The batched heads of Faster and Mask R-CNN as whole models, against mmdet's."""

import vig_backbone  # noqa: F401  brings mmcv's operators, which mmdet imports

# isort: split
from collections.abc import Callable

import numpy as np
import pytest
import torch
from mmdet.models.task_modules.samplers import RandomSampler
from mmdet.structures.mask import BitmapMasks, PolygonMasks
from mmengine.config import ConfigDict
from mmengine.model import BaseModule
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, init_default_scope
from test_configs import REPOSITORY, build, det_batch, take_training_step
from test_gla import relative_error
from torch import Tensor, nn

from vig_backbone.openmmlab.batched_rcnn import detector, sample
from vig_backbone.openmmlab.configuration import load_config
from vig_backbone.openmmlab.errors import ConfigError
from vig_backbone.openmmlab.tensor_masks import TensorMasks

CLASSES = 7
MANY = 4096  # samples: more than there are candidates
SIZES, OBJECTS = [(96, 128), (80, 100), (96, 90)], [3, 1, 0]


class Pyramid(BaseModule):
    """Four cheap maps at strides 4 to 32."""

    def __init__(self, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.steps = nn.ModuleList(nn.Conv2d(8, 8, 2, 2) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = [self.stem(x).tanh()]
        for step in self.steps:
            maps.append(step(maps[-1]).tanh())
        return tuple(maps)


def small_config(**changes) -> ConfigDict:
    """This repository's Mask R-CNN with 16 channels; all candidates are sampled, so that nothing is random.

    Padding is image, as for mmdet.
    """
    cfg = load_config(REPOSITORY / "det_configs" / "mask_rcnn_hier_vig_t.py", data="toy").model
    cfg.pop("init_cfg", None)
    cfg.type = "MaskRCNN"
    cfg.data_preprocessor.valid_sizes = False
    cfg.backbone = ConfigDict(type=Pyramid)
    cfg.neck = ConfigDict(type="FPN", in_channels=[8] * 4, out_channels=16, num_outs=5)
    cfg.rpn_head.update(in_channels=16, feat_channels=16)
    cfg.rpn_head.anchor_generator.scales = [4]
    for name in ("bbox_roi_extractor", "mask_roi_extractor"):
        cfg.roi_head[name].out_channels = 16
    cfg.roi_head.bbox_head.update(in_channels=16, fc_out_channels=32)
    cfg.roi_head.mask_head.update(in_channels=16, conv_out_channels=16)
    cfg.train_cfg.rpn.sampler.update(num=MANY, pos_fraction=1.0)
    cfg.train_cfg.rcnn.sampler.update(num=256, pos_fraction=1.0)
    for field, value in changes.items():
        *path, name = field.split("__")
        place = cfg
        for step in path:
            place = place[step]
        place[name] = value
    return cfg


def batched(cfg: ConfigDict) -> ConfigDict:
    cfg = ConfigDict(cfg.to_dict())
    cfg.type = f"Batched{cfg.type}"
    return cfg


def make_pair(cfg: ConfigDict) -> tuple[nn.Module, nn.Module]:
    """mmdet's model and the batched one with the same weights, large enough to tell scores apart."""
    init_default_scope("mmdet")
    stock, ours = MODELS.build(ConfigDict(cfg.to_dict())), MODELS.build(batched(cfg))
    for parameter in stock.parameters():
        nn.init.normal_(parameter, std=0.08)
    ours.load_state_dict(stock.state_dict(), strict=True)
    return stock.train(), ours.train()


def make_batch(sizes: list[tuple[int, int]], objects: list[int], kind: type = BitmapMasks) -> dict:
    """Boxes from 8 pixels to two thirds of the image, with elliptic masks, or diamonds where polygons are asked for."""
    batch = det_batch(sizes, objects, CLASSES)
    for (H, W), one in zip(sizes, batch["data_samples"]):
        instances, whole = one.gt_instances, torch.tensor([W, H])
        size = 8 + torch.rand(len(instances), 2) * (whole * 0.66 - 8)
        corner = torch.rand(len(instances), 2) * (whole - size)
        instances.bboxes = torch.cat((corner, corner + size), 1)
        instances.masks = make_masks(corner + size / 2, size / 2, H, W, kind)
    return batch


def make_masks(centres: Tensor, radii: Tensor, H: int, W: int, kind: type) -> BitmapMasks | PolygonMasks | TensorMasks:
    if kind is PolygonMasks:
        turns = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
        corners = centres[:, None] + radii[:, None] * turns  # [n, 4, 2]
        return PolygonMasks([[mask.flatten().double().numpy()] for mask in corners], H, W)
    pixels = torch.stack(torch.meshgrid(torch.arange(W), torch.arange(H), indexing="xy"), -1)  # [H, W, 2]
    inside = (((pixels - centres[:, None, None]) / radii[:, None, None]) ** 2).sum(-1) <= 1
    bitmaps = BitmapMasks(inside.numpy().astype(np.uint8), H, W)
    return bitmaps if kind is BitmapMasks else TensorMasks.from_bitmaps(bitmaps)


def losses_of(model: nn.Module, batch: Callable[[], dict]) -> dict[str, Tensor]:
    """What is logged of a step on `batch()`; gradients are left in the model."""
    torch.manual_seed(3)
    data = model.data_preprocessor(batch(), True)
    total, logged = model.parse_losses(model.loss(data["inputs"], data["data_samples"]))
    model.zero_grad()
    total.backward()
    return logged


def assert_same_step(stock: nn.Module, ours: nn.Module, batch: Callable[[], dict]) -> dict[str, Tensor]:
    expected, actual = losses_of(stock, batch), losses_of(ours, batch)
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert actual[name].item() == pytest.approx(value.item(), rel=2e-5, abs=1e-7), name
    for (name, a), e in zip(ours.named_parameters(), stock.parameters()):
        assert a.grad is not None, f"{name} has no gradient"
        # Where mmdet leaves a parameter out, its gradient here is zero.
        assert relative_error(a.grad, torch.zeros_like(a) if e.grad is None else e.grad) < 3e-5, name
    return expected


CASES = {
    "mask_rcnn": {},
    "faster_rcnn": dict(type="FasterRCNN"),
    "softmax_rpn": dict(rpn_head__loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False)),
    "smooth_l1": dict(
        rpn_head__loss_bbox=dict(type="SmoothL1Loss", beta=0.1),
        roi_head__bbox_head__loss_bbox=dict(type="SmoothL1Loss"),
    ),
    "decoded_boxes": dict(
        rpn_head__reg_decoded_bbox=True,
        rpn_head__loss_bbox=dict(type="IoULoss", loss_weight=2.0),
        roi_head__bbox_head__reg_decoded_bbox=True,
        roi_head__bbox_head__loss_bbox=dict(type="GIoULoss", loss_weight=5.0),
    ),
    "class_agnostic": dict(roi_head__bbox_head__reg_class_agnostic=True, roi_head__mask_head__class_agnostic=True),
    "positives_weighted": dict(train_cfg__rpn__pos_weight=2.5, train_cfg__rcnn__pos_weight=3.0),
    "pseudo_sampler": dict(train_cfg__rpn__sampler=dict(type="PseudoSampler")),
    "inner_anchors": dict(train_cfg__rpn__allowed_border=0),
    "one_extractor": dict(roi_head__mask_roi_extractor=None, roi_head__bbox_roi_extractor__roi_layer__output_size=14),
    "soft_masks": dict(train_cfg__rcnn__soft_mask_target=True),
    "sigmoid_classes": dict(roi_head__bbox_head__loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=True)),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_mmdets(case: str) -> None:
    cfg = small_config(**CASES[case])
    if case == "faster_rcnn":
        cfg.roi_head.pop("mask_roi_extractor")
        cfg.roi_head.pop("mask_head")
    if case == "one_extractor":
        cfg.roi_head.bbox_head.roi_feat_size = 14
    stock, ours = make_pair(cfg)
    losses = assert_same_step(stock, ours, lambda: make_batch(SIZES, OBJECTS))
    assert all(value > 0 for name, value in losses.items() if "loss" in name)


@pytest.mark.parametrize("kind", [BitmapMasks, TensorMasks, PolygonMasks])
def test_every_kind_of_mask_gives_mmdets_losses(kind: type) -> None:
    stock, ours = make_pair(small_config())
    assert_same_step(stock, ours, lambda: make_batch(SIZES, OBJECTS, kind))


@pytest.mark.parametrize("objects", [[0, 0], [1, 0], [40, 0]])
def test_few_or_many_objects(objects: list[int]) -> None:
    stock, ours = make_pair(small_config())
    losses = assert_same_step(stock, ours, lambda: make_batch([(64, 64), (50, 64)], objects))
    assert (losses["loss_mask"] > 0) == (sum(objects) > 0)


def test_ignored_regions_count() -> None:
    cfg = small_config(train_cfg__rpn__assigner__ignore_iof_thr=0.5, train_cfg__rcnn__assigner__ignore_iof_thr=0.5)
    stock, ours = make_pair(cfg)

    def batch() -> dict:
        made = make_batch(SIZES, OBJECTS)
        made["data_samples"][1].ignored_instances.bboxes = torch.tensor([[0.0, 0, 60, 60], [50, 20, 90, 80]])
        made["data_samples"][1].ignored_instances.labels = torch.zeros(2, dtype=torch.long)
        return made

    without = losses_of(ours, lambda: make_batch(SIZES, OBJECTS))
    assert assert_same_step(stock, ours, batch)["loss_rpn_cls"] != without["loss_rpn_cls"]


def test_losses_of_the_same_draw_are_mmdets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both draw the candidates with the largest of one set of keys; images alike, so that places are the same."""
    cfg = small_config()
    cfg.train_cfg.rpn.sampler.update(num=40, pos_fraction=0.2)
    cfg.train_cfg.rcnn.sampler.update(num=32, pos_fraction=0.25, neg_pos_ub=2)
    stock, ours = make_pair(cfg)
    keys, batch = torch.rand(100_000), make_batch([(96, 128)] * 2, [3, 3])

    def choose(self: RandomSampler, gallery: Tensor, num: int) -> Tensor:
        return gallery[keys[gallery].topk(num).indices]

    monkeypatch.setattr(RandomSampler, "random_choice", choose)
    monkeypatch.setattr(sample.torch, "rand", lambda shape, device: keys[: shape[1]].expand(shape))
    assert_same_step(stock, ours, lambda: batch)


@pytest.mark.parametrize("swapped", ["rpn_head", "roi_head"])
def test_either_head_works_with_mmdets_other_one(swapped: str) -> None:
    cfg = small_config()
    stock, _ = make_pair(cfg)
    cfg[swapped].type = "BatchedRPNHead" if swapped == "rpn_head" else "BatchedRoIHead"
    ours = MODELS.build(cfg)
    ours.load_state_dict(stock.state_dict(), strict=True)
    stock.load_state_dict(ours.state_dict(), strict=True)
    assert_same_step(stock, ours.train(), lambda: make_batch(SIZES, OBJECTS))


def test_other_heads_stay_and_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(detector, "print_log", lambda message, **options: messages.append(message))
    cfg = batched(small_config())
    cfg.roi_head.type = "DoubleHeadRoIHead"
    cfg.roi_head.reg_roi_scale_factor = 1.3
    model = MODELS.build(cfg)
    assert [type(head).__name__ for head in (model.rpn_head, model.roi_head)] == ["BatchedRPNHead", "DoubleHeadRoIHead"]
    assert messages == ["DoubleHeadRoIHead has no batched form: it trains image by image"]


@pytest.mark.parametrize("nms_pre", [40, 10_000])
@pytest.mark.parametrize("smallest", [-1, 0, 20])
def test_proposals_and_predictions_are_mmdets(nms_pre: int, smallest: int) -> None:
    cfg = small_config()
    cfg.test_cfg.rpn.update(nms_pre=nms_pre, max_per_img=60, min_bbox_size=smallest)
    stock, ours = (model.eval() for model in make_pair(cfg))
    for model in (stock, ours):
        model.rpn_head.rpn_reg.weight.data *= 4  # boxes of many shapes
    batch = make_batch(SIZES, OBJECTS)
    for one in batch["data_samples"]:
        one.set_metainfo(dict(scale_factor=(0.5, 0.8)))
    data = stock.data_preprocessor(batch, False)
    with torch.no_grad():
        maps = stock.extract_feat(data["inputs"])
        for rescale in (False, True):
            results = [model.rpn_head.predict(maps, data["data_samples"], rescale=rescale) for model in (stock, ours)]
            for expected, actual in zip(*results):
                assert isinstance(results[1], list)
                torch.testing.assert_close(actual.bboxes, expected.bboxes, rtol=0, atol=0)
                torch.testing.assert_close(actual.scores, expected.scores, rtol=0, atol=0)
                assert len(actual.labels) == len(expected.labels)
        results = [model.test_step(make_batch(SIZES, OBJECTS)) for model in (stock, ours) if torch.manual_seed(5)]
    for expected, actual in zip(*results):
        assert torch.equal(actual.pred_instances.bboxes, expected.pred_instances.bboxes)
        assert torch.equal(actual.pred_instances.masks, expected.pred_instances.masks)


def test_bfloat16_is_near_float32() -> None:
    _, ours = make_pair(small_config())
    exact = losses_of(ours, lambda: make_batch(SIZES, OBJECTS))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = losses_of(ours, lambda: make_batch(SIZES, OBJECTS))
    for name, value in exact.items():
        if "loss" in name:
            assert rounded[name].item() == pytest.approx(value.item(), rel=0.1), name
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters())


def test_config_of_this_repository_trains_with_the_batched_heads() -> None:
    cfg = load_config(REPOSITORY / "det_configs" / "mask_rcnn_vig_t.py", data="toy")
    model = build(cfg)
    assert [type(head).__name__ for head in (model.rpn_head, model.roi_head)] == ["BatchedRPNHead", "BatchedRoIHead"]
    take_training_step(model, cfg, det_batch([(64, 96), (50, 70)], [3, 0], CLASSES))
    wrapper = OptimWrapper(torch.optim.AdamW(model.parameters(), 1e-4), accumulative_counts=2)
    batch = det_batch([(64, 96), (50, 70)], [3, 2], CLASSES)
    totals = [float(model.train_step(batch, wrapper)["loss"]) for _ in range(12)]
    assert totals[-1] < 0.8 * totals[0]


UNSUPPORTED = {
    "assigner": (dict(train_cfg__rpn__assigner=dict(type="ATSSAssigner", topk=9)), "RPNHead"),
    "assigner_of_rois": (dict(train_cfg__rcnn__assigner=dict(type="ATSSAssigner", topk=9)), "StandardRoIHead"),
    "sampler": (dict(train_cfg__rcnn__sampler__type="InstanceBalancedPosSampler"), "StandardRoIHead"),
    "loss": (dict(rpn_head__loss_cls=dict(type="FocalLoss", use_sigmoid=True)), "RPNHead"),
    "box_loss": (dict(roi_head__bbox_head__loss_bbox=dict(type="BoundedIoULoss")), "StandardRoIHead"),
    "mask_loss": (dict(roi_head__mask_head__loss_mask=dict(type="DiceLoss")), "StandardRoIHead"),
    "coder": (dict(rpn_head__bbox_coder=dict(type="TBLRBBoxCoder")), "RPNHead"),
    "soft_nms": (dict(test_cfg__rpn__nms=dict(type="soft_nms", iou_threshold=0.7)), "RPNHead"),
    "objects_as_anchors": (dict(train_cfg__rpn__sampler__add_gt_as_proposals=True), "False"),
    "boxes_as_ignored": (dict(train_cfg__rpn__assigner__perm_repeat_gt_cfg=dict(iou_thr=0.9)), "RPNHead"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_is_not_supported_is_an_error_that_names_the_stock_class(case: str) -> None:
    changes, name = UNSUPPORTED[case]
    init_default_scope("mmdet")
    with pytest.raises(ConfigError, match=name):
        MODELS.build(batched(small_config(**changes)))
