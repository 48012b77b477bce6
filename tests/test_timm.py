"""Classifiers with official weights, and the same in timm: every method of its contract does what timm means by it."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import golden_image, golden_outputs, golden_weight, sample, set_golden_weights
from torch import Tensor, nn

from vig_backbone import CheckpointError, HierViG, ViG
from vig_backbone.classifier import CLASSIFIERS, HierViGClassifier, ViGClassifier, build_classifier

timm = pytest.importorskip("timm")

SHAPES = json.loads((Path(__file__).parent / "data/state_dict_shapes.json").read_text())
OFFICIAL = {
    "vig_tiny": "ViG-T",
    "vig_small": "ViG-S",
    "vig_base": "ViG-B",
    "hier_vig_tiny": "ViG-H-T",
    "hier_vig_small": "ViG-H-S",
    "hier_vig_base": "ViG-H-B",
}
TINY = ("vig_tiny", "hier_vig_tiny")


def official_shapes(name: str, num_classes: int = 1000) -> dict[str, list[int]]:
    """Of the released classifier: the backbone's, and its head."""
    shapes = {key: shape for key, shape in SHAPES[OFFICIAL[name]].items() if not key.startswith("outnorm")}
    if name.startswith("vig"):
        dim = shapes["norm.weight"][0]
        return shapes | {"head.weight": [num_classes, dim], "head.bias": [num_classes]}
    dim = SHAPES[OFFICIAL[name]]["outnorm3.weight"][0]
    norm = {"classifier.norm.weight": [dim], "classifier.norm.bias": [dim]}
    return shapes | norm | {"classifier.head.weight": [num_classes, dim], "classifier.head.bias": [num_classes]}


def official_file(name: str, path: Path) -> tuple[str, dict[str, Tensor]]:
    weights = {key: golden_weight(key, torch.Size(shape)) for key, shape in official_shapes(name).items()}
    torch.save({"model": weights, "epoch": 299}, path)
    return str(path), weights


def make(name: str, **options) -> nn.Module:
    return set_golden_weights(build_classifier(name, **options))


def relative_error(actual: Tensor | np.ndarray, expected: Tensor | np.ndarray) -> float:
    actual, expected = (torch.as_tensor(x).detach().double() for x in (actual, expected))
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm()).item()


# The classifiers themselves


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_parameters_are_those_of_the_official_classifier(name):
    with torch.device("meta"):
        model = build_classifier(name)
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == official_shapes(name)


@pytest.mark.parametrize(("name", "golden", "limit"), [("vig_tiny", "plain", 1e-4), ("hier_vig_tiny", "hier", 1e-3)])
def test_logits_are_the_head_of_the_mean_of_the_official_features(name, golden, limit):
    model = make(name)
    if golden == "hier":  # whose golden output is behind the last out-norm
        for part in ("weight", "bias"):
            norm = getattr(model.classifier["norm"], part)
            norm.data.copy_(golden_weight(f"outnorm3.{part}", norm.shape))
    samples, shape = golden_outputs(f"{golden}-T/224x224/")["out" if golden == "plain" else "out3"]
    x = golden_image(224, 224)
    with torch.no_grad():
        features, logits = model.forward_features(x), model(x)
    assert list(features.shape) == shape
    assert relative_error(sample(features), samples) < limit
    head = model.get_classifier()
    expected = features.flatten(2).double().mean(2) @ head.weight.double().T + head.bias.double()
    assert relative_error(logits, expected) < 1e-5


@pytest.mark.parametrize("name", TINY)
def test_an_image_in_a_padded_batch_has_the_logits_that_it_has_alone(name):
    model = make(name, num_classes=5)
    x, sizes = torch.randn(2, 3, 96, 80), torch.tensor([[96, 64], [50, 80]])
    with torch.no_grad():
        together = model(x, sizes)
        for i, (h, w) in enumerate(sizes.tolist()):
            assert relative_error(model(x[i : i + 1, :, :h, :w]), together[i : i + 1]) < 1e-4


@pytest.mark.parametrize("name", TINY)
def test_official_file_loads_whole(name, tmp_path):
    source, weights = official_file(name, tmp_path / "official.pth")
    state = build_classifier(name, source).state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[key], value) for key, value in weights.items())


@pytest.mark.parametrize("name", TINY)
def test_new_head_leaves_the_last_layer_alone(name, tmp_path):
    source, weights = official_file(name, tmp_path / "official.pth")
    with pytest.raises(CheckpointError, match=r"head\.weight \[1000, \d+\] instead of \[7, \d+\]"):
        build_classifier(name, source, num_classes=7)
    model = build_classifier(name, source, new_head=True, num_classes=7)
    state = model.state_dict()
    assert model.get_classifier().weight.shape[0] == 7
    kept = {key for key in state if "head" not in key}
    assert all(torch.equal(state[key], weights[key]) for key in kept)
    assert name == "vig_tiny" or "classifier.norm.weight" in kept


def test_file_without_head_or_of_another_variant_is_refused(tmp_path):
    _, weights = official_file("vig_tiny", tmp_path / "official.pth")
    torch.save({k: v for k, v in weights.items() if "head" not in k}, tmp_path / "bare.pth")
    with pytest.raises(CheckpointError, match=r"ViGClassifier.*: 2 missing \(head\.weight, head\.bias\)\."):
        build_classifier("vig_tiny", tmp_path / "bare.pth")
    with pytest.raises(CheckpointError, match=r"These are the weights of ViG\(arch='tiny'\), 'vig_tiny'"):
        build_classifier("vig_small", tmp_path / "official.pth")
    with pytest.raises(ValueError, match="no classifier 'vig_huge'"):
        build_classifier("vig_huge")


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_is_trained(name):
    model = build_classifier(name, num_classes=3, drop_rate=0.1).train()
    nn.functional.cross_entropy(model(torch.randn(2, 3, 64, 64)), torch.tensor([0, 2])).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.get_classifier().weight.grad.abs().sum() > 0


def test_dropout_before_the_head_acts_in_training_alone():
    model, x = make("vig_tiny", num_classes=3, drop_rate=0.5), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        model.train()
        assert not torch.equal(model(x), model(x))


# timm


def run_code(code: str) -> str:
    process = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout.strip()


@pytest.mark.parametrize("order", ["import timm, vig_backbone", "import vig_backbone, timm", "import timm.layers"])
def test_models_are_known_whichever_package_comes_first(order):
    """Without a name clash, which timm would warn of."""
    assert run_code(f"{order}\nimport vig_backbone\nprint(timm.list_models('*vig_*'))") == str(sorted(CLASSIFIERS))


def test_importing_the_package_does_not_import_timm():
    assert run_code("import sys, vig_backbone\nprint('timm' in sys.modules)") == "False"


@pytest.mark.parametrize("name", TINY)
def test_checkpoint_path_takes_an_official_file(name, tmp_path):
    source, weights = official_file(name, tmp_path / "official.pth")
    model = timm.create_model(name, checkpoint_path=source)
    assert isinstance(model, ViGClassifier | HierViGClassifier)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())


@pytest.mark.parametrize("name", TINY)
def test_pretrained_file_with_other_classes_keeps_all_but_the_head(name, tmp_path):
    source, weights = official_file(name, tmp_path / "official.pth")
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=source), num_classes=9)
    state = model.state_dict()
    assert model.get_classifier().weight.shape[0] == 9
    assert all(torch.equal(state[key], weights[key]) for key in state if "head" not in key)


@pytest.mark.parametrize("name", TINY)
def test_pretrained_features_are_those_of_the_official_file(name, tmp_path):
    source, weights = official_file(name, tmp_path / "official.pth")
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=source), features_only=True)
    state = model.model.state_dict()
    assert len(state) > 100
    assert all(torch.equal(value, weights[key]) for key, value in state.items())


@pytest.mark.parametrize(
    ("name", "indices", "channels", "strides"),
    [
        ("vig_tiny", None, [192] * 4, [16] * 4),
        ("vig_tiny", (3, 7), [192] * 2, [16] * 2),
        ("hier_vig_tiny", None, [96, 192, 384, 768], [4, 8, 16, 32]),
        ("hier_vig_tiny", (1, 2), [192, 384], [8, 16]),
        ("hier_vig_tiny", (-2,), [384], [16]),
    ],
)
def test_features_only_gives_the_raw_maps_and_drops_the_rest(name, indices, channels, strides):
    model = timm.create_model(name, features_only=True, **({} if indices is None else {"out_indices": indices})).eval()
    whole = timm.create_model(name).eval()
    whole.load_state_dict(model.model.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps, expected = model(x), whole.forward_intermediates(x, model.out_indices)[1]
    assert model.feature_info.channels() == [m.shape[1] for m in maps] == channels
    assert model.feature_info.reduction() == strides == [64 // m.shape[2] for m in maps]
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
    sum(m.sum() for m in model.train()(x)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())  # no layer is left over


@pytest.mark.parametrize(("name", "backbone"), [("vig_tiny", ViG), ("hier_vig_tiny", HierViG)])
def test_intermediates_are_those_of_the_backbone_and_norm_normalises_the_last(name, backbone):
    model, x = make(name), torch.randn(2, 3, 64, 64)
    reference = backbone("tiny").eval()
    state = {key.replace("classifier.norm", "outnorm3"): value for key, value in model.state_dict().items()}
    reference.load_state_dict({k: state.get(k, v) for k, v in reference.state_dict().items()})
    with torch.no_grad():
        final, maps = model.forward_intermediates(x, 2)
        expected_final, expected = reference.forward_intermediates(x, 2)
        normed = model.forward_intermediates(x, 2, norm=True, intermediates_only=True)
    assert torch.equal(final, expected_final)
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
    assert relative_error(normed[-1], final) < 1e-6
    assert torch.equal(normed[0], maps[0]) == (backbone is HierViG)  # there is one norm, of the width of the last stage


@pytest.mark.parametrize("name", TINY)
def test_forward_is_head_of_features(name):
    model, x = make(name, num_classes=6), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = model.forward_features(x)
        assert torch.equal(model.forward_head(features), model(x))
        pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.num_features) == (2, model.head_hidden_size)


@pytest.mark.parametrize("name", TINY)
def test_without_classes_and_pooling(name):
    model, x = make(name, num_classes=6), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits, features = model(x), model.forward_features(x)
        model.reset_classifier(6, "")
        model.get_classifier().load_state_dict(make(name, num_classes=6).get_classifier().state_dict())
        assert relative_error(model(x).mean((2, 3)), logits) < 1e-5  # the head is linear
        model.reset_classifier(0)
        assert torch.equal(model(x), features)
        model.reset_classifier(0, "avg")
        assert torch.equal(model(x), features.mean((2, 3)))
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model.num_classes == 0


@pytest.mark.parametrize("name", TINY)
def test_created_model_has_the_settings_of_its_arguments(name):
    model = timm.create_model(name, num_classes=4, drop_rate=0.2, drop_path_rate=0.3, global_pool="")
    assert (model.num_classes, model.drop_rate, model.global_pool) == (4, 0.2, "")
    rates = [module.rate for module in model.modules() if hasattr(module, "rate")]
    assert max(rates) == pytest.approx(0.3)
    model.set_grad_checkpointing()
    assert model.with_cp


@pytest.mark.parametrize(
    ("options", "message"),
    [({"in_chans": 4}, "in_chans=4: vig_tiny takes images of three"), ({"global_pool": "max"}, "global_pool='max'")],
)
def test_arguments_that_it_cannot_have_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("vig_tiny", **options)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_pretrained_cfg_is_the_official_evaluation(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    cfg = model.pretrained_cfg
    modules = dict(model.named_modules())
    assert isinstance(modules[cfg["classifier"]], nn.Linear)
    assert isinstance(modules[cfg["first_conv"]], nn.Conv2d)
    assert modules[cfg["classifier"]] is model.get_classifier()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    resize, crop = transform.transforms[:2]
    assert (resize.size, crop.size, str(resize.interpolation.value)) == (256, (224, 224), "bicubic")
    assert cfg["mean"] == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("name", TINY)
def test_group_matcher_orders_layers_from_stem_to_head(name):
    from timm.models import group_parameters

    with torch.device("meta"):
        model = timm.create_model(name)
    groups = group_parameters(model, model.group_matcher())
    order = {parameter: layer for layer, names in groups.items() for parameter in names}
    assert order.keys() == dict(model.named_parameters()).keys()
    head = model.pretrained_cfg["classifier"] + ".weight"
    first = next(key for key in order if key.startswith("patch_embed"))
    block = next(key for key in order if "blocks.1." in key)
    assert order[first] == 0 < order[block] < order[head] == max(order.values())
    assert model.no_weight_decay() <= order.keys()
