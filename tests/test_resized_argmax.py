"""Label maps: maps along an axis against PyTorch's interpolation and crops; every form against the definition."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vig_kernels import Resampling, resampling, resized_argmax
from vig_kernels.resized_argmax import IMPLEMENTATIONS

pytest.importorskip("triton", minversion="3.5")
FORMS = pytest.mark.parametrize("impl", ["chunk", "triton"])
ALIGN = pytest.mark.parametrize("align_corners", [False, True])
SIZES = [((4, 6), (16, 24)), ((7, 5), (33, 50)), ((9, 11), (4, 5)), ((1, 8), (6, 1)), ((5, 6), (5, 6))]


def interpolate(x: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=align_corners)


def bilinear(source: tuple[int, int], target: tuple[int, int], align_corners: bool = False) -> list[Resampling]:
    return [Resampling.bilinear(*sizes, align_corners) for sizes in zip(source, target)]


def resample(x: Tensor, rows: Resampling, columns: Resampling) -> Tensor:
    return rows.matrix() @ x @ columns.matrix().T


# ---- maps along an axis


@ALIGN
@pytest.mark.parametrize(("source", "target"), SIZES, ids=str)
def test_bilinear_is_that_of_pytorch(source, target, align_corners):
    x = torch.randn(2, 3, *source, dtype=torch.float64)
    maps = bilinear(source, target, align_corners)
    torch.testing.assert_close(resample(x, *maps), interpolate(x, target, align_corners))
    assert [len(each) for each in maps] == list(target)
    assert max(each.index.shape[1] for each in maps) <= 2


@ALIGN
def test_a_chain_is_one_map(align_corners):
    """Resize, crop, mirror, resize: what happens to the logits of an image that was padded and mirrored."""
    x = torch.randn(1, 2, 5, 7, dtype=torch.float64)
    full = interpolate(x, (20, 28), align_corners)[:, :, 1:-2, :-3].flip(3)
    rows = Resampling.bilinear(5, 20, align_corners).crop(1, 18).then(Resampling.bilinear(17, 33, align_corners))
    columns = Resampling.bilinear(7, 28, align_corners).crop(0, 25).flip()
    columns = columns.then(Resampling.bilinear(25, 11, align_corners))
    torch.testing.assert_close(resample(x, rows, columns), interpolate(full, (33, 11), align_corners))
    assert rows.index.shape[1] <= 3  # of 2 x 2 entries some meet


@pytest.mark.parametrize("even", [True, False])
def test_windows_are_averaged_where_they_overlap(even):
    windows, starts, size = (
        [Resampling.bilinear(3, 8), Resampling.bilinear(3, 8), Resampling.bilinear(4, 5)],
        [0, 5, 9],
        14,
    )
    x = torch.randn(10, dtype=torch.float64)
    shares = [torch.ones(len(window)) if even else torch.rand(len(window)) + 0.1 for window in windows]
    total, covers = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for part, window, start, share in zip(x.split([3, 3, 4]), windows, starts, shares):
        total[start : start + len(window)] += share * (window.matrix() @ part)
        covers[start : start + len(window)] += share
    average = Resampling.average(windows, starts, size, None if even else shares)
    assert average.size == 10
    torch.testing.assert_close(average.matrix() @ x, total / covers)


def test_maps_that_do_not_fit():
    with pytest.raises(ValueError, match="8 outputs cannot be the inputs of a map of 9"):
        Resampling.bilinear(4, 8).then(Resampling.bilinear(9, 3))
    with pytest.raises(ValueError, match="no window covers output 8 of 12"):
        Resampling.average([Resampling.bilinear(4, 8)], [0], 12)


# ---- classes and scores


def assert_agrees(actual: tuple[Tensor, Tensor], full: Tensor) -> None:
    """`full`: logits of full resolution, float64."""
    classes, scores = actual
    assert classes.dtype == torch.int64
    chosen = full.gather(1, classes[:, None])[:, 0]
    assert (full.amax(1) - chosen).max() <= 1e-5 * full.abs().max()  # the largest, to rounding
    torch.testing.assert_close(scores.double(), full.softmax(1).amax(1), rtol=1e-5, atol=1e-6)


@FORMS
@ALIGN
@pytest.mark.parametrize(("source", "target"), SIZES, ids=str)
def test_one_resize(device, poisoned_memory, impl, align_corners, source, target):
    x = 3 * torch.randn(2, 19, *source, device=device)
    actual = resized_argmax(x, *bilinear(source, target, align_corners), with_scores=True, impl=impl)
    assert_agrees(actual, interpolate(x.double(), target, align_corners))


@FORMS
@pytest.mark.parametrize("C", [1, 2, 150])
def test_a_chain_of_resizes(device, poisoned_memory, impl, C):
    x = 3 * torch.randn(1, C, 5, 7, device=device)
    rows = Resampling.bilinear(5, 20).crop(1, 18).then(Resampling.bilinear(17, 13))
    columns = Resampling.bilinear(7, 28).flip().then(Resampling.bilinear(28, 31))
    actual = resized_argmax(x, rows, columns, with_scores=True, impl=impl)
    assert_agrees(actual, interpolate(interpolate(x.double(), (20, 28), False)[:, :, 1:-2].flip(3), (13, 31), False))


@FORMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_and_strides(device, impl, dtype):
    x = (3 * torch.randn(2, 9, 4, 6, device=device)).to(dtype).to(memory_format=torch.channels_last)
    actual = resized_argmax(x, *bilinear((4, 6), (9, 11)), with_scores=True, impl=impl)
    assert_agrees(actual, interpolate(x.double(), (9, 11), False))


@FORMS
def test_an_autocast_region_changes_nothing(device, impl):
    x, maps = torch.randn(1, 9, 4, 6, device=device), bilinear((4, 6), (9, 11))
    with torch.autocast(device, torch.bfloat16):
        _, actual = resized_argmax(x, *maps, with_scores=True, impl=impl)
    assert torch.equal(actual, resized_argmax(x, *maps, with_scores=True, impl=impl)[1])


@FORMS
def test_without_scores(device, impl):
    x, maps = torch.randn(1, 9, 4, 6, device=device), bilinear((4, 6), (9, 11))
    classes, scores = resized_argmax(x, *maps, impl=impl)
    assert scores is None
    assert torch.equal(classes, resized_argmax(x, *maps, with_scores=True, impl=impl)[0])


@FORMS
def test_ties_go_to_the_first_class(device, impl):
    classes, scores = resized_argmax(torch.zeros(1, 37, 2, 2, device=device), *bilinear((2, 2), (5, 5)), True, impl)
    assert not classes.any()
    torch.testing.assert_close(scores, torch.full_like(scores, 1 / 37))


@pytest.mark.parametrize("numbers", [1, 5 * 24 * 4, 5 * 24 * 16])
def test_any_size_of_chunks(monkeypatch, numbers):
    monkeypatch.setitem(resampling.BLOCK_NUMBERS, "cpu", numbers)
    x = torch.randn(2, 5, 4, 6)
    actual = resized_argmax(x, *bilinear((4, 6), (16, 24)), with_scores=True, impl="chunk")
    assert_agrees(actual, interpolate(x.double(), (16, 24), False))


def test_bad_input():
    x, (rows, columns) = torch.zeros(1, 3, 4, 6), bilinear((4, 6), (8, 8))
    with pytest.raises(ValueError, match=r"rows takes 6 inputs, logits \[1, 3, 4, 6\] have 4"):
        resized_argmax(x, columns, rows)
    with pytest.raises(ValueError, match=r"logits must have shape \[B, C, h, w\]"):
        resized_argmax(x[0], rows, columns)
    with pytest.raises(TypeError, match="logits must be a floating point tensor"):
        resized_argmax(x.int(), rows, columns)
    with pytest.raises(TypeError, match="use impl='chunk'"):
        resized_argmax(x.double(), rows, columns, impl="triton")
    with pytest.raises(ValueError, match="impl='fast' is not available"):
        resized_argmax(x, rows, columns, impl="fast")


def test_names_of_the_forms():
    assert set(IMPLEMENTATIONS) == {"naive", "chunk", "triton"}
