"""The backbones and the neck of the plain one: parity with the official model, any image size, training, contracts."""

import copy
import inspect
import json
import pickle
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import golden_image, golden_outputs, sample, set_golden_weights
from torch import Tensor, nn

from vig_backbone import HierViG, ViG, build_backbone
from vig_backbone.layers import (
    DepthwiseConv3x3,
    DropPath,
    LayerNorm2d,
    PatchConv,
    RMSNorm,
    conv_by_blocks,
    drop_path_rates,
)
from vig_backbone.mixer import GLAMixer
from vig_backbone.necks import SimpleFeaturePyramid

SHAPES = json.loads((Path(__file__).parent / "data/state_dict_shapes.json").read_text())
# Name in state_dict_shapes.json, parameters without classifier (those of ViG-H with its four out-norms).
VARIANTS = {
    "vig_tiny": ("ViG-T", 5_641_536),
    "vig_small": ("ViG-S", 22_230_144),
    "vig_base": ("ViG-B", 88_253_184),
    "hier_vig_tiny": ("ViG-H-T", 27_833_024),
    "hier_vig_small": ("ViG-H-S", 49_284_032),
    "hier_vig_base": ("ViG-H-B", 87_881_152),
}
FAMILIES = [ViG, HierViG]
SIZES = [(32, 32), (33, 47), (64, 100), (101, 37), (32, 129), (100, 100)]


@cache
def golden_state(family: type) -> dict[str, Tensor]:
    return set_golden_weights(family("tiny")).state_dict()


def skeleton(family: type, **options) -> nn.Module:
    """The tiny variant without memory for its weights."""
    with torch.device("meta"):
        return family("tiny", **options)


def make(family: type, **options) -> nn.Module:
    """The tiny variant in evaluation mode, with weights large enough for every part to matter."""
    model = skeleton(family, **options)
    state = golden_state(family)
    model.load_state_dict({name: state[name].clone() for name in model.state_dict()}, assign=True)
    return model.eval()


def make_fresh(family: type) -> nn.Module:
    """The tiny variant as it starts training: well conditioned, unlike the golden weights."""
    torch.manual_seed(0)
    return family("tiny")


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.__name__)
def model(request) -> nn.Module:
    """Shared by the tests that leave it as it is."""
    return make(request.param)


@pytest.fixture(params=FAMILIES, ids=lambda family: family.__name__)
def family(request) -> type:
    return request.param


def images(B: int, H: int, W: int, seed: int = 0) -> Tensor:
    return torch.randn(B, 3, H, W, generator=torch.Generator().manual_seed(seed))


def relative_error(actual: Tensor | np.ndarray, expected: Tensor | np.ndarray) -> float:
    actual, expected = (torch.as_tensor(x).detach().double() for x in (actual, expected))
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm()).item()


def loss_of(maps: tuple[Tensor, ...]) -> Tensor:
    """A scalar in which every number of every map has a weight of its own."""
    generator = torch.Generator().manual_seed(7)
    return sum((x * torch.randn(x.shape, generator=generator).to(x.dtype)).mean() for x in maps)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return list(model.blocks) if isinstance(model, ViG) else [b for stage in model.layers for b in stage.blocks]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# Parameters and parity


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_are_the_official_ones(name):
    official, count = VARIANTS[name]
    with torch.device("meta"):
        model = build_backbone(name)
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == SHAPES[official]
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert len(list(model.parameters())) == len(SHAPES[official])  # nothing but parameters in the state dict


@pytest.mark.parametrize("size", [(224, 224), (256, 320)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_plain_blocks_and_output_equal_the_official_ones(size):
    model = make(ViG)
    golden = golden_outputs(f"plain-T/{size[0]}x{size[1]}/")
    blocks = sorted(int(name.removeprefix("block")) for name in golden if name.startswith("block"))
    assert blocks == [0, 2, 5, 8, 11]
    with torch.no_grad():
        final, maps = model.forward_intermediates(golden_image(*size), indices=blocks)
    ours = {f"block{i}": x.flatten(2).transpose(1, 2) for i, x in zip(blocks, maps)} | {"out": final}
    assert ours.keys() == golden.keys()
    for name, (samples, shape) in golden.items():
        assert list(ours[name].shape) == shape
        assert relative_error(sample(ours[name]), samples) < 1e-4, name


@pytest.mark.parametrize("size", [(224, 224), (256, 320)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_hierarchical_outputs_equal_the_official_ones(size):
    golden = golden_outputs(f"hier-T/{size[0]}x{size[1]}/")
    with torch.no_grad():
        outputs = make(HierViG)(golden_image(*size))
    ours = {f"out{i}": x for i, x in enumerate(outputs)}
    assert ours.keys() == golden.keys()
    for name, (samples, shape) in golden.items():
        assert list(ours[name].shape) == shape
        assert relative_error(sample(ours[name]), samples) < 1e-3, name


# Outputs


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_any_image_size_gives_maps_of_the_rounded_up_size(model, size):
    with torch.no_grad():
        outputs = model(images(1, *size))
    assert isinstance(outputs, tuple)
    assert len(outputs) == 4
    info = model.feature_info
    for x, channels, stride in zip(outputs, info.channels(), info.reduction(), strict=True):
        assert x.shape == (1, channels, ceil_div(size[0], stride), ceil_div(size[1], stride))
        assert torch.isfinite(x).all()


@pytest.mark.parametrize("size", [(16, 16), (17, 16), (31, 90)])
def test_smallest_images_of_the_plain_backbone(size):
    with torch.no_grad():
        (out,) = make(ViG, out_indices=[11])(images(1, *size))
    assert out.shape == (1, 192, ceil_div(size[0], 16), ceil_div(size[1], 16))


@pytest.mark.parametrize("name", VARIANTS)
def test_feature_info_agrees_with_the_outputs(name):
    with torch.device("meta"):
        model = build_backbone(name)
        outputs = model(torch.empty(2, 3, 64, 96))
    assert [x.shape[1] for x in outputs] == model.feature_info.channels()
    assert [ceil_div(64, s) for s in model.feature_info.reduction()] == [x.shape[2] for x in outputs]
    assert [ceil_div(96, s) for s in model.feature_info.reduction()] == [x.shape[3] for x in outputs]
    modules = dict(model.named_modules())
    assert all(module in modules for module in model.feature_info.module_name())


def test_feature_info_follows_the_outputs_that_are_asked_for():
    assert skeleton(HierViG, out_indices=(1, 3)).feature_info.channels() == [192, 768]
    assert skeleton(HierViG, out_indices=(1, 3)).feature_info.reduction() == [8, 32]
    assert skeleton(ViG, out_indices=(-1,)).feature_info.module_name() == ["blocks.11"]


def test_training_and_evaluation_give_the_same_numbers(family):
    model, x = make(family), images(2, 50, 70)
    with torch.no_grad():
        evaluated, trained = model(x), model.train()(x)
    assert all(torch.equal(a, b) for a, b in zip(evaluated, trained))


def test_scan_implementations_agree(family):
    x = images(1, 40, 56).double()
    with torch.no_grad():
        chunk, naive = (make(family, gla_impl=impl).double()(x) for impl in ("chunk", "naive"))
    assert max(relative_error(a, b) for a, b in zip(chunk, naive)) < 1e-11


@pytest.mark.parametrize("activation", [False, True])
def test_mixer_in_triton_gives_the_same(device, activation):
    pytest.importorskip("triton", minversion="3.5")
    x, grad = torch.randn(2, 2, 5, 7, 24, device=device)
    results = {}
    for impl in ("triton", "chunk"):
        torch.manual_seed(0)
        mixer = GLAMixer(24, 2, activation, impl).to(device)
        mixed = mixer(x)
        results[impl] = mixed, *torch.autograd.grad(mixed, mixer.parameters(), grad)
    for triton, chunk in zip(results["triton"], results["chunk"], strict=True):
        assert relative_error(triton, chunk) < 1e-4


def test_unknown_scan_implementation_is_named(family):
    with pytest.raises(ValueError, match="'no_such_kernel' is not available"):
        make(family, gla_impl="no_such_kernel")(images(1, 32, 32))


def test_a_sample_does_not_depend_on_its_batch(model):
    x = images(3, 48, 80)
    with torch.no_grad():
        together = model(x)
        for i in range(3):
            alone = model(x[i : i + 1])
            assert max(relative_error(a, t[i : i + 1]) for a, t in zip(alone, together)) < 1e-5


@pytest.mark.parametrize("arrange", ["channels_last", "view"])
def test_memory_layout_of_the_image_does_not_matter(model, arrange):
    x = images(2, 48, 80)
    if arrange == "channels_last":
        other = x.contiguous(memory_format=torch.channels_last)
    else:
        other = F.pad(x, (3, 2, 1, 4), value=9.0)[..., 1:-4, 3:-2]
    before = other.clone()
    with torch.no_grad():
        for a, b in zip(model(x), model(other)):
            assert relative_error(b, a) < 1e-6
    assert torch.equal(other, before)


def test_forward_features_is_the_last_output(model):
    x = images(1, 50, 70)
    with torch.no_grad():
        assert torch.equal(model.forward_features(x), model(x)[-1])


def test_forward_features_of_the_hierarchical_backbone_needs_the_last_out_norm():
    with pytest.raises(ValueError, match=r"stage 3 has no out-norm: it is not in out_indices=\(0, 1\)"):
        skeleton(HierViG, out_indices=(0, 1)).forward_features(images(1, 32, 32))


@pytest.mark.parametrize("indices", [None, 2, [0], [1, 3], (-2, -1)], ids=str)
def test_forward_intermediates_gives_raw_maps(model, indices):
    x = images(1, 50, 70)
    count = 12 if isinstance(model, ViG) else 4
    wanted = {None: list(range(count)), 2: [count - 2, count - 1]}.get(indices if indices in (None, 2) else "")
    wanted = wanted or [i % count for i in indices]
    # What each block, or stage before its way down, really gave.
    seen: dict[int, Tensor] = {}
    parts = model.blocks if isinstance(model, ViG) else [stage.blocks[-1] for stage in model.layers]
    hooks = [
        part.register_forward_hook(lambda _, __, out, i=i: seen.update({i: out.permute(0, 3, 1, 2)}))
        for i, part in enumerate(parts)
    ]
    try:
        with torch.no_grad():
            final, maps = model.forward_intermediates(x, indices)
            only = model.forward_intermediates(x, indices, intermediates_only=True)
    finally:
        for hook in hooks:
            hook.remove()
    assert isinstance(maps, list)
    assert isinstance(only, list)
    assert len(maps) == len(only) == len(wanted)
    assert all(torch.equal(a, seen[i]) and torch.equal(b, seen[i]) for a, b, i in zip(maps, only, wanted))
    with torch.no_grad():
        assert torch.equal(final, model.forward_features(x))


def test_intermediates_alone_stop_at_the_last_of_them(model):
    blocks = blocks_of(model)
    ran = []
    hooks = [block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(blocks)]
    try:
        with torch.no_grad():
            model.forward_intermediates(images(1, 32, 32), indices=[1], intermediates_only=True)
    finally:
        for hook in hooks:
            hook.remove()
    assert ran == ([0, 1] if isinstance(model, ViG) else [0, 1, 2, 3])


def test_outputs_are_the_residual_stream_normalised_at_the_end():
    """The plain backbone normalises its final map only; the hierarchical one every output."""
    x = images(1, 50, 70)
    plain, hierarchical = make(ViG), make(HierViG)
    with torch.no_grad():
        outputs, raw = plain(x), plain.forward_intermediates(x, [2, 5, 8, 11], intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(outputs[:3], raw[:3]))
        assert relative_error(outputs[3], plain.norm(raw[3].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)) < 1e-6
        for s, (out, raw) in enumerate(zip(hierarchical(x), hierarchical.forward_intermediates(x)[1])):
            assert relative_error(out, hierarchical.get_submodule(f"outnorm{s}")(raw)) < 1e-6


@pytest.mark.parametrize("indices", [(-1,), (0,), (1, -1)])
def test_out_indices_choose_among_the_same_maps(family, indices):
    x = images(1, 50, 70)
    whole = make(family, out_indices=range(12 if family is ViG else 4))
    part = make(family, out_indices=indices)
    with torch.no_grad():
        expected, actual = whole(x), part(x)
    assert len(actual) == len(indices)
    assert all(torch.equal(expected[i], a) for i, a in zip(indices, actual))


# Errors


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([12], "expected indices from -"),
        ([-13], "expected indices from -"),
        ([], "expected indices from -"),
        ([1, 0], "must be in ascending order"),
        ([1, 1], "must be in ascending order"),
        ([-1, 0], "must be in ascending order"),
    ],
    ids=str,
)
def test_out_indices_that_do_not_fit_are_refused(family, indices, message):
    with pytest.raises(ValueError, match=rf"out_indices=\({re.escape(str(indices)[1:-1])}.*{message}"):
        family("tiny", out_indices=indices)
    with pytest.raises(ValueError, match=rf"^indices=.*{message}"):
        skeleton(family).forward_intermediates(images(1, 32, 32), indices)


@pytest.mark.parametrize("arch", ["huge", "Tiny", "", "vig_tiny"])
def test_unknown_arch_lists_the_known_ones(family, arch):
    expected = rf"{family.__name__} has no arch={arch!r}: expected one of 'tiny', 'small', 'base'"
    with pytest.raises(ValueError, match=expected):
        family(arch)


def test_unknown_option_is_named(family):
    with pytest.raises(TypeError, match="drop_path'"):
        family("tiny", drop_path=0.1)
    kinds = {parameter.kind for parameter in inspect.signature(family).parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


@pytest.mark.parametrize("size", [(8, 64), (64, 15), (1, 1)])
def test_image_smaller_than_a_patch_is_refused_with_its_size(model, size):
    least = 16 if isinstance(model, ViG) else 32
    expected = rf"image of {size[0]}x{size[1]} pixels is smaller than a patch: .* at least {least} pixels"
    for forward in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError, match=expected):
            forward(images(1, *size))


@pytest.mark.parametrize("shape", [(1, 1, 64, 64), (1, 4, 64, 64), (3, 64, 64), (1, 64, 64, 3)])
def test_anything_but_a_batch_of_colour_images_is_refused(model, shape):
    with pytest.raises(ValueError, match=rf"takes images \[B, 3, H, W\], .*{re.escape(str(list(shape)))}"):
        model(torch.zeros(shape))


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_impossible_drop_path_rate_is_refused(family, rate):
    with pytest.raises(ValueError, match=r"drop path rate must lie in \[0, 1\)"):
        family("tiny", drop_path_rate=rate)


def test_channels_that_the_heads_cannot_share_are_refused():
    with pytest.raises(ValueError, match="dim=100 must be a multiple of 2 \\* num_heads = 6"):
        GLAMixer(100, 3)


# Locality of the stem


def test_stem_sees_every_pixel(model):
    x = images(1, 45, 59).requires_grad_()
    loss_of((model.patch_embed(x),)).backward()
    assert (x.grad.abs().amax(1) > 0).all()


@pytest.mark.parametrize("pixel", [(0, 0), (40, 52), (99, 99)])
def test_stem_looks_at_the_neighbourhood_only(model, pixel):
    # Token i covers pixels centre - reach .. centre + reach around its own stride, from the two kernels.
    stride, before, after = (16, 9, 15) if isinstance(model, ViG) else (4, 3, 3)
    x = images(1, 100, 100)
    changed = x.clone()
    changed[..., pixel[0], pixel[1]] += 1
    with torch.no_grad():
        touched = (model.patch_embed(x) != model.patch_embed(changed)).any(-1)[0]
    for axis, p in enumerate(pixel):
        tokens = torch.arange(touched.shape[axis]) * stride
        expected = (tokens - before <= p) & (p <= tokens + after)
        assert torch.equal(touched.any(1 - axis), expected)


def test_stem_treats_the_border_as_zeros(model):
    """Zeros around the image change the tokens at its border at most."""
    x = images(1, 100, 100)
    with torch.no_grad():
        tokens, padded = model.patch_embed(x), model.patch_embed(F.pad(x, (0, 28, 0, 28)))
    n = tokens.shape[1]
    assert relative_error(padded[:, : n - 1, : n - 1], tokens[:, : n - 1, : n - 1]) < 1e-6


@pytest.mark.parametrize("s", [2, 4, 8])
def test_convolution_by_blocks_is_the_convolution(s):
    x, bias = torch.randn(2, 3, 2 * s, 5 * s, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    weight = torch.randn(4, 3, s + 1, s + 1, dtype=torch.float64)
    expected = F.conv2d(x, weight, bias, stride=s, padding=1)
    assert relative_error(conv_by_blocks(x, weight, bias, s), expected) < 1e-12


@pytest.mark.gpu
@pytest.mark.parametrize("s", [2, 8])
def test_patch_convolution_is_the_same_on_a_gpu(s):
    conv, x = PatchConv(3, 6, s).double(), torch.randn(1, 3, 3 * s + 1, 2 * s - 1, dtype=torch.float64)
    expected = conv(x)
    expected.square().sum().backward()
    gradient, conv.weight.grad = conv.weight.grad, None
    actual = conv.cuda()(x.cuda())
    actual.square().sum().backward()
    assert expected.shape == (1, 6, 4, 2)
    assert relative_error(actual.cpu(), expected) < 1e-12
    assert relative_error(conv.weight.grad.cpu(), gradient) < 1e-12


class CountedGraphs:
    """A backend for torch.compile that runs the graphs as they are."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


def with_depth(monkeypatch, family, depth: int) -> None:
    archs = sys.modules[family.__module__].ARCHS
    monkeypatch.setitem(archs, "tiny", archs["tiny"] | dict(depth=depth, depths=(depth, depth)))


@pytest.mark.parametrize("padded", [False, True])
def test_compiled_once_for_all_image_sizes(family, padded, monkeypatch):
    with_depth(monkeypatch, family, 2)
    graphs = CountedGraphs()
    plain = family("tiny", out_indices=(1,))
    model = family("tiny", out_indices=(1,), compile=dict(backend=graphs, fullgraph=True))
    model.load_state_dict(plain.state_dict())
    kinds = 1 if family is ViG else 2  # widths of blocks

    def run(m, x):
        return m(x, torch.tensor([x.shape[2:]] * (len(x) - 1) + [[40, 50]]) if padded else None)[0]

    model.eval(), plain.eval()
    with torch.no_grad():
        for size in ((4, 3, 96, 144), (4, 3, 97, 131), (2, 3, 70, 200)):  # no two dimensions alike in the first one
            x = torch.randn(size)
            assert relative_error(run(model, x), run(plain, x)) < 1e-5
    assert graphs.count == kinds
    model.train(), plain.train()
    for size in ((4, 3, 96, 144), (5, 3, 97, 131)):
        x = torch.randn(size)
        for m in (model, plain):
            m.zero_grad()
            run(m, x).square().mean().backward()
        for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert b.grad is None or relative_error(a.grad, b.grad) < 1e-3, name
    assert graphs.count == 2 * kinds


def test_blocks_that_differ_in_drop_path_share_a_graph(family, monkeypatch):
    with_depth(monkeypatch, family, 4)
    graphs = CountedGraphs()
    model = family("tiny", drop_path_rate=0.3, out_indices=(1,), compile=dict(backend=graphs, fullgraph=True))
    model.train()
    outs = [model(torch.ones(3, 3, 64, 64))[0] for _ in range(3)]
    assert not torch.equal(outs[0], outs[1])
    assert graphs.count == (2 if family is ViG else 3)  # the first block has a rate of 0


def test_depthwise_convolution_is_local_and_zero_padded():
    torch.manual_seed(0)
    conv = DepthwiseConv3x3(6)
    x = torch.randn(1, 7, 9, 6)
    expected = F.conv2d(F.pad(x.permute(0, 3, 1, 2), (1, 1, 1, 1)), conv.weight, groups=6).permute(0, 2, 3, 1)
    assert relative_error(conv(x), expected) < 1e-6


@pytest.mark.parametrize(("gla_impl", "around"), [("auto", "auto"), ("triton", "triton"), ("chunk", "naive")])
def test_implementation_of_the_scan_decides_on_that_of_all_operators(family, gla_impl, around):
    with torch.device("meta"):
        model = family("tiny", gla_impl=gla_impl)
    impls = {module.impl for module in model.modules() if hasattr(module, "impl")}
    assert impls == {around}
    assert {module.gla_impl for module in model.modules() if isinstance(module, GLAMixer)} == {gla_impl}


class Wrapped(nn.Module):
    """As adapters do it: another module in the place of a linear layer, which calls that."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.added = nn.Parameter(torch.zeros(linear.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.added


@pytest.mark.parametrize("names", [("qkv_proj",), ("gk_proj.0", "g_proj")], ids=str)
def test_projections_that_were_replaced_are_called(names):
    mixer, x = GLAMixer(24, 2), torch.randn(1, 5, 7, 24)
    expected = mixer(x)
    for name in names:
        mixer.set_submodule(name, Wrapped(mixer.get_submodule(name)))
    assert relative_error(mixer(x), expected) < 1e-6
    with torch.no_grad():
        mixer.get_submodule(names[0]).added.fill_(1)
    assert relative_error(mixer(x), expected) > 1e-3


def test_expansion_of_the_gates_cannot_be_replaced():
    mixer = GLAMixer(24, 2)
    mixer.gk_proj[1] = Wrapped(mixer.gk_proj[1])
    with pytest.raises(TypeError, match=r"gk_proj\[1\] is a Wrapped.*exclude gk_proj.1 from adapters"):
        mixer(torch.randn(1, 5, 7, 24))


def test_position_embedding_is_itself_on_its_own_grid_and_keeps_its_mean_on_others():
    model = make(ViG)
    assert torch.equal(model._pos_embed(14, 14).flatten(1, 2), model.pos_embed)
    with torch.no_grad():
        model.pos_embed.copy_(torch.arange(192.0).expand(1, 196, 192))
        assert relative_error(model._pos_embed(5, 33), torch.arange(192.0).expand(1, 5, 33, 192)) < 1e-6


# Training


@pytest.mark.parametrize("size", [(48, 80), (33, 47)])
def test_gradients_reach_every_parameter_and_the_image(family, size):
    model, x = make(family).train(), images(2, *size).requires_grad_()
    loss_of(model(x)).backward()
    for name, parameter in [*model.named_parameters(), ("image", x)]:
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("how", ["with_cp", "set_grad_checkpointing"])
def test_gradient_checkpointing_recomputes_and_changes_nothing(family, how):
    x = images(2, 48, 64)
    results = []
    for checkpointing in (False, True):
        options = {"drop_path_rate": 0.5} | ({"with_cp": checkpointing} if how == "with_cp" else {})
        model = make(family, **options).train()
        if how != "with_cp":
            model.set_grad_checkpointing(checkpointing)
        runs = [0]
        for block in blocks_of(model):
            block.register_forward_pre_hook(lambda *_, runs=runs: runs.__setitem__(0, runs[0] + 1))
        torch.manual_seed(5)
        loss = loss_of(model(x))
        loss.backward()
        results.append((runs[0], loss.detach(), [parameter.grad for parameter in model.parameters()]))
    (runs, loss, grads), (runs_cp, loss_cp, grads_cp) = results
    assert runs_cp == 2 * runs
    assert torch.equal(loss, loss_cp)
    for name, a, b in zip(dict(model.named_parameters()), grads, grads_cp):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-9), name


def test_gradient_checkpointing_is_idle_without_gradients(family):
    model, x = make(family, with_cp=True), images(1, 32, 32)
    expected = make(family)(x)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model.train()(x), expected))


def test_drop_path_drops_whole_samples_and_keeps_the_expectation():
    torch.manual_seed(0)
    out = DropPath(0.3)(torch.ones(4000, 3, 5))
    assert (out == out[:, :1, :1]).all()
    values = out[:, 0, 0]
    assert torch.equal(values.unique(), torch.tensor([0, 1 / 0.7]))
    assert abs((values == 0).float().mean() - 0.3) < 0.03  # four standard deviations
    assert abs(values.mean() - 1) < 0.045


def test_drop_path_takes_another_rate():
    layer = DropPath(0.3)
    layer.rate = 0.0
    assert layer(torch.ones(4, 3)).min() == 1
    layer.rate = 0.9
    assert layer(torch.ones(400, 3)).min() == 0
    with pytest.raises(ValueError, match="must lie in"):
        layer.rate = 1.0


def test_drop_path_is_the_identity_in_evaluation_and_at_rate_zero():
    x = torch.randn(8, 3)
    assert DropPath(0.9).eval()(x) is x
    assert DropPath(0.0)(x) is x


def test_drop_path_rates_grow_linearly(family):
    model = skeleton(family, drop_path_rate=0.3)
    rates = [block.drop_path.rate for block in blocks_of(model)]
    n = len(rates)
    assert rates == pytest.approx([0.3 * i / (n - 1) for i in range(n)])
    assert drop_path_rates(0.3, 1) == [0.0]


def test_drop_path_acts_in_training_only(family):
    model, x = make(family, drop_path_rate=0.5), images(2, 32, 48)
    with torch.no_grad():
        evaluated = model(x)
        assert all(torch.equal(a, b) for a, b in zip(evaluated, make(family)(x)))
        torch.manual_seed(0)
        first, second = (model.train()(x)[-1] for _ in range(2))
    assert relative_error(first, second) > 1e-2
    assert relative_error(first, evaluated[-1]) > 1e-2


def frozen_names(family: type, frozen_stages: int) -> tuple[str, ...]:
    """Prefixes of the parameters that a value of `frozen_stages` freezes."""
    if frozen_stages < 0:
        return ()
    if family is ViG:
        return ("patch_embed.", "pos_embed", *(f"blocks.{i}." for i in range(frozen_stages)))
    stages = range(frozen_stages)
    downsamplings = range(frozen_stages - 1)  # the way down to a stage belongs to that stage
    return (
        "patch_embed.",
        *(f"layers.{s}.blocks." for s in stages),
        *(f"layers.{s}.downsample." for s in downsamplings),
        *(f"outnorm{s}." for s in stages),
    )


@pytest.mark.parametrize("frozen_stages", [-1, 0, 1, 3, "all"])
def test_frozen_stages_have_no_gradient_and_stay_in_evaluation(family, frozen_stages):
    if frozen_stages == "all":
        frozen_stages = 12 if family is ViG else 4
    model = skeleton(family, frozen_stages=frozen_stages, drop_path_rate=0.1)
    prefixes = frozen_names(family, frozen_stages)
    for _ in range(2):
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad != name.startswith(prefixes), name
        for name, module in model.named_modules():
            holds_weights = next(module.parameters(), None) is not None
            if name and (holds_weights or isinstance(module, DropPath)) and f"{name}." != "layers.":
                frozen = f"{name}.".startswith(prefixes)
                assert module.training != frozen, name
        assert model.training
        model.eval().train()


@pytest.mark.parametrize("frozen_stages", [0, 2])
def test_frozen_weights_survive_an_optimizer_step(family, frozen_stages):
    model = make(family, frozen_stages=frozen_stages).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    loss_of(model(images(2, 48, 48))).backward()
    optimizer.step()
    prefixes = frozen_names(family, frozen_stages)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith(prefixes), name


@pytest.mark.parametrize("with_cp", [True, False])
def test_frozen_stages_leave_the_other_gradients_as_they_are(family, with_cp):
    x = images(1, 32, 48)
    frozen, free = make(family, frozen_stages=1, with_cp=with_cp).train(), make(family).train()
    for model in (frozen, free):
        loss_of(model(x)).backward()
    reference = dict(free.named_parameters())
    for name, parameter in frozen.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.grad, reference[name].grad, rtol=1e-5, atol=1e-9), name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("frozen_stages", [-2, 13])
def test_impossible_frozen_stages_are_refused(family, frozen_stages):
    count = 12 if family is ViG else 4
    with pytest.raises(ValueError, match=rf"frozen_stages from -1 .* to {count} .* got {frozen_stages}"):
        family("tiny", frozen_stages=frozen_stages)


# Number types


@pytest.mark.parametrize("backward_inside", [True, False])
def test_bfloat16_autocast_is_finite_and_close(family, backward_inside):
    model, x = make_fresh(family), images(2, 48, 64)
    exact = model(x)
    loss_of(exact).backward()
    exact_grads = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(x)
        loss = loss_of([out.float() for out in outputs])
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    # bfloat16 rounds by up to 2**-9 = 0.002; errors add up over the blocks.
    assert max(relative_error(a, b) for a, b in zip(outputs, exact)) < 0.03
    for (name, parameter), grad in zip(model.named_parameters(), exact_grads):
        assert parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all(), name
        assert relative_error(parameter.grad, grad) < 0.2, name


def test_float64_model_computes_in_float64(family):
    x = images(1, 48, 64)
    model = make(family)
    with torch.no_grad():
        single = model(x)
        double = model.double()(x.double())
        again = copy.deepcopy(model)(x.double() + 1e-10)
    assert {out.dtype for out in double} == {torch.float64}
    assert max(relative_error(a, b) for a, b in zip(single, double)) < 1e-4
    # A change that float32 cannot see anywhere along the way.
    assert 0 < max(relative_error(a, b) for a, b in zip(again, double)) < 1e-7


def test_bfloat16_model_runs(family):
    model, x = make_fresh(family).eval(), images(1, 48, 64)
    with torch.no_grad():
        exact = model(x)
        rounded = model.bfloat16()(x.bfloat16())
    assert {out.dtype for out in rounded} == {torch.bfloat16}
    assert max(relative_error(a, b) for a, b in zip(rounded, exact)) < 0.06


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_rms_norm_is_its_formula_in_every_type(dtype):
    norm = RMSNorm(8)
    x = images(2, 5, 8).to(dtype) * 100  # squares beyond float16
    nn.init.uniform_(norm.weight, 0.5, 2)
    x64 = x.double()
    expected = x64 / (x64.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    out = norm(x)
    assert out.dtype == dtype
    assert relative_error(out, expected) < 2 * torch.finfo(dtype if dtype != torch.float64 else torch.float32).eps


def test_layer_norm_of_a_map_is_over_channels():
    x = images(2, 5, 7)
    norm = LayerNorm2d(3)
    nn.init.uniform_(norm.weight)
    mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
    expected = (x - mean) / (variance + 1e-5).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
    assert relative_error(norm(x), expected) < 1e-6


# As an object among others


def test_copies_and_pickles_are_the_same_model(model):
    x = images(1, 32, 48)
    with torch.no_grad():
        expected = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert all(torch.equal(a, b) for a, b in zip(twin(x), expected))
            assert twin.feature_info.channels() == model.feature_info.channels()
            assert next(twin.parameters()) is not next(model.parameters())


def test_state_dict_round_trip_is_strict(family, tmp_path):
    source, target = make(family), make_fresh(family)
    torch.save(source.state_dict(), tmp_path / "state.pth")
    target.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True), strict=True)
    x = images(1, 32, 48)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(target.eval()(x), source(x)))


def test_weight_decay_exceptions_and_layer_groups_name_real_parameters(model):
    names = [name for name, _ in model.named_parameters()]
    assert model.no_weight_decay() <= set(names)
    for coarse in (True, False):
        groups = model.group_matcher(coarse)
        patterns = [groups["stem"]]
        patterns += [groups["blocks"]] if coarse else [pattern for pattern, _ in groups["blocks"]]
        assert all(any(re.match(pattern, name) for name in names) for pattern in patterns)
        unmatched = [name for name in names if not any(re.match(pattern, name) for pattern in patterns)]
        # The coarse grouping leaves the final norms to timm's "whatever is left".
        assert not [name for name in unmatched if not (coarse and name.startswith(("norm.", "outnorm")))]


def test_seeded_construction_is_reproducible(family):
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(family("tiny").state_dict())
    first, same, other = states
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_import_and_use_need_torch_alone():
    script = textwrap.dedent(
        """
        import sys

        ABSENT = {"mmengine", "mmcv", "mmdet", "mmseg", "timm", "triton", "torchvision", "safetensors", "PIL", "cv2",
                  "scipy", "pandas", "matplotlib", "sklearn", "skimage", "pycocotools", "numpy"}

        class Without:
            '''A finder that does not know the absent packages.'''

            def __init__(self, finder):
                self.finder = finder

            def __getattr__(self, name):
                return getattr(self.finder, name)

            def find_spec(self, name, path=None, target=None):
                return None if name.partition(".")[0] in ABSENT else self.finder.find_spec(name, path, target)

        sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
        import torch
        import vig_backbone
        from vig_backbone.necks import SimpleFeaturePyramid

        for model in (vig_backbone.ViG("tiny"), vig_backbone.HierViG("tiny")):
            loss = sum(out.square().mean() for out in model(torch.randn(1, 3, 33, 47)))
            loss.backward()
            assert torch.isfinite(loss)
        SimpleFeaturePyramid(192)(vig_backbone.build_backbone("vig_tiny")(torch.randn(1, 3, 32, 32)))
        assert not ABSENT & set(sys.modules), ABSENT & set(sys.modules)
        print("done")
        """
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == "done"


# Simple feature pyramid


@pytest.mark.parametrize("in_channels", [192, 384, 768])
@pytest.mark.parametrize("size", [(7, 5), (1, 1), (4, 6)], ids=str)
@pytest.mark.parametrize("num_outs", [4, 5, 6])
def test_pyramid_has_a_map_for_each_scale(in_channels, size, num_outs):
    with torch.device("meta"):
        neck = SimpleFeaturePyramid(in_channels, 64, num_outs)
        outputs = neck((torch.empty(2, in_channels, *size),))
    H, W = size
    halves = [(ceil_div(H, 2**i), ceil_div(W, 2**i)) for i in range(num_outs - 2)]
    assert [tuple(x.shape) for x in outputs] == [(2, 64, *s) for s in [(4 * H, 4 * W), (2 * H, 2 * W), *halves]]


def test_pyramid_on_the_backbone_passes_gradients_everywhere():
    torch.manual_seed(0)
    backbone, neck = make(ViG, out_indices=[-1]), SimpleFeaturePyramid(192, 32)
    outputs = neck(backbone(images(1, 70, 90)))
    assert [tuple(x.shape[2:]) for x in outputs] == [(20, 24), (10, 12), (5, 6), (3, 3), (2, 2)]
    loss_of(outputs).backward()
    for name, parameter in [*backbone.named_parameters(), *neck.named_parameters()]:
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


def test_pyramid_reads_the_last_map_and_subsamples_the_coarsest():
    torch.manual_seed(0)
    neck = SimpleFeaturePyramid(16, 8, num_outs=6)
    x, other = torch.randn(1, 16, 9, 11), torch.randn(1, 16, 9, 11)
    with torch.no_grad():
        outputs, again = neck((other, x)), neck([x])
    assert all(torch.equal(a, b) for a, b in zip(outputs, again))
    assert torch.equal(outputs[4], outputs[3][..., ::2, ::2])
    assert torch.equal(outputs[5], outputs[4][..., ::2, ::2])


@pytest.mark.parametrize("num_outs", [0, 3])
def test_pyramid_with_fewer_levels_than_scales_is_refused(num_outs):
    with pytest.raises(ValueError, match=f"num_outs={num_outs}: the pyramid has at least 4 levels"):
        SimpleFeaturePyramid(192, num_outs=num_outs)


def test_zero_padding_does_not_blow_up_gradients_of_a_fresh_model(family):
    """Detection batches are padded with exact zeros; tokens without any variance once multiplied gradients by 1e11."""
    x = images(2, 96, 160)
    norms = []
    for padding in (0, 64):
        model = family(arch="tiny").train()
        x[1, :, :, x.shape[-1] - padding :] = 0
        loss_of(model(x)).backward()
        norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())
        assert np.isfinite(norms[-1])
    assert norms[1] < 10 * norms[0]
