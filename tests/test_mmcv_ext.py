"""The stand-in for mmcv's compiled module: when it answers, and that its operators compute what mmcv's do."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import shapely
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]

pytest.importorskip("mmcv")
pytest.importorskip("torchvision")

from vig_backbone.openmmlab import mmcv_ext  # noqa: E402

answering = importlib.util.find_spec("mmcv._ext")
if answering is not None and type(answering.loader).__module__ != mmcv_ext.__name__:
    pytest.skip("a compiled mmcv is installed and answers instead", allow_module_level=True)
mmcv_ext.install()

import mmcv.ops as ops  # noqa: E402
from mmcv.ops.multi_scale_deform_attn import (  # noqa: E402
    MultiScaleDeformableAttnFunction,
    multi_scale_deformable_attn_pytorch,
)

ext = importlib.import_module("mmcv._ext")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def random_boxes(count: int, size: float = 60.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    corner = torch.rand(count, 2, dtype=dtype) * size
    return torch.cat([corner, corner + 4 + torch.rand(count, 2, dtype=dtype) * size / 2], 1)


def iou(a: list[float], b: list[float], offset: int = 0) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + offset)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + offset)
    areas = [(box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


# ---------------------------------------------------------------------------------------------- who answers


def run_python(code: str, *path: Path) -> str:
    code = f"import sys; sys.path[:0] = {[str(folder) for folder in (*path, ROOT)]}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# The parents are replaced by bare packages, so that only what this package imports is counted.
LIGHT_IMPORT = f"""
import types
for name in ("vig_backbone", "vig_backbone.openmmlab"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [{str(ROOT)!r} + "/" + name.replace(".", "/")]
from vig_backbone.openmmlab import mmcv_ext
"""


def test_install_imports_nothing_heavy():
    code = LIGHT_IMPORT + (
        "mmcv_ext.install(); mmcv_ext.install(); active = mmcv_ext.is_active()\n"
        "finders = [f for f in sys.meta_path if type(f).__module__ == mmcv_ext.__name__]\n"
        "print(active, len(finders), finders == sys.meta_path[-1:],"
        " [m for m in ('torch', 'torchvision', 'mmcv', 'numpy') if m in sys.modules])"
    )
    assert run_python(code) == "True 1 True []"


def fake_mmcv(folder: Path, *, compiled: bool) -> Path:
    (folder / "mmcv").mkdir()
    (folder / "mmcv" / "__init__.py").write_text("")
    if compiled:
        (folder / "mmcv" / "_ext.py").write_text("marker = 'compiled'")
    return folder


def test_a_compiled_mmcv_answers_before_the_stand_in(tmp_path):
    code = LIGHT_IMPORT + (
        "mmcv_ext.install(); before = mmcv_ext.is_active()\nimport mmcv._ext\n"
        "print(before, mmcv._ext.marker, mmcv_ext.is_active(), 'torch' in sys.modules)"
    )
    assert run_python(code, fake_mmcv(tmp_path, compiled=True)) == "False compiled False False"


def test_the_stand_in_answers_where_only_the_compiled_part_is_missing(tmp_path):
    code = LIGHT_IMPORT + (
        "before = mmcv_ext.is_active(); mmcv_ext.install()\n"
        "print(before, mmcv_ext.is_active(), 'torch' in sys.modules)\n"
        "import mmcv._ext\nprint(callable(mmcv._ext.nms), mmcv_ext.is_active(), 'torch' in sys.modules)"
    )
    out = run_python(code, fake_mmcv(tmp_path, compiled=False))
    assert out.splitlines() == ["False True False", "True True True"]


def test_without_install_the_import_fails_as_usual(tmp_path):
    code = LIGHT_IMPORT + (
        "try:\n    import mmcv._ext\nexcept ModuleNotFoundError as error:\n    print(error.name, mmcv_ext.is_active())"
    )
    assert run_python(code, fake_mmcv(tmp_path, compiled=False)) == "mmcv._ext False"


def test_the_finder_answers_for_one_name_and_through_importlib():
    finder = next(f for f in sys.meta_path if type(f).__module__ == mmcv_ext.__name__)
    assert finder.find_spec("mmcv._extra") is None
    assert finder.find_spec("mmcv") is None
    spec = importlib.util.find_spec("mmcv._ext")
    assert spec is not None
    assert spec.loader is not None


# ------------------------------------------------------------------------------------- what is there to call


def names_that_mmcv_loads() -> set[str]:
    names = set()
    for file in Path(ops.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "load_ext":
                names |= set(ast.literal_eval(node.args[1]))
    return names


def test_every_operator_that_mmcv_loads_is_served_or_refused():
    loaded = names_that_mmcv_loads()
    assert len(loaded) > 100
    assert loaded == set(mmcv_ext.SUPPORTED) | mmcv_ext.UNSUPPORTED
    assert not set(mmcv_ext.SUPPORTED) & mmcv_ext.UNSUPPORTED


def test_the_module_has_exactly_the_supported_operators():
    assert {name for name in vars(ext) if not name.startswith("__")} == set(mmcv_ext.SUPPORTED)


@pytest.mark.parametrize("name", sorted(mmcv_ext.UNSUPPORTED))
def test_an_unsupported_operator_names_itself_and_both_ways_out_when_called(name):
    operator = getattr(ext, name)
    with pytest.raises(NotImplementedError) as caught:
        operator(torch.zeros(1), anything=1)
    text = str(caught.value)
    assert name in text
    assert "full compiled mmcv" in text
    assert "docs/operators.md" in text


def test_an_unsupported_operator_refuses_through_mmcv():
    with pytest.raises(NotImplementedError, match="min_area_polygons"):
        ops.min_area_polygons(torch.zeros(1, 18))


@pytest.mark.parametrize("name", ["__path__", "__wrapped__", "no_such_operator", "_private"])
def test_other_names_are_absent(name):
    assert not hasattr(ext, name)


def test_build_information_is_text():
    assert "torchvision" in ops.get_compiler_version()
    assert isinstance(ops.get_compiling_cuda_version(), str)


def test_the_documented_table_agrees_with_the_code():
    text = (ROOT / "docs" / "operators.md").read_text()
    documented = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and cells[0].startswith("`"):
            for name in re.findall(r"`(\w+)`", cells[0]):
                assert name not in documented
                documented[name] = cells[2]
    assert documented == mmcv_ext.SUPPORTED
    refused = text.split("## Not served")[1].split("\n## ")[0]
    assert set(re.findall(r"`(\w+)`", refused)) >= mmcv_ext.UNSUPPORTED
    assert not set(re.findall(r"`(\w+)`", refused)) & set(mmcv_ext.SUPPORTED)


# ------------------------------------------------------------------------------------------------------- NMS


def brute_force_nms(boxes: list, scores: list, threshold: float, offset: int) -> list[int]:
    kept = []
    for index in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(iou(boxes[index], boxes[other], offset) <= threshold for other in kept):
            kept.append(index)
    return kept


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("threshold", [0.1, 0.4, 0.7])
def test_nms_is_the_greedy_loop(offset, threshold):
    boxes, scores = random_boxes(80).round(), torch.rand(80)
    dets, kept = ops.nms(boxes, scores, threshold, offset=offset)
    assert kept.tolist() == brute_force_nms(boxes.tolist(), scores.tolist(), threshold, offset)
    torch.testing.assert_close(dets, torch.cat([boxes, scores[:, None]], 1)[kept])


def test_nms_offset_changes_which_boxes_touch():
    boxes = torch.tensor([[0.0, 0, 1, 9], [1.0, 0, 2, 9]])
    scores = torch.tensor([0.9, 0.8])
    assert ops.nms(boxes, scores, 0.2, offset=0)[1].tolist() == [0, 1]
    assert ops.nms(boxes, scores, 0.2, offset=1)[1].tolist() == [0]


def test_nms_does_not_change_its_input():
    boxes = random_boxes(10)
    before = boxes.clone()
    ext.nms(boxes, torch.rand(10), iou_threshold=0.5, offset=1)
    assert torch.equal(boxes, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_nms_takes_any_float(dtype):
    boxes = torch.tensor([[0, 0, 10, 10], [1, 1, 11, 11], [30, 30, 40, 40]], dtype=dtype)
    assert ops.nms(boxes, torch.tensor([0.5, 0.9, 0.1], dtype=dtype), 0.5)[1].tolist() == [1, 2]


def test_batched_nms_keeps_classes_apart():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10]])
    _, kept = ops.batched_nms(
        boxes, torch.tensor([0.1, 0.9, 0.5]), torch.tensor([0, 0, 1]), {"type": "nms", "iou_threshold": 0.5}
    )
    assert kept.tolist() == [1, 2]


def brute_force_soft_nms(boxes, scores, threshold, sigma, min_score, method, offset):
    rest = [(index, score) for index, score in enumerate(scores)]
    kept = []
    while rest:
        best = max(range(len(rest)), key=lambda i: rest[i][1])
        index, score = rest.pop(best)
        kept.append((index, score))
        decayed = []
        for other, value in rest:
            overlap = iou(boxes[index], boxes[other], offset)
            if method == "gaussian":
                value *= math.exp(-overlap * overlap / sigma)
            elif overlap >= threshold:
                value *= 0.0 if method == "naive" else 1 - overlap
            if value >= min_score:
                decayed.append((other, value))
        rest = decayed
    return kept


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
def test_soft_nms_is_the_decay_loop(method, offset):
    boxes, scores = random_boxes(50), torch.rand(50)
    dets, kept = ops.soft_nms(boxes, scores, 0.3, sigma=0.4, min_score=0.05, method=method, offset=offset)
    expected = brute_force_soft_nms(boxes.tolist(), scores.tolist(), 0.3, 0.4, 0.05, method, offset)
    assert kept.tolist() == [index for index, _ in expected]
    torch.testing.assert_close(dets[:, 4], torch.tensor([score for _, score in expected]))
    assert torch.equal(dets[:, :4], boxes[kept])


def test_soft_nms_survives_boxes_without_area():
    # The example of mmcv's own documentation.
    boxes = np.array([[4, 3, 5, 3], [4, 3, 5, 4], *[[3, 1, 3, 1]] * 4], dtype=np.float32)
    scores = np.array([0.9, 0.9, 0.5, 0.5, 0.4, 0.0], dtype=np.float32)
    dets, inds = ops.soft_nms(boxes, scores, 0.6, sigma=0.5)
    assert len(inds) == len(dets) == 5
    with pytest.raises(ValueError, match="method"):
        ext.softnms(torch.zeros(1, 4), torch.zeros(1), torch.zeros(1, 5), 0.5, 0.5, 0.0, 3, 0)


def test_nms_match_groups_boxes_under_the_kept_one():
    boxes, scores = random_boxes(40), torch.rand(40)
    groups = [group.tolist() for group in ops.nms_match(torch.cat([boxes, scores[:, None]], 1), 0.3)]
    free = sorted(range(40), key=lambda i: -scores[i])
    expected = []
    while free:
        taken = [i for i in free if i == free[0] or iou(boxes[free[0]].tolist(), boxes[i].tolist()) >= 0.3]
        expected.append(taken)
        free = [i for i in free if i not in taken]
    assert groups == expected
    assert max(map(len, groups)) > 1


@pytest.mark.parametrize("mode", ["iou", "iof"])
@pytest.mark.parametrize("offset", [0, 1])
def test_bbox_overlaps_matches_mmcvs_reference(mode, offset):
    from mmcv.ops.bbox import _bbox_overlaps_cpu

    first, second = random_boxes(7), random_boxes(5)
    torch.testing.assert_close(
        ops.bbox_overlaps(first, second, mode, offset=offset),
        _bbox_overlaps_cpu(first, second, mode, offset=offset),
    )
    torch.testing.assert_close(
        ops.bbox_overlaps(first[:5], second, mode, aligned=True, offset=offset),
        _bbox_overlaps_cpu(first[:5], second, mode, aligned=True, offset=offset),
    )


def test_bbox_overlaps_of_empty_areas_and_lists_is_zero():
    point = torch.ones(1, 4)
    assert ops.bbox_overlaps(point, point).tolist() == [[0.0]]
    assert ops.bbox_overlaps(point, torch.zeros(0, 4)).shape == (1, 0)


# --------------------------------------------------------------------------------- rotated and quadrilateral


def random_rotated(count: int) -> torch.Tensor:
    return torch.cat(
        [torch.rand(count, 2) * 20, 1 + torch.rand(count, 2) * 15, (torch.rand(count, 1) - 0.5) * 8], 1
    ).double()


def polygon(box: torch.Tensor) -> shapely.Polygon:
    if len(box) == 8:
        return shapely.Polygon(box.view(4, 2).tolist())
    x, y, w, h, angle = box.tolist()
    flat = shapely.box(-w / 2, -h / 2, w / 2, h / 2)
    return shapely.affinity.translate(shapely.affinity.rotate(flat, angle, (0, 0), use_radians=True), x, y)


def exact_overlap(a: torch.Tensor, b: torch.Tensor, mode: str = "iou") -> float:
    first, second = polygon(a), polygon(b)
    whole = first.union(second).area if mode == "iou" else first.area
    return first.intersection(second).area / whole


@pytest.mark.parametrize("mode", ["iou", "iof"])
@pytest.mark.parametrize("clockwise", [True, False])
def test_rotated_iou_is_the_polygons_iou(mode, clockwise):
    first, second = random_rotated(25), random_rotated(20)
    turn = torch.tensor([1, 1, 1, 1, 1 if clockwise else -1])
    expected = torch.tensor([[exact_overlap(a * turn, b * turn, mode) for b in second] for a in first]).double()
    torch.testing.assert_close(ops.box_iou_rotated(first, second, mode, clockwise=clockwise), expected)
    aligned = ops.box_iou_rotated(first[:20], second, mode, aligned=True, clockwise=clockwise)
    torch.testing.assert_close(aligned, expected[:20].diagonal())
    assert (expected == 0).any()
    assert (expected > 0.3).any()


def test_rotated_iou_of_coinciding_touching_and_nested_boxes():
    box = torch.tensor([[10.0, 10, 8, 4, 0.3]])
    others = torch.tensor(
        [
            [10, 10, 8, 4, 0.3],
            [10, 10, 8, 4, 0.3 + math.pi],
            [10, 10, 4, 8, 0.3 + math.pi / 2],
            [10, 10, 4, 2, 0.3],
            [10 + 8 * math.cos(0.3), 10 + 8 * math.sin(0.3), 8, 4, 0.3],
            [10, 10, 0, 4, 0.3],
        ]
    )
    expected = torch.tensor([[1.0, 1.0, 1.0, 0.25, 0.0, 0.0]])
    torch.testing.assert_close(ops.box_iou_rotated(box, others), expected, atol=1e-5, rtol=1e-5)
    far = torch.tensor([4096.0, 4096, 0, 0, 0])
    torch.testing.assert_close(ops.box_iou_rotated(box + far, others + far), expected, atol=1e-3, rtol=1e-3)


def random_quads(count: int) -> torch.Tensor:
    angles = torch.rand(count, 4).sort(1).values * 0.2 + torch.arange(4) * 1.5
    radius = 2 + torch.rand(count, 1) * 8
    points = torch.stack([angles.cos(), angles.sin()], 2) * radius.unsqueeze(2) + torch.rand(count, 1, 2) * 12
    points[::2] = points[::2].flip(1)
    return points.flatten(1).double()


@pytest.mark.parametrize("mode", ["iou", "iof"])
def test_quadrilateral_iou_is_the_polygons_iou_in_either_turn(mode):
    first, second = random_quads(15), random_quads(12)
    expected = torch.tensor([[exact_overlap(a, b, mode) for b in second] for a in first]).double()
    torch.testing.assert_close(ops.box_iou_quadri(first, second, mode), expected)


@pytest.mark.parametrize(("make", "run"), [(random_rotated, ops.nms_rotated), (random_quads, ops.nms_quadri)])
@pytest.mark.parametrize("with_labels", [False, True])
def test_polygon_nms_is_the_greedy_loop(make, run, with_labels):
    boxes, scores = make(60), torch.rand(60).double()
    labels = torch.randint(0, 2, (60,)) if with_labels else torch.zeros(60)
    expected = []
    for index in scores.argsort(descending=True).tolist():
        rivals = [other for other in expected if labels[other] == labels[index]]
        if all(exact_overlap(boxes[index], boxes[other]) <= 0.2 for other in rivals):
            expected.append(index)
    dets, kept = run(boxes, scores, 0.2, labels if with_labels else None)
    assert kept.tolist() == expected
    assert 1 < len(kept) < 60
    torch.testing.assert_close(dets[:, -1], scores[kept])


def test_rotated_nms_over_several_blocks_is_the_loop_over_the_full_matrix():
    boxes, scores = random_rotated(400).float(), torch.rand(400)
    matrix = ops.box_iou_rotated(boxes, boxes) > 0.1
    expected = []
    for index in scores.argsort(descending=True).tolist():
        if not matrix[expected, index].any():
            expected.append(index)
    assert ops.nms_rotated(boxes, scores, 0.1)[1].tolist() == expected


# ------------------------------------------------------------------------------------------------------ RoIs


def ramp(height: int = 20, width: int = 24) -> torch.Tensor:
    """Two channels: the row and the column of every pixel."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns])[None].float()


RAMP_ROI = torch.tensor([[0.0, 4.0, 6.0, 28.0, 22.0]])  # x1, y1, x2, y2 in pixels of an image twice as large


@pytest.mark.parametrize("pool_mode", ["avg", "max"])
@pytest.mark.parametrize("sampling_ratio", [0, 2, 3])
@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align_of_a_ramp_is_the_sample_position(pool_mode, sampling_ratio, aligned):
    out = ops.roi_align(ramp(), RAMP_ROI, (4, 3), 0.5, sampling_ratio, pool_mode, aligned)[0]
    shift = 0.5 if aligned else 0.0
    # Bins are 2 rows by 4 columns of feature pixels.
    for axis, (start, size, bins) in enumerate([(3 - shift, 2.0, 4), (2 - shift, 4.0, 3)]):
        samples = sampling_ratio or math.ceil(size)
        within = size / 2 if pool_mode == "avg" else size * (samples - 0.5) / samples
        expected = start + size * torch.arange(bins) + within
        expected = expected[:, None].expand(4, 3) if axis == 0 else expected[None].expand(4, 3)
        torch.testing.assert_close(out[axis], expected)


def test_roi_align_matches_torchvision():
    from torchvision.ops import roi_align

    features = torch.randn(2, 3, 16, 18)
    rois = torch.cat([torch.tensor([[0.0], [1], [1]]), random_boxes(3, 30)], 1)
    for aligned in (True, False):
        torch.testing.assert_close(
            ops.roi_align(features, rois, (5, 4), 0.4, 0, "avg", aligned),
            roi_align(features, rois, (5, 4), 0.4, -1, aligned),
        )


@pytest.mark.parametrize("pool_mode", ["avg", "max"])
def test_roi_align_gradient(pool_mode):
    features = torch.randn(2, 2, 7, 8, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 1.3, 0.7, 11.1, 12.9], [1, 2.2, 3.1, 9.4, 8.3], [1, -3, -3, 20, 20]]).double()
    assert gradcheck(lambda x: ops.RoIAlign((2, 3), 0.5, 0, pool_mode)(x, rois), features)


@pytest.mark.parametrize("pool_mode", ["avg", "max"])
def test_roi_align_of_boxes_without_size(pool_mode):
    features = (ramp() + 1).requires_grad_()
    point = torch.tensor([[0.0, 5, 7, 5, 7]])
    # Aligned: no samples, hence nothing. Otherwise the box counts as one pixel, here with two bins of one sample.
    empty = ops.roi_align(features, point, (2, 2), 1.0, 0, pool_mode, True)
    assert not empty.any()
    assert not torch.autograd.grad(empty.sum(), features)[0].any()
    pixel = ops.roi_align(features, point, (2, 2), 1.0, 0, pool_mode, False)[0]
    assert pixel[0, :, 0].tolist() == [8.25, 8.75]
    assert pixel[1, 0].tolist() == [6.25, 6.75]


def loop_roi_pool(features: torch.Tensor, roi: list[float], bins: tuple[int, int], scale: float) -> torch.Tensor:
    image, x1, y1, x2, y2 = roi
    out = torch.zeros(features.size(1), *bins)
    bin_h, bin_w = (y2 + 1 - y1) * scale / bins[0], (x2 + 1 - x1) * scale / bins[1]
    for i in range(bins[0]):
        for j in range(bins[1]):
            top, bottom = math.floor(y1 * scale + i * bin_h), math.ceil(y1 * scale + (i + 1) * bin_h)
            left, right = math.floor(x1 * scale + j * bin_w), math.ceil(x1 * scale + (j + 1) * bin_w)
            rows, columns = slice(max(top, 0), max(bottom, 0)), slice(max(left, 0), max(right, 0))
            window = features[int(image), :, rows, columns]
            if window.numel():
                out[:, i, j] = window.amax((1, 2))
    return out


def test_roi_pool_is_the_largest_pixel_of_unrounded_bins():
    features = torch.randn(2, 3, 11, 13)
    rois = torch.tensor([[0, 1.3, 2.6, 17.2, 14.8], [1, 5, 3, 21, 19], [0, 40, 40, 60, 60], [1, -9, -9, 6, 6]])
    out = ops.RoIPool((3, 4), 0.5)(features, rois)
    torch.testing.assert_close(out, torch.stack([loop_roi_pool(features, r, (3, 4), 0.5) for r in rois.tolist()]))
    assert not out[2].any()


def test_roi_pool_gradient():
    features = torch.randn(2, 2, 6, 7, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 1, 0, 9, 8], [1, 2, 3, 11, 10], [1, 30, 30, 40, 40]]).double()
    assert gradcheck(lambda x: ops.RoIPool((2, 3), 0.5)(x, rois), features)


def test_deform_roi_pool_without_offset_is_roi_align():
    features = torch.randn(2, 3, 16, 18)
    rois = torch.cat([torch.tensor([[0.0], [1], [1]]), random_boxes(3, 30)], 1)
    for ratio in (0, 2):
        torch.testing.assert_close(
            ops.DeformRoIPool((5, 4), 0.4, ratio)(features, rois), ops.roi_align(features, rois, (5, 4), 0.4, ratio)
        )


def test_deform_roi_pool_offset_moves_the_bin():
    offset = torch.zeros(1, 2, 4, 3)
    offset[0, 0, 1, 2], offset[0, 1, 0, 0] = 0.5, -1.0
    pool = ops.DeformRoIPool((4, 3), 0.5, 2, gamma=0.1)
    moved = pool(ramp(), RAMP_ROI, offset) - pool(ramp(), RAMP_ROI)
    expected = torch.zeros(1, 2, 4, 3)
    expected[0, 1, 1, 2] = 0.1 * 12 * 0.5  # columns: gamma * width * x offset
    expected[0, 0, 0, 0] = 0.1 * 8 * -1.0  # rows: gamma * height * y offset
    torch.testing.assert_close(moved, expected)


def test_deform_roi_pool_gradient():
    features = torch.randn(2, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 1.3, 0.7, 11.1, 12.9], [1, 2.2, 3.1, 9.4, 8.3]]).double()
    offset = torch.randn(2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, o: ops.DeformRoIPool((2, 2), 0.5, 2)(x, rois, o), (features, offset))
    assert gradcheck(lambda x: ops.DeformRoIPool((2, 2), 0.5, 2)(x, rois), features)


def test_large_work_in_pieces_gives_the_same(monkeypatch):
    from vig_backbone.openmmlab.mmcv_ext import _common

    features = torch.randn(2, 3, 16, 18, requires_grad=True)
    rois = torch.cat([torch.randint(0, 2, (9, 1)).float(), random_boxes(9, 30)], 1)
    boxes = random_rotated(30).float()

    def results() -> list[torch.Tensor]:
        pooled = [ops.roi_align(features, rois, (3, 2), 0.4, 0, "max"), ops.RoIPool((3, 2), 0.4)(features, rois)]
        pooled.append(ops.DeformRoIPool((3, 2), 0.4, 2)(features, rois))
        grads = torch.autograd.grad(sum(out.square().sum() for out in pooled), features)
        return [*pooled, *grads, ops.box_iou_rotated(boxes, boxes)]

    whole = results()
    monkeypatch.setattr(_common, "CHUNK_ELEMENTS", 300)
    for one, other in zip(results(), whole):
        torch.testing.assert_close(one, other)


def test_border_align_takes_the_largest_sample_of_each_side():
    features = torch.cat([ramp(), -ramp(), ramp(), -ramp()], 1)  # channels per side: row, column
    boxes = torch.tensor([[[2.0, 3.0, 10.0, 9.0]]])
    out = ops.BorderAlign(4)(features, boxes)[0, :, 0]
    # Top: row y1, largest column x2. Left (negated): row y1, column x1. Bottom and right alike.
    assert out.T.tolist() == [[3, 10], [-3, -2], [9, 10], [-3, -10]]


def test_border_align_gradient():
    features = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    boxes = random_boxes(4, 4, torch.float64).view(2, 2, 4) - 1.3
    assert gradcheck(lambda x: ops.BorderAlign(3)(x, boxes), features)


# ----------------------------------------------------------------------------------------- deformable convs


@pytest.mark.parametrize("groups", [1, 2])
def test_deformable_convolutions_without_offset_are_convolutions(groups):
    x, weight, bias = torch.randn(3, 4, 9, 8), torch.randn(6, 4 // groups, 3, 2), torch.randn(6)
    geometry = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}
    expected = F.conv2d(x, weight, bias, groups=groups, **geometry)
    size = expected.shape[-2:]
    offset, mask = torch.zeros(3, 2 * 2 * 6, *size), torch.full((3, 2 * 6, *size), 0.5)
    args = (*geometry.values(), groups, 2)
    torch.testing.assert_close(
        ops.deform_conv2d(x, offset, weight, *args), expected - bias[:, None, None], atol=1e-4, rtol=1e-4
    )
    modulated = ops.modulated_deform_conv2d(x, offset, mask, weight, bias, *args)
    half = (expected - bias[:, None, None]) / 2 + bias[:, None, None]
    torch.testing.assert_close(modulated, half, atol=1e-4, rtol=1e-4)


def test_an_integer_offset_shifts_what_the_convolution_sees():
    x, weight = torch.randn(1, 2, 10, 10), torch.randn(3, 2, 3, 3)
    offset = torch.zeros(1, 18, 8, 8)
    offset[:, 0::2], offset[:, 1::2] = 1.0, -2.0  # y, then x
    shifted = F.pad(x, (2, 0, 0, 1))[:, :, 1:, :10]
    torch.testing.assert_close(ops.deform_conv2d(x, offset, weight), F.conv2d(shifted, weight), atol=1e-5, rtol=1e-5)


def deform_operands(groups: int = 2) -> list[torch.Tensor]:
    shapes = [(2, 4, 5, 4), (2, 2 * 2 * 4, 4, 3), (2, 2 * 4, 4, 3), (2, 4 // groups, 2, 2), (2,)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def test_deformable_convolution_gradients():
    x, offset, mask, weight, bias = deform_operands()
    args = (1, 0, 1, 2, 2)
    assert gradcheck(lambda x, o, w: ops.deform_conv2d(x, o, w, *args), (x, offset, weight))
    assert gradcheck(lambda *t: ops.modulated_deform_conv2d(*t, *args), (x, offset, mask, weight, bias))
    assert gradcheck(lambda *t: ops.modulated_deform_conv2d(*t, None, *args), (x, offset, mask, weight))


def test_the_deformable_packs_train():
    x = torch.randn(2, 4, 8, 8)
    for layer in (ops.DeformConv2dPack(4, 4, 3, padding=1), ops.ModulatedDeformConv2dPack(4, 4, 3, padding=1)):
        layer(x).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
        assert layer.conv_offset.weight.grad.any()


# ---------------------------------------------------------------------------------------------------- losses


def sigmoid_focal(logits, target, gamma, alpha, weight=None):
    one_hot = (target[:, None] == torch.arange(logits.size(1))).to(logits.dtype)
    p = logits.sigmoid()
    pt = p * one_hot + (1 - p) * (1 - one_hot)
    balance = alpha * one_hot + (1 - alpha) * (1 - one_hot)
    loss = F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none") * balance * (1 - pt) ** gamma
    if weight is not None:
        loss = loss * torch.cat([weight, weight.new_ones(1)])[target][:, None]
    return loss


def softmax_focal(logits, target, gamma, alpha, weight=None):
    log_p = logits.log_softmax(1).gather(1, target.clamp(min=0)[:, None])[:, 0]
    loss = -alpha * (1 - log_p.exp()) ** gamma * log_p
    if weight is not None:
        loss = loss * weight[target.clamp(min=0)]
    return loss * (target >= 0)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gamma", [0.5, 2.0])
@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_focal_losses_and_gradients_follow_the_formula(kind, gamma, weighted, reduction):
    logits = (torch.randn(9, 4, dtype=torch.float64) * 3).requires_grad_()
    # mmcv marks background by C for the sigmoid loss and an ignored row by a negative class for the softmax loss.
    target = torch.tensor([0, 1, 2, 3, 3, 1, 4, 4, 0] if kind == "sigmoid" else [0, 1, 2, 3, 3, 1, -1, -1, 0])
    weight = torch.rand(4, dtype=torch.float64) + 0.5 if weighted else None
    formula = sigmoid_focal if kind == "sigmoid" else softmax_focal
    served = ops.sigmoid_focal_loss if kind == "sigmoid" else ops.softmax_focal_loss
    expected = formula(logits, target, gamma, 0.3, weight)
    if reduction != "none":
        expected = expected.sum() / (len(logits) if reduction == "mean" else 1)
    loss = served(logits, target, gamma, 0.3, weight, reduction)
    torch.testing.assert_close(loss, expected)
    if kind == "sigmoid" or reduction != "none":  # mmcv's softmax wrapper cannot scale unreduced gradients
        found, wanted = (torch.autograd.grad(value.sum(), logits)[0] for value in (loss, expected))
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("served", [ops.sigmoid_focal_loss, ops.softmax_focal_loss])
def test_focal_losses_stay_finite_at_extreme_logits(served):
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    loss = served(logits, torch.tensor([0, 0]), 0.5, 0.25, None, "sum")
    loss.backward()
    assert loss.isfinite()
    assert loss > 1
    assert logits.grad.isfinite().all()


# ----------------------------------------------------------------------------------- attention and resampling

SHAPES = torch.tensor([[4, 5], [2, 3]])


def attention_operands(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    value = torch.randn(2, 26, 2, 3, dtype=dtype)
    places = torch.rand(2, 4, 2, 2, 3, 2, dtype=dtype) * 1.2 - 0.1
    weights = torch.rand(2, 4, 2, 2, 3, dtype=dtype)
    return [tensor.requires_grad_() for tensor in (value, places, weights)]


def attend(value: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return MultiScaleDeformableAttnFunction.apply(value, SHAPES, torch.tensor([0, 20]), places, weights, 64)


def test_multi_scale_deformable_attention_matches_mmcvs_torch_form():
    value, places, weights = attention_operands()
    expected = multi_scale_deformable_attn_pytorch(value, SHAPES, places, weights)
    torch.testing.assert_close(attend(value, places, weights), expected)
    assert gradcheck(attend, (value, places, weights))


def test_multi_scale_deformable_attention_module_trains():
    module = ops.MultiScaleDeformableAttention(embed_dims=8, num_heads=2, num_levels=2, num_points=2, dropout=0.0)
    module.init_weights()
    query, value = torch.randn(5, 2, 8), torch.randn(26, 2, 8)
    out = module(
        query,
        value=value,
        reference_points=torch.rand(2, 5, 2, 2),
        spatial_shapes=SHAPES,
        level_start_index=torch.tensor([0, 20]),
    )
    out.sum().backward()
    assert out.shape == query.shape
    assert module.value_proj.weight.grad.any()


@pytest.mark.parametrize("psa_type", ["collect", "distribute"])
@pytest.mark.parametrize("mask", [(5, 3), (9, 11), (4, 6)])
def test_psa_mask_spreads_every_centred_mask(psa_type, mask):
    height, width = 4, 5
    x = torch.randn(2, mask[0] * mask[1], height, width, dtype=torch.float64, requires_grad=True)
    module = ops.PSAMask(psa_type, mask)
    expected = torch.zeros(2, height * width, height * width, dtype=torch.float64)
    for h in range(height):
        for w in range(width):
            for i in range(mask[0]):
                for j in range(mask[1]):
                    y, z = h + i - (mask[0] - 1) // 2, w + j - (mask[1] - 1) // 2
                    if 0 <= y < height and 0 <= z < width:
                        pair = (y * width + z, h * width + w)
                        pair = pair if psa_type == "collect" else pair[::-1]
                        expected[:, pair[0], pair[1]] = x.detach()[:, i * mask[1] + j, h, w]
    torch.testing.assert_close(module(x).flatten(2), expected)
    factors = torch.randn_like(expected)
    (found,) = torch.autograd.grad((module(x).flatten(2) * factors).sum(), x)
    # The operator is linear and only copies: its gradient is the transposed copy.
    torch.testing.assert_close((found * x).sum(), (expected * factors).sum())
    if mask == (5, 3):
        assert gradcheck(module, x)


def loop_carafe(features: torch.Tensor, masks: torch.Tensor, kernel: int, groups: int, scale: int) -> torch.Tensor:
    unfolded = F.unfold(features, kernel, padding=kernel // 2)
    n, c, h, w = features.shape
    unfolded = unfolded.view(n, groups, c // groups, kernel * kernel, h, w)
    unfolded = unfolded.repeat_interleave(scale, 4).repeat_interleave(scale, 5)
    weights = masks.view(n, groups, 1, kernel * kernel, h * scale, w * scale)
    return (unfolded * weights).sum(3).view(n, c, h * scale, w * scale)


@pytest.mark.parametrize(("kernel", "groups", "scale"), [(3, 1, 2), (5, 2, 2), (1, 2, 3)])
def test_carafe_reassembles_the_neighbourhood(kernel, groups, scale):
    features = torch.randn(2, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    masks = torch.rand(2, kernel**2 * groups, 3 * scale, 4 * scale, dtype=torch.float64, requires_grad=True)
    args = (kernel, groups, scale)
    expected = loop_carafe(features, masks, *args)
    torch.testing.assert_close(ops.CARAFE(*args)(features, masks), expected)
    torch.testing.assert_close(ops.CARAFENaive(*args)(features, masks), expected)
    factors = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * factors).sum(), (features, masks))
    found = torch.autograd.grad((ops.carafe(features, masks, *args) * factors).sum(), (features, masks))
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other)
    # mmcv's naive wrapper insists on CUDA gradients, the operator does not.
    buffers = [torch.zeros_like(features), torch.zeros_like(masks)]
    ext.carafe_naive_backward(
        factors, features, masks, *buffers, kernel_size=kernel, group_size=groups, scale_factor=scale
    )
    for one, other in zip(buffers, wanted):
        torch.testing.assert_close(one, other)


def test_masked_convolution_is_the_convolution_at_the_mask():
    layer = ops.MaskedConv2d(3, 5, (3, 5), padding=(1, 2))
    x, mask = torch.randn(1, 3, 8, 9), torch.rand(1, 8, 9) > 0.6
    with torch.no_grad():
        torch.testing.assert_close(layer(x, mask), layer(x) * mask, atol=1e-5, rtol=1e-5)
        assert not layer(x, torch.zeros_like(mask)).any()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("pads", [(1, 2, 0, 3), (-1, 1, 2, -1)])
def test_upfirdn2d_matches_mmcvs_torch_form(flip, pads):
    from mmcv.ops.upfirdn2d import _upfirdn2d_ref

    # mmcv's reference form pads wrongly when the two sides differ, so padding is applied here beforehand.
    x, taps = torch.randn(2, 3, 6, 7), torch.rand(3, 2)
    spread = torch.zeros(2, 3, 12, 21)
    spread[:, :, ::2, ::3] = x
    expected = _upfirdn2d_ref(F.pad(spread, pads), taps, down=(2, 1), flip_filter=flip, gain=1.5)
    found = ext.upfirdn2d(x, taps, 3, 2, 2, 1, *pads, flip, 1.5)
    torch.testing.assert_close(found, expected)


def test_fused_bias_leaky_relu_matches_mmcvs_torch_form():
    from mmcv.ops.fused_bias_leakyrelu import FusedBiasLeakyReLUFunction, bias_leakyrelu_ref

    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    served = FusedBiasLeakyReLUFunction.apply(x, bias, 0.2, 1.4)
    torch.testing.assert_close(served, bias_leakyrelu_ref(x, bias, 0.2, 1.4))
    assert gradcheck(lambda x, b: FusedBiasLeakyReLUFunction.apply(x, b, 0.2, 1.4), (x, bias))
    empty = x.new_empty(0)
    assert not ext.fused_bias_leakyrelu(x, empty, x, act=3, grad=2, alpha=0.2, scale=1.0).any()
    with pytest.raises(ValueError, match="act 1 or 3"):
        ext.fused_bias_leakyrelu(x, empty, empty, act=2, grad=0, alpha=0.2, scale=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sync_batch_norm_of_one_process_is_batch_norm(dtype):
    x = (torch.randn(3, 4, 5, 6) * 2 + 1).to(dtype).requires_grad_()
    weight, bias = torch.rand(4).requires_grad_(), torch.randn(4).requires_grad_()
    running, expected_running = ([torch.zeros(4), torch.ones(4)] for _ in range(2))
    function = ops.sync_bn.SyncBatchNormFunction
    out = function.apply(x, *running, weight, bias, 0.1, 1e-5, None, 1, "default")
    expected = F.batch_norm(x.float(), *expected_running, weight, bias, True, 0.1, 1e-5)
    loose = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 1e-2}
    torch.testing.assert_close(out.float(), expected, **loose)
    torch.testing.assert_close(running, expected_running, atol=1e-4, rtol=1e-4)
    factors = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * factors).sum(), (x, weight, bias))
    for one, other in zip(torch.autograd.grad((out.float() * factors).sum(), (x, weight, bias)), wanted):
        torch.testing.assert_close(one, other, **loose)


# ---------------------------------------------------------------------------------- precision and empty inputs


def differentiable_cases() -> dict:
    """Name to a function and its float inputs, of which all get a gradient."""
    rois = torch.tensor([[0.0, 1.5, 0.5, 11, 13], [1, 2, 3, 9, 8]])
    features = torch.randn(2, 4, 8, 8)
    classes = torch.tensor([0, 3, 1, 2])
    conv = [t.detach().float() for t in deform_operands()]
    return {
        "roi_align_avg": (lambda x: ops.roi_align(x, rois.to(x), (2, 2), 0.5), [features]),
        "roi_pool": (lambda x: ops.roi_pool(x, rois.to(x), (2, 2), 0.5), [features]),
        "deform_roi_pool": (lambda x: ops.deform_roi_pool(x, rois.to(x), None, (2, 2), 0.5, 2), [features]),
        "border_align": (lambda x: ops.border_align(x, rois[:, None, 1:].to(x), 2), [features]),
        "deform_conv": (lambda x, o, w: ops.deform_conv2d(x, o, w, 1, 0, 1, 2, 2), [conv[0], conv[1], conv[3]]),
        "modulated": (lambda *t: ops.modulated_deform_conv2d(*t, 1, 0, 1, 2, 2), conv),
        "sigmoid_focal": (lambda x: ops.sigmoid_focal_loss(x, classes), [torch.randn(4, 3)]),
        "softmax_focal": (lambda x: ops.softmax_focal_loss(x, classes), [torch.randn(4, 4)]),
        "attention": (attend, [t.detach().float() for t in attention_operands()]),
        "psa_mask": (ops.PSAMask("collect", (3, 3)), [torch.randn(2, 9, 4, 4)]),
        "carafe": (lambda x, m: ops.carafe(x, m, 3, 1, 2), [torch.randn(1, 4, 3, 3), torch.rand(1, 9, 6, 6)]),
    }


def value_and_gradients(function, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]


@pytest.mark.parametrize("name", sorted(differentiable_cases()))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_forward_and_backward_stay_near_float32(name, dtype):
    function, inputs = differentiable_cases()[name]
    low = [tensor.to(dtype) for tensor in inputs]
    found = value_and_gradients(function, low)
    expected = value_and_gradients(function, [tensor.float() for tensor in low])
    for one, other in zip(found, expected):
        assert one.dtype == dtype
        torch.testing.assert_close(one.float(), other, rtol=0.06, atol=0.06 * float(other.abs().max()))


@pytest.mark.parametrize("name", sorted(differentiable_cases()))
def test_autocast_changes_nothing_inside_an_operator(name):
    function, inputs = differentiable_cases()[name]
    expected = value_and_gradients(function, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradients(function, inputs)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(differentiable_cases()))
def test_operators_repeat_exactly(name):
    function, inputs = differentiable_cases()[name]
    for one, other in zip(value_and_gradients(function, inputs), value_and_gradients(function, inputs)):
        assert torch.equal(one, other)


def test_no_boxes_and_no_rois_give_empty_results():
    none, features = torch.zeros(0, 4), torch.randn(1, 4, 8, 8, requires_grad=True)
    assert ops.nms(none, torch.zeros(0), 0.5)[1].shape == (0,)
    assert ops.soft_nms(none, torch.zeros(0))[0].shape == (0, 5)
    assert ops.nms_match(torch.zeros(0, 5), 0.5) == []
    assert ext.nms_match(torch.zeros(0, 5), 0.5) == []
    assert ops.box_iou_rotated(torch.zeros(0, 5), random_rotated(2).float()).shape == (0, 2)
    assert ops.box_iou_rotated(random_rotated(2).float(), torch.zeros(0, 5)).shape == (2, 0)
    empty_order = torch.zeros(0, dtype=torch.long)
    assert ext.nms_quadri(torch.zeros(0, 8), torch.zeros(0), empty_order, torch.zeros(0, 8), 0.5, False).shape == (0,)
    rois = torch.zeros(0, 5)
    pooled = [
        ops.roi_align(features, rois, (2, 3)),
        ops.roi_align(features, rois, (2, 3), 1.0, 0, "max"),
        ops.roi_pool(features, rois, (2, 3)),
        ops.deform_roi_pool(features, rois, None, (2, 3)),
    ]
    assert [tuple(out.shape) for out in pooled] == [(0, 4, 2, 3)] * 4
    (grad,) = torch.autograd.grad(sum(out.sum() for out in pooled), features)
    assert not grad.any()
    assert ops.border_align(features, torch.zeros(1, 0, 4), 2).shape == (1, 1, 0, 4)
    for served in (ops.sigmoid_focal_loss, ops.softmax_focal_loss):
        logits = torch.zeros(0, 3, requires_grad=True)
        loss = served(logits, torch.zeros(0, dtype=torch.long), 2.0, 0.25, None, "sum")
        loss.backward()
        assert loss == 0


def test_gradients_are_not_recorded_for_operators_that_have_none():
    boxes = random_boxes(4).requires_grad_()
    assert not ops.bbox_overlaps(boxes, boxes).requires_grad
    assert not ops.box_iou_rotated(random_rotated(2).requires_grad_(), random_rotated(2)).requires_grad


def test_points_that_are_not_numbers_contribute_nothing():
    rois = torch.tensor([[[float("nan"), 1, 3, 3], [1, 1, 3, 3]]])
    features = torch.rand(1, 4, 6, 6, requires_grad=True)
    out = ops.border_align(features, rois, 2)
    out.sum().backward()
    assert out[:, :, 1].all()
    assert features.grad.isfinite().all()


# --------------------------------------------------------------------------------------------- whole models


def without_downloads(node: object) -> object:
    """The config with no pretrained weights and with batch norm that needs no process group."""
    if isinstance(node, dict):
        pretrained = isinstance(node.get("init_cfg"), dict) and node["init_cfg"].get("type") == "Pretrained"
        drop = {"pretrained", "data_preprocessor"} | ({"init_cfg"} if pretrained else set())
        return {key: without_downloads(value) for key, value in node.items() if key not in drop}
    if isinstance(node, (list, tuple)):
        return [without_downloads(value) for value in node]
    return "BN" if node == "SyncBN" else node


def build_model(package: str, config: str, **head: object) -> torch.nn.Module:
    module = pytest.importorskip(package)
    from mmengine.config import Config, ConfigDict

    file = Path(module.__file__).parent / ".mim" / "configs" / config
    if not file.exists():
        pytest.skip(f"{package} was installed without its configs")
    cfg = ConfigDict(without_downloads(Config.fromfile(str(file)).model.to_dict()))
    cfg.get("decode_head", {}).update(head)
    importlib.import_module(f"{package}.utils").register_all_modules(init_default_scope=False)
    registry = importlib.import_module(f"{package}.registry").MODELS
    with registry.switch_scope_and_registry(package):
        return registry.build(cfg).train()


def assert_trains(model: torch.nn.Module, losses: dict) -> None:
    total, _ = model.parse_losses(losses)
    total.backward()
    assert total.isfinite()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(grad.isfinite().all() for grad in grads)
    assert sum(bool(grad.any()) for grad in grads) > len(grads) // 2


def test_fcos_of_mmdet_trains_and_predicts():
    model = build_model("mmdet", "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py")
    from mmdet.testing import demo_mm_inputs

    data = demo_mm_inputs(2, [[3, 64, 64]] * 2, num_items=[2, 2], num_classes=80)
    samples = data["data_samples"]
    for sample in samples:
        sample.set_metainfo({"batch_input_shape": (64, 64), "pad_shape": (64, 64)})
    images = torch.stack(data["inputs"]).float() / 255
    assert_trains(model, model.loss(images, samples))
    with torch.no_grad():
        assert len(model.eval().predict(images, samples)[0].pred_instances.scores)


def test_psanet_of_mmseg_trains():
    config = "psanet/psanet_r50-d8_4xb2-40k_cityscapes-512x1024.py"
    model = build_model("mmseg", config, mask_size=(8, 8))
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    labels = [PixelData(data=torch.randint(0, 19, (1, 64, 64))) for _ in range(2)]
    samples = [SegDataSample(gt_sem_seg=label) for label in labels]
    assert_trains(model, model.loss(torch.randn(2, 3, 64, 64), samples))
