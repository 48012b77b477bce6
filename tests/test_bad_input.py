"""A user's mistakes: each gives an error that names the file or field, without a traceback."""

import json
import shutil
from pathlib import Path

import pytest

from vig_backbone.data.toy import make_toy_data
from vig_backbone.openmmlab.configuration import load_config, use_compile
from vig_backbone.openmmlab.errors import ConfigError, DataError
from vig_backbone.openmmlab.preflight import check_data_is_there
from vig_backbone.openmmlab.run import build_runner, evaluate, resume_from, train

REPOSITORY = Path(__file__).resolve().parents[1]
SEG = REPOSITORY / "seg_configs" / "upernet_vig_t.py"
DET = REPOSITORY / "det_configs" / "mask_rcnn_hier_vig_t.py"


def small_config(path: Path, root: Path, work_dir: Path, **options):
    """A config on the embedded set at `root`, without worker processes and without an evaluation beforehand."""
    layout = root / ("ade" if path == SEG else "coco")
    splits = ("train", "val", "test")
    cfg = load_config(
        path,
        data="toy",
        options={
            **{f"{split}_dataloader.dataset.data_root": str(layout) for split in splits},
            **{f"{split}_dataloader.num_workers": 0 for split in splits},
            **{f"{split}_dataloader.persistent_workers": False for split in splits},
            "train_dataloader.batch_size": 2,
            "custom_hooks": [dict(type="CheckDataHook")],
            **options,
        },
    )
    if path == DET:
        for split in ("val", "test"):
            cfg[f"{split}_evaluator"].ann_file = f"{layout}/annotations/instances_val2017.json"
    cfg.work_dir = str(work_dir)
    cfg.launcher = "none"
    return cfg


@pytest.fixture
def own_data(toy_data: Path, tmp_path: Path) -> Path:
    """A copy of the embedded set that a test may break."""
    return Path(shutil.copytree(toy_data, tmp_path / "toy"))


def test_missing_data_set_names_folder_layout_source_and_the_embedded_set(tmp_path: Path) -> None:
    for path, wanted in ((SEG, ("annotations/", "sceneparsing")), (DET, ("instances_train2017.json", "cocodataset"))):
        cfg = small_config(path, tmp_path / "nowhere", tmp_path)
        with pytest.raises(DataError) as caught:
            train(cfg)
        message = str(caught.value)
        for text in (str(tmp_path / "nowhere"), "make_toy_data.py", *wanted):
            assert text in message


def test_incomplete_data_set_names_what_is_missing(own_data: Path, tmp_path: Path) -> None:
    shutil.rmtree(own_data / "ade" / "annotations" / "validation")
    with pytest.raises(DataError, match="annotations/validation"):
        check_data_is_there(small_config(SEG, own_data, tmp_path), ("train", "val"))


@pytest.mark.parametrize("content", [b"", b'{"images": [', b"not json"], ids=["empty", "cut_off", "text"])
def test_broken_annotation_file_is_named(own_data: Path, tmp_path: Path, content: bytes) -> None:
    (own_data / "coco" / "annotations" / "instances_train2017.json").write_bytes(content)
    with pytest.raises(DataError, match=r"instances_train2017\.json"):
        train(small_config(DET, own_data, tmp_path))


def test_annotation_without_objects_is_an_error_not_an_empty_run(own_data: Path, tmp_path: Path) -> None:
    file = own_data / "coco" / "annotations" / "instances_train2017.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "annotations": []}))
    with pytest.raises(DataError, match=r"train_dataloader: no usable image.*instances_train2017\.json"):
        train(small_config(DET, own_data, tmp_path))


@pytest.mark.parametrize("broken", ["image", "annotation"])
def test_unreadable_file_is_named(own_data: Path, tmp_path: Path, broken: str) -> None:
    folder = own_data / "ade" / ("images" if broken == "image" else "annotations") / "training"
    for file in folder.iterdir():
        file.unlink()
        file.write_bytes(b"not a picture")
    with pytest.raises(DataError, match=str(folder)):
        train(small_config(SEG, own_data, tmp_path))


def test_label_above_the_classes_names_the_file(own_data: Path, tmp_path: Path) -> None:
    from PIL import Image

    for file in (own_data / "ade" / "annotations" / "training").iterdir():
        Image.new("L", (64, 64), 77).save(file)
    with pytest.raises(DataError, match=r"annotations/training/.*label 76 in a set of 8 classes"):
        train(small_config(SEG, own_data, tmp_path))


def test_class_count_that_does_not_match_the_head_names_both(toy_data: Path, tmp_path: Path) -> None:
    cfg = small_config(SEG, toy_data, tmp_path, **{"model.decode_head.num_classes": 150})
    with pytest.raises(ConfigError, match=r"model\.decode_head\.num_classes=150.*8 classes"):
        train(cfg)
    cfg = small_config(DET, toy_data, tmp_path, **{"model.roi_head.mask_head.num_classes": 80})
    with pytest.raises(ConfigError, match=r"model\.roi_head\.mask_head\.num_classes=80.*7 classes"):
        train(cfg)


def test_image_smaller_than_a_patch_names_the_file(tmp_path: Path, toy_data: Path) -> None:
    root = tmp_path / "tiny"
    make_toy_data(root, num_train=16, num_val=6, size=32)
    cfg = small_config(SEG, root, tmp_path)
    cfg.model.data_preprocessor.size = None
    cfg.train_dataloader.dataset.pipeline[2:4] = [dict(type="Resize", scale=(12, 12))]
    with pytest.raises(DataError, match=r"img_path=.*12x12 pixels is smaller than a patch"):
        train(cfg)


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"model.backbone.arch": "huge"}, r"no arch='huge': expected one of 'tiny', 'small', 'base'"),
        ({"model.backbone.achr": "tiny"}, r"'achr', did you mean 'arch'"),
        ({"model.backbone.type": "ViGG"}, r"ViGG"),
        ({"model.backbone.out_indices": [2, 12]}, r"out_indices=\(2, 12\)"),
    ],
)
def test_wrong_backbone_setting_names_the_field(option: dict, named: str, toy_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=named):
        build_runner(small_config(SEG, toy_data, tmp_path, **option))


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"modle.backbone.arch": "tiny"}, r"'modle', did you mean 'model'"),
        ({"model.bakbone.arch": "tiny"}, r"'model\.bakbone', did you mean 'model\.backbone'"),
        ({"optim_wraper.type": "OptimWrapper"}, r"did you mean 'optim_wrapper'"),
    ],
)
def test_misspelt_option_names_the_field(option: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config(SEG, options=option)


def test_misspelt_field_in_a_config_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"_base_ = {str(SEG)!r}\ntrian_dataloader = dict(batch_size=4)\n")
    with pytest.raises(ConfigError, match=r"'trian_dataloader', did you mean 'train_dataloader'"):
        load_config(file)


def test_config_with_a_syntax_error_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("model = dict(\n")
    with pytest.raises(ConfigError, match=r"mine\.py cannot be read"):
        load_config(file)


def test_missing_config_suggests_one_that_exists() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean .*upernet_vig_s\.py"):
        load_config(SEG.with_name("upernet_vgi_s.py"))


def test_unknown_data_set_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"--data cityscapes.*known for this folder:.*toy"):
        load_config(SEG, data="cityscapes")


def test_missing_checkpoints_are_named(toy_data: Path, tmp_path: Path) -> None:
    cfg = small_config(SEG, toy_data, tmp_path)
    with pytest.raises(ConfigError, match=r"nothing\.pth: no such file"):
        resume_from(cfg, str(tmp_path / "nothing.pth"))
    with pytest.raises(RuntimeError, match=r"no checkpoint at .*nothing\.pth"):
        evaluate(cfg, tmp_path / "nothing.pth")


def test_checkpoint_of_another_model_is_refused_at_test(toy_data: Path, tmp_path: Path, run_python) -> None:
    import torch

    torch.save(dict(state_dict={"backbone.some.weight": torch.zeros(3)}, meta={}), tmp_path / "other.pth")
    cfg = small_config(SEG, toy_data, tmp_path)
    with pytest.raises(RuntimeError, match=r"other\.pth does not fit"):
        evaluate(cfg, tmp_path / "other.pth")


def test_training_refuses_to_start_from_a_backbone_that_does_not_fit(toy_data: Path, tmp_path: Path) -> None:
    import torch

    torch.save(dict(state_dict={"backbone.some.weight": torch.zeros(3)}, meta={}), tmp_path / "other.pth")
    cfg = small_config(SEG, toy_data, tmp_path, load_from=str(tmp_path / "other.pth"))
    with pytest.raises(RuntimeError, match=r"other\.pth does not fit the ViG"):
        train(cfg)


def test_command_line_shows_a_message_and_no_traceback(run_python, tmp_path: Path) -> None:
    process = run_python("tools/train.py", SEG, "--work-dir", tmp_path, check=False)
    assert process.returncode == 2
    assert "ADE20K is missing or incomplete in data/ade/ADEChallengeData2016" in process.stderr
    assert "Traceback" not in process.stderr
    process = run_python("tools/train.py", SEG, "--work-dir", tmp_path, "--debug", check=False)
    assert "Traceback" in process.stderr


def test_compiling_another_backbone_says_how() -> None:
    cfg = load_config(SEG)
    use_compile(cfg)
    assert cfg.model.backbone.compile is True
    cfg.model.backbone.type = "SwinTransformer"
    with pytest.raises(ConfigError, match="not 'SwinTransformer'; mmengine compiles whole models"):
        use_compile(cfg)
