"""FusedEncoderDecoder against mmseg's EncoderDecoder: losses, accuracy, gradients and label maps."""

import copy

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.model import BaseModule
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData
from torch import Tensor, nn

import vig_backbone  # noqa: F401
from vig_backbone.openmmlab import fused_segmentor
from vig_backbone.openmmlab.configuration import load_config, use_tta

CLASSES = 7
WEIGHTS = [0.5, 1.0, 2.0, 0.1, 3.0, 1.5, 0.0]


@MODELS.register_module()
class FourConvolutions(BaseModule):
    """A pyramid of strides 4 to 32 with eight channels each."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8 if i else 3, 8, 3, 2 if i else 4, 1) for i in range(4))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for conv in self.convs:
            x = conv(x).tanh()
            maps.append(x)
        return maps


def head(kind: str = "FCNHead", **options) -> dict:
    common = dict(type=kind, channels=8, num_classes=CLASSES, norm_cfg=dict(type="BN"), dropout_ratio=0.0)
    if kind == "UPerHead":
        common.update(in_channels=[8] * 4, in_index=[0, 1, 2, 3], pool_scales=(1, 2))
    else:
        common.update(in_channels=8, in_index=1)
    return {**common, **options}


def build(kind: str, decode_head: dict, auxiliary_head: dict | list | None = None, **options) -> nn.Module:
    """Two calls with the same heads have the same weights."""
    init_default_scope("mmseg")
    torch.manual_seed(0)
    options.setdefault("test_cfg", ConfigDict(mode="whole"))
    backbone = dict(type="FourConvolutions")
    config = dict(backbone=backbone, decode_head=decode_head, auxiliary_head=auxiliary_head, train_cfg=dict())
    model = MODELS.build(copy.deepcopy(dict(type=kind, **config, **options)))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def batch(sizes: list[tuple[int, int]], ignored: float = 0.2, **meta) -> tuple[Tensor, list]:
    """Images of one size, the first one's, and labels; `sizes` are those of the originals."""
    from mmseg.structures import SegDataSample

    H, W = sizes[0]
    samples = []
    for size in sizes:
        sample = SegDataSample(metainfo=dict(img_shape=(H, W), ori_shape=size, **meta))
        labels = torch.randint(0, CLASSES, (1, H, W))
        labels[torch.rand(labels.shape) < ignored] = 255
        sample.gt_sem_seg = PixelData(data=labels)
        samples.append(sample)
    return torch.randn(len(sizes), 3, H, W), samples


def losses_and_gradients(model: nn.Module, data: tuple[Tensor, list]) -> tuple[dict[str, Tensor], list[Tensor]]:
    losses = model.loss(*data)
    total, _ = model.parse_losses(losses)
    gradients = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    return losses, [g for g in gradients if g is not None]


def assert_same_training(decode_head: dict, auxiliary_head: dict | list | None = None, ignored: float = 0.2) -> None:
    data = batch([(37, 50), (37, 50)], ignored)
    stock, fused = (build(kind, decode_head, auxiliary_head) for kind in ("EncoderDecoder", "FusedEncoderDecoder"))
    (expected, expected_gradients), (actual, gradients) = (
        losses_and_gradients(model, data) for model in (stock, fused)
    )
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        torch.testing.assert_close(actual[name], value, rtol=2e-5, atol=1e-6, msg=name)
    assert len(gradients) == len(expected_gradients) > 5
    largest = max(e.abs().max() for e in expected_gradients)  # a bias before a norm has none, to rounding
    for a, e in zip(gradients, expected_gradients):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5 * float(largest))


def entropy(**options) -> dict:
    return dict(type="CrossEntropyLoss", **options)


OHEM = dict(type="OHEMPixelSampler", min_kept=300)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(align_corners=True),
        dict(loss_decode=entropy(loss_weight=0.4, avg_non_ignore=True)),
        dict(loss_decode=entropy(reduction="sum", loss_weight=1e-3)),
        dict(loss_decode=entropy(reduction="none")),
        dict(loss_decode=entropy(reduction="sum", class_weight=WEIGHTS, loss_weight=1e-3)),
        dict(loss_decode=[entropy(), entropy(loss_weight=0.5, avg_non_ignore=True)]),
        dict(loss_decode=[entropy(loss_name="loss_a"), entropy(loss_name="loss_b", loss_weight=2.0)]),
        dict(sampler=dict(**OHEM, thresh=0.3)),
        dict(sampler=dict(**OHEM, thresh=0.01)),
        dict(sampler=OHEM),
        dict(sampler=OHEM, loss_decode=[entropy(), entropy(loss_name="loss_b", reduction="sum", loss_weight=1e-3)]),
        dict(ignore_index=3),
    ],
    ids=str,
)
def test_training_is_that_of_mmseg(options):
    # Without the default 255 some label other than those of the classes would be no label at all.
    assert_same_training(head(**options), ignored=0 if "ignore_index" in options else 0.2)


@pytest.mark.parametrize("non_ignore", [False, True])
def test_class_weights_are_those_of_mmseg(non_ignore):
    """mmseg's mean fails where a pixel is ignored."""
    assert_same_training(head(loss_decode=entropy(class_weight=WEIGHTS, avg_non_ignore=non_ignore)), ignored=0)


def test_ignored_pixels_weigh_nothing_under_class_weights():
    images, samples = batch([(32, 32)], ignored=0)
    model = build("FusedEncoderDecoder", head(loss_decode=entropy(class_weight=WEIGHTS)))
    for sample in samples:
        sample.gt_sem_seg.data[:, :16] = 255
    logits = nn.functional.interpolate(model._forward(images), (32, 32), mode="bilinear")
    labels = torch.cat([sample.gt_sem_seg.data for sample in samples])
    expected = nn.functional.cross_entropy(logits, labels, torch.tensor(WEIGHTS), ignore_index=255)
    torch.testing.assert_close(model.loss(images, samples)["decode.loss_ce"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["UPerHead", "PSPHead", "DepthwiseSeparableFCNHead"])
def test_other_heads_and_auxiliary_ones(kind):
    assert_same_training(head(kind), head(loss_decode=entropy(loss_weight=0.4)))


def test_a_list_of_auxiliary_heads():
    assert_same_training(head(), [head(in_index=0), head(in_index=3)])


@pytest.mark.parametrize(
    "options", [dict(), dict(loss_decode=entropy(avg_non_ignore=True)), dict(sampler=OHEM)], ids=str
)
def test_all_pixels_ignored(options):
    images, samples = batch([(32, 32)], ignored=1.1)
    losses, gradients = losses_and_gradients(build("FusedEncoderDecoder", head(**options)), (images, samples))
    assert losses["decode.loss_ce"] == 0
    assert losses["decode.acc_seg"] == 100  # mmseg's 0 of 0
    assert gradients
    assert not any(g.any() for g in gradients)


def test_heads_with_other_losses_compute_them_by_themselves(monkeypatch):
    from vig_backbone.openmmlab import fused_segmentor

    messages = []
    monkeypatch.setattr(fused_segmentor, "print_log", lambda message, **options: messages.append(message))
    dice = dict(type="DiceLoss", loss_name="loss_dice")
    assert_same_training(head(), head(loss_decode=[entropy(), dice]))
    assert messages == [
        "auxiliary_head (FCNHead) computes its loss from logits of full resolution: "
        "loss_decode is not CrossEntropyLoss over softmax alone"
    ]
    model = build("FusedEncoderDecoder", head(), head(loss_decode=[entropy(), dice]))
    assert model._plain_heads == {model.auxiliary_head}


def test_bfloat16_is_nearer_to_float32_than_mmseg():
    data = batch([(37, 50), (37, 50)])
    models = [build(kind, head("UPerHead"), head()) for kind in ("EncoderDecoder", "FusedEncoderDecoder")]
    expected, _ = losses_and_gradients(models[0], data)
    with torch.autocast("cpu", torch.bfloat16):
        stock, fused = (losses_and_gradients(model, data)[0] for model in models)
    for name in ("decode.loss_ce", "aux.loss_ce"):
        assert fused[name].dtype == torch.float32
        assert abs(fused[name] - expected[name]) <= abs(stock[name] - expected[name]) + 2e-3 * expected[name]


# ---- prediction


def assert_same_prediction(data: tuple[Tensor, list | None], align_corners: bool = False, **test_cfg) -> None:
    """The same label map, but for ties to rounding."""
    options = dict(decode_head=head("UPerHead", align_corners=align_corners), test_cfg=ConfigDict(test_cfg))
    images, samples = data
    outputs = []
    for kind in ("EncoderDecoder", "FusedEncoderDecoder"):
        model = build(kind, **options).eval()
        with torch.no_grad():
            outputs.append(model.predict(images, copy.deepcopy(samples)))
    for stock, fused in zip(*outputs, strict=True):
        expected, actual = stock.pred_sem_seg.data, fused.pred_sem_seg.data
        assert actual.shape == expected.shape
        assert actual.dtype == expected.dtype
        logits = stock.seg_logits.data
        assert (logits.amax(0) - logits.gather(0, actual)[0]).max() < 1e-4
        assert (actual != expected).float().mean() < 0.01
        assert len(actual.unique()) > 1
        assert "seg_logits" not in fused


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    "meta",
    [
        dict(),
        dict(pad_shape=(64, 96), img_padding_size=[0, 10, 0, 7]),
        dict(pad_shape=(64, 96), padding_size=[3, 1, 2, 0], flip=True, flip_direction="horizontal"),
        dict(flip=True, flip_direction="vertical"),
    ],
    ids=str,
)
def test_label_maps_are_those_of_mmseg(meta, align_corners):
    images, samples = batch([(64, 96), (33, 47)], **meta)
    samples[0].set_metainfo(dict(ori_shape=(101, 150)))
    assert_same_prediction((images, samples), align_corners, mode="whole")


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    ("size", "crop", "stride"),
    [
        ((64, 96), (32, 32), (21, 21)),
        ((50, 70), (32, 48), (20, 32)),
        ((40, 40), (64, 64), (42, 42)),  # smaller than a window
        ((33, 90), (48, 32), (30, 7)),  # five windows over a pixel
    ],
    ids=str,
)
def test_sliding_windows_are_those_of_mmseg(size, crop, stride, align_corners):
    images, samples = batch([size, size])
    samples[1].set_metainfo(dict(ori_shape=(77, 51)))
    # mmseg changes the metas of a batch on its way.
    settings = dict(mode="slide", crop_size=crop, stride=stride)
    assert_same_prediction((images, samples), align_corners, **settings)


@pytest.mark.parametrize("settings", [dict(window_batch=3), dict()], ids=["as_told", "by_their_pixels"])
def test_windows_go_through_the_model_some_at_a_time(settings, monkeypatch):
    monkeypatch.setitem(fused_segmentor.WINDOW_PIXELS, "cpu", 3 * 32 * 48 + 5)
    images, samples = batch([(50, 70), (50, 70)])
    settings = settings | dict(mode="slide", crop_size=(32, 48), stride=(20, 32))
    model = build("FusedEncoderDecoder", head("UPerHead"), test_cfg=ConfigDict(settings)).eval()
    sizes = []
    model.backbone.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    with torch.no_grad():
        model.predict(images, samples)
    assert sizes == [3, 3, 2]  # two rows and two columns of windows, two images
    assert_same_prediction(batch([(50, 70), (50, 70)]), **settings)


def test_windows_count_less_towards_their_edges():
    """In a linear blend, as far as a pixel is from the nearest edge along each side."""
    images, samples = batch([(50, 70)])
    settings = ConfigDict(mode="slide", crop_size=(32, 40), stride=(18, 30), blend="linear", with_scores=True)
    model = build("FusedEncoderDecoder", head(), test_cfg=settings).eval()
    total, covers = torch.zeros(1, model.num_classes, 50, 70), torch.zeros(50, 70)
    rows, columns = (torch.tensor([min(i + 1, side - i) for i in range(side)]) for side in (32, 40))
    share = rows[:, None] * columns
    with torch.no_grad():
        for top, left in ((top, left) for top in (0, 18) for left in (0, 30)):
            window = images[:, :, top : top + 32, left : left + 40]
            logits = nn.functional.interpolate(model.decode_head(model.extract_feat(window)), (32, 40), mode="bilinear")
            total[:, :, top : top + 32, left : left + 40] += share * logits
            covers[top : top + 32, left : left + 40] += share
        (predicted,) = model.predict(images, samples)
    scores, classes = (total / covers).softmax(1).max(1)
    torch.testing.assert_close(predicted.seg_scores.data, scores, rtol=1e-4, atol=1e-5)
    assert (predicted.pred_sem_seg.data == classes).float().mean() > 0.999


def test_prediction_without_data_samples():
    assert_same_prediction((torch.randn(2, 3, 41, 55), None), mode="whole")


def test_scores_are_those_of_the_class():
    images, samples = batch([(64, 96)])
    samples[0].set_metainfo(dict(ori_shape=(80, 90)))
    model = build("FusedEncoderDecoder", head("UPerHead"), test_cfg=ConfigDict(mode="whole", with_scores=True)).eval()
    with torch.no_grad():
        (fused,) = model.predict(images, copy.deepcopy(samples))
        model.test_cfg.keep_logits = True
        (stock,) = model.predict(images, samples)
    assert fused.seg_scores.shape == (80, 90)
    torch.testing.assert_close(fused.seg_scores.data[0], stock.seg_logits.data.softmax(0).amax(0), rtol=1e-4, atol=1e-5)


def test_wrong_settings_are_errors():
    images, samples = batch([(64, 96)], flip=True, flip_direction="diagonal")
    model = build("FusedEncoderDecoder", head(), test_cfg=ConfigDict(mode="whole"))
    with pytest.raises(ValueError, match="flip_direction='diagonal': expected 'horizontal' or 'vertical'"):
        model.predict(images, samples)
    model.test_cfg.blend = "cosine"
    with pytest.raises(ValueError, match=r"model\.test_cfg\.blend='cosine': expected one of 'mean', 'linear'"):
        model.predict(images, samples)
    model.test_cfg.update(blend="linear", keep_logits=True)
    with pytest.raises(
        ValueError, match=r"blend='linear' needs label maps from low-resolution logits: with keep_logits"
    ):
        model.predict(images, samples)
    model.test_cfg.update(blend="mean", keep_logits=False)
    model.test_cfg.mode = "sliding"
    with pytest.raises(ValueError, match=r"model.test_cfg.mode='sliding': expected 'slide' or 'whole'"):
        model.predict(images, samples)


def test_parameters_are_those_of_mmseg():
    stock, fused = (build(kind, head("UPerHead"), head()) for kind in ("EncoderDecoder", "FusedEncoderDecoder"))
    fused.load_state_dict(stock.state_dict(), strict=True)


def test_test_time_augmentation_gets_logits():
    cfg = load_config("seg_configs/upernet_hier_vig_t.py")
    use_tta(cfg)
    assert cfg.model.module.test_cfg.keep_logits
