"""The kernel benchmark on a CPU: what it reports, and that a broken contender costs one line and no more."""

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from vig_kernels.gla import IMPLEMENTATIONS, chunk_bidirectional_gla

TOOL = Path(__file__).parents[1] / "tools" / "benchmark_kernels.py"
QUICK = ["--device", "cpu", "--quick", "--repeats", "2", "--min-seconds", "0.001"]
SMALL = ["--shapes", "1,2,32,8,8"]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    sys.path.insert(0, str(TOOL.parent))  # as for a script
    module = importlib.import_module("benchmark_kernels")
    sys.path.remove(str(TOOL.parent))
    module.copy_bandwidth = lambda device: 1e10  # a second saved in each test
    return module


@pytest.fixture
def run_with(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable:
    """Run the tool with `operator` in the place of the fused kernels; returns exit code, stdout and stderr."""

    def run(operator: Callable | None, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.delitem(IMPLEMENTATIONS, "triton", raising=False)
        if operator:
            monkeypatch.setitem(IMPLEMENTATIONS, "triton", operator)
        code = tool.main([*QUICK, "--contenders", "chunk,triton", *(arguments or SMALL)])
        return code, *capsys.readouterr()

    return run


def _line(text: str, start: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.split()[:1] == [start])
    return line.split()


def test_sweep_gives_table_numbers_and_plot(run_python, tmp_path):
    table, plot = tmp_path / "kernels.json", tmp_path / "kernels.png"
    arguments = [*QUICK, "--contenders", "naive,chunk,fla", "--sweep-lengths", "64,128"]
    out = run_python(TOOL, *arguments, "--json", table, "--plot", plot).stdout

    forward, backward = out.partition("L=64")[2].partition("L=128")[0].split("forward+backward")
    columns = ["time", "ms", "timing", "first", "s", "copy", "bw"]
    assert _line(forward, "forward") == ["forward", *columns, "error", "vs", "chunk"]
    assert backward.split("\n")[0].split() == [*columns, "kept", "error", "vs", "chunk"]
    for text in (forward, backward):
        assert _line(text, "naive")[2] == "wall"
        assert _line(text, "naive")[-1] in ("slower", "faster")
        assert _line(text, "chunk")[-1] == "-"

    report = json.loads(table.read_text())
    assert report["copy_bytes_per_second"] > 0
    assert report["machine"]["torch"] == torch.__version__
    assert (report["machine"]["dtype"], report["machine"]["gates"]) == ("fp32", "fp32")
    results = {(r["contender"], r["mode"], r["shape"]["L"]): r for r in report["results"]}
    assert len(results) == 3 * 2 * 2
    for (name, mode, L), result in results.items():
        if name == "fla":
            assert result["failure"]
            continue
        assert result["failure"] == ""
        assert result["first_s"] > 0
        assert result["shape"] == {"B": 1, "h": 6, "L": L, "K": 32, "V": 64}
        assert 0 < result["time_ms"]["min"] <= result["time_ms"]["median"] <= result["time_ms"]["max"]
        assert result["error"] < 1e-5
        assert result["accurate"]
        assert result["baseline"] == "chunk"
        inputs, output = 4 * 6 * L * (4 * 32 + 64), 4 * 6 * L * 64
        assert result["input_bytes"] == inputs
        assert result["floor_bytes"] == inputs + output + (mode != "forward") * (2 * inputs + output)
        seconds = result["time_ms"]["median"] / 1e3
        share = result["floor_bytes"] / seconds / report["copy_bytes_per_second"]
        assert result["copy_share"] == pytest.approx(share)
        if mode == "forward":
            assert result["kept_ratio"] is None
        elif name == "chunk":
            assert (result["kept_input_bytes"], result["kept_extra_bytes"]) == (inputs, 0)
        else:
            assert result["kept_ratio"] > 1

    with Image.open(plot) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(maxcolors=1 << 24)}
        assert picture.width > 1000
        assert {(0xD5, 0x5E, 0x00), (0, 0, 0)} <= colours  # the lines of chunk and naive


def test_gates_may_have_another_type(run_python, tmp_path):
    table = tmp_path / "kernels.json"
    arguments = ("--contenders", "chunk", "--shapes", "1,2,64,8,16", "--gate-dtype", "bf16", "--json", table)
    run_python(TOOL, *QUICK, *arguments)
    report = json.loads(table.read_text())
    assert (report["machine"]["dtype"], report["machine"]["gates"]) == ("fp32", "bf16")
    assert report["results"][0]["input_bytes"] == 2 * 64 * (4 * (2 * 8 + 16) + 2 * 2 * 8)


def test_wrong_function_is_exit_code_1(run_with):
    code, out, err = run_with(lambda *inputs: 1.1 * chunk_bidirectional_gla(*inputs))
    assert code == 1
    assert "triton is wrong at B=1 h=2 L=32 K=8 V=8, forward: relative error 1.0e-01" in err
    assert "chunk" not in err
    assert out.count("vs triton") == 2


def test_wrong_gradient_is_exit_code_1(run_with):
    def frozen_gates(q, k, v, log_gate_fwd, log_gate_bwd, scale):
        return chunk_bidirectional_gla(q, k, v, log_gate_fwd * 1, log_gate_bwd.detach() + 0 * log_gate_bwd, scale)

    code, _, err = run_with(frozen_gates)
    assert code == 1
    assert len(err.splitlines()) == 1
    assert "triton is wrong at B=1 h=2 L=32 K=8 V=8, forward+backward" in err


def test_nan_is_wrong(run_with, tmp_path):
    path = tmp_path / "nan.json"
    code, _, err = run_with(lambda *x: chunk_bidirectional_gla(*x) * torch.nan, *SMALL, "--json", str(path))
    assert code == 1
    assert "relative error nan" in err
    report = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert [result["accurate"] for result in report["results"]] == [True, False] * 2


def test_failure_is_one_line(run_with):
    def broken(*inputs):
        if inputs[0].shape[1] > 40:
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")
        raise ValueError("K=8 is not supported\nbecause")

    code, out, _ = run_with(broken, "--shapes", "1,2,32,8,8", "1,2,48,8,8")
    assert code == 0
    lines = [line.split(maxsplit=1)[1] for line in out.splitlines() if line.startswith("  triton")]
    assert lines == ["ValueError: K=8 is not supported"] * 2 + ["out of memory"] * 2
    assert out.count("  chunk  ") == 4

    code, out, _ = run_with(None)
    assert code == 0
    assert _line(out.partition("+backward")[0], "triton") == ["triton", "not", "available"]


def test_time_limit_ends_a_contender(run_with):
    start = time.monotonic()
    code, out, _ = run_with(
        lambda *inputs: time.sleep(30), "--time-limit", "0.5", "--shapes", "1,2,32,8,8", "1,2,48,8,8"
    )
    assert time.monotonic() - start < 10
    assert code == 0
    assert out.count("over the time limit of 0.5 s") == 2
    assert out.count("left out: over the time limit with fewer tokens") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "4,6,4096"], "expected B,h,L,K,V such as 4,6,4096,32,64, got '4,6,4096'"),
        (["--shapes", "4,6,-1,32,64"], "expected whole numbers above 0"),
        (["--contenders", "chunk,magic"], "no contender magic: expected any of triton, chunk"),
        (["--plot", "kernels.png"], "add --sweep or --sweep-lengths"),
        (["--sweep", "--plot", "kernels.jpg"], "expected a name that ends in .png"),
        (["--json", "no/such/folder/x.json"], "expected a file in a folder that exists"),
        (["--repeats", "0"], "must be above 0"),
    ],
)
def test_bad_argument_is_exit_code_2(tool, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        tool.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_bad_argument_has_no_traceback(run_python):
    process = run_python(TOOL, "--device", "cuda", check=False)
    assert process.returncode == 2
    assert "torch sees no GPU here" in process.stderr
    assert "Traceback" not in process.stderr


def test_help_has_examples_and_contenders(tool, capsys):
    with pytest.raises(SystemExit) as exit_:
        tool.main(["--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "python tools/benchmark_kernels.py --sweep" in out
    assert all(f"  {name}  " in out for name in tool.CONTENDERS)
