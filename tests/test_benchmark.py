"""The benchmark of backbones on a CPU: what it reports, what follows from its rows, and that a failure is one line."""

import importlib
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

TOOL = Path(__file__).parents[1] / "tools" / "benchmark.py"
QUICK = ["--device", "cpu", "--quick", "--repeats", "2", "--min-seconds", "0.001", "--paths", "eager"]
needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    sys.path.insert(0, str(TOOL.parent))  # as for a script
    module = importlib.import_module("benchmark")
    sys.path.remove(str(TOOL.parent))
    module.copy_bandwidth = lambda device: 1e10  # a second saved in each test
    module.matmul_rate = lambda device, dtype: 1e11
    return module


@pytest.fixture
def run(tool: ModuleType, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """Run the tool quickly at 64 x 64 pixels; returns exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = tool.main([*QUICK, "--resolutions", "64", *arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def contenders(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put models into the table, by name: a module, or a function that builds it for an image size."""

    def replace(**models: nn.Module | Callable) -> None:
        for name, model in models.items():
            build = (lambda size, model=model: model) if isinstance(model, nn.Module) else model
            monkeypatch.setitem(tool.CONTENDERS, name, tool.Contender(name, build))

    return replace


@pytest.fixture
def row(tool: ModuleType) -> Callable:
    """A fabricated measurement of so many milliseconds an image."""

    def make(model: str, ms: float, size: int = 512, path: str = "eager", batch: int = 2, **fields: object) -> object:
        times = importlib.import_module("_timing").Times.of([ms * batch], 1)
        return tool.Row(model, (size, size), "inference", path, batch, ms=times, **fields)

    return make


def _lines(text: str, start: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.split()[:1] == [start]]


@needs_timm
def test_table_json_and_plot(run, tmp_path):
    table, plot = tmp_path / "backbones.json", tmp_path / "backbones.png"
    models = ("vig_tiny", "deit_tiny_patch16_224")
    code, out, err = run(*models, "--batch-size", "2", "--json", str(table), "--plot", str(plot))
    assert (code, err) == (0, "")
    assert [line.split(",")[0] for line in out.splitlines() if ", 64 " in line] == ["inference", "training", "latency"]
    for name in ("vig_tiny", "deit_tiny"):
        assert [line[1:3] for line in _lines(out, name)] == [["eager", "2"], ["eager", "2"], ["eager", "1"]]
    assert out.count("the images/s of deit_tiny (eager against eager)") == 3

    report = json.loads(table.read_text(), parse_constant=pytest.fail)
    assert report["machine"]["torch"] == torch.__version__
    assert {"device", "dtype", "timm", "flops_per_second", "bytes_per_second"} <= set(report["machine"])
    assert report["fits"] == []
    rows = {(r["model"], r["mode"]): r for r in report["rows"]}
    assert len(rows) == len(report["rows"]) == 6
    for (model, mode), r in rows.items():
        assert (r["size"], r["path"], r["failure"], r["peak_bytes"]) == ([64, 64], "eager", "", None)
        assert r["batch"] == (1 if mode == "latency" else 2)
        assert r["class_name"] == ("ViG" if model == "vig_tiny" else "VisionTransformer")
        assert 5e6 < r["parameters"] < 6e6
        assert 0 < r["ms"]["p10"] <= r["ms"]["median"] <= r["ms"]["p90"] < math.inf
        assert r["images_per_second"] == pytest.approx(r["batch"] / r["ms"]["median"] * 1e3)
        assert r["first_s"] > 0
        assert r["roofline_share"] == pytest.approx(r["cost"]["floor_ms"] / r["ms"]["median"])
        times_forward = r["cost"]["flops"] / r["batch"] / (rows[model, "inference"]["cost"]["flops"] / 2)
        assert times_forward == pytest.approx(3 if mode == "training" else 1, rel=0.02)
    for ratio in report["ratios"]:
        times = [rows[ratio[key], ratio["mode"]]["ms"]["median"] for key in ("model", "other")]
        assert ratio["speed"] == pytest.approx(times[1] / times[0])
        assert ratio["peak_memory"] is None

    with Image.open(plot) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(maxcolors=1 << 24)}
        assert picture.width > 2000
        assert (0x00, 0x72, 0xB2) in colours


@needs_timm
@pytest.mark.parametrize("name", ["swin_tiny", "convnext_tiny", "hier_vig_tiny"])
def test_hierarchical_models_give_all_stages_at_any_size(tool, name):
    contender = tool.find_contender(name)
    with torch.no_grad():
        maps = getattr(contender.build((96, 160)), contender.forward)(torch.randn(1, 3, 96, 160))
    tokens = [tuple(sorted(x.shape[1:])) for x in maps]
    assert tokens == [(24, 40, 96), (12, 20, 192), (6, 10, 384), (3, 5, 768)]


@needs_timm
def test_without_sdpa_is_the_same_function(tool):
    models = [tool.find_contender(name).build((64, 64)).eval() for name in ("deit_tiny", "deit_tiny_nosdpa")]
    assert [model.blocks[0].attn.fused_attn for model in models] == [True, False]
    models[1].load_state_dict(models[0].state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(*(model.forward_features(images) for model in models))


def test_timm_missing_is_one_line(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    code, out, err = run("vig_tiny", "swin_tiny", "--modes", "latency")
    assert code == 0
    assert err.startswith("timm cannot be used")
    assert err.count("\n") == 1
    assert "swin_tiny" not in out
    with pytest.raises(SystemExit) as exit_:
        run("swin_tiny")
    assert exit_.value.code == 2


@pytest.mark.gpu
def test_all_paths_on_a_gpu(tool, tmp_path):
    table = tmp_path / "backbones.json"
    arguments = ["vig_tiny", "--resolutions", "64", "--batch-size", "2", "--quick", "--json", str(table)]
    assert tool.main([*arguments, "--modes", "inference,training"]) == 0
    rows = json.loads(table.read_text())["rows"]
    assert [(r["path"], r["failure"], r["note"]) for r in rows] == [(path, "", "") for path in tool.PATHS] * 2
    assert all(4 * r["parameters"] < r["peak_bytes"] < 2**30 for r in rows)
    assert all(r["roofline_share"] > 0 for r in rows)


# ---- failures


class Picky(nn.Module):
    """Runs out of memory with more than so many images."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.convolution = nn.Conv2d(3, 4, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) > self.limit:
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")
        return self.convolution(images)


def test_batch_is_halved_when_out_of_memory(run, contenders):
    contenders(fits=Picky(3), hopeless=Picky(0))
    code, out, _ = run("fits", "hopeless", "--modes", "inference", "--batch-size", "8")
    assert code == 0
    (line,) = _lines(out, "fits")
    assert line[1:3] == ["eager", "2"]
    assert " ".join(line).endswith("batch 4: out of memory")
    assert " ".join(_lines(out, "hopeless")[0]).startswith("hopeless eager out of memory")


def test_failures_alone_are_exit_code_1(run, contenders, tmp_path):
    def broken(size: tuple[int, int]) -> nn.Module:
        raise ValueError("no such size\nbecause")

    contenders(broken=broken)
    table, plot = tmp_path / "backbones.json", tmp_path / "backbones.png"
    code, out, err = run("broken", "--json", str(table), "--plot", str(plot))
    assert code == 1
    assert "nothing could be measured" in err
    assert [" ".join(line) for line in _lines(out, "broken")] == ["broken eager ValueError: no such size"] * 3
    assert [r["failure"] for r in json.loads(table.read_text())["rows"]] == ["ValueError: no such size"] * 3
    assert not plot.exists()


def test_time_limit_ends_a_model(run, contenders):
    contenders(slow=lambda size: time.sleep(30), quick=nn.Conv2d(3, 4, 3))
    start = time.monotonic()
    arguments = ("--resolutions", "64,96", "--modes", "inference", "--batch-size", "1", "--time-limit", "0.5")
    code, out, _ = run("slow", "quick", *arguments)
    assert time.monotonic() - start < 10
    assert code == 0
    assert out.count("over the time limit of 0.5 s") == 1
    assert out.count("left out: over the time limit before") == 1
    assert len(_lines(out, "quick")) == 2


# ---- what follows from the rows


def test_ratio_is_that_of_the_fastest_paths(tool, row):
    rows = [
        row("vig_tiny", 3.0, peak_bytes=300),
        row("vig_tiny", 2.0, path="compiled", peak_bytes=100),
        row("vig_tiny", 0.1, path="graphed", failure="out of memory"),
        row("deit_tiny", 8.0, peak_bytes=400),
        row("deit_tiny_nosdpa", 9.0, batch=1, peak_bytes=900),
        row("vig_small", 1.0),
        row("deit_tiny", 1.0, size=1024),
    ]
    plain, nosdpa = tool.ratios_of(rows)
    assert (plain.model, plain.other, plain.paths) == ("vig_tiny", "deit_tiny", ("compiled", "eager"))
    assert plain.speed == pytest.approx(4)
    assert plain.peak_memory == pytest.approx(0.25)
    assert str(plain) == "vig_tiny: 4.00x the images/s of deit_tiny (compiled against eager), 0.25x its peak memory"
    assert nosdpa.speed == pytest.approx(4.5)
    assert nosdpa.peak_memory is None  # of another batch


def test_exponent_is_fitted_over_squares_from_512(tool, row):
    rows = [row("vig_tiny", 1e-6 * side**2, size=side) for side in (512, 1024, 2048)]
    rows += [row("deit_tiny", 1e-9 * side**4, size=side, batch=3) for side in (512, 1024)]
    rows += [row("vig_tiny", 5.0, size=224), row("vig_small", 1.0)]
    linear, quadratic = tool.fits_of(rows)
    assert (linear.model, linear.sides, quadratic.sides) == ("vig_tiny", [512, 1024, 2048], [512, 1024])
    assert linear.exponent == pytest.approx(1)
    assert quadratic.exponent == pytest.approx(2)
    assert str(linear) == "vig_tiny, inference: time ~ pixels ** 1.000 (512, 1024, 2048)"


def test_batches_have_about_as_many_pixels(tool):
    sizes = [(224, 224), (512, 512), (800, 1344), (1024, 1024), (2048, 2048), (4096, 4096)]
    assert [tool.batch_for(size, 8 * 1024**2) for size in sizes] == [128, 32, 8, 8, 2, 1]


def test_resolutions_are_height_and_width(tool):
    assert tool.parse_sizes("224,800x1344,224") == [(224, 224), (800, 1344)]
    assert [tool.name_of(size) for size in ((224, 224), (800, 1344))] == ["224", "800x1344"]


# ---- the roofline


def test_cost_counts_products_and_convolutions():
    roofline = importlib.import_module("_roofline")
    model = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.GELU(), nn.Flatten(2), nn.Linear(16, 5, bias=False))
    images = torch.randn(2, 3, 16, 16)

    def step() -> None:
        torch.autograd.grad(model(images).sum(), [*model.parameters()])

    cost = roofline.count_cost(step, roofline.Machine(1e9, 1e9))
    with FlopCounterMode(display=False) as counter:
        step()
    assert cost.flops == counter.get_total_flops()  # a dense convolution, so that torch's formula holds
    convolution, linear = 2 * 2 * 16 * 8 * 48, 2 * 2 * 8 * 16 * 5
    assert cost.flops == 2 * convolution + 3 * linear
    assert cost.floor_ms >= max(cost.flops, cost.bytes) / 1e9 * 1e3

    with torch.no_grad():
        forward = roofline.count_cost(lambda: model(images), roofline.Machine(1e9, 1e9))
    outputs, weights = 2 * 8 * 16, 8 * 48 + 8
    assert forward.bytes == 4 * (images.numel() + weights + outputs + outputs + 5 * 16 + 2 * 8 * 5)


def test_cost_of_depthwise_gradients_is_twice_the_forward_pass():
    roofline = importlib.import_module("_roofline")
    convolution = nn.Conv2d(32, 32, 3, padding=1, groups=32)
    images = torch.randn(1, 32, 8, 8, requires_grad=True)

    def step() -> None:
        torch.autograd.grad(convolution(images).sum(), [images, *convolution.parameters()])

    forward = 2 * 8 * 8 * 32 * 9
    assert roofline.count_cost(step, roofline.Machine(1e9, 1e9)).flops == 3 * forward


# ---- wrong usage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vig_huge"], "no model vig_huge: expected any of vig_tiny, vig_small"),
        (["--resolutions", "224,800x"], "expected HxW, or one side, in pixels, such as 800x1344 or 512, got '800x'"),
        (["--resolutions", "1x2x3"], "expected HxW"),
        (["--modes", "inference,dreaming"], "expected some of inference,training,latency, got 'inference,dreaming'"),
        (["--paths", "graphed"], "CUDA graphs need a GPU"),
        (["--batch-size", "0"], "must be above 0"),
        (["--repeats", "0"], "must be above 0"),
        (["--fit", "--resolutions", "224,512"], "needs two square sizes from 512 up"),
        (["--plot", "backbones.jpg"], "expected a name that ends in .png"),
        (["--json", "no/such/folder/x.json"], "expected a file in a folder that exists"),
    ],
)
def test_bad_argument_is_exit_code_2(tool, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        tool.main(["--device", "cpu", *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_runs_as_a_script(run_python):
    arguments = ("vig_tiny", *QUICK, "--resolutions", "32", "--modes", "latency", "--dtype", "bf16")
    out = run_python(TOOL, *arguments).stdout
    assert "dtype bf16" in out
    assert "copy bandwidth" in out
    assert len(_lines(out, "vig_tiny")) == 1


def test_device_without_gpu_is_exit_code_2(tool, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit_:
        tool.main(["--device", "cuda"])
    assert exit_.value.code == 2
    assert "torch sees no GPU here" in capsys.readouterr().err


def test_help_has_examples_and_models(tool, capsys):
    with pytest.raises(SystemExit) as exit_:
        tool.main(["--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "python tools/benchmark.py vig_tiny" in out
    assert all(f" {name}" in out for name in tool.CONTENDERS)
