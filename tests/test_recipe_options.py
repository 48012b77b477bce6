"""Options of tools/train.py that change a recipe: pre-trained weights, mixed precision, averaging, checkpointing."""

import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from test_configs import DET, SEG

from vig_backbone import build_backbone
from vig_backbone.openmmlab import configuration
from vig_backbone.openmmlab.configuration import (
    load_config,
    use_amp,
    use_ema,
    use_gradient_checkpointing,
    use_pretrained,
)
from vig_backbone.openmmlab.errors import ConfigError

VIG_T = "seg_configs/upernet_vig_t.py"


@pytest.fixture
def cfg() -> Config:
    return load_config(SEG[0].parents[1] / VIG_T)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [("FiniteOptimWrapper", "FiniteAmpOptimWrapper"), ("FiniteAmpOptimWrapper", "FiniteAmpOptimWrapper")],
)
def test_amp_keeps_to_the_recipes_wrapper(cfg, given, expected, dtype):
    cfg.optim_wrapper.type = given
    use_amp(cfg, dtype)
    assert (cfg.optim_wrapper.type, cfg.optim_wrapper.dtype) == (expected, dtype)
    assert "loss_scale" not in cfg.optim_wrapper


def test_amp_with_the_stock_wrapper_is_mmengines(cfg, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg.optim_wrapper.type = "OptimWrapper"
    use_amp(cfg, "float16")
    assert (cfg.optim_wrapper.type, cfg.optim_wrapper.loss_scale) == ("AmpOptimWrapper", "dynamic")


def test_amp_that_cannot_be_says_why(cfg, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg.optim_wrapper.type = "OptimWrapper"
    with pytest.raises(ConfigError, match=r"on GPUs only.*optim_wrapper\.type=FiniteAmpOptimWrapper"):
        use_amp(cfg, "bfloat16")
    cfg.optim_wrapper.type = "ApexOptimWrapper"
    with pytest.raises(ConfigError, match="'ApexOptimWrapper': --amp needs one of 'FiniteOptimWrapper'"):
        use_amp(cfg, "bfloat16")


def test_average_is_asked_for_once(cfg):
    hooks = list(cfg.custom_hooks)
    use_ema(cfg)
    use_ema(cfg)
    assert cfg.custom_hooks == [*hooks, dict(type="EMAHook", update_buffers=True)]


@pytest.mark.parametrize("path", [*SEG, *DET], ids=lambda p: p.stem)
def test_every_recipe_takes_the_options_of_its_backbone(path, tmp_path):
    cfg = load_config(path)
    use_gradient_checkpointing(cfg)
    assert cfg.model.backbone.with_cp is True
    family = "vig_h_" if "hier" in path.stem else "vig_"
    official = tmp_path / f"{family}{cfg.model.backbone.arch[0]}_81p7acc.pth"
    for other in ("vig_t_1.pth", "vig_s_1.pth", "vig_b_1.pth", "vig_h_t_1.pth", "vig_h_s_1.pth", "vig_h_b_1.pth"):
        if not official.name.startswith(other[:-5]):
            (tmp_path / other).touch()
    official.touch()
    use_pretrained(cfg, str(tmp_path))
    assert cfg.model.backbone.init_cfg == dict(type="Pretrained", checkpoint=str(official))


def test_pretrained_takes_a_file_or_a_url(cfg, tmp_path):
    for source in (str(tmp_path / "mine.pth"), "https://example.org/vig_t.pth"):
        (tmp_path / "mine.pth").touch()
        use_pretrained(cfg, source)
        assert cfg.model.backbone.init_cfg.checkpoint == source


def test_missing_weights_are_asked_for_by_name_and_place(cfg, tmp_path):
    with pytest.raises(
        ConfigError, match=r"no file or folder checkpoints; expected .* vig_t_\*\.pth .* in the folder checkpoints"
    ):
        use_pretrained(cfg, "checkpoints")
    (tmp_path / "vig_s_81p7acc.pth").touch()
    with pytest.raises(ConfigError, match=r"0 files vig_t_\*\.pth in .*hustvl/ViG, in the folder "):
        use_pretrained(cfg, str(tmp_path))
    for name in ("vig_t_a.pth", "vig_t_b.pth"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"2 files vig_t_\*\.pth in"):
        use_pretrained(cfg, str(tmp_path))


def test_two_sources_of_weights_are_one_too_many(cfg, tmp_path):
    (tmp_path / "vig_t_a.pth").touch()
    cfg.load_from = "model.pth"
    with pytest.raises(ConfigError, match=r"--pretrained and load_from='model\.pth'.*leave one out"):
        use_pretrained(cfg, str(tmp_path))


@pytest.mark.parametrize("use", [use_gradient_checkpointing, lambda cfg: use_pretrained(cfg, "checkpoints")])
def test_other_backbones_are_refused(cfg, use):
    cfg.model.backbone.type = "SwinTransformer"
    with pytest.raises(ConfigError, match="is for the backbones HierViG, ViG, ViGAdapter, not 'SwinTransformer'"):
        use(cfg)


def test_an_overlay_reaches_every_head_of_a_cascade():
    overlay = dict(heads=dict(classes=7), plain=dict(a=1), new=dict(b=2))
    cfg = dict(heads=[dict(classes=80), dict(classes=80)], plain=dict(a=0))
    assert configuration._for_every_item(overlay, cfg) == dict(
        heads={"0": dict(classes=7), "1": dict(classes=7)}, plain=dict(a=1), new=dict(b=2)
    )


def test_all_of_them_train_together(run_python, small_seg: list[str], tmp_path: Path):
    backbone = build_backbone("vig_tiny")
    torch.save({"model": backbone.state_dict()}, tmp_path / "vig_t_77p2acc.pth")
    options = ["--pretrained", tmp_path, "--amp", "--ema", "--with-cp"]
    process = run_python("tools/train.py", VIG_T, *options, *small_seg, "train_cfg.max_iters=2", "param_scheduler=[]")
    losses = [float(loss) for loss in re.findall(r" loss: (\S+)", process.stdout + process.stderr)]
    assert len(losses) == 2
    assert all(0 < loss < 100 for loss in losses)
    work_dir = Path(small_seg[small_seg.index("--work-dir") + 1])
    saved = torch.load(work_dir / "iter_2.pth", map_location="cpu", weights_only=False)
    stem = "backbone.patch_embed.proj.0.weight"
    start, average = backbone.patch_embed.proj[0].weight, saved["state_dict"][stem]  # mmengine swaps them when it saves
    assert torch.allclose(average, start, atol=5e-3)
    assert not torch.equal(average, start)
    assert not torch.equal(average, saved["ema_state_dict"][f"module.{stem}"])
