"""What a trained backbone looks at: parts that add up, memories, receptive fields, and the command that draws them."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from golden import set_golden_weights
from inference_models import CONFIGS, REPOSITORY, picture, saved, write_checkpoints
from torch import Tensor, nn
from vig_kernels.gla.naive import naive_gla

from vig_backbone import HierViG, ViG
from vig_backbone.explain import (
    ReceptiveField,
    effective_receptive_field,
    explain_blocks,
    record_blocks,
    split_mixer,
)
from vig_backbone.explain.mixing import split_scan
from vig_backbone.explain.pictures import COLUMNS, draw_blocks, draw_fields, draw_profile
from vig_backbone.explain.receptive_field import stride_of
from vig_backbone.mixer import GLAMixer


@pytest.fixture(scope="module")
def vig() -> ViG:
    return set_golden_weights(ViG("tiny"))


@pytest.fixture(scope="module")
def hier_vig() -> HierViG:
    return set_golden_weights(HierViG("tiny"))


@pytest.fixture
def mixer(request: pytest.FixtureRequest) -> GLAMixer:
    return set_golden_weights(GLAMixer(48, 3, activation=getattr(request, "param", False)))


def relative_error(value: Tensor, expected: Tensor) -> float:
    return ((value - expected).norm() / expected.norm()).item()


def sum_of_parts(mixer: GLAMixer, x: Tensor, sizes: Tensor | None = None) -> Tensor:
    parts = split_mixer(mixer, x, sizes)
    return mixer.o_proj((parts.forward + parts.backward + parts.local).flatten(-2)).view(x.shape)


@pytest.mark.parametrize("mixer", [False, True], indirect=True, ids=["plain", "activation"])
def test_parts_add_up_to_the_output_of_the_mixer(mixer: GLAMixer) -> None:
    x = torch.randn(2, 7, 11, 48)
    with torch.no_grad():
        assert relative_error(sum_of_parts(mixer, x), mixer(x)) < 1e-5


@pytest.mark.parametrize("mixer", [False, True], indirect=True, ids=["plain", "activation"])
def test_parts_of_padded_images_add_up_too(mixer: GLAMixer) -> None:
    x, sizes = torch.randn(2, 7, 11, 48), torch.tensor([[7, 11], [4, 6]])
    with torch.no_grad():
        parts, expected = sum_of_parts(mixer, x, sizes), mixer(x, sizes)
    assert relative_error(parts[0], expected[0]) < 1e-5
    assert relative_error(parts[1, :4, :6], expected[1, :4, :6]) < 1e-5


@pytest.mark.parametrize("backbone", ["vig", "hier_vig"])
def test_parts_add_up_in_every_block_of_a_backbone(backbone: str, request: pytest.FixtureRequest) -> None:
    model, errors = request.getfixturevalue(backbone), []

    def compare(mixer: GLAMixer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        errors.append(relative_error(sum_of_parts(mixer, *inputs), output))

    mixers = [module for module in model.modules() if isinstance(module, GLAMixer)]
    hooks = [mixer.register_forward_hook(compare) for mixer in mixers]
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 96))
    for hook in hooks:
        hook.remove()
    assert len(errors) == len(mixers)
    assert max(errors) < 1e-5


def test_directions_are_those_of_the_definition() -> None:
    q, k = torch.randn(2, 1, 100, 2, 8, dtype=torch.float64)
    v = torch.randn(1, 100, 2, 16, dtype=torch.float64)
    gates = -(torch.rand(2, 1, 100, 2, 8, dtype=torch.float64) ** 4)
    forward, backward = split_scan(q, k, v, *gates)
    half = 8**-0.5 / 2
    torch.testing.assert_close(forward, half * naive_gla(q, k, v, gates[0]))
    torch.testing.assert_close(backward, half * naive_gla(q, k, v, gates[1], reverse=True))


@pytest.mark.parametrize("logit", [-3.0, 0.0, 5.0])
def test_memory_of_constant_gates_is_the_sum_of_their_powers(vig: ViG, logit: float) -> None:
    model = ViG("tiny")
    model.load_state_dict(vig.state_dict())
    gates = model.blocks[0].attn.gk_proj[1]
    nn.init.zeros_(gates.weight)
    with torch.no_grad():
        gates.bias[:96], gates.bias[96:] = logit, logit + 2
    (block,) = explain_blocks(model, torch.randn(1, 3, 64, 64), [0])
    for memory, value in ((block.memory_forward, logit), (block.memory_backward, logit + 2)):
        gate = torch.tensor(value, dtype=torch.float64).sigmoid() ** (1 / 16)
        expected = (gate ** torch.arange(400_000)).sum().float()
        torch.testing.assert_close(memory, expected.expand(1, 4, 4), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("bias", "share"), [(-100.0, 0.0), (100.0, 1.0)])
def test_an_injection_gate_that_is_shut_leaves_one_branch(vig: ViG, bias: float, share: float) -> None:
    model = ViG("tiny")
    model.load_state_dict(vig.state_dict())
    nn.init.constant_(model.blocks[2].attn.g_proj.bias, bias)
    (block,) = explain_blocks(model, torch.randn(1, 3, 48, 64), [2])
    for values in (block.gate, block.scan_share):
        torch.testing.assert_close(values, torch.full((1, 3, 4), share))


def test_first_and_last_token_have_little_of_the_scan_that_starts_there(vig: ViG) -> None:
    for block in explain_blocks(vig, torch.randn(4, 3, 96, 96)):
        assert block.forward_share[:, 0, 0].mean() < block.forward_share[:, -1, -1].mean()


def test_maps_have_the_grid_of_their_stage(hier_vig: HierViG) -> None:
    blocks = explain_blocks(hier_vig, torch.randn(2, 3, 64, 100))
    assert [block.name for block in blocks] == [
        f"layers.{s}.blocks.{i}" for s in range(4) for i in range((2, 2, 5, 2)[s])
    ]
    grids = {name.split(".")[1]: grid for name, grid in ((block.name, block.gate.shape[1:]) for block in blocks)}
    assert grids == {"0": (16, 25), "1": (8, 13), "2": (4, 7), "3": (2, 4)}
    for block in blocks:
        assert {values.shape for values in block.norms.values()} == {block.gate.shape}
        assert (block.memory_forward >= 1).all()


def test_heads_can_be_told_apart(vig: ViG) -> None:
    """They add up to the whole, so that norms of one alone are no larger than a triangle allows."""
    images = torch.randn(1, 3, 64, 80)
    (whole,), (heads,) = (explain_blocks(vig, images, [-1], per_head) for per_head in (False, True))
    assert heads.scan_share.shape == heads.memory_backward.shape == (1, 3, 4, 5)
    torch.testing.assert_close(heads.gate.mean(1), whole.gate)
    for part, norm in whole.norms.items():
        assert (norm <= heads.norms[part].sum(1) * 1.0001).all()
        assert (norm >= 2 * heads.norms[part].amax(1) - heads.norms[part].sum(1) - 1e-4).all()
    assert len(heads.summary()["scan_share"]) == 3


@pytest.mark.parametrize("backbone", ["vig", "hier_vig"])
def test_an_image_in_a_padded_batch_has_the_maps_that_it_has_alone(
    backbone: str, request: pytest.FixtureRequest
) -> None:
    model, images = request.getfixturevalue(backbone), torch.randn(2, 3, 96, 128)
    padded = explain_blocks(model, images, valid_sizes=torch.tensor([[96, 128], [70, 90]]))
    for block, alone in zip(padded, explain_blocks(model, images[1:, :, :70, :90])):
        rows, columns = alone.gate.shape[1:]
        for field in (column.field for column in COLUMNS):
            values = getattr(block, field)[1]
            torch.testing.assert_close(values[:rows, :columns], getattr(alone, field)[0], rtol=1e-3, atol=1e-4)
            assert values[rows:].isnan().all()
            assert values[:, columns:].isnan().all()
        assert block.summary()["gate"] == pytest.approx(block.gate.nanmean().item())


def test_recording_changes_nothing_and_leaves_no_hooks(vig: ViG) -> None:
    images = torch.randn(1, 3, 64, 64)
    expected = vig(images)
    with record_blocks(vig, [0, 3]) as records:
        outputs = vig(images)
    vig(images)
    assert [record.name for record in records] == ["blocks.0", "blocks.3"]
    assert all(torch.equal(one, other) for one, other in zip(outputs, expected))
    with pytest.raises(RuntimeError, match="stop"), record_blocks(vig) as records:
        raise RuntimeError("stop")
    vig(images)
    assert not records


def test_modes_of_modules_come_back(vig: ViG) -> None:
    vig.train()
    vig.blocks[1].eval()
    explain_blocks(vig, torch.randn(1, 3, 32, 32))
    assert vig.training
    assert not vig.blocks[1].attn.training
    assert vig.blocks[2].attn.training
    vig.eval()


def test_compiled_blocks_are_recorded() -> None:
    model = ViG("tiny", compile=dict(backend="eager")).eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        model(images)  # graphs without hooks
    assert len(explain_blocks(model, images)) == 12


def test_autocast_around_a_recorded_model_is_left_out(vig: ViG) -> None:
    with record_blocks(vig, [5]) as records, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        vig(torch.randn(1, 3, 64, 64))
    assert records[0].gate.dtype == torch.float32


def test_what_cannot_be_explained_is_refused(vig: ViG) -> None:
    with pytest.raises(ValueError, match="expected ViG, HierViG"):
        explain_blocks(nn.Conv2d(3, 3, 1), torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"blocks=\(12,\) does not fit: expected indices from -12 to 11"):
        explain_blocks(vig, torch.randn(1, 3, 32, 32), [12])


def box_filter(size: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(3, 4, size, stride, padding=(size - stride + 1) // 2, bias=False)
    nn.init.ones_(conv.weight)
    return conv


def test_field_of_a_convolution_is_its_kernel() -> None:
    field = effective_receptive_field(box_filter(5), torch.randn(3, 3, 21, 31))
    expected = torch.zeros(21, 31, dtype=torch.float64)
    expected[8:13, 13:18] = 3 * 4  # colours, channels
    torch.testing.assert_close(field.map, expected)
    assert field.position == (10, 15)
    assert field.center == (10.5, 15.5)
    assert (field.side(1.0), field.side(9 / 25), field.side(0.5)) == (5, 3, 5)
    assert field.area(1.0) == pytest.approx(25 / (21 * 31))


def test_field_of_any_token_lies_around_it() -> None:
    field = effective_receptive_field(box_filter(4, stride=4), torch.randn(1, 3, 32, 40), position=(1, 7))
    assert field.map.nonzero().amin(0).tolist() == [4, 28]
    assert field.map.nonzero().amax(0).tolist() == [7, 31]
    assert field.stride == (4, 4)
    assert field.side(1.0) == 4


def test_field_is_the_mean_of_the_sizes_of_gradients() -> None:
    class Squared(nn.Module):
        """Gradients 2 x w, of both signs."""

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (x[:, :2].square() * torch.tensor([1.0, -3.0])[:, None, None],)

    images = torch.randn(5, 3, 3, 3)
    field = effective_receptive_field(Squared(), images)
    expected = (2 * images[:, 0, 1, 1].abs() + 6 * images[:, 1, 1, 1].abs()).mean()
    torch.testing.assert_close(field.map.sum().float(), expected)


def test_square_lies_around_the_gradients_and_not_around_the_cell() -> None:
    """As in a ResNet, whose convolutions of stride 2 have padding on the left and above alone."""
    layers = [nn.Conv2d(3, 3, 3, stride=2, padding=1, bias=False) for _ in range(3)]
    for layer in layers:
        nn.init.ones_(layer.weight)
    field = effective_receptive_field(nn.Sequential(*layers), torch.randn(1, 3, 64, 64))
    assert field.stride == (8, 8)
    assert field.center == pytest.approx((32.5, 32.5))  # the pixel at 4 x 8, upper left of the cell 32 to 40
    assert field.side(1.0) == pytest.approx(15)


def test_square_of_an_even_field_has_the_share_of_the_total() -> None:
    field = ReceptiveField(torch.ones(100, 100, dtype=torch.float64), (1.0, 1.0), (50, 50))
    assert field.side(0.25) == 50
    assert field.area(0.25) == pytest.approx(0.25)
    assert field.side(1.0) == 100
    with pytest.raises(ValueError, match="above 0, up to 1"):
        field.side(90)


@pytest.mark.parametrize("backbone", ["vig", "hier_vig"])
def test_every_output_sees_the_whole_image(backbone: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(backbone)
    for output, info in enumerate(model.feature_info):
        field = effective_receptive_field(model, torch.randn(1, 3, 64, 96), output)
        assert field.stride == (info["reduction"],) * 2
        assert (field.map > 0).double().mean() > 0.99
        assert field.side(0.5) < field.side(0.9)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_fields_of_backbones_of_timm() -> None:
    timm = pytest.importorskip("timm")
    images = torch.randn(1, 3, 64, 64)
    for name, options in (("resnet10t", {}), ("swin_tiny_patch4_window7_224", dict(img_size=64))):
        model = timm.create_model(name, features_only=True, **options)
        for output, stride in enumerate(model.feature_info.reduction()):
            assert effective_receptive_field(model, images, output).stride == (stride, stride)
        assert model.training


def test_maps_may_be_in_a_dict_or_have_channels_last() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = box_filter(3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return dict(image=x, map=self.conv(x).permute(0, 2, 3, 1))

    field = effective_receptive_field(Named(), torch.randn(1, 3, 9, 12), output=1, channels_last=True)
    assert field.map.shape == (9, 12)
    assert field.side(1.0) == 3


def test_fields_that_do_not_exist_are_refused() -> None:
    images, conv = torch.randn(2, 3, 16, 16), box_filter(3)
    classifier = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match=r"returned \[1, 4\], expected a map .*features_only=True"):
        effective_receptive_field(classifier, images)
    with pytest.raises(ValueError, match="returns 1 maps"):
        effective_receptive_field(conv, images, output=1)
    with pytest.raises(ValueError, match="16 x 16 tokens"):
        effective_receptive_field(conv, images, position=(16, 0))
    with pytest.raises(ValueError, match="expected one size"):
        effective_receptive_field(conv, [images[0], images[1, :, :8]])
    with pytest.raises(ValueError, match="no images"):
        effective_receptive_field(conv, [])
    nn.init.zeros_(conv.weight)
    with pytest.raises(ValueError, match=r"is 0\.0: expected a positive"):
        effective_receptive_field(conv, images)


@pytest.mark.parametrize(
    ("pixels", "tokens", "stride"), [(100, 7, 16), (33, 2, 32), (128, 128, 1), (96, 32, 3), (40, 2, 32)]
)
def test_stride_is_that_of_a_padded_grid(pixels: int, tokens: int, stride: float) -> None:
    assert stride_of(pixels, tokens) == stride


def test_pictures_show_every_block_on_one_scale(vig: ViG) -> None:
    images = torch.randn(1, 3, 40, 56)
    blocks = explain_blocks(vig, images, [0, 11])
    figure = draw_blocks(picture(80, 112), (40, 56), blocks, "title")
    maps = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(maps) == 2 * (1 + len(COLUMNS))
    for column in range(1, 1 + len(COLUMNS)):
        first, second = maps[column], maps[column + 1 + len(COLUMNS)]
        assert first.get_clim() == second.get_clim()
        assert tuple(first.get_extent()) == (0, 64, 48, 0)  # whole tokens, of which the image ends in the last
        assert first.axes.get_xlim() == (0, 56)
    per_head = draw_blocks(picture(), (40, 56), explain_blocks(vig, images, [3], per_head=True), "title")
    assert sum(bool(axes.images) for axes in per_head.axes) == 3 * (1 + len(COLUMNS))


def test_pictures_name_the_package_that_they_lack(vig: ViG, monkeypatch: pytest.MonkeyPatch) -> None:
    block = explain_blocks(vig, torch.randn(1, 3, 32, 32), [0])[0]
    field = effective_receptive_field(vig, torch.randn(1, 3, 32, 32))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        draw_profile([block.summary()], "title")
    with pytest.raises(ImportError, match="pip install matplotlib"):
        draw_fields({"output": field}, "title")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def tool() -> Iterator[ModuleType]:
    sys.path.insert(0, str(REPOSITORY / "tools"))  # as for a script
    yield importlib.import_module("explain")
    sys.path.remove(str(REPOSITORY / "tools"))


def run(tool: ModuleType, *arguments: object) -> int:
    return tool.run_command(tool.main, tool.parse_args([*map(str, arguments), "--device", "cpu"]))


@pytest.mark.parametrize("task", list(CONFIGS))
def test_tool_explains_the_backbone_of_a_config(
    task: str, tool: ModuleType, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    for name, size in (("a", (64, 96)), ("b/c", (96, 64))):
        saved(tmp_path / f"images/{name}.png", *size)
    out = tmp_path / "out"
    options = ("--data", "toy", "--out", out, "--blocks", "0,-1")
    assert run(tool, CONFIGS[task], checkpoints[task], tmp_path / "images", *options) == 0
    assert {str(path.relative_to(out)) for path in out.rglob("*.png")} == {
        *("gates/a.png", "gates/b/c.png"),
        *("blocks.png", "erf.png"),
    }
    numbers = json.loads((out / "explain.json").read_text())
    assert list(numbers["gates"]["images"]) == ["a", "b/c"]
    assert [block["name"] for block in numbers["gates"]["mean"]] == [f"blocks.{i}" for i in range(12)]
    assert all(block["tokens"][0] < block["tokens"][1] for block in numbers["gates"]["images"]["a"])
    height, width = numbers["erf"]["image_size"]
    assert height == width
    for output in numbers["erf"]["outputs"]:
        assert output["stride"] == 16
        assert 0 < output["squares"]["50%"]["side"] < output["squares"]["90%"]["side"]


def test_tool_explains_a_backbone_by_name(
    tool: ModuleType, vig: ViG, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    torch.save(dict(model=vig.state_dict()), tmp_path / "vig.pth")
    image = saved(tmp_path / "a.png", 50, 100)
    options = ("--size", 64, "--gates", "--per-head", "--out", tmp_path / "out", "--json", tmp_path / "numbers.json")
    assert run(tool, "vig_tiny", tmp_path / "vig.pth", image, *options) == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["gates"]["images"]["a"][0]["tokens"] == [4, 8]
    heads = numbers["gates"]["heads"]["a"]
    assert [block["name"] for block in heads] == [f"blocks.{i}" for i in (0, 4, 7, 11)]
    assert len(heads[0]["scan_share"]) == 3
    assert "erf" not in numbers
    assert "blocks.11" in capsys.readouterr().out


def test_tool_prepares_images_as_the_model_does(tool: ModuleType, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Detectors pad to whole strides; that is cut off."""
    saved(tmp_path / "a.png", 70, 100)
    arguments = (CONFIGS["detection"], checkpoints["detection"], tmp_path / "a.png", "--data", "toy", "--device", "cpu")
    backbone, (prepared,) = tool.load(tool.parse_args([*map(str, arguments)]))
    assert isinstance(backbone, ViG)
    height, width = prepared.inputs.shape[1:]
    assert height % 32
    assert height / width == pytest.approx(0.7, abs=0.02)
    assert np.abs(prepared.inputs.mean((1, 2)).numpy()).max() < 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vig_tiny", "w.pth", "missing.png"), "missing.png: no such file"),
        (("vig_tiny", "w.pth", "film.mp4"), "film.mp4: a video; expected images"),
        (("vig_tiny", "w.pth", "broken.png"), "broken.png: truncated, damaged or no image"),
        (("vig_tiny", "missing.pth", "a.png"), "no checkpoint at missing.pth"),
        (("vig_tiny", "w.pth", "a.png", "--blocks", "3,12"), "--blocks 12: the model has 12, 0 to 11"),
        (("hier_vig_tiny", "w.pth", "a.png"), "arch='tiny'"),
    ],
)
def test_mistakes_are_messages(
    arguments: tuple[str, ...],
    message: str,
    tool: ModuleType,
    vig: ViG,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(vig.state_dict(), "w.pth")
    saved(Path("a.png"))
    for name in ("film.mp4", "broken.png"):
        Path(name).write_bytes(b"nothing")
    assert run(tool, *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ("vig_tiny", "w.pth", "a.png", "--data", "toy"),
        ("vig_tiny", "w.pth", "a.png", "--blocks", "first"),
        ("vig_tiny", "w.pth", "a.png", "--size", "16"),
        ("vig_tiny", "w.pth", "a.png", "--erf", "--per-head"),
        ("config.py", "w.pth", "a.png", "--size", "64"),
    ],
)
def test_wrong_options_are_refused(options: tuple[str, ...], tool: ModuleType) -> None:
    with pytest.raises(SystemExit, match="2"):
        tool.parse_args(list(options))
