"""Non-maximum suppression of groups of boxes: every form against torchvision's."""

import pytest
import torch
from torch import Tensor
from vig_kernels import grouped_nms
from vig_kernels.suppression import IMPLEMENTATIONS

pytest.importorskip("triton", minversion="3.5")
nms = pytest.importorskip("torchvision.ops").nms
FORMS = pytest.mark.parametrize("impl", ["naive", "triton"])


def random_boxes(*shape: int) -> Tensor:
    """Corners on whole pixels: their overlaps have no rounding. Some with many others above them."""
    corners = torch.randint(0, 30, (*shape, 2)).float()
    return torch.cat((corners, corners + torch.randint(20, 30, (*shape, 2))), -1)


def expected(boxes: Tensor, valid: Tensor, counts: list[int], threshold: float) -> Tensor:
    kept = torch.zeros_like(valid)
    for b in range(len(boxes)):
        start = 0
        for count in counts:
            places = (start + torch.arange(count))[valid[b, start : start + count].cpu()]
            order = -torch.arange(len(places), dtype=torch.float32)
            kept[b, places[nms(boxes[b, places].cpu(), order, threshold)]] = True
            start += count
    return kept


@FORMS
@pytest.mark.parametrize("threshold", [0.3137, 0.7071])  # no ratio of small areas
@pytest.mark.parametrize("counts", [[1], [63, 64, 65], [300, 0, 130, 7]], ids=str)
def test_the_same_boxes_as_torchvision(impl, counts, threshold, device):
    boxes, valid = random_boxes(2, sum(counts)), torch.rand(2, sum(counts)) < 0.8
    kept = grouped_nms(boxes.to(device), valid.to(device), counts, threshold, impl)
    assert kept.dtype == torch.bool
    assert torch.equal(kept.cpu(), expected(boxes, valid, counts, threshold))
    if sum(counts) > 100:
        assert kept.sum() < valid.sum()  # some were removed


@FORMS
def test_what_is_removed_removes_nothing(impl, device):
    """Each box overlaps the next one alone: every second one goes, however long the chain."""
    left = 5.0 * torch.arange(200)
    boxes = torch.stack((left, torch.zeros(200), left + 10, torch.full((200,), 10.0)), -1)[None]
    kept = grouped_nms(boxes.to(device), torch.ones(1, 200, dtype=torch.bool, device=device), [200], 0.3, impl)
    assert kept[0].nonzero().flatten().tolist() == list(range(0, 200, 2))


@FORMS
def test_boxes_that_take_no_part_remove_nothing(impl, device):
    boxes = random_boxes(1, 1).expand(1, 150, 4).to(device)
    valid = torch.zeros(1, 150, dtype=torch.bool, device=device)
    assert not grouped_nms(boxes, valid, [150], 0.5, impl).any()
    valid[0, [70, 149]] = True
    assert grouped_nms(boxes, valid, [150], 0.5, impl).nonzero().tolist() == [[0, 70]]


@FORMS
def test_boxes_without_area_stay(impl, device):
    boxes = torch.tensor([3.0, 4.0, 3.0, 4.0]).expand(1, 90, 4).to(device)
    assert grouped_nms(boxes, torch.ones(1, 90, dtype=torch.bool, device=device), [90], 0.5, impl).all()


@FORMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_types_and_strides(impl, dtype, device):
    boxes = random_boxes(70, 2).to(device, dtype).transpose(0, 1)
    valid = torch.ones(2, 70, dtype=torch.bool, device=device)
    kept = grouped_nms(boxes, valid, [70], 0.4137, impl)
    assert torch.equal(kept.cpu(), expected(boxes.float().cpu(), valid.cpu(), [70], 0.4137))


def test_nothing_at_all():
    boxes, valid = torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.bool)
    for impl in IMPLEMENTATIONS:
        assert grouped_nms(boxes, valid, [0, 0], 0.5, impl).shape == (2, 0)


def test_arguments_that_do_not_fit():
    boxes, valid = random_boxes(2, 5), torch.ones(2, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"\[B, M, 4\], got \[2, 5, 2\]"):
        grouped_nms(boxes[..., :2], valid, [5], 0.5)
    with pytest.raises(ValueError, match="as boxes ask for"):
        grouped_nms(boxes, valid[:, :4], [5], 0.5)
    with pytest.raises(TypeError, match="must be bool"):
        grouped_nms(boxes, valid.int(), [5], 0.5)
    with pytest.raises(ValueError, match=r"add up to the 5 boxes of an image, got \[2, 2\]"):
        grouped_nms(boxes, valid, [2, 2], 0.5)
    with pytest.raises(ValueError, match="'auto' or one of"):
        grouped_nms(boxes, valid, [5], 0.5, "fast")


@pytest.mark.gpu
def test_nobody_waits():
    boxes, valid = random_boxes(2, 700).cuda(), torch.ones(2, 700, dtype=torch.bool, device="cuda")
    grouped_nms(boxes, valid, [400, 300], 0.5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        grouped_nms(boxes, valid, [400, 300], 0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
