"""Training several models by one recipe: what they share, what is recorded, when a score is reached, and what fails."""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from vig_backbone.data.toy import HARD_CLASSES, PALETTE, class_names, make_toy_data
from vig_backbone.openmmlab.configuration import load_config
from vig_backbone.openmmlab.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[1]
FAMILIES = [  # one config of each
    *("upernet_vig_s", "upernet_vig_adapter_t", "upernet_hier_vig_t", "upernet_hier_vig_b_640"),
    *("mask_rcnn_vig_t", "mask_rcnn_vig_s_lsj_100e", "mask_rcnn_vig_adapter_t", "mask_rcnn_hier_vig_t_3x_ms"),
    "cascade_mask_rcnn_hier_vig_t_3x_ms",
]
OUR_SEG, OUR_DET = "ours=seg_configs/upernet_vig_t.py", "ours=det_configs/mask_rcnn_vig_t.py"
SWIN = "swin=mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"
NARROW_SWIN = f"{SWIN}@" + ",".join(
    [
        *("model.backbone.embed_dims=12", "model.backbone.depths=[1,1,1,1]", "model.backbone.num_heads=[1,1,2,2]"),
        *("model.decode_head.in_channels=[12,24,48,96]", "model.auxiliary_head.in_channels=48"),
    ]
)
RESNET = "resnet=mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"
NARROW_RESNET = f"{RESNET}@model.backbone.depth=18,model.backbone.base_channels=8,model.neck.in_channels=[8,16,32,64]"
SMALL_SEG = [
    "model.data_preprocessor.size=(64,64)",
    "train_dataloader.dataset.pipeline.2.scale=(64,64)",
    "train_dataloader.dataset.pipeline.3.crop_size=(64,64)",
    "model.decode_head.channels=16",
    "model.auxiliary_head.channels=16",
]
SMALL_DET = [
    "train_dataloader.dataset.pipeline.2.scale=(64,64)",
    "val_dataloader.dataset.pipeline.1.scale=(64,64)",
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
    sys.path.insert(0, str(REPOSITORY / "tools"))  # as for a script
    module = importlib.import_module("compare_training")
    sys.path.remove(str(REPOSITORY / "tools"))
    return module


@pytest.fixture
def part(tool: ModuleType) -> Callable[[str], ModuleType]:
    """A module of the tool, by the end of its name."""
    return lambda name: sys.modules[f"_compare_{name}"]


@pytest.fixture(scope="module")
def hard_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "hard"
    make_toy_data(root, num_train=8, num_val=2, size=64, difficulty="hard")
    return root


@pytest.fixture
def run(
    tool: ModuleType, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str, dict]]:
    """Run the tool without worker processes; returns exit code, stdout, stderr and its JSON."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def run(*arguments: str) -> tuple[int, str, str, dict]:
        table = tmp_path / "compare.json"
        code = tool.main(["--workers", "0", "--work-dir", str(tmp_path / "work"), "--json", str(table), *arguments])
        out, err = capsys.readouterr()
        return code, out, err, json.loads(table.read_text(), parse_constant=pytest.fail)

    return run


def at(root: Path, scope: str) -> list[str]:
    """Options that have the data set at `root`, and batches of 4."""
    roots = [f"{split}_dataloader.dataset.data_root={root}/{scope}" for split in ("train", "val", "test")]
    files = [f"{s}_evaluator.ann_file={root}/coco/annotations/instances_val2017.json" for s in ("val", "test")]
    return ["train_dataloader.batch_size=4", *roots, *(files if scope == "coco" else [])]


# ---- the data set and the recipe


@pytest.mark.parametrize("folder", ["seg_configs", "det_configs"])
def test_the_hard_override_names_the_classes_of_the_hard_set(folder: str) -> None:
    cfg = Config.fromfile(REPOSITORY / folder / "_base_" / "data_hard.py")
    things = folder == "det_configs"
    assert tuple(cfg.classes) == (HARD_CLASSES if things else class_names("hard", semantic=True))
    assert [*map(tuple, cfg.palette)] == [*map(tuple, PALETTE[things:])]


@pytest.mark.parametrize("name", FAMILIES)
def test_hard_data_fits_over_every_family(name: str) -> None:
    path = REPOSITORY / ("seg_configs" if name.startswith("upernet") else "det_configs") / f"{name}.py"
    cfg, without = load_config(path, data="hard"), load_config(path)
    heads = cfg.model.decode_head if cfg.default_scope == "mmseg" else cfg.model.roi_head.bbox_head
    for head in heads if isinstance(heads, list) else [heads]:
        assert head.num_classes == len(cfg.train_dataloader.dataset.metainfo.classes)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.data_root.startswith("data/hard/")
    assert cfg.model.backbone == dict(without.model.backbone, drop_path_rate=0.1)


def plain(node: Any) -> Any:
    """A part of a config without the names of scopes, and with the stock names of transforms that are lighter."""
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items() if key != "_scope_"}
    if isinstance(node, list | tuple):
        return [plain(each) for each in node]
    return node.replace("FastLoadDet", "Load").replace("Fast", "") if isinstance(node, str) else node


@pytest.mark.parametrize("preset", ["segmentation", "detection"])
@pytest.mark.parametrize("data", ["hard", "toy"])
def test_all_models_of_a_preset_learn_by_one_recipe_and_from_nothing(
    part, preset: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    configs = part("configs")
    recipes = []
    for variant in configs.parse_variants(preset):
        cfg = configs.load_row(variant, data, [])
        configs.set_run(cfg, tmp_path, tmp_path / "record.json", 3, None, 2, None)
        loader, wrapper, backbone = cfg.train_dataloader, cfg.optim_wrapper, cfg.model.backbone
        recipe = dict(cfg.items(), clip_grad=wrapper.get("clip_grad"), validation=cfg.val_dataloader.dataset)
        recipe |= {field: wrapper.optimizer[field] for field in ("type", "lr", "betas", "weight_decay", "fused")}
        recipe |= {field: loader[field] for field in ("batch_size", "num_workers", "sampler", "dataset")}
        shared = ("clip_grad", "type", "lr", "betas", "weight_decay", "fused", "batch_size", "num_workers", "sampler")
        shared += (
            "dataset",
            "validation",
            "train_cfg",
            "param_scheduler",
            "randomness",
            "val_evaluator",
            "custom_hooks",
        )
        recipes.append({field: plain(recipe[field]) for field in shared})
        drop_path = None if variant.name == "ResNet-50" else {"hard": 0.1, "toy": 0.0}[data]
        assert backbone.get("drop_path_rate") == drop_path
        assert "'Pretrained'" not in str(cfg.model)
        assert cfg.model.get("pretrained") is None
        assert backbone.get("frozen_stages", -1) < 0
        assert not backbone.get("norm_eval")
        stock = [
            name for name in (cfg.model.data_preprocessor.type, loader.dataset.pipeline[-1].type) if "Fast" not in name
        ]
        assert len(stock) == (2 if configs.is_stock(variant) else 0)
    assert len(recipes) == 4
    for recipe in recipes[1:]:
        assert recipe == recipes[0]


def test_stock_models_decay_the_parameters_that_ours_decay(part) -> None:
    configs = part("configs")
    cfg = configs.load_row(configs.parse_variants(NARROW_SWIN)[0], "hard", SMALL_SEG)
    init_default_scope("mmseg")
    import mmseg.models  # noqa: F401

    model = MODELS.build(cfg.model)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    decay = {id(p): group["weight_decay"] for group in wrapper.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        decayed = p.dim() > 1 and "relative_position_bias_table" not in name
        assert decay[id(p)] == (cfg.optim_wrapper.optimizer.weight_decay if decayed else 0), name


def test_a_shorter_run_keeps_its_schedule_and_its_eight_evaluations(part) -> None:
    configs = part("configs")
    cfg = configs.load_row(configs.parse_variants(OUR_SEG)[0], "hard", [])
    configs.set_length(cfg, 80)
    assert (cfg.train_cfg.max_iters, cfg.train_cfg.val_interval) == (80, 10)
    assert [each.end for each in cfg.param_scheduler] == [8, 80]
    cfg = configs.load_row(configs.parse_variants(OUR_DET)[0], "hard", [])
    configs.set_length(cfg, 3)
    assert (cfg.train_cfg.max_epochs, cfg.train_cfg.val_interval, cfg.param_scheduler[1].end) == (3, 1, 3)
    cfg.param_scheduler[1] = dict(type="MultiStepLR", by_epoch=True, milestones=[2], end=99)
    with pytest.raises(ConfigError, match="expected a warm-up in steps and a decay to 3"):
        configs.set_length(cfg, 6)


# ---- what is recorded


def test_the_record_counts_training_and_not_evaluations(part, tmp_path: Path) -> None:
    recorder, now = part("recorder"), [100.0]
    file = tmp_path / "record.json"
    hook = recorder.TrainingRecorder(str(file), clock=lambda: now[0])
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    cfg = Config(dict(train_dataloader=dict(batch_size=4)))
    runner = SimpleNamespace(iter=0, model=model, cfg=cfg)

    def evaluate(metrics: dict[str, float]) -> None:
        hook.before_val(runner)
        now[0] += 1000
        hook.after_val_epoch(runner, metrics)
        hook.after_val(runner)

    hook.before_run(runner)
    evaluate({"mIoU": 1.0})  # before training
    hook.before_train(runner)
    for seconds in (3, 4):
        now[0] += seconds
        hook.before_train_iter(runner, runner.iter)
        hook.after_train_iter(runner, runner.iter, None, dict(loss=torch.tensor(seconds / 2), acc=torch.tensor(9.0)))
        runner.iter += 1
        evaluate({"mIoU": 10.0 * runner.iter})
    assert not recorder.Record.read(file).finished
    hook.after_train(runner)

    record = recorder.Record.read(file)
    assert record.finished
    assert (record.parameters, record.trained_parameters, record.batch) == (8, 6, 4)
    assert record.losses == [1.5, 2.0]
    assert len(record.step_ms) == 2
    assert min(record.step_ms) >= 0
    assert [(each.step, each.seconds, each.metrics["mIoU"]) for each in record.evaluations] == [
        (0, 0.0, 1.0),
        (1, 3.0, 10.0),
        (2, 7.0, 20.0),
    ]


# ---- what follows from it


def record_of(part, points: list[tuple[float, float]], metric: str = "mIoU", **fields: Any) -> Any:
    """A finished training whose evaluations found `points`, seconds and scores, 10 steps apart."""
    evaluations = [
        part("recorder").Evaluation(10 * i, seconds, {metric: score}) for i, (seconds, score) in enumerate(points)
    ]
    defaults = dict(parameters=2_000_000, trained_parameters=1, batch=4, losses=[3.0, 2.0, 1.0])
    defaults |= dict(step_ms=[900.0, 100.0, 100.0, 200.0], finished=True)
    return part("recorder").Record(**{**defaults, **fields}, evaluations=evaluations)


def row_of(part, name: str, *records: Any, stock: bool = False, scope: str = "mmseg", failure: str = "") -> Any:
    runs = [part("runs").Run(seed, "work", record, 60.0) for seed, record in enumerate(records)]
    if failure:
        runs.append(part("runs").Run(len(runs), "work", failure=failure))
    return part("results").Row(name, "config.py", [], scope, stock, runs)


def test_a_score_is_reached_between_two_evaluations(part) -> None:
    seconds_to = part("results").seconds_to
    curve = [(0.0, 2.0), (10.0, 12.0), (20.0, 8.0), (30.0, 28.0)]
    assert seconds_to(curve, 7.0) == 5.0
    assert seconds_to(curve, 12.0) == 10.0  # although it falls below again
    assert seconds_to(curve, 18.0) == 25.0
    assert seconds_to(curve, 1.0) == 0.0
    assert seconds_to(curve, 28.5) is None
    assert seconds_to([], 1.0) is None


def test_thresholds_are_those_of_the_best_stock_model(part) -> None:
    results = part("results")
    ours = row_of(part, "ours", record_of(part, [(0, 0), (5, 60)]))
    swin = row_of(part, "swin", record_of(part, [(0, 0), (9, 40)]), stock=True)
    deit = row_of(part, "deit", record_of(part, [(0, 0), (9, 20)]), stock=True)
    broken = row_of(part, "broken", stock=True, failure="out of memory")
    assert results.reference_of([ours, deit, swin, broken]) is swin
    assert results.thresholds_of([ours, deit, swin, broken]) == {0.5: 20.0, 0.9: 36.0}
    assert results.reference_of([ours, broken]) is ours
    assert results.reference_of([broken]) is None
    assert results.thresholds_of([broken]) == {}
    nothing = row_of(part, "swin", record_of(part, [(0, 0), (9, 0)]), stock=True)
    assert results.thresholds_of([ours, nothing]) == {}  # every model reaches 0


def test_a_summary_is_of_all_seeds_that_came_to_their_end(part) -> None:
    first = record_of(part, [(0, 0), (10, 40), (20, 30)], peak_bytes=3_000_000)
    second = record_of(part, [(0, 0), (10, 20), (20, 50)], peak_bytes=2_000_000, step_ms=[500.0, 100.0, 100.0, 100.0])
    row = row_of(part, "ours", first, second, failure="over the time limit of 1 s")
    summary = part("results").summarize(row, {0.5: 20.0, 0.9: 45.0})
    assert summary.final == {"mIoU": [30.0, 50.0]}
    assert summary.best == {"mIoU": [40.0, 50.0]}
    assert summary.seconds_to == {0.5: 7.5, 0.9: None}  # the first one never gets to 45
    assert summary.samples_per_second == 40.0  # 4 in 100 ms
    assert summary.samples_per_second_with_data == 4.0  # 4 x 20 in 20 s
    assert (summary.first_s, summary.training_s, summary.peak_bytes) == (0.7, 20.0, 3_000_000)


def test_a_detector_that_finds_nothing_has_a_score_of_zero(part) -> None:
    results = part("results")
    record = record_of(part, [(0, 0.0), (10, float("nan")), (20, 0.25)], metric="coco/segm_mAP")
    record.evaluations[0].metrics.clear()
    assert results.curve_of(record, results.SCORES["mmdet"][0]) == [(0, 0.0), (10, 0.0), (20, 25.0)]


def test_the_table_has_a_line_for_each_row_and_each_failure(part) -> None:
    ours = row_of(part, "ours", record_of(part, [(0, 0), (10, 60)]), record_of(part, [(0, 0), (10, 50)]))
    swin = row_of(part, "swin", record_of(part, [(0, 0), (20, 40)], step_ms=[400.0]), stock=True)
    broken = row_of(part, "broken", failure="out of memory")
    lines = part("results").format_table([ours, swin, broken]).splitlines()
    header, *rows = [line.split() for line in lines[:4]]
    assert header[:4] == ["model", "params", "M", "mIoU"]
    assert rows[0][:6] == ["ours", "2.0", "55.0", "±7.1", "55.0", "±7.1"]
    assert rows[1][:6] == ["swin", "2.0", "40.0", "40.0", "10.0", "18.0"]  # half and 90% of its own 40 in 20 s
    assert rows[2] == ["broken", *["failed"] * 11]
    assert len({len(line) for line in lines[:4]}) == 1
    assert lines[4] == "  broken, seed 0: out of memory"
    assert "50% is 20.0, 90% is 36.0" in lines[5]
    assert lines[6] == "  ours against swin: +15.0 points, 2.67x its samples/s, 90% of its score in 0.37 of its time"


def test_losses_are_smoothed_over_what_came_before(part) -> None:
    assert part("results").smoothed([4.0, 2.0, 0.0, 7.0], 2) == [4.0, 3.0, 1.0, 3.5]


# ---- processes


def test_a_process_over_its_time_ends_with_its_children(part, tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    start = time.monotonic()
    assert part("runs").run_within([sys.executable, "-c", script], log, 2) is None
    assert time.monotonic() - start < 20
    child = int(log.read_text())
    for _ in range(100):
        if not is_running(child):
            break
        time.sleep(0.05)
    assert not is_running(child)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_exit_codes_and_reasons_of_processes(part, tmp_path: Path) -> None:
    runs, log = part("runs"), tmp_path / "log"
    assert runs.run_within([sys.executable, "-c", "print(1)"], log, 60) == 0
    assert runs.run_within([sys.executable, "-c", "x = 1 / 0"], log, 60) == 1
    assert runs.reason_in(log.read_text()) == "ZeroDivisionError: division by zero"
    assert runs.reason_in("a\nerror: no such arch\n(--debug shows the traceback)\n") == "no such arch"
    assert runs.reason_in("\n") == "nothing was printed"


# ---- whole runs


def test_segmenters_train_beside_each_other_and_one_that_cannot_be_built(run, hard_data: Path, tmp_path: Path) -> None:
    plot = tmp_path / "compare.png"
    broken = f"broken={OUR_SEG.partition('=')[2]}@model.backbone.arch=huge"
    options = ["--cfg-options", *at(hard_data, "ade"), *SMALL_SEG]
    code, out, err, report = run(NARROW_SWIN, broken, OUR_SEG, "--iters", "2", "--plot", str(plot), *options)
    assert (code, err) == (0, "")
    rows = {row["name"]: row for row in report["rows"]}
    assert [*rows] == ["swin", "broken", "ours"]
    for name in ("swin", "ours"):
        (one,) = rows[name]["runs"]
        record = one["record"]
        assert record["finished"]
        assert one["failure"] == ""
        assert [each["step"] for each in record["evaluations"]] == [0, 1, 2]
        assert all(0 <= each["metrics"]["mIoU"] <= 100 for each in record["evaluations"])
        assert len(record["losses"]) == len(record["step_ms"]) == 2
        assert record["losses"][0] == pytest.approx(1.4 * torch.tensor(17.0).log().item(), rel=0.3)
        assert 0 < record["evaluations"][-1]["seconds"] < one["total_s"]
        assert rows[name]["summary"]["final"]["mIoU"] == [record["evaluations"][-1]["metrics"]["mIoU"]]
        assert not [*Path(one["folder"]).rglob("*.pth")]
    assert (rows["swin"]["stock"], rows["ours"]["stock"], rows["broken"]["summary"]) == (True, False, None)
    assert "no arch='huge'" in rows["broken"]["runs"][0]["failure"]
    assert out.splitlines()[0].startswith("device ")
    assert f"threads: {torch.get_num_threads()}" in report["machine"]["device"]
    table = out[out.index("\nmmseg\n") :].splitlines()[2:]
    assert [line.split()[0] for line in table[:4]] == ["model", "swin", "broken", "ours"]
    assert "broken, seed 0: the config cannot be built" in out
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_detectors_train_with_every_seed(run, hard_data: Path, tmp_path: Path) -> None:
    options = ["--epochs", "1", "--seeds", "2", "--cfg-options", *at(hard_data, "coco"), *SMALL_DET]
    code, out, err, report = run(NARROW_RESNET, OUR_DET, *options)
    assert (code, err) == (0, "")
    for row in report["rows"]:
        losses = [each["record"]["losses"] for each in row["runs"]]
        assert [len(each) for each in losses] == [2, 2]
        assert losses[0] != losses[1]
        assert set(row["summary"]["final"]) == {"mask AP", "box AP"}
        assert [len(scores) for scores in row["summary"]["final"].values()] == [2, 2]
    assert "\nmmdet\n" in out


def test_exit_code_1_where_nothing_could_be_trained(run, hard_data: Path) -> None:
    options = ["--cfg-options", *at(hard_data, "ade"), *SMALL_SEG]
    code, out, err, report = run(OUR_SEG, "--iters", "2", "--time-limit", "0.5", *options)
    assert (code, err) == (1, "error: nothing could be trained\n")
    assert "ours, seed 0: over the time limit of 0.5 s" in out
    assert report["rows"][0]["summary"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seg_configs/upernet_vig_x.py"], "no config at seg_configs/upernet_vig_x.py"),
        (["mmdet::no/such.py"], "no config at"),
        ([OUR_SEG, "--data", "cityscapes"], "data_cityscapes.py: no such file"),
        ([OUR_SEG, OUR_SEG], "two rows of one name"),
        ([OUR_SEG, "--seeds", "0"], "must be above 0"),
        ([OUR_SEG, "--plot", "figure.pdf"], "ends in .png"),
        ([OUR_SEG, "--json", "/no/such/folder/x.json"], "in a folder that exists"),
        ([OUR_SEG, "--cfg-options", "model.bakbone.arch=tiny"], "did you mean 'model.backbone'"),
        (
            [OUR_SEG, "--cfg-options", "train_dataloader.dataset.data_root=/nowhere/hard/ade"],
            "make_toy_data.py data/hard --difficulty hard",
        ),
    ],
)
def test_wrong_usage_ends_before_any_training(
    tool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(SystemExit) as stop:
        tool.main(arguments)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_missing_data_are_written_only_where_the_configs_look_for_them(
    tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(tool.EMBEDDED, "hard", "data/hard --difficulty hard --size 32 --train 1 --val 1")
    tool.make_data("hard", os.path.join("elsewhere", "hard", "ade"))
    assert not (tmp_path / "data").exists()
    tool.make_data("hard", "data/hard/ade")
    assert (tmp_path / "data/hard/toy.json").is_file()
    assert "$ python" in capsys.readouterr().out
    (tmp_path / "data/hard/toy.json").unlink()
    tool.make_data("hard", "data/hard/ade")  # what is there is left alone
    assert not (tmp_path / "data/hard/toy.json").exists()
