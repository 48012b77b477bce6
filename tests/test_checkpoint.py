"""Loading weights: every layout that is around is understood, everything else is refused, loudly and with no effect."""

import json
import pickle
from http.client import IncompleteRead
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from golden import golden_weight
from torch import Tensor, nn

from vig_backbone import CheckpointError, HierViG, ViG, build_backbone, load_checkpoint

SHAPES = json.loads((Path(__file__).parent / "data/state_dict_shapes.json").read_text())
URL = "https://example.com/weights/vig_t.pth?download=true"


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Weights of ViG-T that no initialisation gives."""
    return {name: golden_weight(name, tensor.shape) for name, tensor in build_backbone("vig_tiny").state_dict().items()}


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty cache of downloads."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub/checkpoints"


def saved(content: object, path: Path) -> str:
    torch.save(content, path)
    return str(path)


def prefixed(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in weights.items()}


def holds(model: nn.Module, weights: dict[str, Tensor]) -> bool:
    state = model.state_dict()
    return all(torch.equal(state[name], value) for name, value in weights.items())


def load_directly(source: str, **options: str) -> nn.Module:
    model = ViG("tiny")
    load_checkpoint(model, source, **options)
    return model


def load_while_building(source: str) -> nn.Module:
    return build_backbone("vig_tiny", checkpoint=source)


def load_by_init_cfg(source: str, **options: str) -> nn.Module:
    model = ViG("tiny", init_cfg=dict(type="Pretrained", checkpoint=source, **options))
    model.init_weights()
    return model


def assert_refused(model: nn.Module, source: str | Path, message: str, **options: str) -> CheckpointError:
    """Loading fails with `message`, and no tensor of the model changes."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(model, source, **options)
    assert holds(model, before)
    return error.value


def head(dim: int = 192) -> dict[str, Tensor]:
    return {"head.weight": torch.ones(10, dim), "head.bias": torch.ones(10), "classifier.0.weight": torch.ones(3, dim)}


def segmenter(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    others = {"neck.levels.0.0.weight": torch.ones(3), "decode_head.conv_seg.weight": torch.ones(7, 4, 1, 1)}
    return {**prefixed(weights, "backbone."), **others, "data_preprocessor.mean": torch.zeros(3)}


LAYOUTS = {
    "bare": lambda w: w,
    "bare_with_other_entries": lambda w: {**w, "epoch": 12, "optimizer": {"state": {0: torch.ones(2)}}},
    "model": lambda w: {"model": w, "epoch": 300},
    "model_with_classifier": lambda w: {"model": {**w, **head()}},
    "state_dict": lambda w: {"state_dict": w, "meta": {"epoch": 1}},
    "model_ema_alone": lambda w: {"model_ema": w},
    "distributed": lambda w: {"state_dict": prefixed(w, "module.")},
    "distributed_compiled": lambda w: {"model": prefixed(w, "module._orig_mod.")},
    "compiled_distributed": lambda w: {"model": prefixed(w, "_orig_mod.module.")},
    "segmenter": lambda w: {"state_dict": segmenter(w), "meta": {}, "message_hub": {}},
    "distributed_segmenter": lambda w: {"state_dict": prefixed(segmenter(w), "module.")},
    "averaged_segmenter": lambda w: {
        "ema_state_dict": {"steps": torch.tensor(4), **prefixed(segmenter(w), "module.")},
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_understood(layout, weights, tmp_path):
    model = load_directly(saved(LAYOUTS[layout](weights), tmp_path / "file.pth"))
    assert holds(model, weights)


@pytest.mark.parametrize("load", [load_directly, load_while_building, load_by_init_cfg])
def test_every_way_of_loading_sets_every_weight(load, weights, tmp_path):
    model = load(saved({"model": weights}, tmp_path / "official.pth"))
    assert model.state_dict().keys() == weights.keys()
    assert holds(model, weights)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("load", [load_directly, load_by_init_cfg])
@pytest.mark.parametrize("key", ["model_ema", "teacher"])
def test_key_chooses_among_several_sets(load, key, weights, tmp_path):
    doubled = {name: 2 * value for name, value in weights.items()}
    source = saved({"model": weights, key: doubled}, tmp_path / "file.pth")
    assert holds(load(source, key=key), doubled)
    assert holds(load(source), weights)


@pytest.mark.parametrize("load", [load_directly, load_by_init_cfg])
def test_prefix_chooses_among_several_models(load, weights, tmp_path):
    doubled = {name: 2 * value for name, value in weights.items()}
    both = {**prefixed(weights, "student.backbone."), **prefixed(doubled, "teacher.backbone.")}
    source = saved({"state_dict": both}, tmp_path / "file.pth")
    assert holds(load(source, prefix="teacher.backbone."), doubled)
    assert holds(load(source, prefix="student.backbone."), weights)


def test_prefix_may_spell_out_the_wrapper(weights, tmp_path):
    source = saved({"state_dict": prefixed(segmenter(weights), "module.")}, tmp_path / "file.pth")
    for prefix in ("module.backbone.", "backbone."):
        assert holds(load_directly(source, prefix=prefix), weights)


@pytest.mark.parametrize("wrap", [lambda w: w, segmenter], ids=["bare", "segmenter"])
def test_safetensors(wrap, weights, tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(wrap(weights), tmp_path / "model.safetensors")
    assert holds(load_directly(str(tmp_path / "model.safetensors")), weights)


def test_damaged_safetensors(tmp_path):
    pytest.importorskip("safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00")
    assert_refused(ViG("tiny"), tmp_path / "model.safetensors", r"model\.safetensors cannot be read as a checkpoint")


def test_path_objects_are_taken(weights, tmp_path):
    saved(weights, tmp_path / "file.pth")
    model = ViG("tiny")
    load_checkpoint(model, tmp_path / "file.pth")
    assert holds(model, weights)


def test_half_precision_files_load_into_the_type_of_the_model(weights, tmp_path):
    halves = {name: value.half() for name, value in weights.items()}
    model = load_directly(saved(halves, tmp_path / "file.pth"))
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert holds(model, {name: value.float() for name, value in halves.items()})


def test_hierarchical_file_without_out_norms_leaves_them_alone(tmp_path):
    model = HierViG("tiny")
    for parameter in model.outnorm2.parameters():
        nn.init.constant_(parameter, 0.7)
    file = {name: golden_weight(name, torch.Size(shape)) for name, shape in SHAPES["ViG-H-T"].items()}
    file = {name: value for name, value in file.items() if not name.startswith("outnorm")}
    load_checkpoint(model, saved({"model": {**file, **head(768)}}, tmp_path / "file.pth"))
    assert holds(model, file)
    assert len(model.state_dict()) == len(file) + 8
    assert (model.outnorm2.weight == 0.7).all()
    assert (model.outnorm3.weight == 1).all()
    assert (model.outnorm3.bias == 0).all()


def test_hierarchical_file_with_out_norms_sets_those_that_the_model_has(tmp_path):
    file = {name: golden_weight(name, torch.Size(shape)) for name, shape in SHAPES["ViG-H-T"].items()}
    model = HierViG("tiny", out_indices=(1, 3))
    load_checkpoint(model, saved(file, tmp_path / "file.pth"))
    assert torch.equal(model.outnorm1.weight, file["outnorm1.weight"])
    assert torch.equal(model.outnorm3.bias, file["outnorm3.bias"])


def test_out_norm_of_another_shape_is_refused(tmp_path):
    file = {name: torch.zeros(1).expand(shape) for name, shape in SHAPES["ViG-H-T"].items()}
    file["outnorm0.weight"] = torch.zeros(5)
    source = saved(file, tmp_path / "file.pth")
    assert_refused(HierViG("tiny"), source, r"outnorm0\.weight \[5\] instead of \[96\]")


def test_frozen_stages_are_loaded_and_stay_frozen(weights, tmp_path):
    model = ViG("tiny", frozen_stages=2)
    load_checkpoint(model, saved(weights, tmp_path / "file.pth"))
    assert holds(model, weights)
    assert not model.pos_embed.requires_grad
    assert not model.blocks[1].attn.qkv_proj.weight.requires_grad


VARIANTS = {
    "vig_tiny": "ViG(arch='tiny')",
    "vig_small": "ViG(arch='small')",
    "vig_base": "ViG(arch='base')",
    "hier_vig_tiny": "HierViG(arch='tiny')",
    "hier_vig_small": "HierViG(arch='small')",
    "hier_vig_base": "HierViG(arch='base')",
}


@pytest.mark.parametrize(
    ("file_name", "model_name"),
    [
        *((name, "vig_tiny") for name in VARIANTS if name != "vig_tiny"),
        *((name, "hier_vig_tiny") for name in ("vig_tiny", "hier_vig_small", "hier_vig_base")),
    ],
)
def test_another_variant_is_refused_by_name(file_name, model_name, tmp_path):
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build_backbone(file_name).state_dict().items()}
    # One number each, seen as a whole tensor: even the base variants take no room.
    file = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items() if not name.startswith("outnorm")}
    source = saved({"model": file}, tmp_path / "file.pth")
    error = assert_refused(build_backbone(model_name), source, "does not fit")
    assert f"does not fit {VARIANTS[model_name]}" in str(error)
    assert f"These are the weights of {VARIANTS[file_name]}, {file_name!r}" in str(error)


def test_missing_extra_and_reshaped_weights_are_counted_and_named(weights, tmp_path):
    misfit = {name: value for name, value in weights.items() if not name.startswith("blocks.3.mlp.")}
    misfit |= {"blocks.12.norm.weight": torch.ones(1), "norm.weight": torch.ones(191)}
    error = assert_refused(ViG("tiny"), saved(misfit, tmp_path / "file.pth"), "does not fit")
    assert "2 missing (blocks.3.mlp.gate_proj.weight, blocks.3.mlp.down_proj.weight)" in str(error)
    assert "1 unexpected (blocks.12.norm.weight)" in str(error)
    assert "1 of another shape: (norm.weight [191] instead of [192])" in str(error)
    assert "These are the weights of" not in str(error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("pos_embed"), r"1 missing \(pos_embed\)"),
        (lambda w: w.update({"bonus": torch.ones(1)}), r"1 unexpected \(bonus\)"),
        (lambda w: w.update({"outnorm0.weight": torch.ones(1)}), r"1 unexpected \(outnorm0\.weight\)"),
        (lambda w: w.update({"header.weight": torch.ones(1)}), r"1 unexpected \(header\.weight\)"),
        (lambda w: w.update({"norm.weight": torch.ones(1)}), r"norm\.weight \[1\] instead of \[192\]"),
        (lambda w: w.update({"norm.weight": "a text"}), r"1 missing \(norm\.weight\)"),
    ],
    ids=["missing", "extra", "outnorm_of_plain", "almost_a_head", "broadcastable", "not_a_tensor"],
)
def test_one_misfit_is_enough(change, message, weights, tmp_path):
    changed = dict(weights)
    change(changed)
    assert_refused(ViG("tiny"), saved({"model": changed}, tmp_path / "file.pth"), message)


def test_failing_init_cfg_raises_instead_of_training_from_scratch(weights, tmp_path):
    changed = {name: value for name, value in weights.items() if name != "pos_embed"}
    source = saved(changed, tmp_path / "file.pth")
    model = ViG("tiny", init_cfg={"type": "Pretrained", "checkpoint": source})
    with pytest.raises(CheckpointError, match="1 missing"):
        model.init_weights()
    with pytest.raises(CheckpointError, match="1 missing"):
        build_backbone("vig_tiny", checkpoint=source)


DAMAGE = {
    "empty": lambda raw: b"",
    "one_byte": lambda raw: raw[:1],
    "head_only": lambda raw: raw[:1000],
    "half": lambda raw: raw[: len(raw) // 2],
    "last_bytes_missing": lambda raw: raw[:-30],
    "text": lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 22\n",
    "web_page": lambda raw: b"<!DOCTYPE html><html><body>404</body></html>",
    "plain_pickle_cut": lambda raw: pickle.dumps({"a": 1}, protocol=2)[:-3],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_refused(damage, weights, tmp_path):
    path = tmp_path / "file.pth"
    saved(weights, path)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    error = assert_refused(ViG("tiny"), path, "cannot be read as a checkpoint")
    assert str(path) in str(error)
    assert f"{path.stat().st_size} bytes" in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["nothing.pth", "", "."])
def test_missing_file_is_refused(name, tmp_path):
    error = assert_refused(ViG("tiny"), tmp_path / name, "no checkpoint at")
    assert str(tmp_path / name) in str(error)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ([1, 2], {}, "holds a list, expected a dictionary of weights"),
        (torch.ones(3), {}, "holds a Tensor, expected a dictionary of weights"),
        ({}, {}, "holds no weights"),
        ({"epoch": 3, "state_dict": 4}, {}, "holds no weights"),
        ({"state_dict": {}}, {}, "holds no weights under 'state_dict'"),
        ({"state_dict": 4}, {"key": "state_dict"}, "holds a int under 'state_dict', expected a dictionary of weights"),
        ({"norm.weight": torch.ones(192)}, {"key": "norm.weight"}, "holds a Tensor under 'norm.weight'"),
        ({"model": {"a": torch.ones(1)}}, {"key": "ema"}, r"has no entry 'ema': it holds \['model'\]"),
        ({"backbone.a": torch.ones(1)}, {"prefix": "encoder."}, r"no weight in .* starts with 'encoder\.'"),
        ({0: torch.ones(1)}, {}, r"1 unexpected \(0\)"),
        ({"decode_head.a": torch.ones(1)}, {}, "does not fit"),
    ],
)
def test_file_without_backbone_weights_is_refused(content, options, message, tmp_path):
    assert_refused(ViG("tiny"), saved(content, tmp_path / "file.pth"), message, **options)


class _Payload:
    """Unpickled without care, it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(zipped, weights, tmp_path):
    target, path = tmp_path / "target", tmp_path / "file.pth"
    torch.save({"model": weights, "extra": _Payload(target)}, path, _use_new_zipfile_serialization=zipped)
    assert_refused(ViG("tiny"), path, "cannot be read as a checkpoint")
    assert not target.exists()
    # The payload is live: careless reading runs it.
    torch.load(path, weights_only=False)
    assert target.exists()


def test_download_is_kept_whole_and_fetched_once(weights, tmp_path, hub, monkeypatch):
    original = Path(saved({"model": weights}, tmp_path / "original.pth"))
    fetched = []

    def download(url: str, dst: str, *args: object, **kwargs: object) -> None:
        assert not (hub / "vig_t.pth").exists(), "the final name must not exist before the file is complete"
        fetched.append(url)
        Path(dst).write_bytes(original.read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        assert holds(build_backbone("vig_tiny", checkpoint=URL), weights)
    assert fetched == [URL]
    assert [path.name for path in hub.iterdir()] == ["vig_t.pth"]
    assert (hub / "vig_t.pth").read_bytes() == original.read_bytes()


@pytest.mark.parametrize(
    "failure",
    [URLError("no route"), RuntimeError("invalid hash"), TimeoutError("too slow"), IncompleteRead(b"half")],
    ids=lambda failure: type(failure).__name__,
)
def test_failed_download_says_where_to_put_the_file_and_leaves_nothing(failure, weights, tmp_path, hub, monkeypatch):
    def download(url: str, dst: str, *args: object, **kwargs: object) -> None:
        Path(dst).write_bytes(b"half a file")
        raise failure

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    error = assert_refused(ViG("tiny"), URL, "cannot be fetched")
    assert URL in str(error)
    assert f"put the file at {hub / 'vig_t.pth'}" in str(error)
    assert list(hub.iterdir()) == []
    # The advice works.
    saved({"model": weights}, hub / "vig_t.pth")
    assert holds(load_directly(URL), weights)


def test_download_cut_off_without_an_error_is_not_kept(weights, tmp_path, hub, monkeypatch):
    """A server that closes the connection early raises nothing: the file is only shorter."""
    raw = Path(saved({"model": weights}, tmp_path / "original.pth")).read_bytes()
    sizes = [len(raw) // 2, len(raw)]
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda url, dst, *_, **__: Path(dst).write_bytes(raw[: sizes.pop(0)])
    )
    error = assert_refused(ViG("tiny"), URL, "cannot be read as a checkpoint")
    assert URL in str(error)
    assert list(hub.iterdir()) == []
    assert holds(load_directly(URL), weights)


@pytest.mark.parametrize(
    "init_cfg",
    [
        {"type": "Pretrained"},
        {"type": "Pretrained", "checkpoint": ""},
        {"type": "TruncNormal", "layer": "Linear", "std": 0.02},
        {"checkpoint": "file.pth"},
        {"type": "Pretrained", "checkpoint": "file.pth", "map_location": "cpu"},
        "file.pth",
        [{"type": "Pretrained", "checkpoint": "file.pth"}],
    ],
)
def test_init_cfg_that_is_not_understood_is_refused_when_building(init_cfg):
    with pytest.raises(ValueError, match=r"init_cfg=.* is not understood.*type='Pretrained'"):
        ViG("tiny", init_cfg=init_cfg)


def test_without_init_cfg_weights_are_drawn_anew():
    torch.manual_seed(0)
    model = ViG("tiny")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.init_weights()
    drawn = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"pos_embed", "blocks.0.attn.qkv_proj.weight", "patch_embed.proj.0.weight"} <= drawn
    assert 0.019 < model.blocks[5].mlp.gate_proj.weight.std() < 0.021


def test_unknown_backbone_lists_the_known_ones():
    with pytest.raises(ValueError, match="no backbone 'vig_huge'") as error:
        build_backbone("vig_huge")
    assert all(repr(name) in str(error.value) for name in VARIANTS)
