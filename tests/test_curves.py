"""Curves of trainings: by iteration, joined where a training was resumed, drawn and smoothed."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from vig_backbone.openmmlab import tensorboard
from vig_backbone.openmmlab.configuration import load_config
from vig_backbone.openmmlab.errors import ConfigError, DataError
from vig_backbone.openmmlab.report.charts import format_tick, line_chart, log_ticks, thin, ticks
from vig_backbone.openmmlab.report.curves import read_curves

REPOSITORY = Path(__file__).resolve().parents[1]


def write_run(work_dir: Path, time: str, lines: list[dict]) -> Path:
    """What mmengine writes for one process."""
    file = work_dir / time / "vis_data" / "scalars.json"
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def step(iteration: int, loss: float = 1.0, **values: float) -> dict:
    return {"lr": 0.1, "loss": loss, "time": 0.5, "iter": iteration, "step": iteration, **values}


def test_iterations_of_a_resumed_run_never_go_back(tmp_path: Path) -> None:
    first = [step(i, loss=1.0) for i in (10, 20, 30, 40, 50)]
    write_run(tmp_path, "20260101_000000", [*first, {"mIoU": 11.0, "step": 40}])
    # The first process was killed after 50, its last checkpoint was that of 30.
    write_run(tmp_path, "20260102_000000", [step(i, loss=2.0) for i in (40, 50, 60)] + [{"mIoU": 22.0, "step": 60}])
    curves = read_curves(tmp_path)
    assert curves.training["loss"] == [(10, 1.0), (20, 1.0), (30, 1.0), (40, 2.0), (50, 2.0), (60, 2.0)]
    assert curves.evaluation["mIoU"] == [(60, 22.0)]


def test_run_begun_anew_replaces_the_older_one_with_its_evaluations(tmp_path: Path) -> None:
    write_run(tmp_path, "20260101_000000", [{"mIoU": 1.0, "step": 0}, *map(step, (10, 20)), {"mIoU": 5.0, "step": 20}])
    write_run(tmp_path, "20260102_000000", [{"mIoU": 2.0, "step": 0}, step(10, loss=3.0)])
    curves = read_curves(tmp_path)
    assert curves.training["loss"] == [(10, 3.0)]
    assert curves.evaluation["mIoU"] == [(0, 2.0)]


def test_evaluations_counted_in_epochs_are_placed_at_iterations(tmp_path: Path) -> None:
    # 7 iterations an epoch, logged every 3: the last one of an epoch is not in the log.
    steps = [step(iteration, epoch=-(-iteration // 7)) for iteration in (3, 6, 10, 13, 17, 20, 21)]
    write_run(tmp_path, "20260101_000000", [*steps, {"coco/bbox_mAP": 0.25, "coco/segm_mAP": -1.0, "step": 3}])
    curves = read_curves(tmp_path)
    assert curves.evaluation["coco/bbox_mAP"] == [(21, 0.25)]
    assert curves.scores() == {"box AP": [(21, 25.0)], "mask AP": []}  # COCO's -1 is no score


def test_counters_and_times_are_no_curves(tmp_path: Path) -> None:
    file = write_run(tmp_path, "20260101_000000", [step(10, epoch=1, memory=100, data_time=0.1, grad_norm=3.0)])
    assert set(read_curves(file).training) == {"loss", "lr", "grad_norm"}


def test_half_a_line_at_the_end_is_that_of_a_killed_process(tmp_path: Path) -> None:
    file = write_run(tmp_path, "20260101_000000", [step(10), step(20)])
    file.write_text(file.read_text()[:-20])
    assert read_curves(tmp_path).training["loss"] == [(10, 1.0)]


def test_damage_elsewhere_is_named(tmp_path: Path) -> None:
    file = write_run(tmp_path, "20260101_000000", [step(10), step(20)])
    file.write_text("not json\n" + file.read_text())
    with pytest.raises(DataError, match=r"scalars\.json: line 1 .* 'not json'"):
        read_curves(tmp_path)


def test_folder_without_a_training_is_named(tmp_path: Path) -> None:
    write_run(tmp_path, "20260101_000000", [{"mIoU": 1.0, "step": 0}])
    with pytest.raises(DataError, match="no training was logged"):
        read_curves(tmp_path)


def test_chart_shows_each_line_and_leaves_out_what_is_not_finite() -> None:
    chart = line_chart({"a & b": [(0, 1.0), (1, float("nan")), (2, 3.0)], "empty": []}, "x", "y")
    (points,) = re.findall(r'polyline points="([^"]*)"', chart)
    assert len(points.split()) == 2
    assert "a &amp; b" in chart
    assert "empty" not in chart
    assert line_chart({"a": [(0, -1.0)]}, "x", "y", logarithmic=True) == ""


def test_chart_places_low_values_below_high_ones() -> None:
    for logarithmic in (False, True):
        chart = line_chart({"a": [(0, 1.0), (10, 100.0)]}, "x", "y", logarithmic=logarithmic)
        (points,) = re.findall(r'polyline points="([^"]*)"', chart)
        (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in points.split())
        assert x1 < x2
        assert y1 > y2  # an SVG's y grows downwards


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 160_000), (-3, 7), (1e-6, 1e-3), (56.9, 57.1)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 11
    assert low - 1e-9 <= found[0] <= found[-1] <= high * (1 + 1e-9)
    assert len({format_tick(value) for value in found}) == len(found)


@pytest.mark.parametrize(("low", "high", "expected"), [(0.02, 4.0, "0.02 0.05 0.1 0.2 0.5 1 2"), (1e-4, 5.0, None)])
def test_ticks_of_a_logarithmic_axis_are_round(low: float, high: float, expected: str | None) -> None:
    found = [format_tick(10**tick) for tick in log_ticks(math.log10(low), math.log10(high))]
    assert found == (expected or "0.0001 0.001 0.01 0.1 1").split()


def test_long_curves_keep_their_ends() -> None:
    points = [(i, float(i)) for i in range(5000)]
    thinned = thin(points)
    assert len(thinned) <= 600
    assert (thinned[0], thinned[-1]) == (points[0], points[-1])


@pytest.mark.parametrize("installed", [True, False])
def test_tensorboard_is_added_once_to_the_log(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: object() if installed else None)
    cfg = load_config(REPOSITORY / "seg_configs" / "upernet_vig_t.py", data="toy")
    if not installed:
        with pytest.raises(ConfigError, match="pip install tensorboard"):
            tensorboard.use_tensorboard(cfg)
        return
    for _ in range(2):
        tensorboard.use_tensorboard(cfg)
    assert [backend.type for backend in cfg.visualizer.vis_backends] == ["LocalVisBackend", "TensorboardVisBackend"]


def test_tool_draws_several_runs_and_writes_their_numbers(run_python: Callable, tmp_path: Path) -> None:
    for name, scale in (("one", 1.0), ("two", 2.0)):
        steps = [step(i, loss=scale * i) for i in (10, 20, 30)]
        write_run(tmp_path / name, "20260101_000000", [*steps, {"mIoU": scale, "step": 30}])
    picture, numbers = tmp_path / "curves.png", tmp_path / "curves.json"
    runs = [tmp_path / name for name in ("one", "two")]
    process = run_python("tools/plot_curves.py", *runs, "--out", picture, "--json", numbers, "--smooth", "2")
    assert "one: loss 25 at 30" in process.stdout  # the mean of 20 and 30
    assert "two: loss 50 at 30" in process.stdout
    with Image.open(picture) as image:
        assert image.width > image.height
    assert json.loads(numbers.read_text())["two"]["evaluation"]["mIoU"] == [[30, 2.0]]


def test_tool_says_what_is_wrong(run_python: Callable, tmp_path: Path) -> None:
    process = run_python("tools/plot_curves.py", tmp_path / "nothing", "--out", tmp_path / "a.png", check=False)
    assert process.returncode == 2
    assert "no training was logged" in process.stderr
    assert "Traceback" not in process.stderr
