"""Layer-wise learning-rate decay: every parameter of real detectors and segmenters gets the rate of its layer."""

import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.optim import LinearLR, MultiStepLR, OptimWrapper, PolyLR, build_optim_wrapper
from mmengine.runner import Runner
from test_configs import REPOSITORY, build, load_config
from torch import Tensor, nn

from vig_backbone import HierViG, ViG
from vig_backbone.openmmlab.layer_decay import ViGOptimWrapperConstructor, layer_table

DET_HIER = "det_configs/mask_rcnn_hier_vig_t.py"
SEG_PLAIN = "seg_configs/upernet_vig_t.py"
NAME = ViGOptimWrapperConstructor.__name__


class Detector(BaseModel):
    """A backbone and a head, as small as they come."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Conv2d(192, 2, 1)

    def forward(self, images: Tensor, mode: str) -> dict[str, Tensor]:
        return dict(loss=self.head(self.backbone(images)[-1]).square().mean())


def settings(lr: float = 1e-3, weight_decay: float = 0.05, **paramwise_cfg) -> dict:
    optimizer = dict(type="AdamW", lr=lr, weight_decay=weight_decay, fused=True)
    return dict(type="OptimWrapper", optimizer=optimizer, constructor=NAME, paramwise_cfg=paramwise_cfg)


def by_name(model: nn.Module, wrapper: OptimWrapper) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each parameter; no parameter may be in two groups."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = [
        (names[id(p)], (group["lr"], group["weight_decay"]))
        for group in wrapper.optimizer.param_groups
        for p in group["params"]
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


def steps_from_the_end(name: str, depths: tuple[int, ...]) -> int:
    """How often the rate applies to a parameter of a model whose backbone has `depths` blocks in its stages."""
    total = sum(depths)
    if match := re.match(r"backbone\.blocks\.(\d+)\.", name):
        return total - int(match[1])
    if match := re.match(r"backbone\.layers\.(\d+)\.blocks\.(\d+)\.", name):
        return total - sum(depths[: int(match[1])]) - int(match[2])
    if match := re.match(r"backbone\.layers\.(\d+)\.downsample\.", name):
        return total - sum(depths[: int(match[1]) + 1])
    return total + 1 if re.match(r"backbone\.(patch_embed|pos_embed)", name) else 0


@pytest.mark.parametrize(("path", "depths", "rate"), [(DET_HIER, (2, 2, 5, 2), 0.9), (SEG_PLAIN, (12,), 0.85)])
def test_every_parameter_of_a_recipe_learns_at_the_rate_of_its_layer(path: str, depths, rate: float) -> None:
    model = build(load_config(REPOSITORY / path))
    found = by_name(model, build_optim_wrapper(model, settings(layer_decay_rate=rate)))
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        lr, weight_decay = found[name]
        assert lr == pytest.approx(1e-3 * rate ** steps_from_the_end(name, depths), rel=1e-9), name
        assert weight_decay == (0 if p.dim() == 1 or name == "backbone.pos_embed" else 0.05), name


def test_some_expected_rates_in_numbers() -> None:
    """Against a slip in the formula above."""
    found = by_name(model := Detector(ViG("tiny")), build_optim_wrapper(model, settings(layer_decay_rate=0.5)))
    assert found["backbone.pos_embed"] == (1e-3 * 0.5**13, 0)
    assert found["backbone.blocks.0.attn_norm.weight"] == (1e-3 * 0.5**12, 0)
    assert found["backbone.blocks.11.mlp.down_proj.weight"] == (1e-3 * 0.5, 0.05)
    assert found["backbone.norm.weight"] == (1e-3, 0)
    assert found["head.weight"] == (1e-3, 0.05)
    found = by_name(model := HierViG("tiny"), build_optim_wrapper(model, settings(layer_decay_rate=0.5)))
    assert found["patch_embed.0.weight"] == (1e-3 * 0.5**12, 0.05)
    assert found["layers.0.blocks.1.norm.bias"] == (1e-3 * 0.5**10, 0)
    assert found["layers.0.downsample.1.weight"] == found["layers.1.blocks.0.mlp.fc2.weight"] == (1e-3 * 0.5**9, 0.05)
    assert found["layers.3.blocks.1.mlp.fc2.weight"] == (1e-3 * 0.5, 0.05)
    assert found["outnorm0.weight"] == (1e-3, 0)


@pytest.mark.parametrize("path", [DET_HIER, SEG_PLAIN])
def test_rate_1_is_mmengines_constructor_without_decay_of_flat_parameters(path: str) -> None:
    model = build(load_config(REPOSITORY / path))
    stock_cfg = settings()
    del stock_cfg["constructor"]
    stock_cfg["paramwise_cfg"] = dict(flat_decay_mult=0.0, custom_keys={"pos_embed": dict(decay_mult=0.0)})
    stock = build_optim_wrapper(model, stock_cfg)
    ours = build_optim_wrapper(model, settings())
    assert by_name(model, ours) == by_name(model, stock)
    assert len(ours.optimizer.param_groups) == 2


def test_an_adapter_learns_at_the_full_rate_and_names_what_is_not_decayed() -> None:
    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.level_embed = nn.Parameter(torch.zeros(3, 192))
            self.proj = nn.Linear(4, 4)

        def no_weight_decay(self) -> set[str]:
            return {"level_embed"}

    class Adapted(ViG):
        def __init__(self) -> None:
            super().__init__("tiny")
            self.adapter = Adapter()
            self.blocks[3].attn.lora = nn.Linear(4, 4, bias=False)

    model = Adapted()
    found = by_name(model, build_optim_wrapper(model, settings(layer_decay_rate=0.5)))
    assert found["adapter.level_embed"] == (1e-3, 0)
    assert found["adapter.proj.weight"] == (1e-3, 0.05)
    assert found["blocks.3.attn.lora.weight"] == (1e-3 * 0.5**9, 0.05)


def test_custom_keys_multiply_the_rate_and_set_the_decay() -> None:
    keys = {
        "head": dict(lr_mult=10.0),
        "head.bias": dict(lr_mult=2.0, decay_mult=0.5),
        "blocks.0.mlp": dict(decay_mult=0.1),
    }
    model = Detector(ViG("tiny"))
    found = by_name(model, wrapper := build_optim_wrapper(model, settings(layer_decay_rate=0.5, custom_keys=keys)))
    assert found["head.weight"] == (1e-2, 0.05)
    assert found["head.bias"] == (2e-3, 0.025)  # the longest key that fits
    assert found["backbone.blocks.0.mlp.gate_proj.weight"] == (1e-3 * 0.5**12, 0.05 * 0.1)
    assert found["backbone.blocks.1.mlp.gate_proj.weight"] == (1e-3 * 0.5**11, 0.05)
    assert wrapper.optimizer.param_groups[0]["lr"] == 1e-3  # what is logged, although the head learns faster


def test_frozen_stages_are_in_no_group() -> None:
    model = Detector(ViG("tiny", frozen_stages=2))
    found = by_name(model, build_optim_wrapper(model, settings(layer_decay_rate=0.5)))
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith(("backbone.pos_embed", "backbone.blocks.1.")) for name in found)
    assert found["backbone.blocks.2.mlp.down_proj.weight"] == (1e-3 * 0.5**10, 0.05)


def test_a_model_inside_a_wrapper_gives_the_same_groups(tmp_path: Path) -> None:
    model = Detector(ViG("tiny"))
    plain = build_optim_wrapper(model, settings(layer_decay_rate=0.5))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = build_optim_wrapper(MMDistributedDataParallel(model), settings(layer_decay_rate=0.5))
    finally:
        torch.distributed.destroy_process_group()
    assert by_name(model, wrapped) == by_name(model, plain)


@pytest.mark.parametrize(
    ("paramwise_cfg", "message"),
    [
        (dict(decay_rate=0.9), "unknown 'decay_rate'; known are 'layer_decay_rate', 'custom_keys'"),
        (dict(layer_decay_rate=1.5), "layer_decay_rate=1.5, expected a number above 0, at most 1"),
        (dict(layer_decay_rate="0.9"), "layer_decay_rate='0.9', expected a number"),
        (dict(custom_keys={"head": dict(lr=1.0)}), r"custom_keys\['head'\] has unknown 'lr'; known are 'lr_mult'"),
        (dict(custom_keys={"haed": dict(lr_mult=1.0)}), "custom_keys 'haed': part of no parameter's name"),
    ],
)
def test_fields_that_cannot_be_right_are_refused(paramwise_cfg: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_optim_wrapper(Detector(ViG("tiny")), settings(**paramwise_cfg))


def test_an_optimizer_without_weight_decay_must_say_so() -> None:
    cfg = settings()
    del cfg["optimizer"]["weight_decay"]
    with pytest.raises(ValueError, match=r"must say its weight_decay \(0 for none\)"):
        build_optim_wrapper(Detector(ViG("tiny")), cfg)


def test_another_backbone_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not of Conv2d: leave optim_wrapper\.constructor out"):
        build_optim_wrapper(Detector(nn.Conv2d(3, 4, 1)), settings())


def test_a_parameter_of_no_layer_is_refused_by_name() -> None:
    backbone = ViG("tiny")
    backbone.normalizer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"ViG that belong to no layer: 'normalizer\.weight', 'normalizer\.bias'"):
        build_optim_wrapper(Detector(backbone), settings())


def test_the_table_accounts_for_every_parameter_and_describes_the_groups() -> None:
    model = Detector(HierViG("tiny"))
    rows = layer_table(model, cfg := settings(layer_decay_rate=0.9))
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters())
    wrapper = build_optim_wrapper(model, cfg)
    groups = wrapper.optimizer.param_groups
    assert [(row.lr, row.weight_decay, row.tensors) for row in rows] == [
        (group["lr"], group["weight_decay"], len(group["params"])) for group in groups
    ]
    assert [row.layer for row in rows[::2]][:3] == ["rest", "layers.3.blocks.1", "layers.3.blocks.0"]
    assert rows[-1].layer == "stem"
    assert rows[-1].lr_scale == pytest.approx(0.9**12)


def train(tmp_path: Path, iterations: int, **options) -> Runner:
    torch.manual_seed(0)
    runner = Runner(
        model=Detector(ViG("tiny", out_indices=(11,))),
        work_dir=str(tmp_path),
        train_dataloader=dict(
            dataset=[dict(images=image) for image in torch.rand(4, 3, 32, 32)],
            batch_size=2,
            sampler=dict(type=DefaultSampler, shuffle=False),
            collate_fn=dict(type="default_collate"),
        ),
        train_cfg=dict(by_epoch=False, max_iters=iterations),
        optim_wrapper=settings(layer_decay_rate=0.5),
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=1, by_epoch=False)),
        experiment_name=f"{tmp_path.name}_{iterations}",
        default_scope="mmengine",
        **options,
    )
    runner.train()
    return runner


def test_the_log_shows_the_learning_rate_of_the_heads_and_training_resumes(tmp_path: Path) -> None:
    first = train(tmp_path, 1)
    assert first.message_hub.get_scalar("train/lr").data[0].tolist() == [1e-3]
    assert first.message_hub.get_scalar("train/base_lr").data[0].tolist() == [1e-3]
    assert "blocks.11" in (Path(first.log_dir) / f"{first.timestamp}.log").read_text()

    resumed = train(tmp_path, 2, resume=True, load_from=str(tmp_path / "iter_1.pth"))
    assert resumed.iter == 2
    at_once = train(tmp_path / "at_once", 2)
    for (name, expected), actual in zip(at_once.model.named_parameters(), resumed.model.parameters()):
        torch.testing.assert_close(actual, expected, msg=name)


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda wrapper: LinearLR(wrapper, start_factor=0.01, by_epoch=False, end=5),
        lambda wrapper: PolyLR(wrapper, eta_min=0.0, power=1.0, by_epoch=False, end=10),
        lambda wrapper: MultiStepLR(wrapper, milestones=[2, 4], by_epoch=False),
    ],
    ids=["linear", "poly", "steps"],
)
def test_schedules_keep_the_ratio_between_layers(scheduler) -> None:
    wrapper = build_optim_wrapper(Detector(ViG("tiny")), settings(layer_decay_rate=0.5))
    ratios = [row.lr_scale for row in layer_table(Detector(ViG("tiny")), settings(layer_decay_rate=0.5))]
    schedule = scheduler(wrapper)
    seen = set()
    for _ in range(6):
        wrapper.step()
        schedule.step()
        lrs = wrapper.get_lr()["lr"]
        assert [lr / lrs[0] for lr in lrs] == pytest.approx(ratios)
        seen.add(lrs[0])
    assert len(seen) > 1


def test_config_objects_are_taken_like_dicts() -> None:
    cfg = Config(dict(optim_wrapper=settings(layer_decay_rate=0.5, custom_keys={"head": dict(lr_mult=2.0)})))
    model = Detector(ViG("tiny"))
    assert by_name(model, build_optim_wrapper(model, cfg.optim_wrapper))["head.weight"] == (2e-3, 0.05)
    assert {row.lr for row in layer_table(model, cfg.optim_wrapper)} >= {2e-3, 5e-4}
