"""Lean files out of checkpoints: the same outputs, and no more in them than is needed."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from golden import golden_weight
from torch import Tensor

from vig_backbone import CheckpointError, build_backbone
from vig_backbone.checkpoint import find_weights, read_checkpoint
from vig_backbone.classifier import build_classifier
from vig_backbone.convert import convert_checkpoint, read_metadata, verify_backbone

pytest.importorskip("safetensors")

SUFFIXES = (".pth", ".safetensors")


@pytest.fixture(scope="module")
def classifier() -> dict[str, Tensor]:
    """Weights of the official ViG-T."""
    with torch.device("meta"):
        shapes = build_classifier("vig_tiny").state_dict()
    return {name: golden_weight(name, tensor.shape) for name, tensor in shapes.items()}


@pytest.fixture
def official(classifier, tmp_path) -> str:
    torch.save(dict(model=classifier, optimizer={"exp_avg": [torch.ones(1000)]}, epoch=299), tmp_path / "vig_t.pth")
    return str(tmp_path / "vig_t.pth")


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory) -> str:
    """A small checkpoint as a training writes it: weights, moving average, config, classes."""
    pytest.importorskip("mmseg")
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    cfg = Config(
        dict(
            default_scope="mmseg",
            custom_imports=dict(imports=["vig_backbone"], allow_failed_imports=False),
            model=dict(
                type="EncoderDecoder",
                backbone=dict(type="ViG", arch="tiny", out_indices=(11,)),
                decode_head=dict(type="FCNHead", in_channels=192, in_index=0, channels=8, num_classes=3, num_convs=1),
            ),
        )
    )
    init_default_scope("mmseg")
    torch.manual_seed(0)
    weights = MODELS.build(cfg.model).state_dict()
    average = {f"module.{name}": value * 0.5 for name, value in weights.items()}
    content = dict(
        meta=dict(
            epoch=3, iter=70, cfg=cfg.pretty_text, dataset_meta=dict(classes=("a", "b", "c"), palette=[[0, 0, 1]])
        ),
        state_dict=weights,
        ema_state_dict=dict(steps=torch.tensor(4), **average),
        optimizer=dict(state={0: dict(exp_avg=torch.ones(5000))}),
        message_hub={},
    )
    path = tmp_path_factory.mktemp("trained") / "iter_70.pth"
    torch.save(content, path)
    return str(path)


def stored(path: Path) -> dict[str, Tensor]:
    return find_weights(read_checkpoint(str(path)), str(path))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_official_file_keeps_its_weights_and_its_origin(suffix, official, classifier, tmp_path):
    converted = convert_checkpoint(official, tmp_path / f"out/vig_t{suffix}")
    assert same(stored(converted.path), classifier)
    assert converted.dropped == {"optimizer": 4000, "epoch": 0}
    metadata = read_metadata(converted.path)
    assert metadata["source"] == "vig_t.pth"
    assert metadata["source_sha256"] == hashlib.sha256(Path(official).read_bytes()).hexdigest()
    assert (metadata["architecture"], metadata["epoch"]) == ("vig_tiny", 299)
    assert verify_backbone(official, converted) == 0


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_name_has_the_hash_of_the_content_which_is_always_the_same(suffix, official, tmp_path):
    first, second = (convert_checkpoint(official, tmp_path / folder / f"x{suffix}").path for folder in "ab")
    assert first.name == second.name == f"x-{hashlib.sha256(first.read_bytes()).hexdigest()[:8]}{suffix}"
    assert first.read_bytes() == second.read_bytes()
    assert [path.name for path in first.parent.iterdir()] == [first.name]


def test_hash_of_safetensors_is_the_same_in_another_process(official, tmp_path, run_python):
    code = (
        "import sys; from vig_backbone.convert import convert_checkpoint; print(convert_checkpoint(*sys.argv[1:]).path)"
    )
    names = {run_python("-c", code, official, tmp_path / f"{i}/x.safetensors").stdout.split("/")[-1] for i in range(2)}
    assert len(names) == 1


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_trained_model_keeps_config_and_classes(suffix, segmenter, tmp_path):
    converted = convert_checkpoint(segmenter, tmp_path / f"seg{suffix}")
    content = read_checkpoint(segmenter)
    assert same(stored(converted.path), dict(content["state_dict"]))
    assert set(converted.dropped) == {"ema_state_dict", "optimizer", "message_hub"}
    assert converted.dropped["optimizer"] == 20000
    metadata = read_metadata(converted.path)
    assert metadata["cfg"] == content["meta"]["cfg"]
    assert list(metadata["dataset_meta"]["classes"]) == ["a", "b", "c"]
    assert metadata["architecture"] == "vig_tiny"


def test_key_takes_the_other_weights(segmenter, tmp_path):
    converted = convert_checkpoint(segmenter, tmp_path / "seg.pth", key="ema_state_dict")
    weights = read_checkpoint(segmenter)["state_dict"]
    assert same(stored(converted.path), {name: value * 0.5 for name, value in weights.items()})


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_backbone_alone_has_the_names_of_the_backbone(suffix, segmenter, tmp_path):
    converted = convert_checkpoint(segmenter, tmp_path / f"backbone{suffix}", backbone_only=True)
    backbone = build_backbone("vig_tiny", converted.path)
    expected = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    weights = read_checkpoint(segmenter)["state_dict"]
    assert same(expected, {name: value for name, value in weights.items() if name.startswith("backbone.")})
    assert "decode_head.*" in converted.dropped
    assert not {"cfg", "dataset_meta"} & read_metadata(converted.path).keys()
    assert verify_backbone(segmenter, converted) == 0


def test_backbone_of_a_classifier_has_no_head(official, tmp_path):
    converted = convert_checkpoint(official, tmp_path / "backbone.pth", backbone_only=True)
    assert stored(converted.path).keys() == build_backbone("vig_tiny").state_dict().keys()
    assert converted.dropped["head.*"] == 4 * (192 * 1000 + 1000)


def test_half_rounds_to_float16_and_differs_by_no_more(official, classifier, tmp_path):
    converted = convert_checkpoint(official, tmp_path / "half.safetensors", half=True)
    assert same(stored(converted.path), {name: value.half() for name, value in classifier.items()})
    assert 0 < verify_backbone(official, converted) < 0.02
    assert {tensor.dtype for tensor in build_backbone("vig_tiny", converted.path).state_dict().values()} == {
        torch.float32
    }


def test_half_leaves_integers_and_refuses_what_does_not_fit(official, tmp_path):
    content = torch.load(official)
    content["model"]["head.counter"] = torch.tensor(100_000)
    torch.save(content, official)
    assert stored(convert_checkpoint(official, tmp_path / "a.pth", half=True).path)["head.counter"] == 100_000
    content["model"]["norm.weight"][3] = 1e6
    torch.save(content, official)
    with pytest.raises(CheckpointError, match=r"norm\.weight has numbers that float16 cannot hold"):
        convert_checkpoint(official, tmp_path / "b.pth", half=True)


def test_difference_of_the_outputs_is_noticed(official, tmp_path):
    converted = convert_checkpoint(official, tmp_path / "x.pth")
    content = torch.load(converted.path)
    content["state_dict"]["blocks.7.attn.o_proj.weight"][0, 0] += 1e-3
    torch.save(content, converted.path)
    with pytest.raises(CheckpointError, match="differ from the original's by"):
        verify_backbone(official, converted)


@pytest.mark.parametrize("target", ["x.onnx", "x", "x.pt"])
def test_target_of_another_kind_is_refused(target, official, tmp_path):
    with pytest.raises(CheckpointError, match=r"expected a file NAME\.pth or NAME\.safetensors"):
        convert_checkpoint(official, tmp_path / target)


def test_hierarchical_backbone_without_out_norms_is_compared(tmp_path):
    with torch.device("meta"):
        shapes = build_classifier("hier_vig_tiny").state_dict()
    source = str(tmp_path / "vig_h_t.pth")
    torch.save(dict(model={name: golden_weight(name, tensor.shape) for name, tensor in shapes.items()}), source)
    converted = convert_checkpoint(source, tmp_path / "x.safetensors")
    assert verify_backbone(source, converted) == 0
    assert converted.metadata["architecture"] == "hier_vig_tiny"


# The command, and what the files are for


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_command_compares_whole_models_and_says_what_it_left_out(suffix, segmenter, tmp_path, run_python):
    summary = tmp_path / "summary.json"
    process = run_python("tools/convert_checkpoint.py", segmenter, tmp_path / f"seg{suffix}", "--json", summary)
    assert "dropped optimizer" in process.stdout
    assert "outputs of the model for a random image: equal" in process.stdout
    facts = json.loads(summary.read_text())
    assert facts["sha256"] == hashlib.sha256(Path(facts["file"]).read_bytes()).hexdigest()
    assert facts["difference"] == 0
    assert str(facts["file"]) in process.stdout


def test_command_removes_a_file_that_does_not_fit_its_config(segmenter, tmp_path, run_python):
    content = torch.load(segmenter)
    del content["state_dict"]["decode_head.conv_seg.bias"]
    torch.save(content, tmp_path / "bad.pth")
    arguments = "tools/convert_checkpoint.py", tmp_path / "bad.pth", tmp_path / "out/x.pth"
    process = run_python(*arguments, check=False)
    assert process.returncode == 2
    assert "does not fit the config in it: 1 missing (decode_head.conv_seg.bias)" in process.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_config_in_a_checkpoint_is_not_executed(segmenter, tmp_path):
    from vig_backbone.openmmlab.config_text import config_from_text

    for text in ("x = __import__('os').getcwd()", "import os", "x = [open('a') for _ in 'a']", "print(1)"):
        with pytest.raises(CheckpointError, match=r"the config in file\.pth is not understood"):
            config_from_text(text, "file.pth")


def test_config_text_is_read_as_mmengine_reads_it():
    mmengine = pytest.importorskip("mmengine")
    from vig_backbone.openmmlab.config_text import config_from_text

    fields = dict(a=dict(b=[1, -2.5, None], c=("x", True)), d={"1x": dict(e=())}, f=float("inf"), g='it\'s\na "text"')
    text = mmengine.Config(fields).pretty_text
    assert config_from_text(text, "file.pth")._cfg_dict.to_dict() == fields


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_mmengine_loads_the_file_into_the_model(suffix, segmenter, tmp_path):
    from mmengine.runner.checkpoint import CheckpointLoader

    from vig_backbone.openmmlab.safetensors_loader import register_safetensors

    register_safetensors()
    register_safetensors()
    converted = convert_checkpoint(segmenter, tmp_path / f"seg{suffix}")
    content = CheckpointLoader.load_checkpoint(str(converted.path), map_location="cpu", logger=None)
    assert same(dict(content["state_dict"]), dict(read_checkpoint(segmenter)["state_dict"]))
    assert list(content["meta"]["dataset_meta"]["classes"]) == ["a", "b", "c"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_init_cfg_takes_the_file(suffix, segmenter, tmp_path):
    from vig_backbone import ViG

    converted = convert_checkpoint(segmenter, tmp_path / f"seg{suffix}")
    model = ViG("tiny", init_cfg=dict(type="Pretrained", checkpoint=str(converted.path)))
    model.init_weights()
    assert torch.equal(model.norm.weight, stored(converted.path)["backbone.norm.weight"])
