"""Counting parameters and FLOPs: published numbers come out, hand counts agree, and the READMEs' tables are current."""

import importlib
import json
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import deform_conv2d
from vig_kernels.gla import IMPLEMENTATIONS

from vig_backbone import hier_vig, vig
from vig_backbone.openmmlab.complexity import Report, count_config, format_tree, replace_table
from vig_backbone.openmmlab.complexity.counter import counting, scan_macs
from vig_backbone.openmmlab.complexity.report import _count
from vig_backbone.openmmlab.complexity.run import build_model, run_model
from vig_backbone.openmmlab.complexity.table import BEGIN, END
from vig_backbone.openmmlab.configuration import load_config
from vig_backbone.openmmlab.errors import ConfigError
from vig_backbone.openmmlab.packages import get_installed_path

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDERS = ("det_configs", "seg_configs")
SWIN_DET = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"
SWIN_SEG = "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"
CASCADE = "mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py"
RETINANET = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"


def load(name: str) -> Config:
    """A config of this repository or, mmdet::PATH or mmseg::PATH, a stock one."""
    return deepcopy(_read(name))


@cache
def _read(name: str) -> Config:
    package, _, path = name.partition("::")
    return load_config(Path(get_installed_path(package)) / ".mim" / "configs" / path if path else REPOSITORY / name)


def backbone_config(family: str, arch: str) -> Config:
    """Mask R-CNN on one of our backbones."""
    cfg = load("det_configs/mask_rcnn_vig_t.py")
    cfg.model.backbone = dict(type=family, arch=arch)
    if family == "ViG":
        dim = vig.ARCHS[arch]["dim"]
        cfg.model.backbone.out_indices = (11,)
        cfg.model.neck = dict(type="SimpleFeaturePyramid", in_channels=dim, out_channels=256, num_outs=5)
    else:
        channels = [hier_vig.ARCHS[arch]["dim"] * 2**s for s in range(4)]
        cfg.model.neck = dict(type="FPN", in_channels=channels, out_channels=256, num_outs=5)
    return cfg


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    sys.path.insert(0, str(REPOSITORY / "tools"))  # as for a script
    module = importlib.import_module("flops")
    sys.path.remove(str(REPOSITORY / "tools"))
    return module


@pytest.fixture
def run(
    tool: ModuleType, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Run the tool as a user does; returns exit code, stdout, stderr."""
    monkeypatch.chdir(REPOSITORY)

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = tool.run_command(tool.main, tool.parse_args([*map(str, arguments)]))
        except SystemExit as error:  # of argparse
            code = error.code
        return code, *capsys.readouterr()

    return run


# ---- published numbers


def window_attention(report: Report) -> int:
    """Products of queries with keys, and of weights with values, of mmdet's and mmseg's Swin."""
    costs = report.modules
    return sum(
        cost.macs - costs[f"{name}.qkv"].macs - costs[f"{name}.proj"].macs
        for name, cost in costs.items()
        if name.endswith(".w_msa")
    )


def with_cascade_of_swin(cfg: Config) -> None:
    """The box heads of Swin's Cascade Mask R-CNN: four convolutions with SyncBN, then one linear layer."""
    for head in cfg.model.roi_head.bbox_head:
        head.update(type="ConvFCBBoxHead", num_shared_convs=4, num_shared_fcs=1, conv_out_channels=256)
        head.update(norm_cfg=dict(type="SyncBN"), reg_class_agnostic=False)


def test_swin_in_mask_rcnn_comes_out_as_published() -> None:
    report = count_config(load(SWIN_DET))
    assert round(report.model.parameters / 1e6) == 48
    assert round(report.model.published / 1e9) == 267


@pytest.mark.parametrize(("size", "parameters", "flops"), [("tiny", 60, 945), ("small", 81, 1038), ("base", 121, 1188)])
def test_swin_in_upernet_comes_out_as_published(size: str, parameters: int, flops: int) -> None:
    report = count_config(load(SWIN_SEG.replace("tiny", size)))
    assert round(report.model.parameters / 1e6) == parameters
    assert round(report.model.published / 1e9) == flops


def test_swin_in_cascade_mask_rcnn_comes_out_as_published_and_as_users_measured() -> None:
    cfg = load(CASCADE)
    swin = load(SWIN_DET)
    cfg.model.backbone, cfg.model.neck = swin.model.backbone, swin.model.neck
    with_cascade_of_swin(cfg)
    report = count_config(cfg)
    assert round(report.model.parameters / 1e6) == 86
    assert round(report.model.published / 1e9) == 745
    # SwinTransformer/Swin-Transformer-Object-Detection, issue 34: what mmdet's get_flops.py said.
    assert f"{(report.model.published - window_attention(report)) / 1e9:.2f}" == "742.36"


def test_what_mmseg_counted_of_upernet_comes_out_to_the_last_digit() -> None:
    # SwinTransformer/Swin-Transformer-Semantic-Segmentation, issue 16.
    report = count_config(load(SWIN_SEG), (512, 512))
    assert f"{(report.model.published - window_attention(report)) / 1e9:.2f}" == "236.08"
    assert f"{report.model.parameters / 1e6:.2f}" == "59.94"


def test_what_mmdet_counted_of_retinanet_comes_out_to_the_last_digit() -> None:
    # The example of mmdet 2's documentation of get_flops.py.
    assert f"{count_config(load(RETINANET)).model.published / 1e9:.2f}" == "239.32"


# ---- hand counts


def mixer_macs(tokens: int, C: int, h: int) -> tuple[int, int]:
    """Of one GLA mixer: products without the scan, and the scan."""
    projections = 9 * C + C * 2 * C + C * 16 + 16 * C + C * C + C * C  # depthwise, q k v, gates (2), G, output
    K, V = C // 2 // h, C // h
    return tokens * projections, tokens * h * (2 * 2 * K * V)  # two directions, updating and reading a state


def vig_macs(arch: str, H: int, W: int) -> tuple[int, int]:
    """Of plain ViG for one image: products without the scan, and the scan."""
    settings = vig.ARCHS[arch]
    C, hidden, depth = settings["dim"], settings["hidden_dim"], settings["depth"]
    coarse, tokens = -(-H // 8) * -(-W // 8), -(-H // 16) * -(-W // 16)
    stem = coarse * 81 * 3 * C // 2 + tokens * 9 * C // 2 * C
    mixer, scan = mixer_macs(tokens, C, settings["num_heads"])
    return stem + depth * (mixer + tokens * 3 * C * hidden), depth * scan


def hier_vig_macs(arch: str, H: int, W: int) -> tuple[int, int]:
    """The same of ViG-H."""
    settings = hier_vig.ARCHS[arch]
    C, h = settings["dim"], settings["num_heads"]
    half = -(-H // 2) * -(-W // 2)
    H, W = -(-H // 4), -(-W // 4)
    total, scans = half * 9 * 3 * C // 2 + H * W * 9 * C // 2 * C, 0
    for s, depth in enumerate(settings["depths"]):
        if s > 0:
            H, W, C, h = -(-H // 2), -(-W // 2), 2 * C, 2 * h
            total += H * W * 9 * C // 2 * C
        mixer, scan = mixer_macs(H * W, C, h)
        hidden = -(-8 * C // 96) * 32
        total, scans = total + depth * (mixer + H * W * 3 * C * hidden), scans + depth * scan
    return total, scans


HAND_COUNTS = {"ViG": vig_macs, "HierViG": hier_vig_macs}


@pytest.mark.parametrize("size", [(224, 224), (97, 211)], ids=str)
@pytest.mark.parametrize("arch", ["tiny", "small", "base"])
@pytest.mark.parametrize("family", ["ViG", "HierViG"])
def test_backbones_agree_with_a_hand_count(family: str, arch: str, size: tuple[int, int]) -> None:
    report = count_config(backbone_config(family, arch), size)
    assert report.backbone.macs == sum(HAND_COUNTS[family](arch, *size))


@pytest.mark.parametrize(
    ("family", "arch", "parameters", "products", "scan"),
    [
        ("ViG", "tiny", 5_641_536, "1.11", "0.06"),
        ("ViG", "small", 22_230_144, "4.37", "0.12"),
        ("ViG", "base", 88_253_184, "17.31", "0.23"),
        ("HierViG", "tiny", 27_833_024, "4.41", "0.09"),
        ("HierViG", "small", 49_284_032, "8.61", "0.14"),
        ("HierViG", "base", 87_881_152, "15.36", "0.19"),
    ],
)
def test_backbones_cost_what_the_design_says_at_224(
    family: str, arch: str, parameters: int, products: str, scan: str
) -> None:
    backbone = count_config(backbone_config(family, arch), (224, 224)).backbone
    by_hand = HAND_COUNTS[family](arch, 224, 224)
    assert backbone.parameters == parameters
    assert f"{(backbone.macs - by_hand[1]) / 1e9:.2f}" == products
    assert f"{by_hand[1] / 1e9:.2f}" == scan


def test_parameters_of_vig_t_by_hand() -> None:
    C, hidden = 192, 512
    stem = 81 * 3 * C // 2 + C // 2 + C + 9 * C // 2 * C + C + 2 * C  # two convolutions, two norms
    mixer = 9 * C + 2 * C * C + 2 * 16 * C + C + C * C + C + C * C + 2 * C // 3
    block = mixer + 3 * C * hidden + 2 * C
    backbone = count_config(load("det_configs/mask_rcnn_vig_t.py"), (64, 64)).backbone
    assert backbone.parameters == stem + 196 * C + 12 * block + C


def test_paper_style_leaves_out_the_down_projection_of_plain_vig_alone() -> None:
    size, C, hidden = (224, 224), 384, 1024
    block = count_config(load("det_configs/mask_rcnn_vig_s.py"), size).modules["backbone.blocks.3"]
    assert block.macs - block.published == 14 * 14 * hidden * C
    block = count_config(load("det_configs/mask_rcnn_hier_vig_s.py"), size).modules["backbone.layers.2.blocks.3"]
    assert block.macs == block.published


def test_an_adapter_counts_on_top_of_the_backbone_that_it_adapts() -> None:
    cfg = backbone_config("HierViG", "tiny")
    cfg.model.backbone = dict(type="ViGAdapter", arch="tiny")
    cfg.model.neck.in_channels = [192] * 4
    costs = count_config(cfg, (97, 211)).modules
    assert costs["backbone"].macs - costs["backbone.adapter"].macs == sum(vig_macs("tiny", 97, 211))
    assert costs["backbone.adapter"].macs > costs["backbone"].macs / 2


def test_box_heads_see_1000_proposals_and_mask_heads_100_detections() -> None:
    costs = count_config(load("det_configs/mask_rcnn_vig_t.py")).modules
    assert costs["roi_head.bbox_head"].macs == 1000 * (256 * 49 * 1024 + 1024 * 1024 + 1024 * (81 + 4 * 80))
    mask_head = 4 * 196 * 9 * 256 * 256 + 784 * 256 * 256 + 784 * 256 * 80
    assert costs["roi_head.mask_head"].macs == 100 * mask_head


def test_every_stage_of_a_cascade_counts() -> None:
    one, three = (count_config(load(name)).modules for name in (SWIN_DET, CASCADE))
    class_agnostic = 1000 * 1024 * 4 * 79  # fewer numbers of a box
    assert three["roi_head.bbox_head"].macs == 3 * (one["roi_head.bbox_head"].macs - class_agnostic)
    assert three["roi_head.mask_head"].macs == 3 * one["roi_head.mask_head"].macs


def test_auxiliary_heads_have_parameters_but_do_not_run() -> None:
    report = count_config(load("seg_configs/upernet_vig_t.py"))
    head = report.modules["auxiliary_head"]
    assert head.parameters > 0
    assert head.macs == head.published == head.activations == 0
    rest = sum(report.modules[name].macs for name in ("backbone", "neck", "decode_head"))
    assert report.model.macs == rest


# ---- the counter


class Everything(nn.Module):
    """Products that are easily counted wrong: grouped and transposed convolutions, attention, bilinear samples."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(8, 16, 3, padding=1, groups=4)
        self.transposed = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm(self.transposed(self.grouped(x))))  # [1, 8, 10, 14]
        tokens = x.flatten(2).mT[None]  # [1, 1, 140, 8]
        tokens = F.scaled_dot_product_attention(tokens, tokens, tokens)
        return F.grid_sample(x, x.new_zeros(1, 3, 4, 2), align_corners=False) + tokens.mean()


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_products_and_extras_of_each_kind(device: str) -> None:
    model = Everything().to(device).eval()
    with torch.no_grad(), counting(model) as counts:
        model(torch.zeros(1, 8, 5, 7, device=device))
    assert counts["grouped"].macs == 35 * 9 * 2 * 16
    assert counts["grouped"].extras == 35 * 16  # biases
    assert counts["transposed"].macs == 35 * 16 * 8 * 4
    assert counts["norm"].extras == 2 * 140 * 8
    assert counts["act"].extras == 140 * 8
    assert counts[""].macs == 2 * 140 * 140 * 8 + 5 * 8 * 12
    assert counts["grouped"].activations == 35 * 16
    assert counts["norm"].macs == counts["norm"].activations == 0


def test_a_deformable_convolution_counts_as_the_convolution_that_it_is() -> None:
    x, offset, weight = torch.zeros(1, 8, 5, 7), torch.zeros(1, 18, 5, 7), torch.zeros(16, 4, 3, 3)
    with counting(nn.Identity()) as counts:
        deform_conv2d(x, offset, weight, padding=1)
    assert counts[""].macs == 35 * 9 * 4 * 16


def test_torchs_counter_says_twice_as_much() -> None:
    cfg = load(RETINANET)
    model = build_model(cfg, "meta")
    with FlopCounterMode(display=False) as counter:
        run_model(model, (64, 96))
    assert counter.get_total_flops() == 2 * count_config(cfg, (64, 96)).model.macs > 0


def test_the_scan_counts_as_the_formula_that_torch_knows_for_it() -> None:
    pytest.importorskip("triton")
    from vig_kernels.gla.triton_op import gla_flops

    q, v = torch.Size((2, 50, 3, 16)), torch.Size((2, 50, 3, 32))
    assert 2 * scan_macs(q, v) == gla_flops(q, v)


@pytest.mark.parametrize("name", ["det_configs/mask_rcnn_hier_vig_t.py", "seg_configs/upernet_vig_t.py"])
def test_real_tensors_give_the_same_count(name: str) -> None:
    cfg = load(name)
    assert _count(cfg, (50, 71), "cpu") == count_config(cfg, (50, 71))


def test_a_model_that_asks_for_values_is_run_with_them() -> None:
    cfg = load("mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py")
    size = (64, 64)
    costs = count_config(cfg, size).modules
    attention = "decoder.layers.0.cross_attn"
    own = costs[attention].macs - sum(
        costs[f"{attention}.{part}"].macs
        for part in ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    )
    assert own == 5 * 300 * 256 * 4 * 4  # queries, channels, levels, points


def test_counting_leaves_nothing_behind() -> None:
    before = dict(IMPLEMENTATIONS)
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match="shape"), counting(model):
        model(torch.zeros(2, 4))
    assert before == IMPLEMENTATIONS
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks


def test_a_checkpoint_is_not_looked_for() -> None:
    cfg = load("det_configs/mask_rcnn_vig_t.py")
    cfg.model.backbone.init_cfg = dict(type="Pretrained", checkpoint="nowhere.pth")
    cfg.model.backbone.compile = True
    assert count_config(cfg, (64, 64)) == count_config(load("det_configs/mask_rcnn_vig_t.py"), (64, 64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(backbone=dict(arch="huge")), "cannot be built.*'tiny'"),
        (dict(neck=dict(in_channels=100)), "does not run for one image of 64 x 96 pixels"),
    ],
)
def test_errors_say_what_is_wrong(change: dict, message: str) -> None:
    cfg = load("det_configs/mask_rcnn_vig_t.py")
    cfg.merge_from_dict(dict(model=change))
    with pytest.raises(ConfigError, match=message):
        count_config(cfg, (64, 96))


# ---- the tool


@pytest.mark.parametrize("folder", FOLDERS)
def test_table_of_the_readme_is_what_the_tool_prints(folder: str, run: Callable[..., tuple[int, str, str]]) -> None:
    code, table, _ = run("--table", folder)
    assert code == 0
    readme = (REPOSITORY / folder / "README.md").read_text()
    assert readme.partition(BEGIN)[2].partition(END)[0].strip() == table.strip(), (
        f"out of date: python tools/flops.py --table {folder} --write"
    )
    assert table.count("\n") == 2 + len([*(REPOSITORY / folder).glob("*.py")]) + 1


def test_sizes_stand_side_by_side_in_the_table(tool: ModuleType) -> None:
    names = ["a_vig_t_3x", "a_vig_b", "a_hier_vig_s", "a_vig_s", "a_vig_adapter_t", "a_vig_t", "a_hier_vig_t"]
    ordered = sorted(map(Path, names), key=tool.sort_key)
    assert [*map(str, ordered)] == [
        *("a_hier_vig_t", "a_hier_vig_s", "a_vig_t", "a_vig_s", "a_vig_b"),
        *("a_vig_t_3x", "a_vig_adapter_t"),
    ]


def test_table_is_written_between_the_markers_alone() -> None:
    text = f"before\n\n{BEGIN}\n\nold\n\n{END}\n\nafter\n"
    assert replace_table(text, ["| new |"]) == f"before\n\n{BEGIN}\n\n| new |\n\n{END}\n\nafter\n"
    with pytest.raises(ConfigError, match="no place for the table"):
        replace_table("before\nafter\n", ["| new |"])


def test_tree_shows_modules_down_to_the_depth_asked_for() -> None:
    report = count_config(load("det_configs/mask_rcnn_vig_t.py"), (64, 64))
    shown = [line.split()[0] for line in format_tree(report, 1)[1:]]
    assert shown == ["whole", "backbone", "neck", "rpn_head", "roi_head"]
    assert any(line.startswith("    blocks ") for line in format_tree(report, 2))


def test_numbers_go_to_a_file(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    file = tmp_path / "flops.json"
    config = "det_configs/mask_rcnn_vig_t.py"
    code, printed, _ = run(config, "--size", "64", "--json", file, "--cfg-options", "model.backbone.drop_path_rate=0")
    assert code == 0
    assert "64 x 64 pixels" in printed
    assert "one multiply-add" in printed
    content = json.loads(file.read_text())
    assert content["models"][0]["config"] == config
    costs = content["models"][0]["modules"]
    assert costs[""]["macs"] == count_config(load(config), (64, 64)).model.macs
    assert costs["backbone.blocks.0.mlp.down_proj"]["published"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["det_configs/mask_rcnn_vig.py"], "Did you mean"),
        (["det_configs/mask_rcnn_vig_t.py", "--size", "8"], "smaller than a patch"),
        (["det_configs/mask_rcnn_vig_t.py", "--size", "8x8x8"], "expected HxW, or one side"),
        (["det_configs/mask_rcnn_vig_t.py", "--cfg-options", "model"], "expected KEY=VALUE"),
        ([], "expected configs, or --table"),
        (["det_configs/mask_rcnn_vig_t.py", "--write"], "--write: expected --table"),
        (["--table", "docs"], "no config there"),
        (["--table", "det_configs", "--write", "--size", "64"], "no --size"),
        (["det_configs/mask_rcnn_vig_t.py", "--json", "nowhere/flops.json"], "a folder that exists"),
        ([SWIN_DET, "--cfg-options", "model=none"], "no model.backbone"),
        (["mmdet::htc/htc_r50_fpn_1x_coco.py"], "HybridTaskCascade does not run"),
    ],
)
def test_mistakes_end_with_code_2_and_a_message(
    arguments: list[str], message: str, run: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, errors = run(*arguments)
    assert code == 2
    assert message in errors
