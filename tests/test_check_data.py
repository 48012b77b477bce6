"""The data checker: a whole set passes, and of a broken one precisely the broken file is named."""

import json
import runpy
import shutil
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vig_backbone.data.check import check_ade20k, check_coco
from vig_backbone.data.layouts import LAYOUTS, layout_problems, missing_data_message
from vig_backbone.data.progress import ProgressLine
from vig_backbone.data.toy import make_toy_data

REPOSITORY = Path(__file__).parents[1]
PHOTOS = REPOSITORY.parent / "shared/tiny_coco"
TRAIN_JSON = "annotations/instances_train2017.json"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return make_toy_data(tmp_path_factory.mktemp("toy") / "toy", 4, 2, (40, 56)).root


@pytest.fixture
def coco(pristine, tmp_path):
    return Path(shutil.copytree(pristine / "coco", tmp_path / "coco"))


@pytest.fixture
def ade(pristine, tmp_path):
    return Path(shutil.copytree(pristine / "ade", tmp_path / "ade"))


def _edit(root: Path, change) -> None:
    content = json.loads((root / TRAIN_JSON).read_text())
    change(content)
    (root / TRAIN_JSON).write_text(json.dumps(content))


def _only_problem(report, file: str, *words: str) -> None:
    assert [p.file for p in report.problems] == [file], report.text()
    assert all(word in report.problems[0].what for word in words), report.text()
    assert report.problems[0].remedy
    assert not report.ok


def _shorten(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def test_whole_sets_pass(coco, ade):
    report = check_coco(coco)
    assert report.ok, report.text()
    assert report.counts["train images"] == 4
    assert report.counts["val images"] == 2
    assert report.counts["train images without annotations"] == 0
    assert report.notes[0] == "train has 4 images; the official coco set has 118,287"
    report = check_ade20k(ade, num_classes=8)
    assert report.ok, report.text()
    assert report.counts["train annotations"] == 4
    assert report.counts["label maps without any label"] == 0
    assert "20,210" in report.notes[0]


@pytest.mark.parametrize("kept", ["half", "all but the last two bytes", "nothing"])
def test_truncated_photo(coco, ade, kept):
    for root, file in ((coco, "train2017/000000000002.jpg"), (ade, "images/training/000000000002.jpg")):
        size = (root / file).stat().st_size
        _shorten(root / file, {"half": size // 2, "nothing": 0}.get(kept, size - 2))
    word = "0 bytes" if kept == "nothing" else "truncated"
    _only_problem(check_coco(coco), "train2017/000000000002.jpg", word)
    _only_problem(check_ade20k(ade, num_classes=8), "images/training/000000000002.jpg", word)
    assert check_coco(coco, full=False).ok


def test_photo_padded_with_zeros_is_truncated(coco):
    """What an interrupted download with reserved space leaves."""
    file = coco / "val2017/000000000001.jpg"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    _only_problem(check_coco(coco), "val2017/000000000001.jpg", "truncated")


@pytest.mark.parametrize("lost", [1, 12, 60])
def test_truncated_label_map(ade, lost):
    file = "annotations/validation/000000000001.png"
    _shorten(ade / file, (ade / file).stat().st_size - lost)
    _only_problem(check_ade20k(ade, num_classes=8), file, "truncated")


def test_file_that_is_no_image(coco):
    (coco / "train2017/000000000003.jpg").write_text("<html>404 Not Found</html>")
    _only_problem(check_coco(coco), "train2017/000000000003.jpg", "cannot identify image file")


def test_missing_photo(coco):
    (coco / "val2017/000000000002.jpg").unlink()
    _only_problem(check_coco(coco), "val2017/000000000002.jpg", "missing", "instances_val2017.json")


def test_photo_of_another_size(coco):
    file = coco / "train2017/000000000001.jpg"
    Image.open(file).resize((30, 40)).save(file)
    _only_problem(check_coco(coco), "train2017/000000000001.jpg", "30x40", "56x40")


@pytest.mark.parametrize(
    ("content", "words"),
    [("", ["empty (0 bytes)"]), ('{"images": [', ["not valid JSON"]), ("[]", ["not a JSON object"])],
)
def test_broken_annotation_file(coco, content, words):
    (coco / TRAIN_JSON).write_text(content)
    _only_problem(check_coco(coco), TRAIN_JSON, *words)


def _first(key: str, **values):
    return lambda content: content[key][0].update(values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("categories"), ["'categories' is missing"]),
        (lambda c: c["images"][2].pop("width"), ["images[2]", "width"]),
        (lambda c: c["annotations"][1].pop("iscrowd"), ["annotations[1]", "iscrowd"]),
        (_first("annotations", bbox="0,0,1,1"), ["annotations[0]", "bbox", "wrong type"]),
        (_first("annotations", image_id=99), ["annotation id 1", "unknown image id 99"]),
        (_first("annotations", category_id=77), ["annotation id 1", "unknown category id 77"]),
        (_first("annotations", bbox=[3, 3, 0, 5]), ["annotation id 1", "no width or height"]),
        (_first("annotations", bbox=[3, 3, 5]), ["annotation id 1", "not [x, y, w, h]"]),
        (_first("annotations", bbox=[30, 3, 40, 5]), ["annotation id 1", "outside the image of 56x40"]),
        (_first("annotations", segmentation=[]), ["annotation id 1", "empty segmentation"]),
        (_first("annotations", segmentation=[[1, 1, 5, 5]]), ["empty segmentation"]),
        (_first("annotations", segmentation={"size": [40, 56], "counts": "PV2"}), ["empty segmentation"]),
        (_first("annotations", segmentation={"size": [56, 40], "counts": [9, 9]}), ["mask size [56, 40]"]),
        (_first("annotations", id=2), ["annotations: id 2 occurs 2 times"]),
    ],
)
def test_faulty_annotation_is_named(coco, change, words):
    _edit(coco, change)
    _only_problem(check_coco(coco), TRAIN_JSON, *words)


def test_polygons_and_images_without_annotations_are_fine(coco):
    def change(content: dict) -> None:
        kept = [a for a in content["annotations"] if a["image_id"] != 1]
        kept[0]["segmentation"] = [[1, 1, 9, 1, 9, 9]]
        content["annotations"] = kept

    _edit(coco, change)
    report = check_coco(coco)
    assert report.ok, report.text()
    assert report.counts["train images without annotations"] == 1


def test_flat_boxes_of_the_published_file_are_a_note(coco):
    def change(content: dict) -> None:
        content["images"][0]["id"] = 200365
        for annotation in content["annotations"]:
            if annotation["image_id"] == 1:
                annotation |= {"image_id": 200365, "bbox": [3, 3, 1.03, 0.0]}

    _edit(coco, change)
    report = check_coco(coco)
    assert report.ok, report.text()
    assert any("height 0" in note for note in report.notes)


def test_label_above_the_number_of_classes(ade):
    file = "annotations/training/000000000003.png"
    labels = np.array(Image.open(ade / file))
    labels[5, 5] = 200
    Image.fromarray(labels).save(ade / file)
    _only_problem(check_ade20k(ade, num_classes=8), file, "above 8: 200")
    assert len(check_ade20k(ade, num_classes=3).problems) > 1


@pytest.mark.parametrize("mode", ["RGB", "I;16", "1"])
def test_label_map_of_another_mode(ade, mode):
    file = "annotations/training/000000000001.png"
    image = Image.open(ade / file)
    (image.convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)).save(ade / file)
    _only_problem(check_ade20k(ade, num_classes=8), file, "expected one channel of 8 bits")


def test_palette_label_map_is_fine(ade):
    file = ade / "annotations/training/000000000001.png"
    image = Image.fromarray(np.asarray(Image.open(file)))
    image.putpalette(list(range(30)))
    image.save(file)
    assert Image.open(file).mode == "P"
    assert check_ade20k(ade, num_classes=8).ok


def test_label_map_of_another_size(ade):
    file = "annotations/validation/000000000002.png"
    Image.open(ade / file).crop((0, 0, 30, 40)).save(ade / file)
    _only_problem(check_ade20k(ade, num_classes=8), file, "30x40", "56x40")


def test_unpaired_files(ade):
    (ade / "annotations/training/000000000002.png").unlink()
    _only_problem(check_ade20k(ade, num_classes=8), "images/training/000000000002.jpg", "no annotation")
    (ade / "images/training/000000000002.jpg").unlink()
    assert check_ade20k(ade, num_classes=8).ok
    (ade / "images/training/000000000003.jpg").unlink()
    _only_problem(check_ade20k(ade, num_classes=8), "annotations/training/000000000003.png", "no image")


def test_unlabelled_maps_are_counted(ade):
    Image.new("L", (56, 40)).save(ade / "annotations/training/000000000001.png")
    report = check_ade20k(ade, num_classes=8)
    assert report.ok
    assert report.counts["label maps without any label"] == 1


def test_layout_problems_are_quick_and_exact(coco, ade, tmp_path):
    assert layout_problems("coco", coco) == []
    assert layout_problems("ade20k", ade) == []
    shutil.rmtree(coco / "val2017")
    (coco / TRAIN_JSON).write_text("")
    assert layout_problems("coco", coco) == [f"{TRAIN_JSON}: empty (0 bytes)", "val2017: missing"]
    assert layout_problems("coco", coco, splits=["val"]) == ["val2017: missing"]
    assert [p.file for p in check_coco(coco).problems] == [TRAIN_JSON, "val2017"]
    shutil.rmtree(ade / "images/training")
    (ade / "images/training").write_text("../../coco/train2017")
    assert "a file where a folder is expected" in layout_problems("ade20k", ade)[0]
    assert layout_problems("coco", tmp_path / "none") == [f"{tmp_path / 'none'}: missing"]


@pytest.mark.parametrize(("kind", "source"), [("coco", "cocodataset.org"), ("ade20k", "sceneparsing.csail.mit.edu")])
def test_missing_folder_explains_itself(tmp_path, kind, source):
    check = check_coco if kind == "coco" else check_ade20k
    with pytest.raises(FileNotFoundError) as caught:
        check(tmp_path / "nowhere")
    message = str(caught.value)
    for part in (str(tmp_path / "nowhere"), source, "├── ", "python tools/make_toy_data.py data/toy"):
        assert part in message
    assert missing_data_message(kind, "data/x", ["train2017"]).count("train2017: ") == 0
    assert LAYOUTS[kind].name in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"workers": 0}, "workers is 0"), ({"num_classes": 300}, "num_classes is 300"), ({"splits": ["test"]}, "'test'")],
)
def test_wrong_arguments_are_named(ade, arguments, message):
    with pytest.raises(ValueError, match=message):
        check_ade20k(ade, **arguments)


def test_progress_line_in_a_log_and_on_a_terminal():
    log = StringIO()
    line = ProgressLine("reading", log, every=60)
    for done in range(1, 101):
        line(done, 100)
    assert log.getvalue() == "reading 100/100 (100%), 0 s left\n"

    terminal = StringIO()
    terminal.isatty = lambda: True
    line = ProgressLine("reading", terminal)
    line(1, 1)
    assert terminal.getvalue().startswith("\r[" + 30 * "#" + "] reading 1/1")


@pytest.fixture
def tool(monkeypatch, capsys):
    """Run the tool as a script of this process (a new one imports torch first); returns exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        path = str(REPOSITORY / "tools/check_data.py")
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(path, run_name="__main__")
        return exit_.value.code, *capsys.readouterr()

    return run


def test_tool_exit_codes(coco, ade, tmp_path, tool):
    code, _, err = tool("ade20k", ade, "--num-classes", 8, "--json", tmp_path / "report.json")
    assert code == 0, err
    assert "6/6 (100%)" in err
    assert json.loads((tmp_path / "report.json").read_text())["ok"] is True
    (coco / "train2017/000000000001.jpg").write_bytes(b"")
    code, out, _ = tool("coco", coco)
    assert code == 1
    assert "train2017/000000000001.jpg: empty file (0 bytes)" in out
    code, _, err = tool("coco", tmp_path / "nowhere")
    assert code == 2
    assert "Traceback" not in err
    assert "├── annotations/" in err


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"the photo set is not at {PHOTOS}")
def test_real_photos_pass(tmp_path):
    report = check_coco(PHOTOS / "coco")
    assert report.ok, report.text()
    assert report.counts["train images"] == 26
    # The set's image folders are links into coco/, which not every file system keeps: link them here.
    (tmp_path / "images").mkdir()
    for ade_split, coco_split in (("training", "train2017"), ("validation", "val2017")):
        (tmp_path / "images" / ade_split).symlink_to(PHOTOS / "coco" / coco_split)
    (tmp_path / "annotations").symlink_to(PHOTOS / "ade/annotations")
    report = check_ade20k(tmp_path, num_classes=133)
    assert report.ok, report.text()
    assert report.counts["train images"] + report.counts["val images"] == 53
