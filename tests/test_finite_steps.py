"""Updates with gradients that are not finite: skipped, counted and reported, without waiting."""

import copy

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, build_optim_wrapper
from test_batched_rcnn_waits import Watch
from test_configs import REPOSITORY, build, det_batch, load_config, seg_batch
from torch import Tensor, nn

from vig_backbone.openmmlab import finite_steps
from vig_backbone.openmmlab.finite_steps import FiniteOptimWrapper, NonFiniteError

NAN, INF = float("nan"), float("inf")
ADAMW = dict(type="AdamW", lr=1e-2, weight_decay=0.1, fused=True)
OPTIMIZERS = {
    "fused AdamW": ADAMW,
    "AdamW": {**ADAMW, "fused": False},
    "fused SGD": dict(type="SGD", lr=1e-2, momentum=0.9, fused=True),
}
PRECISIONS = {
    "float32": dict(type="FiniteOptimWrapper"),
    "bfloat16": dict(type="FiniteAmpOptimWrapper", dtype="bfloat16"),
    "float16": dict(type="FiniteAmpOptimWrapper", dtype="float16", loss_scale=dict(init_scale=1024.0)),
}


class Net(BaseModel):
    """Its loss and activations are multiplied by what comes with a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor, factor: Tensor, mode: str) -> dict[str, Tensor]:
        y = self.head(self.norm(self.stem(x * factor.mean()))).float()
        return dict(loss_fit=y.square().mean(), loss_l1=self.stem.weight.abs().mean())


def batch(factor: float = 1.0) -> dict:
    return dict(x=torch.randn(6, 4), factor=torch.full((6,), factor))


def make(device: str = "cpu", optimizer: dict = ADAMW, **cfg) -> tuple[Net, OptimWrapper]:
    torch.manual_seed(0)
    model = Net().to(device)
    return model, build_optim_wrapper(model, dict(optimizer=optimizer, **cfg))


def state(model: nn.Module, wrapper: OptimWrapper) -> dict[str, Tensor]:
    """Parameters, running statistics and everything that the optimizer keeps."""
    names = {p: name for name, p in model.named_parameters()}
    kept = {
        f"{names[p]}: {key}": value for p, entries in wrapper.optimizer.state.items() for key, value in entries.items()
    }
    weights = {name: x for name, x in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    return {name: x.detach().clone() for name, x in {**weights, **kept}.items() if x is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, x in expected.items():
        assert torch.equal(actual[name], x), name


def assert_finite_updates(wrapper: FiniteOptimWrapper, skipped: int) -> None:
    wrapper.read()
    assert wrapper.skipped == skipped


@pytest.mark.parametrize("factor", [NAN, INF])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_skipped_update_changes_nothing(precision: str, optimizer: str, factor: float) -> None:
    """Neither weights nor momentum, step counts and running statistics; the next update goes on from there."""
    model, wrapper = make(**PRECISIONS[precision], optimizer=OPTIMIZERS[optimizer])
    twin, twin_wrapper = make(**PRECISIONS[precision], optimizer=OPTIMIZERS[optimizer])
    good = [batch() for _ in range(4)]
    for data in good[:2]:
        model.train_step(data, wrapper)
        twin.train_step(data, twin_wrapper)
    before = state(model, wrapper)
    model.train_step(batch(factor), wrapper)
    assert_same(state(model, wrapper), before)
    assert all(x.isfinite().all() for x in before.values())
    for data in good[2:]:
        model.train_step(data, wrapper)
        twin.train_step(data, twin_wrapper)
    assert_same(state(model, wrapper), state(twin, twin_wrapper))
    assert_finite_updates(wrapper, skipped=1)
    assert_finite_updates(twin_wrapper, skipped=0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", ["seg_configs/upernet_vig_t.py", "det_configs/mask_rcnn_hier_vig_t.py"])
def test_a_skipped_update_changes_nothing_in_a_recipe(recipe: str, precision: str) -> None:
    """With features that are not finite, in heads with batch norm, proposals and sampling."""
    cfg = load_config(REPOSITORY / recipe, data="toy")
    model = build(cfg).train()
    if cfg.default_scope == "mmseg":
        data = seg_batch([(128, 128)] * 2, num_classes=8)
    else:
        data = det_batch([(64, 96)] * 2, [3, 1], num_classes=7)
    wrapper = build_optim_wrapper(model, dict(optimizer=ADAMW, **PRECISIONS[precision]))
    model.train_step(data, wrapper)
    before = state(model, wrapper)
    hook = model.backbone.register_forward_hook(lambda module, inputs, maps: tuple(x * NAN for x in maps))
    model.train_step(data, wrapper)
    assert_same(state(model, wrapper), before)
    hook.remove()
    losses = model.train_step(data, wrapper)
    assert losses["loss"].isfinite()
    assert_finite_updates(wrapper, skipped=1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_very_first_update_can_be_skipped(optimizer: str) -> None:
    model, wrapper = make(type="FiniteOptimWrapper", optimizer=OPTIMIZERS[optimizer])
    twin, twin_wrapper = make(type="FiniteOptimWrapper", optimizer=OPTIMIZERS[optimizer])
    model.train_step(batch(NAN), wrapper)
    assert_same(state(model, wrapper), state(twin, twin_wrapper))
    data = batch()
    model.train_step(data, wrapper)
    twin.train_step(data, twin_wrapper)
    assert_same(state(model, wrapper), state(twin, twin_wrapper))


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(clip_grad=dict(max_norm=0.05)),
        dict(clip_grad=dict(type="value", clip_value=0.01)),
        dict(accumulative_counts=2),
    ],
    ids=["plain", "clipped norm", "clipped value", "accumulated"],
)
def test_finite_training_is_mmengines_bit_for_bit(options: dict) -> None:
    data = [batch() for _ in range(6)]
    results = []
    for kind in ("OptimWrapper", "FiniteOptimWrapper"):
        model, wrapper = make(type=kind, **options)
        for one in data:
            model.train_step(one, wrapper)
        results.append(state(model, wrapper))
    assert_finite_updates(wrapper, skipped=0)
    assert_same(*results)


def test_bfloat16_is_plain_autocast_without_loss_scale() -> None:
    model, wrapper = make(**PRECISIONS["bfloat16"])
    stock, stock_wrapper = make(type="OptimWrapper")
    for _ in range(3):
        data = batch()
        model.train_step(data, wrapper)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, _ = stock.parse_losses(stock(**data, mode="loss"))
        stock_wrapper.update_params(loss)
    assert_same(state(model, wrapper), state(stock, stock_wrapper))
    assert not torch.equal(model.stem.weight, make(type="OptimWrapper")[0].stem.weight)


def test_float16_halves_its_loss_scale_at_every_skipped_update_and_recovers() -> None:
    """A scale that overflows by itself, as at the start of every run."""
    model, wrapper = make(type="FiniteAmpOptimWrapper", dtype="float16", loss_scale=dict(init_scale=2.0**24))
    before = state(model, wrapper)
    for _ in range(12):
        model.train_step(batch(), wrapper)
    wrapper.read()
    assert 0 < wrapper.skipped < 12
    assert wrapper.loss_scaler.get_scale() == 2.0 ** (24 - wrapper.skipped)
    assert not torch.equal(before["stem.weight"], model.stem.weight)


def test_one_bad_part_spoils_the_whole_accumulated_update() -> None:
    model, wrapper = make(type="FiniteOptimWrapper", accumulative_counts=2)
    model.train_step(batch(), wrapper)
    model.train_step(batch(), wrapper)
    before = state(model, wrapper)
    model.train_step(batch(NAN), wrapper)
    model.train_step(batch(), wrapper)
    assert_same(state(model, wrapper), before)
    model.train_step(batch(), wrapper)
    model.train_step(batch(), wrapper)
    assert not torch.equal(model.stem.weight, before["stem.weight"])
    assert_finite_updates(wrapper, skipped=1)


def test_the_log_counts_and_keeps_the_norm_of_finite_gradients() -> None:
    model, wrapper = make(type="FiniteOptimWrapper", clip_grad=dict(max_norm=1.0))
    wrapper.message_hub.log_scalars.clear()
    for factor in (1.0, NAN, 1.0, INF):
        model.train_step(batch(factor), wrapper)
    wrapper.read()
    assert wrapper.message_hub.get_scalar("train/skipped_steps").current() == 2
    norms = wrapper.message_hub.get_scalar("train/grad_norm").data[0]
    assert len(norms) == 2
    assert 0 < min(norms) <= max(norms) < INF


def messages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(finite_steps, "print_log", lambda text, **options: found.append(text))
    return found


def test_the_warning_names_iteration_losses_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    found = messages(monkeypatch)
    model, wrapper = make(type="FiniteOptimWrapper")
    for factor in (1.0, NAN):
        wrapper.remember_losses(model.train_step(batch(factor), wrapper))
    wrapper.read()
    assert len(found) == 1
    assert found[0].startswith("iteration 2: the update was skipped, 6 of 6 gradients are not finite (the first: stem.")
    assert "losses: loss=nan, loss_fit=nan" in found[0]
    assert "loss_l1" not in found[0]


def test_the_warning_tells_an_overflow_of_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    found = messages(monkeypatch)
    model, wrapper = make(type="FiniteOptimWrapper")
    model.head.bias.register_hook(lambda grad: grad * INF)
    wrapper.remember_losses(model.train_step(batch(), wrapper))
    wrapper.read()
    assert "1 of 6 gradients are not finite (the first: head.bias); losses: all finite" in found[0]


def test_the_warning_says_that_a_falling_loss_scale_is_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    found = messages(monkeypatch)
    model, wrapper = make(type="FiniteAmpOptimWrapper", dtype="float16", loss_scale=dict(init_scale=2.0**24))
    wrapper.remember_losses(model.train_step(batch(), wrapper))
    wrapper.read()
    assert "losses: all finite, as usual in float16 until the loss scale fits; it is now 8.38861e+06" in found[0]


def test_only_so_many_in_a_row_are_an_error() -> None:
    model, wrapper = make(type="FiniteOptimWrapper", max_in_a_row=3)
    for factor in (NAN, NAN, 1.0, NAN, NAN, 1.0, 1.0, NAN, NAN):
        model.train_step(batch(factor), wrapper)
    assert_finite_updates(wrapper, skipped=6)
    model.train_step(batch(NAN), wrapper)  # the third in a row, two of which have been read
    with pytest.raises(NonFiniteError, match=r"in 3 updates in a row, iterations 8 to 10; .*lower learning rate"):
        wrapper.read()
    assert wrapper.message_hub.get_scalar("train/skipped_steps").current() == 7


def test_without_the_hook_updates_are_read_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite_steps, "MAX_UNREAD", 4)
    model, wrapper = make(type="FiniteOptimWrapper", max_in_a_row=4)
    for _ in range(4):
        model.train_step(batch(NAN), wrapper)
    with pytest.raises(NonFiniteError):
        model.train_step(batch(NAN), wrapper)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("clip_grad", [None, dict(max_norm=1.0)])
def test_the_host_waits_for_no_update(precision: str, clip_grad: dict | None) -> None:
    """After the first one. mmengine's own wrapper reads the norm of clipped gradients each time."""
    model, wrapper = make(**PRECISIONS[precision], clip_grad=clip_grad)
    losses = [model.train_step(batch(), wrapper)]
    data = [batch(factor) for factor in (1.0, NAN, 1.0)]
    with Watch() as watch:
        losses += [model.train_step(one, wrapper) for one in data]
    assert watch.operators > 100
    assert watch.waits == 0
    assert_finite_updates(wrapper, skipped=1)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (dict(type="FiniteOptimWrapper", max_in_a_row=0), "max_in_a_row=0, expected at least 1"),
        (dict(type="FiniteAmpOptimWrapper", dtype="half"), "dtype='half', expected 'bfloat16' or 'float16'"),
        (dict(type="FiniteAmpOptimWrapper", loss_scale="static"), "loss_scale='static', expected 'dynamic', a number"),
    ],
)
def test_options_that_cannot_be_right_are_refused(cfg: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**cfg)


def test_a_checkpoint_passes_between_precisions_and_the_stock_wrapper() -> None:
    model, half = make(**PRECISIONS["float16"])
    model.train_step(batch(), half)
    model.train_step(batch(NAN), half)
    saved = half.state_dict()
    assert (saved["skipped_steps"], saved["loss_scaler"]["scale"]) == (1, 512.0)
    for kind in (*PRECISIONS.values(), dict(type="OptimWrapper")):
        other_model, other = make(**kind)
        other.load_state_dict(copy.deepcopy(saved))
        other_model.train_step(batch(), other)
        assert next(iter(other.optimizer.state.values()))["step"] == 2
    again = make(**PRECISIONS["float16"])[1]
    again.load_state_dict(copy.deepcopy(saved))
    assert (again.skipped, again.loss_scaler.get_scale()) == (1, 512.0)
    brain = make(**PRECISIONS["bfloat16"])[1]
    again.load_state_dict(brain.state_dict())  # which has no scale


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_on_a_gpu_an_update_is_skipped_without_waiting(precision: str) -> None:
    model, wrapper = make("cuda", **PRECISIONS[precision], clip_grad=dict(max_norm=1.0))
    data = {factor: {name: x.cuda() for name, x in batch(factor).items()} for factor in (1.0, NAN)}
    for _ in range(3):
        model.train_step(data[1.0], wrapper)
    before = state(model, wrapper)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.train_step(data[NAN], wrapper)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(state(model, wrapper), before)
    model.train_step(data[1.0], wrapper)
    assert not torch.equal(model.stem.weight, before["stem.weight"])
    assert_finite_updates(wrapper, skipped=1)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_thousand_updates_stay_finite(precision: str, device: str) -> None:
    model, wrapper = make(device, **PRECISIONS[precision])
    for _ in range(1000):
        model.train_step({name: x.to(device) for name, x in batch().items()}, wrapper)
    wrapper.read()
    assert wrapper.skipped == 0
    assert all(x.isfinite().all() for x in state(model, wrapper).values())
