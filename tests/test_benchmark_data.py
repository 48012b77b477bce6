"""The benchmark of data pipelines: what it reports of the embedded set, and that a failure is one line."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import vig_backbone  # noqa: F401 - mmcv's operators

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

TOOLS = Path(__file__).parents[1] / "tools"
DET, SEG = "det_configs/mask_rcnn_vig_t.py", "seg_configs/upernet_vig_t.py"
QUICK = ["--samples", "3", "--repeats", "1", "--seconds", "0.05", "--device", "cpu"]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    sys.path.insert(0, str(TOOLS))  # as for a script
    module = importlib.import_module("benchmark_data")
    sys.path.remove(str(TOOLS))
    return module


@pytest.fixture
def run(tool: ModuleType, capsys: pytest.CaptureFixture, tmp_path: Path) -> Callable[..., tuple[int, str, dict]]:
    """Run the tool; returns exit code, stdout and what it wrote as JSON."""

    def run(*arguments: str) -> tuple[int, str, dict]:
        threads, file = torch.get_num_threads(), tmp_path / "data.json"
        try:
            code = tool.main([*arguments, *QUICK, "--json", str(file)])
        finally:
            torch.set_num_threads(threads)
        return code, capsys.readouterr().out, json.loads(file.read_text())

    return run


def test_both_loadings_of_a_detector_are_measured(run: Callable, toy_data: Path) -> None:
    code, out, found = run(DET, "--data", "toy", "--data-root", str(toy_data / "coco"), "--workers", "0,1")
    assert code == 0
    stock, fast = found["costs"]
    assert (stock["loading"], fast["loading"]) == ("stock", "fast")
    assert stock["images"] == fast["images"] == 16
    assert [name for name, _ in stock["transforms"]][1] == "LoadAnnotations"
    assert [name for name, _ in fast["transforms"]][1] == "FastLoadDetAnnotations"
    assert all(ms >= 0 for _, ms in fast["transforms"])
    # What travels does not depend on the machine: bitmaps through the pipe, or run lengths in shared memory.
    assert stock["pipe_bytes"] > 5 * fast["pipe_bytes"]
    assert stock["shared_tensors"] >= 5
    assert fast["shared_tensors"] * fast["batch"] == 1
    assert [(rate["loading"], rate["workers"]) for rate in found["rates"]] == [
        *(("stock", 0), ("fast", 0), ("stock", 1), ("fast", 1))
    ]
    assert all(rate["images_per_second"] > 0 and rate["main_ms"] > 0 for rate in found["rates"])
    assert "FastPackDetInputs" not in out  # the names of the first column
    assert out.count("\n  stock ") == out.count("\n  fast ") == 2


def test_one_loading_of_a_segmenter_with_another_batch(run: Callable, toy_data: Path) -> None:
    arguments = ("--workers", "0", "--loading", "fast", "--batch-size", "4")
    code, out, found = run(SEG, "--data", "toy", "--data-root", str(toy_data / "ade"), *arguments)
    assert code == 0
    (cost,) = found["costs"]
    assert not cost["failure"]
    assert cost["batch"] == 4
    assert cost["shared_tensors"] == 0.25
    assert 0 < cost["shared_bytes"] <= 4 * 128 * 128 + 128  # 8-bit image and labels of at most the crop's size
    assert "  FastRandomCrop" in out
    assert "stock" not in out


def test_missing_data_are_one_line_each_and_exit_code_1(tool: ModuleType, capsys: pytest.CaptureFixture) -> None:
    config = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"
    option = "train_dataloader.dataset.ann_file=none.json"
    assert tool.main([config, *QUICK, "--workers", "0", "--cfg-options", option]) == 1
    captured = capsys.readouterr()
    assert captured.out.count("FileNotFoundError") == 4
    assert "Traceback" not in captured.out + captured.err
    assert "nothing could be measured" in captured.err
    assert "--data-root" in captured.err


def test_message_counts_tensors_and_what_is_pickled(tool: ModuleType) -> None:
    data = importlib.import_module("_data")
    tensors = [torch.zeros(10), torch.zeros(2, 8, dtype=torch.uint8)]
    pipe, shared = data.message_of({"a": tensors, "b": b"x" * 1000})
    assert shared == [40, 16]
    assert 1000 < pipe < 1300


def test_transforms_of_the_first_wrapped_data_set_are_found(tool: ModuleType) -> None:
    data = importlib.import_module("_data")

    class Leaf:
        pipeline = staticmethod(lambda sample: sample)

    class Wrapper:
        def __init__(self, **inner: object) -> None:
            vars(self).update(inner)

    leaf = Leaf()
    assert data.first_leaf(Wrapper(dataset=Wrapper(datasets=[leaf, Leaf()]))) is leaf
    with pytest.raises(TypeError, match="Wrapper has no pipeline and wraps no data set that has one"):
        data.first_leaf(Wrapper())


def test_time_limit_is_a_failure_of_the_row(run: Callable, toy_data: Path) -> None:
    data = ("--data", "toy", "--data-root", str(toy_data / "coco"))
    code, out, found = run(DET, *data, "--workers", "0", "--time-limit", "0.001")
    assert code == 1
    assert {row["failure"] for row in (*found["costs"], *found["rates"])} == {"over the time limit of 0.001 s"}
    assert "over the time limit" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.py"], "no config at no.py"),
        (["mmpose::x.py"], "expected mmdet or mmseg"),
        ([DET, "--workers", "1,-2"], "expected numbers of worker processes such as 0,1,4, got '1,-2'"),
        ([DET, "--loading", "slow"], "expected some of stock,fast, got 'slow'"),
        ([DET, "--seconds", "0"], "must be above 0"),
        ([DET, "--batch-size", "0"], "--batch-size must be above 0"),
        ([DET, "--data-root", "no/such"], "--data-root no/such: expected a folder"),
        ([DET, "--data", "nothing"], "--data nothing: there is no"),
        ([DET, "--json", "no/such/folder/x.json"], "expected a file in a folder that exists"),
        ([DET, "--cfg-options", "novalue"], "expected KEY=VALUE"),
        ([DET, "--cfg-options", "train_dataloade.batch_size=1"], "did you mean"),
    ],
)
def test_bad_argument_is_exit_code_2(
    tool: ModuleType, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        tool.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_device_without_gpu_is_exit_code_2(
    tool: ModuleType, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit_:
        tool.main([DET, "--device", "cuda"])
    assert exit_.value.code == 2
    assert "torch sees no GPU here" in capsys.readouterr().err


def test_runs_as_a_script_and_has_examples(run_python: Callable) -> None:
    out = run_python(TOOLS / "benchmark_data.py", "--help").stdout
    assert "python tools/benchmark_data.py det_configs/mask_rcnn_vig_t.py" in out
