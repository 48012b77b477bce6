"""ViG with a ViT-Adapter: the pyramid, its start from a plain ViG, padding, training, use in OpenMMLab."""

import vig_backbone  # noqa: F401  brings mmcv's operators

# isort: split
import re
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmcv.ops import MultiScaleDeformableAttention
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vig_backbone import ViG
from vig_backbone.checkpoint import CheckpointError
from vig_backbone.openmmlab.vit_adapter import ViGAdapter, adapter, backbone
from vig_backbone.openmmlab.vit_adapter.attention import DeformableAttention
from vig_backbone.openmmlab.vit_adapter.grids import Grid, resize, route
from vig_backbone.padding import at_stride
from vig_backbone.vig import ARCHS

STRIDES = (4, 8, 16, 32)
SIZES = [(33, 47), (64, 100), (101, 37), (32, 32)]


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block for each interaction."""
    monkeypatch.setitem(ARCHS, "tiny", ARCHS["tiny"] | dict(depth=4))


def make(**options) -> ViGAdapter:
    """A tiny one in evaluation mode in which every part of the adapter matters."""
    model = ViGAdapter("tiny", **options)
    for name, parameter in model.adapter.named_parameters():
        if "gamma" in name or "sampling_offsets" in name or "attention_weights" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    norms = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model(torch.randn(2, 3, 100, 80))  # the norms' statistics
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach() - expected.detach()).norm() / expected.detach().norm())


def shapes(maps: Sequence[Tensor]) -> list[list[int]]:
    return [list(x.shape) for x in maps]


def expected_shapes(B: int, C: int, H: int, W: int, strides: Sequence[int] = STRIDES) -> list[list[int]]:
    return [[B, C, -(-H // s), -(-W // s)] for s in strides]


def grid_over(images: Tensor, valid_sizes: Tensor | None, stride: int) -> Grid:
    H, W = images.shape[-2:]
    return Grid(stride, -(-H // stride), -(-W // stride), at_stride(valid_sizes, stride))


def loss(maps: Sequence[Tensor]) -> Tensor:
    """Depends on every number in its own way, as sums of normalised maps would not."""
    return sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)).sum() for x in maps)


# -- The pyramid


@pytest.mark.parametrize(("H", "W"), [*SIZES, (96, 64), (63, 65)])
@torch.no_grad()
def test_maps_at_four_strides_for_any_size(H: int, W: int) -> None:
    model = ViGAdapter("tiny").eval()
    assert shapes(model(torch.randn(2, 3, H, W))) == expected_shapes(2, 192, H, W)


@pytest.mark.parametrize(
    ("arch", "C", "parameters"), [("tiny", 192, 2_438_192), ("small", 384, 5_830_160), ("base", 768, 13_680_608)]
)
@torch.no_grad()
def test_variants(arch: str, C: int, parameters: int) -> None:
    model = MODELS.build(dict(type="ViGAdapter", arch=arch)).eval()
    assert sum(p.numel() for p in model.adapter.parameters()) == parameters
    assert model.feature_info.channels() == [C] * 4
    assert model.feature_info.reduction() == list(STRIDES)
    assert shapes(model(torch.randn(1, 3, 49, 80))) == expected_shapes(1, C, 49, 80)


@pytest.mark.parametrize("add_features", ["last", "each"])
@torch.no_grad()
def test_fewer_levels_are_the_same_maps_without_idle_parameters(shallow: None, add_features: str) -> None:
    full = make(add_features=add_features)
    part = ViGAdapter("tiny", out_indices=(-3, 2, 3), add_features=add_features).eval()
    left_out = part.load_state_dict(full.state_dict(), strict=False)
    assert not left_out.missing_keys
    x = torch.randn(1, 3, 70, 90)
    maps = part(x)
    assert part.feature_info.reduction() == [8, 16, 32]
    assert all(torch.equal(a, b) for a, b in zip(maps, full(x)[1:], strict=True))
    with torch.enable_grad():
        loss(part.train()(x)).backward()
    assert not [name for name, p in part.named_parameters() if p.grad is None]


@torch.no_grad()
def test_features_of_vig_are_added_to_the_levels(shallow: None) -> None:
    """With all else out of the way, the outputs are ViG's maps, resized."""
    x = torch.randn(1, 3, 64, 96)
    for add_features, wanted in (("last", [3, 3, 3, 3]), ("each", [0, 1, 2, 3])):
        model = ViGAdapter("tiny", add_features=add_features).eval()
        for parameter in (*model.adapter.spatial_prior.parameters(), model.adapter.level_embed):
            parameter.zero_()
        for interaction in model.adapter.interactions:
            for extractor in interaction.extractors:
                for layer in (extractor.attn.output_proj, extractor.ffn.fc2):
                    layer.weight.zero_()
                    layer.bias.zero_()
        plain = ViG("tiny", out_indices=(0, 1, 2, 3)).eval()
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("adapter.")})
        features = [plain(x)[i] for i in wanted]
        for stride, actual, feature in zip(STRIDES, model(x), features, strict=True):
            size = (64 // stride, 96 // stride)
            expected = F.interpolate(feature, size=size, mode="bilinear", align_corners=False)
            assert relative_error(actual, expected / (1 + 1e-5) ** 0.5) < 1e-5, (add_features, stride)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(add_features="all"), ValueError, "add_features='all': expected 'last' or 'each'"),
        (dict(out_indices=(0, 4)), ValueError, r"out_indices=\(0, 4\) does not fit"),
        (dict(arch="huge"), ValueError, "ViG has no arch='huge'"),
        (dict(adapter=dict(num_heads=5)), ValueError, "num_heads=5 must divide the 192 channels"),
        (dict(adapter=dict(deform_ratio=0.45)), ValueError, "deform_ratio=0.45, 86"),
        (dict(adapter=dict(heads=6)), TypeError, "heads"),
    ],
)
def test_options_that_cannot_work(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ViGAdapter(**{"arch": "tiny", **options})


# -- The start


@torch.no_grad()
def test_starts_from_a_plain_vig_and_its_checkpoint(shallow: None, tmp_path) -> None:
    plain = ViG("tiny", out_indices=(3,)).eval()
    plain.pos_embed.normal_()
    torch.save({"model": plain.state_dict() | {"head.weight": torch.ones(1)}}, tmp_path / "vig.pth")
    model = ViGAdapter("tiny", init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "vig.pth"))).eval()
    model.init_weights()
    tokens = []
    model.norm.register_forward_hook(lambda module, inputs, output: tokens.append(output))
    x = torch.randn(2, 3, 70, 90)
    model(x)
    assert torch.equal(tokens.pop().permute(0, 3, 1, 2), plain(x)[0])
    model.adapter.interactions[1].injector.gamma.fill_(0.1)
    model(x)
    assert relative_error(tokens.pop().permute(0, 3, 1, 2), plain(x)[0]) > 1e-3


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path) -> None:
    weights = ViG("tiny").state_dict()
    del weights["blocks.3.attn.g_norm.weight"]
    torch.save(weights, tmp_path / "vig.pth")
    model = ViGAdapter("tiny", init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "vig.pth")))
    with pytest.raises(CheckpointError, match=r"1 missing \(blocks.3.attn.g_norm.weight\)"):
        model.init_weights()


def test_whole_checkpoint_loads_with_its_adapter(shallow: None, tmp_path) -> None:
    trained = make()
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in trained.state_dict().items()}}, tmp_path / "det.pth")
    model = ViGAdapter("tiny", init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "det.pth")))
    model.init_weights()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), trained.state_dict().values()))


@pytest.mark.parametrize("again", [False, True])
def test_initialisation(shallow: None, again: bool) -> None:
    model = ViGAdapter("tiny") if not again else make()
    if again:
        model.init_weights()
    stock = MultiScaleDeformableAttention(192, num_heads=6, num_levels=3, num_points=4)
    for interaction in model.adapter.interactions:
        injector = interaction.injector
        assert not injector.gamma.any()
        assert torch.equal(injector.attn.sampling_offsets.bias, stock.sampling_offsets.bias)
        assert not injector.attn.sampling_offsets.weight.any()
        assert not injector.attn.attention_weights.weight.any()
        bound = (6 / (2 * 192)) ** 0.5  # Xavier's
        for layer in (injector.attn.value_proj, interaction.extractors[0].attn.output_proj):
            assert 0.95 * bound < layer.weight.abs().max() <= bound
        assert interaction.extractors[0].ffn.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.blocks[0].mlp.down_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    deviation = model.adapter.spatial_prior.stem[1][0].weight.std().item()
    assert deviation == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)
    assert model.adapter.level_embed.std().item() == pytest.approx(1, rel=0.1)
    names = {name for name, buffer in model.adapter.named_buffers() if "running_var" in name and (buffer != 1).any()}
    assert not names


# -- Attention and geometry against other implementations


def sample(channel_map: np.ndarray, x: float, y: float) -> float:
    """Bilinear, at pixels whose centres have integer coordinates; 0 outside."""
    total = 0.0
    for i in (int(np.floor(y)), int(np.floor(y)) + 1):
        for j in (int(np.floor(x)), int(np.floor(x)) + 1):
            if 0 <= i < channel_map.shape[0] and 0 <= j < channel_map.shape[1]:
                total += (1 - abs(y - i)) * (1 - abs(x - j)) * channel_map[i, j]
    return total


def slow_attention(
    attention: DeformableAttention,
    query: np.ndarray,
    values: list[np.ndarray],
    queries: list[tuple[int, int, int]],
    strides: list[int],
) -> np.ndarray:
    """For one image without padding: query [Q, C], values [H, W, C]; `queries` are stride, row and column of each."""
    parameters = {name: p.detach().numpy() for name, p in attention.named_parameters()}

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ parameters[f"{name}.weight"].T + parameters[f"{name}.bias"]

    h, P, L = attention.num_heads, attention.num_points, len(values)
    projected = [linear("value_proj", value) for value in values]
    D = projected[0].shape[-1] // h
    read = np.zeros((len(query), h * D))
    for q, (stride, row, column) in enumerate(queries):
        offsets = linear("sampling_offsets", query[q]).reshape(h, L, P, 2)
        for head, logits in enumerate(linear("attention_weights", query[q]).reshape(h, L, P)):
            weights = np.exp(logits) / np.exp(logits).sum()
            for level in range(L):
                ratio = stride / strides[level]
                for point in range(P):
                    x = (column + 0.5) * ratio - 0.5 + offsets[head, level, point, 0]
                    y = (row + 0.5) * ratio - 0.5 + offsets[head, level, point, 1]
                    for d in range(head * D, head * D + D):
                        read[q, d] += weights[level, point] * sample(projected[level][:, :, d], x, y)
    return linear("output_proj", read)


def random_attention(levels: int, ratio: float = 1.0, dim: int = 8) -> DeformableAttention:
    attention = DeformableAttention(dim, num_heads=2, num_levels=levels, num_points=2, value_ratio=ratio).double()
    for name, parameter in attention.named_parameters():
        parameter.data += (1.5 if name.startswith("sampling") else 0.5) * torch.randn_like(parameter)
    return attention


@pytest.mark.parametrize("ratio", [1.0, 0.5])
@pytest.mark.parametrize("downwards", [True, False], ids=["injector", "extractor"])
@torch.no_grad()
def test_attention_agrees_with_loops_over_samples_with_and_without_padding(ratio: float, downwards: bool) -> None:
    sizes = [(50, 37), (33, 70)]
    images = torch.empty(2, 3, 60, 75)
    own, pyramid = (16,), (8, 16, 32)
    from_strides, to_strides = (own, pyramid) if downwards else (pyramid, own)
    attention = random_attention(len(to_strides), ratio)
    from_grids, to_grids = (
        [grid_over(images, torch.tensor(sizes), stride) for stride in strides] for strides in (from_strides, to_strides)
    )
    query = torch.randn(2, sum(grid.H * grid.W for grid in from_grids), 8, dtype=torch.float64)
    value = torch.randn(2, sum(grid.H * grid.W for grid in to_grids), 8, dtype=torch.float64)
    actual = attention(query, value, route(from_grids, to_grids, query.device))
    for b in range(2):
        places = [(g.stride, i, j) for g in from_grids for i in range(g.H) for j in range(g.W)]
        inside = [q for q, (s, i, j) in enumerate(places) if i * s < sizes[b][0] and j * s < sizes[b][1]]
        maps = [x.view(g.H, g.W, 8) for g, x in zip(to_grids, value[b].split([g.H * g.W for g in to_grids]))]
        valid = [x[: -(-sizes[b][0] // g.stride), : -(-sizes[b][1] // g.stride)] for g, x in zip(to_grids, maps)]
        expected = slow_attention(
            attention, query[b, inside].numpy(), [x.numpy() for x in valid], [places[q] for q in inside], to_strides
        )
        np.testing.assert_allclose(actual[b, inside].numpy(), expected, atol=1e-10)


@torch.no_grad()
def test_attention_agrees_with_mmcv_where_strides_divide_the_image() -> None:
    images = torch.empty(1, 3, 64, 96)
    attention = random_attention(levels=3)
    own, pyramid = grid_over(images, None, 16), [grid_over(images, None, stride) for stride in (8, 16, 32)]
    y, x = torch.meshgrid((torch.arange(4).double() + 0.5) / 4, (torch.arange(6).double() + 0.5) / 6, indexing="ij")
    points = torch.stack((x, y), -1).view(1, 24, 1, 2).expand(2, -1, 3, -1)
    query = torch.randn(2, 24, 8, dtype=torch.float64)
    value = torch.randn(2, 8 * 12 + 4 * 6 + 2 * 3, 8, dtype=torch.float64)
    expected = MultiScaleDeformableAttention.forward(
        attention,
        query,
        value=value,
        identity=torch.zeros_like(query),
        reference_points=points,
        spatial_shapes=torch.tensor([(8, 12), (4, 6), (2, 3)]),
    )
    actual = attention(query, value, route([own], pyramid, query.device))
    torch.testing.assert_close(actual, expected)


def test_attention_has_the_gradients_of_finite_differences() -> None:
    images = torch.empty(1, 3, 17, 30)
    own, level = grid_over(images, None, 16), grid_over(images, None, 8)
    attention, way = random_attention(levels=1, dim=4), route([own], [level], images.device)
    inputs = [torch.randn(1, n, 4, dtype=torch.float64, requires_grad=True) for n in (2 * 2, 3 * 4)]
    assert torch.autograd.gradcheck(lambda query, value: attention(query, value, way), inputs)


@pytest.mark.parametrize("stride", STRIDES)
def test_resizing_is_that_of_torch_and_padding_changes_nothing(stride: int) -> None:
    images, sizes = torch.empty(3, 3, 160, 192), [(160, 192), (64, 96), (97, 70)]
    valid = torch.tensor(sizes)
    source, target = (grid_over(images, valid, s) for s in (16, stride))
    x = torch.randn(3, 2, 10, 12)
    actual = resize(x, source, target)
    assert actual.isfinite().all()
    expected = F.interpolate(x[:1], size=(160 // stride, 192 // stride), mode="bilinear", align_corners=False)
    torch.testing.assert_close(actual[:1], expected)
    for b, (h, w) in enumerate(sizes):
        alone = [grid_over(images[..., :h, :w], None, s) for s in (16, stride)]
        one = resize(x[b : b + 1, :, : alone[0].H, : alone[0].W], *alone)
        torch.testing.assert_close(actual[b : b + 1, :, : alone[1].H, : alone[1].W], one)


# -- Padding


def padded_batch(sizes: Sequence[tuple[int, int]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Images with numbers in their padding that must not matter."""
    return torch.randn(len(sizes), 3, 133, 110, dtype=dtype), torch.tensor(sizes)


@pytest.mark.parametrize("add_features", ["last", "each"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@torch.no_grad()
def test_images_get_the_same_maps_alone_and_in_a_padded_batch(
    add_features: str, dtype: torch.dtype, tolerance: float
) -> None:
    model = make(add_features=add_features).to(dtype)
    x, sizes = padded_batch(SIZES, dtype)
    maps = model(x, sizes)
    assert shapes(maps) == expected_shapes(len(SIZES), 192, 133, 110)
    for b, (h, w) in enumerate(SIZES):
        for batch_map, expected in zip(maps, model(x[b : b + 1, :, :h, :w]), strict=True):
            H, W = expected.shape[-2:]
            actual = batch_map[b : b + 1, :, :H, :W].clone()
            batch_map[b, :, :H, :W] = 0
            assert relative_error(actual, expected) < tolerance
            assert not batch_map[b].any(), "zeros in the padding"


def test_padding_changes_no_gradient(shallow: None) -> None:
    model = make().double()
    x, sizes = padded_batch(SIZES[:2], torch.float64)
    gradients = []
    for together in (True, False):
        model.zero_grad()
        for b, (h, w) in enumerate(SIZES[:2]):
            maps = model(x, sizes) if together else model(x[b : b + 1, :, :h, :w])
            shape = [(b if together else 0, slice(None), slice(-(-h // s)), slice(-(-w // s))) for s in STRIDES]
            loss([feature[index] for feature, index in zip(maps, shape)]).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[1].items():
        assert relative_error(gradients[0][name], expected) < 1e-8, name


def test_nothing_is_read_from_the_device(shallow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a pretended GPU, whose tensors have a shape but no values: reading one is an error."""
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda weight, std: weight)  # that does
    with FakeTensorMode():
        with torch.device("cuda"):
            model = ViGAdapter("tiny", gla_impl="chunk").train()
            x, sizes = torch.empty(2, 3, 65, 99), torch.ones(2, 2, dtype=torch.long)
        maps = model(x, sizes)
    assert {(x.device.type, *x.shape[-2:]) for x in maps} == {
        ("cuda", -(-65 // stride), -(-99 // stride)) for stride in STRIDES
    }


# -- Training


@pytest.mark.parametrize("add_features", ["last", "each"])
def test_every_parameter_learns(add_features: str) -> None:
    model = make(add_features=add_features).train()
    loss(model(torch.randn(2, 3, 65, 99))).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_at_first_injectors_learn_their_scale_alone_and_queries_ask_nothing(shallow: None) -> None:
    model = ViGAdapter("tiny")
    loss(model(torch.randn(2, 3, 65, 99))).backward()
    idle = {name for name, p in model.named_parameters() if p.grad is not None and not p.grad.any()}
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    in_injectors = {n for n, _ in model.named_parameters() if ".injector." in n and not n.endswith("gamma")}
    queries = {n for n, _ in model.named_parameters() if ".query_norm." in n}  # the same places whatever the query
    assert idle == in_injectors | queries


@pytest.mark.parametrize("padded", [False, True])
def test_checkpointing_changes_nothing(shallow: None, padded: bool) -> None:
    model = make(drop_path_rate=0.5).train()
    x, sizes = padded_batch(SIZES[:2], torch.float32)
    results = []
    for with_cp in (False, True):
        model.set_grad_checkpointing(with_cp)
        model.zero_grad()
        torch.manual_seed(1)
        maps = model(x, sizes if padded else None)
        loss(maps).backward()
        results.append([*(feature.detach() for feature in maps), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_bfloat16_autocast_stays_close(training: bool) -> None:
    model = ViGAdapter("tiny").train(training)
    for interaction in model.adapter.interactions:
        interaction.injector.gamma.data.fill_(0.2)
    x = torch.randn(2, 3, 97, 130)
    with torch.autocast("cpu", torch.bfloat16):
        maps = model(x)
    loss(maps).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    for actual, expected in zip(maps, model(x), strict=True):
        assert relative_error(actual, expected) < 0.05


def test_frozen_stages_are_those_of_vig() -> None:
    model = ViGAdapter("tiny", frozen_stages=2)
    frozen = {re.match(r"(blocks\.\d+|\w+)", name)[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"patch_embed", "pos_embed", "blocks.0", "blocks.1"}
    assert all(p.requires_grad for p in model.adapter.parameters())
    with pytest.raises(ValueError, match="frozen_stages from -1"):
        ViGAdapter("tiny", frozen_stages=13)


def test_asks_for_no_weight_decay_on_embeddings() -> None:
    model = ViGAdapter("tiny")
    assert model.no_weight_decay() == {"pos_embed", "adapter.level_embed"}
    assert model.no_weight_decay() <= set(dict(model.named_parameters()))


def test_gla_impl_is_that_of_everything_around_the_scan() -> None:
    model = ViGAdapter("tiny", gla_impl="chunk")
    assert {module.impl for module in model.modules() if hasattr(module, "impl")} == {"naive"}


@pytest.mark.parametrize("with_cp", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_once_for_all_image_sizes(with_cp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHS, "tiny", ARCHS["tiny"] | dict(depth=1))
    for module in (backbone, adapter):
        monkeypatch.setattr(module, "INTERACTIONS", 1)
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    options = dict(adapter=dict(extra_extractors=0))
    plain = make(**options).train()
    options |= dict(with_cp=with_cp, compile=dict(backend=backend))
    model = ViGAdapter("tiny", **options).train()
    model.load_state_dict(plain.state_dict())
    for H, W in ((160, 224), (65, 99), (97, 64), (64, 64)):  # no two sides of maps are alike in the first one
        x = torch.randn(2, 3, H, W)
        for m in (model, plain):
            m.zero_grad()
            loss(m(x)).backward()
        for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert relative_error(a.grad, b.grad) < 1e-3, name
    assert len(graphs) == 1


# -- OpenMMLab


def test_synchronised_batch_norm_needs_nothing_in_one_process(shallow: None) -> None:
    model = make().train()
    assert any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    x = torch.randn(2, 3, 64, 64)
    maps = model(x)
    reverted = revert_sync_batchnorm(model)  # what mmengine's runner does then
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in reverted.modules())
    assert all(torch.equal(a, b) for a, b in zip(maps, reverted(x), strict=True))


def test_norm_of_the_config_is_taken(shallow: None) -> None:
    model = ViGAdapter("tiny", norm_cfg=dict(type="GN", num_groups=16))
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    assert sum(isinstance(module, nn.GroupNorm) for module in model.modules()) == 6 + 4
    assert shapes(model(torch.randn(1, 3, 32, 32))) == expected_shapes(1, 192, 32, 32)


def test_a_detector_neck_and_a_segmentation_head_take_the_maps(shallow: None) -> None:
    from mmdet.models.necks import FPN
    from mmseg.models.decode_heads import UPerHead

    channels = ViGAdapter("tiny").feature_info.channels()
    fpn = FPN(channels, out_channels=16, num_outs=5)
    head = UPerHead(
        in_channels=channels, in_index=[0, 1, 2, 3], pool_scales=(1, 2), channels=16, num_classes=3, dropout_ratio=0
    )
    model, x = make().train(), torch.randn(2, 3, 70, 100)
    pyramid, logits = fpn(model(x)), head(model(x))
    assert shapes(pyramid) == expected_shapes(2, 16, 70, 100, (*STRIDES, 64))
    assert list(logits.shape) == [2, 3, 18, 25]
    (loss(pyramid) + loss([logits])).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
