"""Reports: the metrics are those of the test tool, any config works, the page needs no other file."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from vig_backbone.openmmlab.configuration import load_config
from vig_backbone.openmmlab.errors import ConfigError, DataError
from vig_backbone.openmmlab.packages import get_installed_path
from vig_backbone.openmmlab.report import make_report
from vig_backbone.openmmlab.report.page import page, table
from vig_backbone.openmmlab.report.part import best_and_worst
from vig_backbone.openmmlab.report.pictures import View, draw, palette_of
from vig_backbone.openmmlab.report.record import RecordSegmentation, decode_labels, encode_labels

REPOSITORY = Path(__file__).resolve().parents[1]
SEG = "seg_configs/upernet_vig_t.py"
DET = "det_configs/mask_rcnn_hier_vig_t.py"
STOCK_DET = "mmdet::retinanet/retinanet_r18_fpn_1x_coco.py"
STOCK_SEG = "mmseg::fcn/fcn_r18b-d8_4xb2-80k_cityscapes-512x1024.py"

# ---- pictures and pages


def test_label_maps_survive_recording() -> None:
    labels = torch.randint(0, 60_000, (7, 9))
    assert (decode_labels(encode_labels(labels)) == labels.numpy()).all()


def test_no_image_is_both_among_the_worst_and_the_best() -> None:
    images = [(float(i), {"i": i}) for i in range(5)]
    groups = best_and_worst(images, 3)
    assert [score for score, _ in groups["Worst"]] == [0, 1, 2]
    assert [score for score, _ in groups["Best"]] == [4, 3]


def test_drawing_marks_what_it_is_given_and_nothing_else() -> None:
    image = np.full((20, 40, 3), 128, dtype=np.uint8)
    mask = np.zeros((1, 20, 40), dtype=bool)
    mask[0, 5:15, 5:15] = True
    plain = np.asarray(draw(View(image), ["a"], [(255, 0, 0)], side=40))
    view = View(image, boxes=np.zeros((0, 4)), labels=np.array([0]), masks=mask)
    marked = np.asarray(draw(view, ["a"], [(255, 0, 0)], side=40))
    assert (plain == 128).all()
    assert ((marked != plain).any(2) == mask[0]).all()
    assert draw(View(image), [], [], side=80).size == (80, 40)


def test_classes_without_colours_get_different_ones() -> None:
    names = [str(i) for i in range(150)]
    assert len(set(palette_of(names))) > 100
    assert palette_of(["a"], [(1, 2, 3)]) == [(1, 2, 3)]


class Links(HTMLParser):
    """Tags that are open, and what a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        values = dict(attributes)
        self.fetched += [values[name] for name in ("src", "href") if name in values]
        if tag not in ("meta", "img", "line", "circle", "polyline", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(html: str) -> None:
    links = Links()
    links.feed(html)
    assert not links.open
    assert all(source.startswith("data:image/") for source in links.fetched)
    assert "url(" not in html
    assert "@import" not in html
    assert "nan" not in re.sub(r"base64,[^\"]*", "", html).lower().split()


def test_page_escapes_names() -> None:
    html = page("<b>", [table(["class"], [["<script>"], [float("nan")], [None]])])
    check_page(html)
    assert "<td>&lt;script&gt;</td>" in html


# ---- whole reports


def untrained(config: str | Config, path: Path) -> Path:
    """A checkpoint of a model by chance."""
    cfg = load_config(REPOSITORY / config, data="toy") if isinstance(config, str) else config
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    torch.save(dict(state_dict=model.state_dict(), meta=dict(epoch=3, iter=30)), path)
    return path


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_report_has_the_metrics_of_the_test_tool(
    run_python: Callable, small_seg: list[str], small_det: list[str], tmp_path: Path, task: str
) -> None:
    config, options = (SEG, small_seg) if task == "segmentation" else (DET, small_det)
    checkpoint = untrained(config, tmp_path / "untrained.pth")
    page, numbers, metrics = tmp_path / "report.html", tmp_path / "report.json", tmp_path / "work" / "metrics.json"
    run_python("tools/test.py", config, checkpoint, *options)
    expected = json.loads(metrics.read_text())
    metrics.unlink()
    run_python("tools/report.py", config, checkpoint, "--out", page, "--json", numbers, "--images", "2", *options)
    found = json.loads(numbers.read_text())
    assert found["metrics"] == expected == json.loads(metrics.read_text())
    html = page.read_text()
    check_page(html)
    assert html.count('<figure class="pictures">') == 4  # two of the worst, two of the best
    assert found["about"]["checkpoint"] == str(checkpoint)
    assert re.fullmatch("[0-9a-f]{64}", found["about"]["sha256"])
    assert "epoch 3, iter 30" in found["about"]["trained"]
    (check_segmentation if task == "segmentation" else check_detection)(found, expected)


def check_segmentation(found: dict, expected: dict) -> None:
    classes = found["mmseg"]["classes"]
    assert len(classes) == 8
    mean = np.nanmean([np.nan if each["iou"] is None else each["iou"] for each in classes.values()])
    assert mean == pytest.approx(expected["mIoU"], abs=0.006)  # mmseg rounds
    confusion = np.array(found["mmseg"]["confusion"])
    assert confusion.sum() == 6 * 64 * 64
    assert 100 * np.trace(confusion) / confusion.sum() == pytest.approx(expected["aAcc"], abs=0.006)
    assert len(found["mmseg"]["images"]) == 6


def check_detection(found: dict, expected: dict) -> None:
    for kind in ("bbox", "segm"):
        for name, value in found["mmdet"][kind]["summary"].items():
            there = expected[f"coco/{kind}_{name}"]
            assert (value is None) == (there == -1)
            assert value is None or value == pytest.approx(100 * there, abs=0.051)  # mmdet rounds
        assert sum(found["mmdet"][kind]["errors"]["counts"].values()) > 0
    assert len(found["mmdet"]["confusion"]) == 8  # seven classes and the background


def stock_config(name: str, toy: Path, work_dir: Path) -> Config:
    """A stock config on the small set, smaller: no pretrained weights, images of 64 pixels, no workers."""
    package, _, path = name.partition("::")
    cfg = load_config(Path(get_installed_path(package)) / ".mim" / "configs" / path)
    cfg.work_dir = str(work_dir)
    cfg.model.pop("pretrained", None)
    cfg.model.backbone.pop("init_cfg", None)
    own = load_config(REPOSITORY / (DET if package == "mmdet" else SEG), data="toy")
    cfg.test_dataloader = own.test_dataloader
    cfg.test_dataloader.update(num_workers=0, persistent_workers=False)
    cfg.test_dataloader.dataset.data_root = str(toy / ("coco" if package == "mmdet" else "ade"))
    return cfg


def test_report_of_a_stock_detector_without_an_annotation_file_of_its_metric(toy_data: Path, tmp_path: Path) -> None:
    cfg = stock_config(STOCK_DET, toy_data, tmp_path)
    cfg.model.bbox_head.num_classes = 7
    cfg.model.test_cfg.update(score_thr=0.001, max_per_img=5)
    cfg.test_evaluator = dict(type="VOCMetric", metric="mAP")
    loader = cfg.test_dataloader.dataset.pipeline[-1]
    loader.meta_keys = (*loader.meta_keys, "instances")  # which VOCMetric reads
    report = make_report(cfg, str(untrained(cfg, tmp_path / "untrained.pth")), "python", images=1)
    assert set(report.metrics) == {"pascal_voc/mAP", "pascal_voc/AP50"}
    assert set(report.numbers["mmdet"]) == {"bbox", "confusion", "images"}  # no masks
    assert 0 <= report.numbers["mmdet"]["bbox"]["summary"]["mAP"] <= 100
    check_page(report.html)


def test_report_of_a_detector_that_finds_nothing(toy_data: Path, tmp_path: Path) -> None:
    cfg = stock_config(STOCK_DET, toy_data, tmp_path)
    cfg.model.bbox_head.num_classes = 7
    cfg.model.test_cfg.score_thr = 0.999
    cfg.test_evaluator.ann_file = str(toy_data / "coco" / "annotations" / "instances_val2017.json")
    report = make_report(cfg, str(untrained(cfg, tmp_path / "untrained.pth")), "python")
    assert report.metrics == {}
    assert "Nothing was detected" in report.html
    assert report.numbers["mmdet"]["bbox"]["errors"]["gains"]["missed"] == 0  # without objects there is no score
    check_page(report.html)


def test_report_of_a_stock_segmenter_shows_its_training(toy_data: Path, tmp_path: Path) -> None:
    cfg = stock_config(STOCK_SEG, toy_data, tmp_path)
    cfg.model.data_preprocessor.size = (64, 64)
    for head in ("decode_head", "auxiliary_head"):
        cfg.model[head].num_classes = 8
    norm = dict(type="BN", requires_grad=True)
    for part in ("backbone", "decode_head", "auxiliary_head"):
        cfg.model[part].norm_cfg = norm
    log = tmp_path / "20260101_000000" / "vis_data" / "scalars.json"
    log.parent.mkdir(parents=True)
    log.write_text(json.dumps({"loss": 1.0, "lr": 0.1, "iter": 10, "step": 10}) + "\n")
    report = make_report(cfg, str(untrained(cfg, tmp_path / "untrained.pth")), "python", images=1)
    assert report.numbers["curves"]["training"]["loss"] == [(10, 1.0)]
    assert "<h2>Training</h2>" in report.html
    assert report.metrics["mIoU"] >= 0
    check_page(report.html)


def test_sample_without_truth_is_named() -> None:
    metric = RecordSegmentation("unused.pkl")
    metric.dataset_meta = dict(classes=("a",))
    with pytest.raises(DataError, match=r"gt_sem_seg of each image, and a\.jpg has none"):
        metric.process({}, [dict(img_path="a.jpg", pred_sem_seg=dict(data=torch.zeros(1, 2, 2)))])


def test_missing_log_and_missing_truth_are_named_before_the_evaluation(toy_data: Path, tmp_path: Path) -> None:
    cfg = stock_config(STOCK_DET, toy_data, tmp_path)
    with pytest.raises(DataError, match="no training was logged"):
        make_report(cfg, "checkpoint.pth", "python", training=tmp_path)
    cfg.test_evaluator.format_only = True
    with pytest.raises(ConfigError, match="needs ground truth"):
        make_report(cfg, "checkpoint.pth", "python")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "report.pdf"], "ends in .html"),
        (["--json", "/nowhere/report.json"], "folder that exists"),
        (["--images", "-1"], "0 or more"),
    ],
)
def test_tool_refuses_what_it_cannot_write_before_the_evaluation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, options: list[str], message: str
) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    tool = import_module("report")
    args = tool.parse_args([str(REPOSITORY / SEG), "no_such_checkpoint.pth", *options])
    assert tool.run_command(tool.main, args) == 2
    assert message in capsys.readouterr().err
