"""Exported models compute what the models compute, for the sizes that they promise, and say so where they cannot."""

import importlib
from pathlib import Path

import pytest
import torch
from golden import set_golden_weights
from torch import Tensor, nn
from vig_kernels.gla.naive import naive_bidirectional_gla

from vig_backbone import HierViG, ViG, hier_vig, vig
from vig_backbone.export import ExportError, ImageSize, export_model, prepare
from vig_backbone.export.check import compare_outputs, measure_latency, sizes_to_check
from vig_backbone.export.formats import Exported
from vig_backbone.export.scan import exportable_gla

FAMILIES = [ViG, HierViG]
# Of the fixture `small`, and whether sizes are dynamic.
CASES = [(ViG, False), (ViG, True), (HierViG, False), pytest.param(HierViG, True, marks=pytest.mark.slow)]


@pytest.fixture(params=[ViG])
def small(request, monkeypatch) -> nn.Module:
    """The tiny variant with one block, or two stages of one block: graphs grow with the number of blocks."""
    monkeypatch.setitem(vig.ARCHS, "tiny", {**vig.ARCHS["tiny"], "depth": 1})
    monkeypatch.setitem(hier_vig.ARCHS, "tiny", {**hier_vig.ARCHS["tiny"], "depths": (1, 1)})
    options = dict(gla_impl="chunk", out_indices=(0,) if request.param is ViG else (0, 1))
    return set_golden_weights(request.param("tiny", **options))


def export(model: nn.Module, path: Path, format: str, size: ImageSize) -> Exported:
    return export_model(prepare(model), path, format, size, [f"map_{i}" for i in range(len(model.out_indices))])


def gla_inputs(L: int, strength: float, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    q, k, fwd, bwd = (torch.randn(2, L, 3, 16, dtype=dtype) for _ in range(4))
    return [q, k, torch.randn(2, L, 3, 24, dtype=dtype), -strength * fwd.abs(), -strength * bwd.abs()]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


# The form of the scan


@pytest.mark.parametrize("L", [1, 7, 63, 64, 65, 200])
@pytest.mark.parametrize("strength", [0.0, 0.05, 1, 1000])
def test_scan_is_the_definition(L, strength):
    inputs = gla_inputs(L, strength)
    expected = naive_bidirectional_gla(*(x.double() for x in inputs), 0.3)
    assert relative_error(exportable_gla(*inputs, 0.3), expected) < 1e-6


def test_scan_in_double_precision():
    inputs = gla_inputs(150, 0.3, torch.float64)
    assert relative_error(exportable_gla(*inputs, 0.3), naive_bidirectional_gla(*inputs, 0.3)) < 1e-14


def test_weak_gates_far_behind_strong_ones_keep_their_precision():
    """A decay that is the difference of two sums over all tokens would be lost in the rounding of the first ones."""
    q, k, v, fwd, bwd = gla_inputs(400, 0.01)
    fwd[:, :200] *= 1e8
    bwd[:, :200] *= 1e8
    expected = naive_bidirectional_gla(*(x.double() for x in (q, k, v, fwd, bwd)), 1.0)
    out = exportable_gla(q, k, v, fwd, bwd, 1.0)
    assert relative_error(out[:, 200:], expected[:, 200:]) < 1e-6


def test_half_precision_comes_back_as_it_went_in():
    inputs = [x.bfloat16() for x in gla_inputs(70, 0.1)]
    out = exportable_gla(*inputs, 1.0)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, naive_bidirectional_gla(*(x.double() for x in inputs), 1.0)) < 5e-3


# Prepared models


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(64, 100), (224, 224)])
def test_prepared_model_computes_the_same_and_the_model_stays_as_it_is(family, size):
    model = set_golden_weights(family("tiny", gla_impl="chunk", with_cp=True)).double().train()
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    prepared = prepare(model)
    with torch.no_grad():
        difference = max(relative_error(b, a) for a, b in zip(model(x), prepared(x), strict=True))
    assert difference < 1e-11
    assert (model.training, model.with_cp, prepared.training, prepared.with_cp) == (True, True, False, False)
    assert all(p.requires_grad for p in model.parameters())
    assert {m.gla_impl for m in model.modules() if hasattr(m, "gla_impl")} == {"chunk"}


# Files


@pytest.mark.parametrize(("small", "dynamic"), CASES, indirect=["small"])
def test_onnx_file_runs_and_agrees(small, dynamic, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    size = ImageSize(64, 96, dynamic, smallest=33)
    exported = export(small, tmp_path / "folder/model.onnx", "onnx", size)
    differences = compare_outputs(small, exported.run, size)
    assert len(differences) == (4 if dynamic else 1)
    assert all(d.relative < 1e-5 for d in differences)
    onnx = importlib.import_module("onnx")
    graph = onnx.load(exported.path).graph
    names = [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim]
    assert names == ([1, 3, "height", "width"] if dynamic else [1, 3, 64, 96])
    assert [out.name for out in graph.output] == [f"map_{i}" for i in range(len(small.out_indices))]
    assert {node.domain for node in graph.node} <= {"", "ai.onnx", "pkg.onnxscript.torch_lib"}  # no operator of ours


@pytest.mark.parametrize(("small", "dynamic"), CASES, indirect=["small"])
def test_program_runs_and_agrees(small, dynamic, tmp_path):
    size = ImageSize(64, 96, dynamic, smallest=33)
    exported = export(small, tmp_path / "model.pt2", "torch", size)
    assert all(d.relative < 1e-5 for d in compare_outputs(small, exported.run, size))


@pytest.mark.slow
def test_package_runs_and_agrees(monkeypatch, tmp_path):
    monkeypatch.setitem(vig.ARCHS, "tiny", {**vig.ARCHS["tiny"], "depth": 1})
    model = set_golden_weights(ViG("tiny", gla_impl="chunk", out_indices=(0,)))
    size = ImageSize(64, 96)
    exported = export(model, tmp_path / "model.pt2", "aot", size)
    assert all(d.relative < 1e-5 for d in compare_outputs(model, exported.run, size))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("format", ["torch", "aot"])
def test_triton_kernels_are_in_the_files_of_a_gpu(format, tmp_path):
    model = ViG("tiny", gla_impl="triton", out_indices=(11,)).cuda().eval()
    size = ImageSize(64, 96)
    exported = export_model(prepare(model, "triton"), tmp_path / "model.pt2", format, size, ["map"])
    assert all(d.relative < 1e-3 for d in compare_outputs(model, exported.run, size))


def test_missing_package_is_named(small, monkeypatch, tmp_path):
    def import_module(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(ExportError, match=r"needs the package onnx: pip install 'vig-dense\[export\]'"):
        export(small, tmp_path / "model.onnx", "onnx", ImageSize(64, 64))


def test_model_that_cannot_be_exported_is_refused(tmp_path):
    class DependsOnValues(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, images: Tensor) -> tuple[Tensor]:
            return (images * self.weight if images.sum() > 0 else images,)

    with pytest.raises(ExportError, match=r"torch\.export does not take this model"):
        export_model(DependsOnValues(), tmp_path / "model.pt2", "torch", ImageSize(64, 64), ["out"])


def test_differences_are_found():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return images * self.weight, images[:, 0] > 0

    model, size = Model(), ImageSize(40, 40, dynamic=True, smallest=33)
    same = compare_outputs(model, lambda x: [x.clone(), x[:, 0] > 0], size)
    assert all(d.is_small and d.largest == 0 for d in same)
    assert [(d.height, d.width) for d in same] == sizes_to_check(size)
    assert not any(d.is_small for d in compare_outputs(model, lambda x: [x * 1.001, x[:, 0] > 0], size))
    assert not any(d.is_small for d in compare_outputs(model, lambda x: [x, x[:, 0] > 0.1], size))
    assert not any(d.is_small for d in compare_outputs(model, lambda x: [x[..., :1], x[:, 0] > 0], size))


def test_latency_is_measured_over_calls_that_all_happen():
    calls = []
    assert measure_latency(lambda x: calls.append(x) or [], torch.ones(1), seconds=0) >= 0
    assert len(calls) == 5


# Whole models and the command


@pytest.mark.parametrize("size", [(7, 10), (12, 12), (3, 5)])
@pytest.mark.parametrize("bins", [1, 2, 3, 6])
def test_pooling_by_matrices_is_adaptive_pooling(size, bins):
    pytest.importorskip("mmengine")
    from vig_backbone.openmmlab.exportable import PooledByMatrices

    x = torch.randn(2, 4, *size)
    assert torch.allclose(PooledByMatrices(bins)(x), nn.AdaptiveAvgPool2d(bins)(x), atol=1e-6)


@pytest.fixture
def load():
    pytest.importorskip("mmdet")
    pytest.importorskip("mmseg")
    from vig_backbone.openmmlab.configuration import load_config
    from vig_backbone.openmmlab.exportable import exportable_model, replace_pooling

    def build(config: str, labels: bool = False) -> tuple[nn.Module, nn.Module]:
        """The exportable part of a config, and its prepared form."""
        torch.manual_seed(0)
        model = exportable_model(load_config(config, "toy"), None, "cpu", labels)
        return model, replace_pooling(prepare(model))

    return build


def test_segmenter_gives_logits_or_labels_of_the_size_of_the_image(load):
    x = torch.randn(1, 3, 64, 96)
    model, prepared = load("seg_configs/upernet_vig_t.py")
    with torch.no_grad():
        (logits,), (again,) = model(x), prepared(x)
        (labels,) = load("seg_configs/upernet_vig_t.py", labels=True)[0](x)
        stock = model.model.inference(x, [dict(ori_shape=(64, 96), img_shape=(64, 96), pad_shape=(64, 96))])
    assert logits.shape == (1, 8, 64, 96)
    assert relative_error(again, logits) < 1e-5
    assert relative_error(logits, stock) < 1e-5
    assert torch.equal(labels, logits.argmax(1))


def test_detector_gives_maps_of_neck_and_rpn(load):
    x = torch.randn(1, 3, 64, 96)
    model, prepared = load("det_configs/mask_rcnn_vig_t.py")
    with torch.no_grad():
        maps, again = model(x), prepared(x)
    assert len(maps) == len(model.outputs) == 15
    assert model.outputs[::5] == ("neck_0", "rpn_score_0", "rpn_box_0")
    assert [m.shape[1] for m in maps[5:10]] == [3] * 5
    assert [m.shape[1] for m in maps[10:]] == [12] * 5
    assert maps[0].shape[2:] == (16, 24)
    assert max(relative_error(b, a) for a, b in zip(maps, again, strict=True)) < 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vig_tiny", "--size", "12"], "at least 33 pixels"),
        (["vig_tiny", "--argmax"], "expected a config, not the name of a backbone"),
        (["vig_tiny", "no_such_file.pth"], "no checkpoint at no_such_file.pth"),
        (["vig_huge"], "no config at vig_huge"),
    ],
)
def test_command_says_what_is_wrong(arguments, message, run_python):
    process = run_python("tools/export.py", *arguments, check=False)
    assert process.returncode == 2
    assert message in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.slow
@pytest.mark.parametrize("config", ["seg_configs/upernet_vig_t.py", "det_configs/mask_rcnn_vig_t.py"])
def test_whole_models_go_into_onnx(config, load, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model, prepared = load(config)
    size = ImageSize(64, 96)
    exported = export_model(prepared, tmp_path / "model.onnx", "onnx", size, model.outputs)
    assert all(d.is_small for d in compare_outputs(model, exported.run, size))
