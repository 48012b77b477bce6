"""Batches of images of different sizes: each image gets what it gets alone, whatever stands in its padding."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_backbones import make
from test_gla import relative_error
from torch import Tensor, nn

from vig_backbone import HierViG, ViG, hier_vig, vig
from vig_backbone.mixer import GLAMixer
from vig_backbone.padding import attach_valid_sizes, clear_padding, clear_padding_tokens
from vig_backbone.resizing import resize_bicubic

SIZES = [(75, 100), (64, 33), (130, 150), (32, 41)]
FAMILIES = pytest.mark.parametrize("family", [ViG, HierViG])


def padded_batch(sizes: list[tuple[int, int]], H: int, W: int) -> Tensor:
    """Images, with anything but zeros behind them."""
    batch = torch.randn(len(sizes), 3, H, W)
    for image, (h, w) in zip(batch, sizes):
        image[:, h:] = float("nan")
        image[:, :, w:] = 100.0
    return batch


def assert_like_alone(
    model: nn.Module, batch: Tensor, maps: tuple[Tensor, ...], sizes: list[tuple[int, int]], limit: float = 1e-4
) -> None:
    for i, (h, w) in enumerate(sizes):
        for together, alone in zip(maps, model(batch[i : i + 1, :, :h, :w])):
            rows, columns = alone.shape[-2:]
            assert relative_error(together[i, :, :rows, :columns], alone[0]) < limit
            assert not together[i, :, rows:].any()
            assert not together[i, :, :, columns:].any()


@FAMILIES
@torch.no_grad()
def test_maps_do_not_depend_on_padding(family):
    model = make(family, **({"out_indices": (0, 5, 11)} if family is ViG else {}))
    batch = padded_batch(SIZES, 133, 151)
    assert_like_alone(model, batch, model(batch, torch.tensor(SIZES)), SIZES)


@FAMILIES
@torch.no_grad()
def test_sizes_that_come_along_with_the_images_count(family):
    model = make(family)
    batch, sizes = padded_batch(SIZES[:2], 80, 128), torch.tensor(SIZES[:2])
    expected = model(batch, sizes)
    attach_valid_sizes(batch, sizes)
    assert all(torch.equal(a, e) for a, e in zip(model(batch), expected))
    assert torch.equal(model.forward_features(batch), expected[-1])
    final, maps = model.forward_intermediates(batch)
    assert torch.equal(final, expected[-1])
    assert all(not x[1, :, :, -1].any() for x in maps)


@FAMILIES
@torch.no_grad()
def test_without_sizes_padding_is_image(family):
    """What the other tests would not see if they compared nothing."""
    model = make(family)
    batch = torch.zeros(1, 3, 96, 128)
    batch[:, :, :75, :100] = torch.randn(1, 3, 75, 100)
    alone, together = model(batch[:, :, :75, :100])[-1], model(batch)[-1]
    assert relative_error(together[..., : alone.shape[2], : alone.shape[3]], alone) > 1e-2


@FAMILIES
@pytest.mark.parametrize("with_cp", [False, True])
def test_gradients_of_a_batch_are_those_of_its_images(family, with_cp):
    model = make(family, with_cp=with_cp).train()
    sizes = [(40, 57), (64, 33)]
    batch = padded_batch(sizes, 70, 64).requires_grad_()

    def gradients(maps: tuple[Tensor, ...]) -> dict[str, Tensor]:
        sum((x * torch.linspace(-1, 1, x.shape[1])[:, None, None]).square().sum() for x in maps).backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    together = gradients(model(batch, torch.tensor(sizes)))
    from_images = [batch.grad[i : i + 1, :, :h, :w].clone() for i, (h, w) in enumerate(sizes)]
    alone: dict[str, Tensor] = {}
    for i, (h, w) in enumerate(sizes):
        image = batch.detach()[i : i + 1, :, :h, :w].requires_grad_()
        for name, gradient in gradients(model(image)).items():
            alone[name] = alone.get(name, 0) + gradient
        assert relative_error(from_images[i], image.grad) < 1e-4
        assert not batch.grad[i, :, h:].any()
        assert not batch.grad[i, :, :, w:].any()
    assert together.keys() == alone.keys()
    for name in alone:
        assert relative_error(together[name], alone[name]) < 1e-4, name


@pytest.mark.parametrize("activation", [False, True])
def test_triton_form_of_the_mixer_agrees(device, activation):
    def run(impl: str) -> list[Tensor]:
        torch.manual_seed(1)
        mixer = GLAMixer(32, 2, activation, gla_impl=impl).to(device)
        x = torch.randn(2, 6, 7, 32, device=device, requires_grad=True)
        y = clear_padding_tokens(mixer(x, sizes), sizes)
        y.square().sum().backward()
        return [y.detach(), x.grad, *(p.grad for p in mixer.parameters())]

    sizes = torch.tensor([[6, 4], [5, 7]], device=device)
    for actual, expected in zip(run("triton"), run("chunk")):
        assert relative_error(actual, expected) < 1e-4


@pytest.mark.gpu
@FAMILIES
@torch.no_grad()
def test_maps_do_not_depend_on_padding_on_a_gpu(family, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = make(family).cuda()
    batch = padded_batch(SIZES, 133, 151).cuda()
    # These weights make every part matter, and rounding as well; other sizes take other kernels of cuDNN.
    assert_like_alone(model, batch, model(batch, torch.tensor(SIZES, device="cuda")), SIZES, limit=1e-3)


@FAMILIES
@torch.no_grad()
def test_low_precision_is_as_close_to_the_exact_maps_as_alone(family):
    model = make(family)
    (h, w), *_ = SIZES
    batch = padded_batch(SIZES[:2], 80, 112)
    alone = batch[:1, :, :h, :w]
    exact = model(alone)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, padded = model(alone), model(batch, torch.tensor(SIZES[:2]))
    for e, r, p in zip(exact, rounded, padded):
        assert relative_error(p[:1, :, : e.shape[2], : e.shape[3]], e) < 1.5 * relative_error(r, e)


@FAMILIES
@torch.no_grad()
def test_one_more_graph_for_padded_batches_of_any_size(family, monkeypatch):
    monkeypatch.setitem(vig.ARCHS["tiny"], "depth", 2)
    monkeypatch.setitem(hier_vig.ARCHS["tiny"], "depths", (1, 1))
    last = dict(out_indices=(-1,))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    model = family("tiny", **last).eval()
    compiled = family("tiny", compile=dict(backend=backend, fullgraph=True), **last).eval()
    compiled.load_state_dict(model.state_dict())
    for H, W, sizes in [(96, 128, SIZES[:2]), (80, 112, SIZES[:2]), (80, 112, None), (77, 101, [(40, 40), (32, 101)])]:
        batch = torch.randn(2, 3, H, W)
        attach_valid_sizes(batch, None if sizes is None else torch.tensor(sizes))
        for actual, expected in zip(compiled(batch), model(batch)):
            assert relative_error(actual, expected) < 1e-5
    widths = 1 if family is vig.ViG else 2
    assert len(graphs) == 2 * widths


def test_position_embedding_is_resized_to_the_grid_of_each_image():
    grid = torch.randn(1, 14, 14, 6, dtype=torch.float64, requires_grad=True)
    sizes = [(14, 14), (7, 30), (1, 3), (33, 20), (1, 1)]
    resized = resize_bicubic(grid, torch.tensor(sizes), (34, 31))
    assert resized.shape == (5, 34, 31, 6)
    expected = torch.zeros(5, 34, 31, 6, dtype=torch.float64)
    for i, (h, w) in enumerate(sizes):
        expected[i, :h, :w] = F.interpolate(grid.permute(0, 3, 1, 2), (h, w), mode="bicubic")[0].permute(1, 2, 0)
    assert relative_error(resized.detach(), expected.detach()) < 1e-12
    weight = torch.randn_like(expected)
    actual, wanted = (torch.autograd.grad((x * weight).sum(), grid)[0] for x in (resized, expected))
    assert relative_error(actual, wanted) < 1e-12


def test_position_embedding_is_resized_in_float32_under_autocast():
    grid = torch.randn(1, 14, 14, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        resized = resize_bicubic(grid, torch.tensor([[20, 20]]), (20, 20))
    expected = F.interpolate(grid.permute(0, 3, 1, 2), (20, 20), mode="bicubic").permute(0, 2, 3, 1)
    assert relative_error(resized, expected) < 1e-5


def test_padding_is_filled_and_nothing_else():
    x = torch.randn(2, 3, 4, 5)
    cleared = clear_padding(x, torch.tensor([[4, 2], [3, 5]]), value=7.0)
    assert torch.equal(cleared[0, :, :, :2], x[0, :, :, :2])
    assert torch.equal(cleared[1, :, :3], x[1, :, :3])
    assert (cleared == 7).sum() == 3 * (4 * 3 + 5)
    assert clear_padding(x, None) is x


@FAMILIES
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([[64, 64]], r"valid_sizes must hold .* integers \[2, 2\], got shape \[1, 2\]"),
        ([[64.0, 64.0]] * 2, r"valid_sizes must hold .*torch.float32"),
        ([[64, 64], [65, 64]], "65x64 pixels do not lie in a batch of 64x64 pixels"),
        ([[64, 64], [64, 0]], "64x0 pixels do not lie in a batch of 64x64 pixels"),
    ],
)
def test_sizes_that_cannot_be_are_refused(family, sizes, message):
    with pytest.raises(ValueError, match=message):
        make(family)(torch.zeros(2, 3, 64, 64), torch.tensor(sizes))


def test_a_copy_of_a_model_keeps_its_own_padding():
    """As for an exponential moving average."""
    pytest.importorskip("mmengine")
    from vig_backbone.openmmlab.padding_masks import PaddingMasks

    class Neck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1)
            self.padding = PaddingMasks(self.conv)

        def forward(self, images: Tensor) -> Tensor:
            self.padding.set_images(images)
            return self.conv(images)

    neck = Neck()
    twin = copy.deepcopy(neck)
    images = torch.ones(1, 1, 8, 8)
    attach_valid_sizes(images, torch.tensor([[4, 4]]))
    neck(images)
    assert torch.equal(twin(torch.ones(1, 1, 8, 8)), neck.conv(torch.ones(1, 1, 8, 8))) is False
    assert torch.equal(twin(images), neck(images))
