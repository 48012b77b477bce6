"""Detectors and preprocessors: predictions do not depend on what else is in the batch."""

import copy

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import MessageHub
from test_configs import REPOSITORY, build, det_batch, seg_batch
from test_gla import relative_error
from torch import Tensor, nn

from vig_backbone.openmmlab.configuration import load_config
from vig_backbone.openmmlab.padding_masks import PaddingMasks, stride_of
from vig_backbone.padding import attach_valid_sizes, attached_valid_sizes

SIZES = [(96, 150), (130, 100), (64, 61)]
CONFIGS = ["mask_rcnn_hier_vig_t", "mask_rcnn_vig_t"]


def detector(name: str, **preprocessor: bool) -> nn.Module:
    """With random weights that make many different proposals and detections."""
    cfg = load_config(REPOSITORY / "det_configs" / f"{name}.py")
    cfg.model.data_preprocessor.update(preprocessor)
    cfg.model.test_cfg.rpn.update(nms_pre=200, max_per_img=100)
    cfg.model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=30)
    model = build(cfg)
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 1 or "rpn_cls" in parameter_name or "rpn_reg" in parameter_name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def image_of(batch: dict, i: int) -> dict:
    return dict(inputs=[batch["inputs"][i]], data_samples=[copy.deepcopy(batch["data_samples"][i])])


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_detections_do_not_depend_on_the_batch(name):
    model, batch = detector(name), det_batch(SIZES, [1] * len(SIZES), 80)
    together = model.test_step(copy.deepcopy(batch))
    for i, sample in enumerate(together):
        alone = model.test_step(image_of(batch, i))[0].pred_instances
        found = sample.pred_instances
        assert len(found) == len(alone) > 0
        assert torch.equal(found.labels, alone.labels)
        assert relative_error(found.scores, alone.scores) < 1e-4
        assert relative_error(found.bboxes, alone.bboxes) < 1e-4
        assert (found.masks != alone.masks).float().mean() < 1e-4


@torch.no_grad()
def test_without_sizes_they_do():
    model, batch = detector(CONFIGS[0], valid_sizes=False), det_batch(SIZES, [1] * len(SIZES), 80)
    together = model.test_step(copy.deepcopy(batch))[2].pred_instances
    alone = model.test_step(image_of(batch, 2))[0].pred_instances
    assert len(together) != len(alone) or relative_error(together.scores, alone.scores) > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_training_sees_each_image_as_it_is_alone(name):
    """Maps of the neck in training mode, and their gradients for the backbone."""
    model, batch = detector(name).train(), det_batch(SIZES[1:], [1, 1], 80)
    model.backbone.drop_path_rate = 0.0
    for module in model.backbone.modules():
        if hasattr(module, "rate"):
            module.rate = 0.0

    def gradient(data: dict, i: int, rows: list[int], columns: list[int]) -> tuple[list[Tensor], Tensor]:
        maps = model.extract_feat(model.data_preprocessor(copy.deepcopy(data), training=True)["inputs"])
        maps = [x[i, :, :h, :w] for x, h, w in zip(maps, rows, columns)]
        sum(x.square().sum() for x in maps).backward()
        weight = model.backbone.patch_embed.get_parameter("0.weight" if "hier" in name else "proj.0.weight")
        found, weight.grad = weight.grad, None
        model.zero_grad()
        return [x.detach() for x in maps], found

    for i, (h, w) in enumerate(SIZES[1:]):
        rows, columns = ([-(-side // stride) for stride in (4, 8, 16, 32, 64)] for side in (h, w))
        together = gradient(batch, i, rows, columns)
        alone = gradient(image_of(batch, i), 0, rows, columns)
        assert all(relative_error(a, e) < 1e-4 for a, e in zip(together[0], alone[0]))
        assert relative_error(together[1], alone[1]) < 1e-3


def test_detection_batches_take_their_sizes_along():
    model = detector(CONFIGS[0])
    batch = det_batch(SIZES, [1] * len(SIZES), 80)
    inputs = model.data_preprocessor(copy.deepcopy(batch), training=True)["inputs"]
    assert attached_valid_sizes(inputs).tolist() == [list(size) for size in SIZES]
    fitting = det_batch([(64, 96), (64, 96)], [1, 1], 80)
    assert attached_valid_sizes(model.data_preprocessor(fitting)["inputs"]) is None
    model.data_preprocessor.valid_sizes = False
    assert attached_valid_sizes(model.data_preprocessor(batch)["inputs"]) is None


def test_sizes_follow_images_that_the_preprocessor_resizes():
    cfg = load_config(REPOSITORY / "det_configs" / f"{CONFIGS[0]}.py")
    resize = dict(type="BatchSyncRandomResize", random_size_range=(256, 256), interval=1, size_divisor=32)
    cfg.model.data_preprocessor.batch_augments = [resize]
    model = build(cfg)
    MessageHub.get_current_instance().update_info("iter", 0)
    model.data_preprocessor(det_batch([(64, 128)], [1], 80), training=True)  # draws the size of the next batch
    data = model.data_preprocessor(det_batch([(64, 128), (40, 60)], [1, 1], 80), training=True)
    H, W = data["inputs"].shape[-2:]
    assert (H, W) != (64, 128)
    assert attached_valid_sizes(data["inputs"]).tolist() == [[H, W], [40 * H // 64, 60 * W // 128]]


def test_segmentation_batches_take_their_sizes_along():
    cfg = load_config(REPOSITORY / "seg_configs" / "upernet_hier_vig_t.py")
    cfg.model.data_preprocessor.size = (64, 96)
    model = build(cfg)
    sizes = [(64, 96), (50, 70)]
    inputs = model.data_preprocessor(seg_batch(sizes, 150), training=True)["inputs"]
    assert attached_valid_sizes(inputs).tolist() == [list(size) for size in sizes]
    assert attached_valid_sizes(model.data_preprocessor(seg_batch(sizes[:1], 150), training=True)["inputs"]) is None
    assert attached_valid_sizes(model.data_preprocessor(seg_batch(sizes[1:], 150))["inputs"]) is None


@torch.no_grad()
def test_windows_know_how_much_of_them_is_image(monkeypatch):
    cfg = load_config(REPOSITORY / "seg_configs" / "upernet_vig_t.py")
    cfg.model.test_cfg = ConfigDict(mode="slide", crop_size=(64, 64), stride=(48, 48))
    model = build(cfg).eval()
    seen = []
    extract_feat = model.extract_feat
    monkeypatch.setattr(model, "extract_feat", lambda x: seen.append(attached_valid_sizes(x)) or extract_feat(x))
    images = torch.randn(1, 3, 64, 160)
    attach_valid_sizes(images, torch.tensor([[40, 100]]))
    model.predict(images)
    assert torch.cat(seen).tolist() == [[40, 64], [40, 52], [40, 4]]


@pytest.mark.parametrize(
    ("images", "size", "stride"),
    [((800, 1344), (200, 336), 4), ((800, 1344), (13, 21), 64), ((65, 65), (2, 2), 64), ((100, 33), (4, 2), 32)],
)
def test_the_size_of_a_map_tells_its_stride(images, size, stride):
    assert stride_of(images, size) == stride


def test_a_map_at_no_stride_is_refused():
    with pytest.raises(ValueError, match="a map of 30x30 is at no stride of images of 64x64 pixels"):
        stride_of((64, 64), (30, 30))


def test_only_what_looks_at_neighbours_has_a_hook():
    one, three = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 3, padding=1)
    double, wide = nn.ConvTranspose2d(1, 1, 2, stride=2), nn.ConvTranspose2d(1, 1, 4, stride=2, padding=1)
    PaddingMasks(nn.Sequential(one, nn.Sequential(three, double), wide, nn.MaxPool2d(2)), nn.Identity())
    assert [bool(layer._forward_pre_hooks) for layer in (one, three, double, wide)] == [False, True, False, True]


def test_last_row_and_column_of_image_are_repeated_once():
    masks = PaddingMasks()
    images = torch.zeros(2, 3, 16, 16)
    attach_valid_sizes(images, torch.tensor([[8, 16], [12, 4]]))
    masks.set_images(images)
    x = torch.arange(32.0).view(2, 1, 4, 4)
    first, second = masks.extended([x])[0][:, 0]
    assert torch.equal(first, torch.cat((x[0, 0, :2], x[0, 0, 1:2], x[0, 0, 3:])))
    rows = torch.cat((x[1, 0, :3], x[1, 0, 2:3]))
    assert torch.equal(second, torch.cat((rows[:, :1], rows[:, :1], rows[:, 2:]), 1))
