"""The benchmark of whole models on a CPU: what it reports, how parts and profiles become numbers, and its errors."""

import argparse
import importlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from torch import nn

REPOSITORY = Path(__file__).parents[1]
TOOL = REPOSITORY / "tools" / "benchmark_step.py"
QUICK = ["--device", "cpu", "--quick", "--repeats", "2", "--min-seconds", "0.001", "--size", "64", "--batch-size", "2"]
OUR_SEG, OUR_DET = "seg_configs/upernet_hier_vig_t.py", "det_configs/mask_rcnn_hier_vig_t.py"
SWIN_SEG = "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"
SWIN_DET = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"
SHALLOW = "model.backbone.depths=[1,1,1,1]"
SMALL_SEG = ["model.decode_head.channels=16", "model.auxiliary_head.channels=16"]
SMALL_DET = [
    "model.train_cfg.rpn_proposal.nms_pre=50",
    "model.train_cfg.rpn_proposal.max_per_img=20",
    "model.train_cfg.rcnn.sampler.num=8",
    "model.test_cfg.rpn.max_per_img=10",
    "model.test_cfg.rcnn.max_per_img=5",
    "model.roi_head.mask_head.num_convs=1",
    "model.roi_head.bbox_head.fc_out_channels=16",
]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    sys.path.insert(0, str(TOOL.parent))  # as for a script
    module = importlib.import_module("benchmark_step")
    sys.path.remove(str(TOOL.parent))
    return module


@pytest.fixture
def part(tool: ModuleType) -> Callable[[str], ModuleType]:
    """A module of the tool, by the end of its name."""
    return lambda name: sys.modules[f"_step_{name}"]


@pytest.fixture
def run(
    tool: ModuleType, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str, dict]]:
    """Run the tool quickly at 64 x 64 pixels; returns exit code, stdout, stderr and its JSON."""
    monkeypatch.chdir(REPOSITORY)

    def run(*arguments: str) -> tuple[int, str, str, dict]:
        table = tmp_path / "step.json"
        code = tool.main([*arguments, *QUICK, "--json", str(table)])
        out, err = capsys.readouterr()
        return code, out, err, json.loads(table.read_text(), parse_constant=pytest.fail)

    return run


def _cells(out: str, name: str) -> list[list[str]]:
    return [line.split() for line in out.splitlines() if line.split()[:1] == [name]]


# ---- whole runs


def _check_row(row: dict[str, Any]) -> None:
    """What holds for every row that was measured on a CPU."""
    assert (row["failure"], row["note"], row["size"], row["peak_bytes"], row["device"]) == (
        "",
        "",
        [64, 64],
        None,
        None,
    )
    assert row["batch"] == (1 if row["mode"] == "latency" else 2)
    assert 0 < row["ms"]["p10"] <= row["ms"]["median"] <= row["ms"]["p90"] < math.inf
    assert row["images_per_second"] == pytest.approx(row["batch"] / row["ms"]["median"] * 1e3)
    assert row["operators"] > row["waiting_operators"] >= 0
    assert all(ms >= 0 for ms in row["parts_ms"].values())
    assert next(iter(row["parts_ms"])) == "data_preprocessor"
    assert list(row["parts_ms"])[-1] == "rest"
    training_parts = {"backward", "optimizer", "log"}
    assert training_parts & set(row["parts_ms"]) == (training_parts if row["mode"] == "training" else set())


def test_segmenters_of_this_repository_and_stock_ones_share_a_table(run, tmp_path):
    plot = tmp_path / "step.png"
    variants = f"swin={SWIN_SEG}@{SHALLOW}", f"ours={OUR_SEG}"
    options = ("--modes", "inference,training", "--plot", str(plot), "--cfg-options", *SMALL_SEG)
    code, out, err, report = run(*variants, *options)
    assert (code, err) == (0, "")
    assert [line.split("  ")[0] for line in out.splitlines() if "images/s" in line and "batch" in line] == [
        "training, mmseg, 64",
        "inference, mmseg, 64",
    ]
    rows = {(row["name"], row["mode"]): row for row in report["rows"]}
    assert len(rows) == 4
    for (name, mode), row in rows.items():
        _check_row(row)
        assert row["classes"]["backbone"] == ("HierViG" if name == "ours" else "SwinTransformer")
        expected = {"backbone", "decode_head.forward"}
        expected |= {"model.loss", "auxiliary_head.forward_train"} if mode == "training" else {"model.predict"}
        assert expected <= set(row["parts_ms"])
        if name == "swin":
            in_stock = {"auxiliary_head.loss_by_feat"} if mode == "training" else {"model.postprocess_result"}
            assert in_stock <= set(row["parts_ms"])
        assert len(_cells(out, name)) == 2
    assert rows["swin", "training"]["options"] == [SHALLOW]
    for ratio in report["ratios"]:
        ours, swin = (rows[name, ratio["group"].split(",")[0]]["images_per_second"] for name in ("ours", "swin"))
        assert (ratio["name"], ratio["other"], ratio["peak_memory"]) == ("ours", "swin", None)
        assert ratio["speed"] == pytest.approx(ours / swin)
    assert out.count("the images/s of swin") == len(report["ratios"]) == 2
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert report["machine"]["torch"] == torch.__version__


@pytest.mark.parametrize("config", [f"ours={OUR_DET}", f"swin={SWIN_DET}@{SHALLOW}"], ids=["ours", "swin"])
def test_detectors_are_cut_into_the_parts_of_their_heads(run, config):
    code, _, err, report = run(config, "--modes", "training,latency", "--cfg-options", *SMALL_DET)
    assert (code, err) == (0, "")
    assert [row["mode"] for row in report["rows"]] == ["training", "latency"]
    for row in report["rows"]:
        _check_row(row)
        head = "roi_head.bbox_head"
        expected = {"neck", "rpn_head.forward", "roi_head.bbox_roi_extractor.forward", "roi_head.mask_head.forward"}
        expected |= {"roi_head.loss"} if row["mode"] == "training" else {f"{head}.predict_by_feat"}
        expected -= {"roi_head.bbox_roi_extractor.forward"} if "ours" in row["name"] else set()
        assert expected <= set(row["parts_ms"])
        if row["name"] == "swin" and row["mode"] == "training":
            assert f"{head}.get_targets" in row["parts_ms"]
            assert row["waiting_operators"] > 10  # stock targets and samplers do


def test_training_in_bfloat16_on_real_data(tool, toy_data, tmp_path, capsys):
    config = tmp_path / "toy.py"
    config.write_text(f"""
_base_ = "{REPOSITORY / OUR_SEG}"
train_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root="{toy_data / "ade"}", pipeline=[
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations", reduce_zero_label=True),
        dict(type="RandomCrop", crop_size=(64, 64)),
        dict(type="PackSegInputs"),
    ]),
)
model = dict(data_preprocessor=dict(size=(64, 64)))
""")
    table = tmp_path / "step.json"
    arguments = [a for a in QUICK if a not in ("--size", "64")]
    options = ["--data", "real", "--dtype", "bf16", "--json", str(table), "--cfg-options", *SMALL_SEG]
    assert tool.main([f"toy={config}", *arguments, *options]) == 0
    assert "training, mmseg, real data" in capsys.readouterr().out
    (row,) = json.loads(table.read_text())["rows"]
    assert (row["failure"], row["size"], row["batch"]) == ("", None, 2)
    assert 0 < row["data_ms"] < row["ms"]["median"]
    assert row["parts_ms"]["data"] > 0


def test_steps_leave_the_weights_alone(part, tool, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    variant = part("configs").parse_variant(f"{SWIN_SEG}@{SHALLOW}")
    workload = part("workload").Workload(
        variant,
        part("configs").load_variant(variant, SMALL_SEG),
        "training",
        part("workload").Setup(torch.device("cpu"), torch.float32, (64, 64), 2, False),
    )
    workload.prepare()
    before = [x.detach().clone() for x in workload.model.parameters()]
    workload.step()
    workload.step()
    assert all(torch.equal(a, b) for a, b in zip(before, workload.model.parameters()))
    assert len(workload.optim_wrapper.optimizer.state) == len(before)


# ---- failures and wrong usage


def test_config_that_fails_is_a_row_with_its_reason(run):
    broken = f"broken={OUR_SEG}@model.backbone.arch=huge"
    code, out, err, report = run(broken, f"fine={OUR_SEG}", "--modes", "latency", "--cfg-options", *SMALL_SEG)
    assert (code, err, report["ratios"]) == (0, "", [])
    assert [bool(row["failure"]) for row in report["rows"]] == [True, False]
    assert "huge" in " ".join(_cells(out, "broken")[0])


def test_failures_alone_are_exit_code_1(run):
    code, _, err, _ = run(f"{OUR_SEG}@model.backbone.arch=huge", "--modes", "latency", "--plot", "no.png")
    assert code == 1
    assert "nothing could be measured" in err
    assert not (REPOSITORY / "no.png").exists()


def test_time_limit_ends_a_row(run):
    code, out, _, _ = run(OUR_DET, "--modes", "training", "--time-limit", "0.05")
    assert code == 1
    assert "over the time limit of 0.05 s" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["@model.type=X"], "expected [NAME=]CONFIG[@KEY=VALUE,KEY=VALUE..]"),
        ([f"{OUR_SEG}@compile"], "expected [NAME=]CONFIG[@KEY=VALUE,KEY=VALUE..]"),
        (["seg_configs/upernet_vig_x.py"], "no config at seg_configs/upernet_vig_x.py. Did you mean"),
        (["mmnothing::swin/x.py"], "no package 'mmnothing' is installed, expected mmdet or mmseg"),
        (["mmseg::swin/swin-tiny.py"], "no config at"),
        ([f"{OUR_SEG}@model.bakbone.arch=tiny"], "did you mean 'model.backbone'?"),
        ([f"{OUR_SEG}@compile=True"], "would hide the parts of a step"),
        ([OUR_SEG, OUR_SEG], "two rows of one name"),
        ([OUR_SEG, "--size", "64,96"], "expected HxW"),
        ([OUR_SEG, "--batch-size", "0"], "--batch-size must be above 0"),
        ([OUR_SEG, "--modes", "dreaming"], "expected some of training,inference,latency, got 'dreaming'"),
        ([OUR_SEG, "--data", "real", "--modes", "latency"], "expected --modes training alone"),
        ([OUR_SEG, "--data", "real", "--size", "64"], "no --size"),
        ([OUR_SEG, "--data", "real", "--smaller", "0.5"], "no --size or --smaller"),
        ([OUR_SEG, "--smaller", "1"], "--smaller must be at least 0 and below 1"),
        ([OUR_SEG, "--plot", "step.jpg"], "expected a name that ends in .png"),
    ],
)
def test_bad_argument_is_exit_code_2(tool, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(SystemExit) as exit_:
        tool.main(["--device", "cpu", *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_help_as_a_script_has_examples(run_python):
    out = run_python(TOOL, "--help").stdout
    assert "python tools/benchmark_step.py seg_configs/upernet_hier_vig_t.py" in out


# ---- configs


def test_variants_have_a_name_a_config_and_options(part):
    configs = part("configs")
    assert configs.parse_variant("a/b.py") == configs.Variant("b", "a/b.py")
    assert configs.parse_variant("x=mmdet::a/b.py") == configs.Variant("x", "mmdet::a/b.py")
    options = "model.backbone.depths=[1,2],model.test_cfg.stride=(3,4),model.type=X"
    variant = configs.parse_variant(f"x=b.py@{options}")
    assert variant.options == ("model.backbone.depths=[1,2]", "model.test_cfg.stride=(3,4)", "model.type=X")
    values = {"model.backbone.depths": [1, 2], "model.test_cfg.stride": (3, 4), "model.type": "X"}
    assert configs.parse_options([*variant.options]) == values
    assert configs.parse_variant("b.py@model.type=X").name == "b@model.type=X"
    with pytest.raises(argparse.ArgumentTypeError):
        configs.parse_variant("=b.py")


def test_own_options_win_over_those_for_all(part):
    configs = part("configs")
    variant = configs.parse_variant(f"{SWIN_SEG}@model.backbone.drop_path_rate=0.1")
    cfg = configs.load_variant(variant, ["model.backbone.drop_path_rate=0.5", "model.decode_head.channels=16"])
    assert (cfg.model.backbone.drop_path_rate, cfg.model.decode_head.channels) == (0.1, 16)


def test_options_of_a_stock_config_can_import_other_classes(part):
    configs = part("configs")
    variant = configs.parse_variant(f"{SWIN_DET}@custom_imports.imports=[vig_backbone.openmmlab.det_tta],model.type=X")
    assert configs.load_variant(variant, []).model.type == "X"
    assert "vig_backbone.openmmlab.det_tta" in sys.modules


@pytest.mark.parametrize("config", [SWIN_SEG, SWIN_DET])
def test_nothing_is_downloaded(part, config):
    configs = part("configs")
    cfg = configs.load_variant(configs.parse_variant(config), [])
    assert "://" in str(cfg.model)
    configs.drop_pretrained(cfg.model)
    assert "://" not in str(cfg.model)
    assert "Pretrained" not in str(cfg.model)


def test_other_initialisations_are_kept(part):
    model = dict(
        pretrained="open-mmlab://resnet50",
        heads=[dict(init_cfg=[dict(type="Normal"), dict(type="Pretrained", checkpoint="x")])],
        neck=dict(init_cfg=dict(type="Xavier")),
    )
    part("configs").drop_pretrained(model)
    expected = dict(
        pretrained=None, heads=[dict(init_cfg=[dict(type="Normal")])], neck=dict(init_cfg=dict(type="Xavier"))
    )
    assert model == expected


def test_precision_decides_on_the_optimizer_wrapper(part):
    configs, cpu = part("configs"), torch.device("cpu")
    cfg = Config(dict(optim_wrapper=dict(type="AmpOptimWrapper", dtype="float16", loss_scale="dynamic", optimizer={})))
    configs.set_precision(cfg, torch.float32, cpu)
    assert cfg.optim_wrapper == dict(type="OptimWrapper", optimizer={})
    configs.set_precision(cfg, torch.bfloat16, cpu)
    assert cfg.optim_wrapper.type is configs.CpuAmpOptimWrapper
    cfg.optim_wrapper = dict(type="FiniteAmpOptimWrapper", dtype="float16", optimizer={})
    configs.set_precision(cfg, torch.bfloat16, cpu)
    assert cfg.optim_wrapper == dict(type="FiniteAmpOptimWrapper", dtype="bfloat16", optimizer={})
    configs.set_precision(cfg, torch.float32, cpu)
    assert cfg.optim_wrapper == dict(type="FiniteOptimWrapper", optimizer={})
    cfg.optim_wrapper.type = "ApexOptimWrapper"
    with pytest.raises(configs.ConfigError, match=r"optim_wrapper\.type='ApexOptimWrapper'"):
        configs.set_precision(cfg, torch.float32, cpu)


# ---- synthetic data


def test_boxes_lie_in_the_image_and_masks_fill_them(part):
    data, size = part("data"), (96, 160)
    boxes = data.random_boxes(np.random.default_rng(0), size, 300)
    extent = boxes[:, 2:] - boxes[:, :2]
    assert boxes.min() >= 0
    assert (boxes[:, 2:] <= (size[1], size[0])).all()
    assert extent.min() >= 3.99
    assert extent.prod(-1).min() < 100 < 5000 < extent.prod(-1).max()
    for box, area in zip(boxes, extent.prod(-1)):
        x, y = np.array(data.ellipse(box)).reshape(-1, 2).T
        np.testing.assert_allclose((x.min(), y.min(), x.max(), y.max()), box, atol=1e-3)
        around = abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
        assert around == pytest.approx(math.pi / 4 * area, rel=0.02)


def test_label_maps_have_many_classes_and_ignored_regions(part):
    labels = part("data").label_map(np.random.default_rng(0), (128, 128), 150)
    found, counts = np.unique(labels, return_counts=True)
    assert labels.dtype == np.uint8
    assert 10 < len(found) <= part("data").REGIONS
    assert found[-1] == 255
    assert counts[-1] < labels.size / 4
    assert found[-2] < 150


@pytest.fixture
def feed(part: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Of a config and options of its dataloader: batches of 3 images of 32 x 48 pixels."""
    monkeypatch.chdir(REPOSITORY)

    def make(config: str, num_classes: int | None, *options: str, smaller: float = 0.0) -> Any:
        cfg = part("configs").load_variant(part("configs").parse_variant(config), [*options])
        part("workload").enter_scope(cfg.default_scope)
        return part("data").synthetic_feed(cfg, (32, 48), 3, num_classes, torch.device("cpu"), smaller)

    return make


@pytest.mark.parametrize("config", [OUR_DET, OUR_SEG])
def test_images_of_several_sizes(part, feed, config):
    sizes = {tuple(image.shape[-2:]) for image in feed(config, 5, smaller=0.5).next()["inputs"]}
    assert len(sizes) > 1
    assert all(16 <= h <= 32 and 24 <= w <= 48 for h, w in sizes)


@pytest.mark.parametrize("config", [SWIN_DET, SWIN_SEG])
def test_every_model_gets_the_same_batches_in_turn(part, feed, config):
    feeds, batches = [feed(config, 5) for _ in range(2)], part("data").BATCHES
    seen = []
    for _ in range(batches + 1):
        one, other = (each.next() for each in feeds)
        assert [(x.shape, x.dtype) for x in one["inputs"]] == [((3, 32, 48), torch.uint8)] * 3
        assert all(torch.equal(a, b) for a, b in zip(one["inputs"], other["inputs"]))
        for a, b in zip(one["data_samples"], other["data_samples"]):
            if config == SWIN_DET:
                boxes, masks = a.gt_instances.bboxes.tensor, a.gt_instances.masks.masks
                assert torch.equal(boxes, b.gt_instances.bboxes.tensor)
                assert len(a.gt_instances.labels) == len(boxes) == len(masks) > 0
                assert set(np.unique(masks)) <= {0, 1}
                assert len(a.ignored_instances) == 0
            else:
                assert torch.equal(a.gt_sem_seg.data, b.gt_sem_seg.data)
                assert a.gt_sem_seg.data.shape == (1, 32, 48)
        seen.append(one["inputs"][0])
    assert torch.equal(seen[0], seen[batches])
    assert not torch.equal(seen[0], seen[1])
    assert len(feeds[0].waits) == batches + 1


def test_samples_have_the_form_that_the_config_gives_them(feed):
    from mmdet.structures.mask import PolygonMasks

    sample = feed(SWIN_DET, 5, "train_dataloader.dataset.pipeline.1.poly2mask=False").next()["data_samples"][0]
    assert isinstance(sample.gt_instances.masks, PolygonMasks)


def test_batches_are_collated_as_the_config_says(part, monkeypatch):
    data = part("data")
    monkeypatch.setitem(data.FUNCTIONS.module_dict, "count_samples", lambda samples, unit: f"{len(samples)} {unit}")
    collate = data.collate_of(dict(collate_fn=dict(type="count_samples", unit="images")))
    assert collate([1, 2, 3]) == "3 images"
    assert data.collate_of({})([dict(inputs=1), dict(inputs=2)]) == dict(inputs=[1, 2])


@pytest.mark.parametrize(("config", "original"), [(SWIN_DET, (19, 29)), (SWIN_SEG, (32, 64))])
def test_samples_for_testing_have_another_size_and_no_annotations(feed, config, original):
    sample = feed(config, None).next()["data_samples"][0]
    assert tuple(sample.ori_shape) == original
    assert "gt_sem_seg" not in sample
    assert len(sample.get("gt_instances", ())) == 0


# ---- parts


class FakeClock:
    """Each look at it takes a millisecond."""

    def __init__(self) -> None:
        self.now = 0

    def mark(self) -> int:
        self.now += 1
        return self.now

    def ms(self, start: int, end: int) -> float:
        return end - start

    def synchronize(self) -> None:
        pass


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.inner(x))


def test_parts_are_timed_without_the_parts_inside_and_add_up(part):
    parts, model = part("parts"), Outer()
    listed = [parts.Part("outer", model, "forward"), parts.Part("inner", model.inner, "forward")]
    times = parts.part_times(lambda: model(torch.ones(1, 2)), listed, FakeClock(), 3)
    # Marks in order, which add up to the step: step 1, outer 2, inner 3-4 and 5-6, outer 7, step 8.
    assert times == {"outer": 3, "inner": 2, "rest": 2}
    assert list(times)[-1] == "rest"
    assert "forward" not in vars(model)
    assert "forward" not in vars(model.inner)


def test_methods_come_back_after_an_error(part):
    parts, model = part("parts"), Outer()

    def fail() -> None:
        model(torch.ones(1, 3))

    with pytest.raises(RuntimeError):
        parts.part_times(fail, [parts.Part("outer", model, "forward")], FakeClock(), 1)
    assert "forward" not in vars(model)


def test_marks_stay_outside_of_compiled_modules(part):
    parts, model = part("parts"), Outer()
    model.compile(backend="eager", fullgraph=True)
    compiled = model._compiled_call_impl
    assert parts.called_method(model) == "_compiled_call_impl"
    times = parts.part_times(
        lambda: model(torch.ones(1, 2)), parts.parts_of(nn.ModuleDict({"backbone": model}), None), FakeClock(), 2
    )
    assert times == {"backbone": 1, "rest": 2}
    assert model._compiled_call_impl is compiled


def test_medians_count_steps_without_a_part_as_nothing(part):
    steps = [{"rest": 1.0, "a": 4.0}, {"rest": 3.0}, {"rest": 2.0, "b": 9.0}]
    assert part("parts").median_times(steps) == {"a": 0.0, "b": 0.0, "rest": 2.0}


def test_parts_of_later_rows_are_sorted_in(part):
    results = part("results")
    fields = dict(config="", options=[], scope="mmseg", mode="training", size=(8, 8), batch=1)
    a = results.Row("a", **fields, parts_ms=dict(backbone=1.0, head=2.0, rest=3.0))
    b = results.Row("b", **fields, parts_ms=dict(backbone=1.0, neck=5.0, rest=3.0))
    assert results.order_of_parts([a, b]) == ["backbone", "neck", "head", "rest"]
    lines = results.Table.of(["a", "b"], False, False).parts([a, b]).splitlines()
    assert [line.split() for line in lines] == [
        ["part,", "ms", "a", "b"],
        ["backbone", "1.00", "1.00"],
        ["neck", "-", "5.00"],
        ["head", "2.00", "-"],
        ["rest", "3.00", "3.00"],
    ]


# ---- the device


def test_profile_becomes_busy_time_launches_and_waits(part):
    device = part("device")
    kernel, memory, call = device.KERNEL, device.MEMORY, device.CALL
    events = [
        device.Event("gemm", 100, 1000, kernel),
        device.Event("gemm", 2000, 1000, kernel),
        device.Event("add", 600, 1000, kernel),  # on another stream: from 1100 on alone
        device.Event("Memcpy HtoD (Pageable -> Device)", 2500, 200, memory),  # while gemm runs
        device.Event("Memset (Device)", 4000, 400, memory),
        device.Event("cudaLaunchKernel", 0, 10, call),
        device.Event("cuLaunchKernelEx", 20, 10, call),
        device.Event("cudaGraphLaunch", 40, 10, call),
        device.Event("cudaMemcpyAsync", 60, 10, call),
        device.Event("cudaStreamSynchronize", 80, 900, call),
        device.Event("cudaMemcpy", 1500, 10, call),
        device.Event("cudaEventRecord", 1600, 10, call),
        device.Event("cudaMemsetAsync", 1700, 10, call),
        device.Event("cudaStreamSynchronize", 1800, 10, call),  # of the step, though nothing is launched after it
        device.Event("cudaDeviceSynchronize", 1900, 900, call),  # ours, at the end
        device.Event("cudaDeviceSynchronize", 2900, 10, call),  # the profiler's
    ]
    use = device.device_use(events, steps=2)
    assert use.busy_ms == pytest.approx((1500 + 1000 + 400) / 2 / 1e3)
    assert use.copy_ms == pytest.approx(600 / 2 / 1e3)
    assert (use.kernels, use.launches, use.syncs) == (1.5, 1.5, 1.5)
    assert [(k.name, k.calls) for k in use.top[:2]] == [("gemm", 1.0), ("add", 0.5)]
    assert use.top[0].ms == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [([], 0), ([(0, 5), (5, 5)], 10), ([(0, 10), (2, 3)], 10), ([(3, 4), (0, 5)], 7), ([(0, 1), (9, 1)], 2)],
)
def test_overlapping_events_count_once(part, intervals, expected):
    device = part("device")
    assert device.covered([device.Event("x", *interval, device.KERNEL) for interval in intervals]) == expected


def test_profile_without_work_is_no_work(part):
    use = part("device").device_use([], steps=3)
    assert (use.busy_ms, use.kernels, use.syncs, use.top) == (0, 0, 0, [])


def test_trace_keeps_what_concerns_the_device(part):
    device = part("device")
    entries = [
        dict(ph="X", cat="kernel", name="gemm", ts=1.5, dur=2, args={}),
        dict(ph="X", cat="cuda_driver", name="cuLaunchKernel", ts=0, dur=1),
        dict(ph="X", cat="cpu_op", name="aten::mm", ts=0, dur=9),
        dict(ph="f", cat="kernel", name="flow", ts=0),
        dict(ph="M", name="process_name"),
    ]
    assert device.events_of(dict(traceEvents=entries)) == [
        device.Event("gemm", 1.5, 2.0, device.KERNEL),
        device.Event("cuLaunchKernel", 0.0, 1.0, device.CALL),
    ]


def test_profile_that_torch_writes_can_be_read(part, monkeypatch):
    device = part("device")
    monkeypatch.setattr(device, "ProfilerActivity", argparse.Namespace(CUDA=torch.profiler.ProfilerActivity.CPU))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    steps = []
    use = device.profile_steps(lambda: steps.append(torch.ones(2) + 1), steps=2)
    assert len(steps) == 3  # the first one alone
    assert (use.busy_ms, use.kernels, use.launches, use.top) == (0, 0, 0, [])


@pytest.mark.gpu
def test_row_of_a_gpu(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    table = tmp_path / "step.json"
    sizes = ["--size", "64", "--batch-size", "2", "--quick", "--json", str(table)]
    assert tool.main([OUR_DET, OUR_SEG, *sizes, "--modes", "training,inference", "--kernels"]) == 0
    assert capsys.readouterr().out.count("longest kernels of a step") == 4
    for row in json.loads(table.read_text())["rows"]:
        assert (row["failure"], row["note"]) == ("", "")
        assert 4 * row["parameters"] < row["peak_bytes"] < 2**34
        assert 0 < row["busy_share"] < 1.1
        assert row["device"]["kernels"] >= len(row["device"]["top"]) > 5
        if row["mode"] == "inference":
            assert row["device"]["syncs"] > 0  # for results; a training step need not wait for anything


@pytest.mark.parametrize(
    ("step", "waiting"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool((x > 0).any()), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.masked_select(x > 0), 1),
        (lambda x: x.index_put((x > 0,), torch.zeros(())), 1),
        (lambda x: (x > 0).nonzero(), 1),
        (lambda x: x.unique(), 1),
        (lambda x: torch.equal(x, x), 1),
        (lambda x: x.repeat_interleave(torch.tensor([1, 2, 1, 1])), 1),
        (lambda x: x.repeat_interleave(torch.tensor([1, 2, 1, 1]), output_size=5), 0),
        (lambda x: x[torch.tensor([0, 2])], 0),
        (lambda x: torch.where(x > 0, x, 0.0).topk(2), 0),
        (lambda x: x.view(2, 2)[:, 1], 0),
    ],
)
def test_operators_that_would_wait_are_counted(part, step, waiting):
    x = torch.tensor([1.0, -1.0, 2.0, 3.0])
    operators, found = part("device").count_operators(lambda: step(x))
    assert found == waiting
    assert operators >= 1


# ---- scores


def test_untrained_detector_detects_something(part, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    configs, workload = part("configs"), part("workload")
    variant = configs.parse_variant(f"{SWIN_DET}@{SHALLOW}")
    setup = workload.Setup(torch.device("cpu"), torch.float32, (64, 64), 2, False)
    load = workload.Workload(variant, configs.load_variant(variant, SMALL_DET), "inference", setup)
    batch = load.feed.next()
    with torch.no_grad():
        before = load.model.test_step(batch)
        workload.set_score_threshold(load.model, batch, load.autocast)
        after = load.model.test_step(batch)
    assert sum(len(sample.pred_instances) for sample in before) == 0
    assert [len(sample.pred_instances) for sample in after] == [5, 5]  # rcnn.max_per_img
    assert after[0].pred_instances.masks.shape[1:] == (38, 38)
