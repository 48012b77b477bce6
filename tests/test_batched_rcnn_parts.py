"""The parts of the batched heads, each against mmdet's own for one image."""

import vig_backbone  # noqa: F401  brings mmcv's operators, which mmdet imports

# isort: split
import numpy as np
import pytest
import torch
from mmcv.ops import batched_nms
from mmdet.models.losses import accuracy as mmdet_accuracy
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.models.task_modules.assigners import AssignResult, MaxIoUAssigner
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
from mmdet.models.task_modules.samplers import PseudoSampler, RandomSampler
from mmdet.structures.bbox import bbox_overlaps
from mmdet.structures.mask import BitmapMasks, PolygonMasks, mask_target
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor

from vig_backbone.openmmlab.batched_rcnn import assign, mask_targets, proposals
from vig_backbone.openmmlab.batched_rcnn.assign import BatchedAssigner
from vig_backbone.openmmlab.batched_rcnn.batch import image_groups, pad_ignored, pad_objects
from vig_backbone.openmmlab.batched_rcnn.boxes import BoxDeltas, pairwise_overlap
from vig_backbone.openmmlab.batched_rcnn.losses import accuracy
from vig_backbone.openmmlab.batched_rcnn.mask_targets import batched_mask_target
from vig_backbone.openmmlab.batched_rcnn.proposals import Proposals, best_boxes
from vig_backbone.openmmlab.batched_rcnn.roi_features import pool
from vig_backbone.openmmlab.batched_rcnn.sample import BatchedSampler, Samples
from vig_backbone.openmmlab.tensor_masks import TensorMasks


def grid_boxes(count: int, size: int = 12) -> Tensor:
    """Boxes with corners on a coarse grid: many ties, some duplicates, some without area."""
    corners = torch.randint(0, size, (count, 2, 2)).sort(1).values
    return corners.flatten(1).float()


def make_instances(counts: list[int]) -> list[InstanceData]:
    return [InstanceData(bboxes=grid_boxes(n), labels=torch.randint(0, 7, (n,))) for n in counts]


RULES = {
    "rpn": dict(pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3),
    "rcnn": dict(pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.5),
    "no_low_quality": dict(pos_iou_thr=0.5, neg_iou_thr=0.4, match_low_quality=False),
    "one_box_per_object": dict(pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.1, gt_max_assign_all=False),
    "any_overlap": dict(pos_iou_thr=0.6, neg_iou_thr=0.3, min_pos_iou=0.0),
    "band_of_negatives": dict(pos_iou_thr=0.5, neg_iou_thr=(0.1, 0.4), min_pos_iou=0.3),
    "ignore": dict(pos_iou_thr=0.5, neg_iou_thr=0.3, min_pos_iou=0.3, ignore_iof_thr=0.5),
    "ignore_by_region": dict(pos_iou_thr=0.5, neg_iou_thr=0.3, ignore_iof_thr=0.4, ignore_wrt_candidates=False),
}


@pytest.mark.parametrize("budget", [assign.TABLE_ENTRIES, 50], ids=["together", "few_at_a_time"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_assignment_is_that_of_max_iou_assigner(rule: dict, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assign, "TABLE_ENTRIES", budget)
    stock = MaxIoUAssigner(**rule)
    ours = BatchedAssigner(stock, "RPNHead")
    kinds = set()
    for _ in range(40):
        counts, regions = torch.randint(0, 6, (2, 4)).tolist()
        instances, ignored = make_instances(counts), make_instances(regions)
        boxes, valid = torch.stack([grid_boxes(30) for _ in counts]), torch.rand(4, 30) < 0.9
        actual = ours(boxes, valid, pad_objects(instances), pad_ignored(ignored))
        for image in range(4):
            priors = InstanceData(priors=boxes[image, valid[image]])
            expected = stock.assign(priors, instances[image], ignored[image]).gt_inds
            assert torch.equal(actual[image, valid[image]], expected)
            kinds.update(expected.clamp(max=1).tolist())
        assert (actual[~valid] == -1).all()
    assert {0, 1} <= kinds


def test_assignment_without_any_object_or_region_is_background() -> None:
    ours = BatchedAssigner(MaxIoUAssigner(0.5, 0.5, ignore_iof_thr=0.5), "RPNHead")
    assigned = ours(grid_boxes(20), torch.ones(2, 20, dtype=torch.bool), pad_objects(make_instances([0, 0])), None)
    assert (assigned == 0).all()
    assert pad_ignored([None, make_instances([0])[0]]) is None


def test_groups_of_images_keep_within_the_budget() -> None:
    assert image_groups([3, 3, 3, 9, 1], 6) == [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 5)]
    assert image_groups([1, 1], 10) == [slice(0, 2)]


def draw(assigned: Tensor, **rule) -> tuple[Samples, list[set[int]], list[set[int]]]:
    samples = BatchedSampler(RandomSampler(**rule), "RPNHead")(assigned)
    rows = list(zip(samples.index, samples.valid, samples.positive))
    positives = [index[positive].tolist() for index, _, positive in rows]
    negatives = [index[valid & ~positive].tolist() for index, valid, positive in rows]
    for drawn in (*positives, *negatives):
        assert len(drawn) == len(set(drawn)), "drawn twice"
    return samples, [set(p) for p in positives], [set(n) for n in negatives]


@pytest.mark.parametrize("neg_pos_ub", [-1, 0, 0.7, 3])
@pytest.mark.parametrize("num", [8, 20, 1000])
def test_sample_has_mmdets_numbers(num: int, neg_pos_ub: float) -> None:
    rule = dict(num=num, pos_fraction=0.25, neg_pos_ub=neg_pos_ub, add_gt_as_proposals=False)
    assigned = torch.stack([torch.randint(-1, top, (60,)) for top in (1, 2, 5)] + [torch.full((60,), -1)])
    samples, positives, negatives = draw(assigned, **rule)
    assert samples.index.shape == (4, num)
    assert not samples.positive[:, samples.heads :].any()
    factor = 0
    for image, row in enumerate(assigned):
        result = AssignResult(3, row.clone(), torch.zeros(60), labels=row.clone())
        boxes = InstanceData(priors=grid_boxes(60))
        expected = RandomSampler(**rule).sample(result, boxes, make_instances([4])[0])
        assert len(positives[image]) == len(expected.pos_inds)
        assert len(negatives[image]) == len(expected.neg_inds)
        assert (row[list(positives[image])] > 0).all()
        assert (row[list(negatives[image])] == 0).all()
        factor += expected.avg_factor
    assert samples.avg_factor == factor


def test_everything_that_fits_is_sampled() -> None:
    assigned = torch.tensor([[0, 1, -1, 2, 0, 0]])
    _, positives, negatives = draw(assigned, num=100, pos_fraction=1.0)
    assert positives == [{1, 3}]
    assert negatives == [{0, 4, 5}]


def test_sampling_is_uniform() -> None:
    torch.manual_seed(0)
    assigned = (torch.arange(40) < 12).long().expand(4000, -1)
    samples = BatchedSampler(RandomSampler(num=16, pos_fraction=0.5), "RPNHead")(assigned)
    times = torch.zeros(40).scatter_add_(0, samples.index.flatten(), samples.valid.flatten().float())
    for group, drawn in ((times[:12], 8), (times[12:], 8)):
        share = drawn / len(group)
        deviation = (4000 * share * (1 - share)) ** 0.5
        assert ((group - 4000 * share).abs() < 4.5 * deviation).all()


def test_pseudo_sampler_takes_all() -> None:
    samples = BatchedSampler(PseudoSampler(), "RPNHead")(torch.tensor([[0, 1, -1], [0, 0, 0]]))
    assert samples.valid.tolist() == [[True, True, False], [True, True, True]]
    assert samples.positive.tolist() == [[False, True, False], [False, False, False]]
    assert samples.avg_factor == 2  # a positive, and one for the image that has none


@pytest.mark.parametrize("clamped", [False, True])
def test_box_deltas_are_those_of_mmdets_coder(clamped: bool) -> None:
    coder = DeltaXYWHBBoxCoder((0.1, 0.0, 0.2, 0.0), (0.1, 0.1, 0.2, 0.2), add_ctr_clamp=clamped, ctr_clamp=3)
    boxes, goals = (torch.cat((c, c + torch.rand(50, 2) * 30 + 1), 1) for c in torch.rand(2, 50, 2) * 60)
    deltas = torch.randn(50, 4) * 5
    ours = BoxDeltas(coder)
    assert torch.equal(ours.encode(boxes, goals), coder.encode(boxes, goals))
    assert torch.equal(ours.decode(boxes, deltas), coder.decode(boxes, deltas))
    limits = torch.tensor([70.0, 50.0, 70.0, 50.0])
    assert torch.equal(ours.decode(boxes, deltas, limits), coder.decode(boxes, deltas, max_shape=(50, 70)))
    assert not ours.state_dict()


def test_overlaps_are_mmdets() -> None:
    first, second = grid_boxes(30), grid_boxes(40)
    assert torch.equal(pairwise_overlap(first, second), bbox_overlaps(first, second))
    assert torch.equal(pairwise_overlap(first, second, of_first=True), bbox_overlaps(first, second, mode="iof"))


@pytest.mark.parametrize("grouped", [True, False], ids=["all_levels_together", "image_by_image"])
def test_suppression_is_mmcvs_for_each_image(grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposals, "triton_runs_on", lambda boxes: grouped)
    corners = torch.rand(3, 200, 2) * 60
    boxes = torch.cat((corners, corners + 5 + torch.rand(3, 200, 2) * 30), -1)
    counts, valid = [110, 0, 70, 20], torch.rand(3, 200) < 0.8
    valid[2] = False
    levels = torch.arange(4).repeat_interleave(torch.tensor(counts))
    scores = (torch.rand(3, 200) * 50).round() / 50  # ties
    scores = torch.cat([part.sort(1, descending=True).values for part in scores.split(counts, 1)], 1)
    found = best_boxes(boxes, scores, counts, valid, 0.5, 30)
    assert found.boxes.shape == (3, 30, 4)
    for image in range(2):
        mine = valid[image]
        expected, _ = batched_nms(
            boxes[image, mine], scores[image, mine], levels[mine], dict(type="nms", iou_threshold=0.5)
        )
        assert torch.equal(torch.cat((found[image].bboxes, found[image].scores[:, None]), 1), expected[:30])
    assert len(found[2]) == 0


def test_proposals_of_another_rpn_are_padded() -> None:
    padded = Proposals.of(make_instances([3, 0, 5]))
    assert padded.valid.sum(1).tolist() == [3, 0, 5]
    assert Proposals.of(padded) is padded


def test_accuracy_is_that_of_the_valid_rows() -> None:
    scores, labels, valid = torch.randn(60, 4), torch.randint(0, 4, (60,)), torch.arange(60) < 40
    labels[::2] = scores[::2].argmax(1)
    expected = mmdet_accuracy(scores[:40], labels[:40])
    assert 50 <= expected < 100
    torch.testing.assert_close(accuracy(scores, labels, valid), expected)
    assert accuracy(scores, labels, valid & False).tolist() == [0]


def make_extractor(**layer) -> SingleRoIExtractor:
    roi_layer = dict(type="RoIAlign", output_size=3, **layer)
    return SingleRoIExtractor(roi_layer, out_channels=2, featmap_strides=[4, 8, 16], finest_scale=20)


@pytest.mark.parametrize(
    "layer", [dict(sampling_ratio=0), dict(sampling_ratio=2), dict(sampling_ratio=0, aligned=False)]
)
def test_pooled_features_and_gradients_are_the_extractors(layer: dict) -> None:
    extractor = make_extractor(**layer)
    sizes = torch.rand(20, 2) * torch.linspace(5, 100, 20)[:, None]
    corners = torch.rand(20, 2) * 20
    rois = torch.cat((torch.randint(0, 2, (20, 1)).float(), corners, corners + sizes), 1)
    rois[0, 1:] = 0  # as places that are not used
    results = []
    for function in (extractor, lambda *inputs: pool(extractor, *inputs)):
        torch.manual_seed(1)
        maps = [torch.randn(2, 2, 128 // s, 128 // s, requires_grad=True) for s in (4, 8, 16)]
        features = function(tuple(maps), rois)
        (features * torch.randn_like(features)).sum().backward()
        results.append([features, *(level.grad for level in maps)])
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_levels_without_rois_stay_in_the_graph() -> None:
    maps = [torch.randn(1, 2, 128 // s, 128 // s, requires_grad=True) for s in (4, 8, 16)]
    pool(make_extractor(), tuple(maps), torch.tensor([[0, 1.0, 1.0, 9.0, 9.0]])).sum().backward()
    assert maps[0].grad.any()
    assert all(level.grad is not None and not level.grad.any() for level in maps[1:])


def make_masks(count: int, H: int, W: int) -> BitmapMasks:
    bitmaps = torch.nn.functional.interpolate(torch.rand(1, max(count, 1), 5, 6), (H, W), mode="bilinear")[0, :count]
    return BitmapMasks((bitmaps > 0.5).numpy().astype(np.uint8), H, W)


@pytest.mark.parametrize("budget", [mask_targets.PIXELS_AT_ONCE, 1], ids=["together", "image_by_image"])
@pytest.mark.parametrize(
    ("kind", "soft"),
    [(kind, soft) for kind in ("bitmaps", "tensors", "both") for soft in (False, True)] + [("polygons", False)],
)
def test_mask_targets_are_mmdets(kind: str, soft: bool, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_targets, "PIXELS_AT_ONCE", budget)
    if kind == "polygons":
        square = [np.array([5.0, 5, 40, 5, 40, 30, 5, 30])]
        masks = [PolygonMasks([square] * n, H, W) for n, H, W in ((3, 50, 64), (2, 40, 70), (1, 8, 8))]
    else:
        masks = [make_masks(3, 50, 64), make_masks(2, 40, 70), make_masks(0, 8, 8)]
    counts = [9, 7, 0]
    corners = torch.rand(16, 2) * 40 - 5  # over the borders on all sides
    rois = torch.cat((torch.tensor([[0.0]] * 9 + [[1.0]] * 7), corners, corners + 2 + torch.rand(16, 2) * 50), 1)
    matched = torch.cat((torch.randint(0, 3, (9,)), torch.randint(0, 2, (7,))))
    cfg = ConfigDict(mask_size=(7, 9), soft_mask_target=soft)
    expected = mask_target(list(rois[:, 1:].split(counts)), list(matched.split(counts)), masks, cfg)
    if kind in ("tensors", "both"):
        masks = [TensorMasks.from_bitmaps(m) if kind == "tensors" or i else m for i, m in enumerate(masks)]
    actual = batched_mask_target(masks, rois, matched, counts, cfg)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6 if soft else 0)


def test_mask_targets_without_rois_are_empty() -> None:
    cfg = ConfigDict(mask_size=28)
    targets = batched_mask_target([make_masks(2, 9, 9)], torch.zeros(0, 5), torch.zeros(0).long(), [0], cfg)
    assert targets.shape == (0, 28, 28)
