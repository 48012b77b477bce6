"""Classification: fine-tuning learns, evaluation gives what training printed, no folder is taken for another class."""

import importlib
import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from PIL import Image, ImageDraw
from torch import nn

from vig_backbone import CheckpointError, build_backbone, vig
from vig_backbone.classifier import build_classifier
from vig_backbone.openmmlab.errors import ConfigError, DataError

pytest.importorskip("timm")
from vig_backbone.classification import (
    build_from_file,
    evaluate_classifier,
    evaluation_data,
    finetune,
    finetuning_config,
    measure,
)
from vig_backbone.classification.data import ClassFolderDataset, evaluation_transform, imagenet_synsets
from vig_backbone.classification.evaluation import hits
from vig_backbone.classification.finetuning import Finetuned, change_fields, use_average
from vig_backbone.classification.folders import class_folders, map_classes, split_folder
from vig_backbone.classification.published import against_published
from vig_backbone.classification.resuming import resume_training

REPOSITORY = Path(__file__).resolve().parents[1]
CLASSES = ("circle", "square", "triangle")
COLOURS = ((220, 40, 40), (40, 200, 60), (50, 70, 230))
SIZE = 64
EPOCHS = 6


@pytest.fixture(scope="module", autouse=True)
def _small_model() -> Iterator[None]:
    """A narrow ViG-T: names and layers are as usual, a step takes less than a tenth of a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vig.ARCHS, "tiny", dict(dim=64, depth=12, num_heads=1, hidden_dim=64, activation=True))
        yield


def draw(index: int, rng: random.Random) -> Image.Image:
    image = Image.new("RGB", (32, 32), tuple(rng.randint(60, 140) for _ in range(3)))
    x, y, side = rng.randint(2, 8), rng.randint(2, 8), rng.randint(14, 22)
    pen, box = ImageDraw.Draw(image), (x, y, x + side, y + side)
    if index == 0:
        pen.ellipse(box, COLOURS[0])
    elif index == 1:
        pen.rectangle(box, COLOURS[1])
    else:
        pen.polygon((x, y + side, x + side, y + side, x + side // 2, y), COLOURS[2])
    return image


def make_images(root: Path, names: tuple[str, ...], count: int, seed: int = 0) -> Path:
    rng = random.Random(seed)
    for index, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(count):
            draw(index, rng).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ with three classes of coloured shapes."""
    root = tmp_path_factory.mktemp("shapes")
    make_images(root / "train", CLASSES, 16, seed=0)
    make_images(root / "val", CLASSES, 7, seed=1)
    return root


def recipe(folder: Path, work_dir: Path, **options) -> Config:
    settings = dict(epochs=EPOCHS, batch_size=8, size=SIZE, workers=0) | options
    cfg = finetuning_config("vig_tiny", folder, work_dir, **settings)
    cfg.experiment_name = f"{work_dir.parent.name}_{work_dir.name}"  # mmengine's own is the time, in seconds
    change_fields(cfg, {"optim_wrapper.optimizer.lr": 2e-3, "auto_scale_lr.enable": False})
    change_fields(cfg, {"default_hooks.checkpoint.max_keep_ckpts": EPOCHS})
    return cfg


@pytest.fixture(scope="module")
def trained(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Finetuned, Path]:
    work_dir = tmp_path_factory.mktemp("trained")
    return finetune(recipe(shapes, work_dir)), work_dir


@pytest.fixture
def tool() -> Iterator[Callable[..., int]]:
    """The command, in this process; gives its exit code."""
    sys.path.insert(0, str(REPOSITORY / "tools"))  # as for a script
    module: ModuleType = importlib.import_module("classify")

    def run(*arguments: object) -> int:
        try:
            return module.run_command(module.main, module.parse_args([*map(str, arguments)]))
        except SystemExit as stopped:
            return stopped.code

    yield run
    sys.path.remove(str(REPOSITORY / "tools"))


def official_like(path: Path, num_classes: int = 1000) -> Path:
    torch.manual_seed(5)  # not that of a training, which would begin with the same weights
    torch.save({"model": build_classifier("vig_tiny", num_classes=num_classes).state_dict()}, path)
    return path


# Fine-tuning


def test_fine_tuning_learns(trained):
    assert trained[0].top1 > 66  # chance is 33


def test_evaluation_gives_what_training_printed(trained, shapes):
    for batch_size in (4, 64):
        accuracy = evaluate_classifier(
            "vig_tiny", trained[0].checkpoint, shapes, size=SIZE, batch_size=batch_size, workers=0
        )
        assert accuracy.top1 == pytest.approx(trained[0].top1)
        assert (accuracy.images, accuracy.top5, accuracy.unreadable) == (21, None, [])


def test_checkpoint_starts_a_backbone_without_its_head(trained):
    weights = torch.load(trained[0].checkpoint)["state_dict"]
    state = build_backbone("vig_tiny", checkpoint=str(trained[0].checkpoint)).state_dict()
    assert all(torch.equal(value, weights[f"backbone.{name}"]) for name, value in state.items())
    assert weights.keys() - {f"backbone.{name}" for name in state} == {"backbone.head.weight", "backbone.head.bias"}


def test_pretrained_gives_all_weights_but_those_of_the_head(shapes, tmp_path):
    source = official_like(tmp_path / "official.pth")
    cfg = recipe(shapes, tmp_path / "work", pretrained=source, epochs=2)
    cfg.optim_wrapper.optimizer.lr = 0.0
    trained = torch.load(finetune(cfg).checkpoint)["state_dict"]
    state = {name.removeprefix("backbone."): value for name, value in trained.items()}
    weights = torch.load(source)["model"]
    assert state["head.weight"].shape[0] == len(CLASSES)
    assert all(torch.equal(state[name], weights[name]) for name in weights if not name.startswith("head."))
    assert cfg.optim_wrapper.paramwise_cfg.layer_decay_rate < 1


@pytest.mark.parametrize(("name", "head"), [("vig_tiny", "norm|head"), ("hier_vig_tiny", "classifier")])
def test_head_and_last_norm_learn_at_the_full_rate_and_the_stem_at_the_least(name, head, shapes, tmp_path):
    cfg = finetuning_config(name, shapes, tmp_path)
    cfg.optim_wrapper.paramwise_cfg.layer_decay_rate = 0.5
    model = MODELS.build(cfg.model)
    settings = {key: value for key, value in cfg.optim_wrapper.items() if key not in ("constructor", "paramwise_cfg")}
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.get(cfg.optim_wrapper.constructor)
    optimizer = constructor(settings, cfg.optim_wrapper.paramwise_cfg)(model).optimizer
    lr = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    rates = {name: lr[id(p)] / cfg.optim_wrapper.optimizer.lr for name, p in model.backbone.named_parameters()}
    assert {rates[key] for key in rates if key.startswith(tuple(head.split("|")))} == {1.0}
    blocks = 12 if name == "vig_tiny" else 11
    assert {rates[key] for key in rates if key.startswith("patch_embed")} == {0.5 ** (blocks + 1)}
    assert len(set(rates.values())) == blocks + 2


def test_resuming_goes_on_with_the_schedule_of_the_checkpoint(trained, shapes, tmp_path):
    first = torch.load(trained[1] / "epoch_2.pth")
    (tmp_path / "work").mkdir()
    torch.save(first, tmp_path / "work" / "epoch_2.pth")
    cfg = recipe(shapes, tmp_path / "work", epochs=30)
    resume_training(cfg, "auto")
    finetune(cfg)
    last, expected = (torch.load(folder / f"epoch_{EPOCHS}.pth") for folder in (tmp_path / "work", trained[1]))
    assert last["meta"]["iter"] == expected["meta"]["iter"]
    assert not (tmp_path / "work" / f"epoch_{EPOCHS + 1}.pth").exists()
    rates = [[group["lr"] for group in content["optimizer"]["param_groups"]] for content in (last, expected)]
    assert rates[0] == pytest.approx(rates[1])
    name = "backbone.head.weight"
    assert not torch.equal(last["state_dict"][name], first["state_dict"][name])


def test_what_cannot_be_resumed_is_refused(trained, shapes, tmp_path):
    source = str(trained[1] / "epoch_2.pth")
    with pytest.raises(ConfigError, match=rf"--epochs 9: .* of a training of {EPOCHS}"):
        resume_training(recipe(shapes, tmp_path), source, epochs=9)
    with pytest.raises(CheckpointError, match="does not fit vig_small"):
        resume_training(finetuning_config("vig_small", shapes, tmp_path), source)
    with pytest.raises(CheckpointError, match="no checkpoint of a fine-tuning"):
        resume_training(recipe(shapes, tmp_path), str(official_like(tmp_path / "official.pth", 3)))
    for split in ("train", "val"):
        make_images(tmp_path / "others" / split, ("ball", "cube", "cone"), 1)
    with pytest.raises(ConfigError, match=r"trained on 3 classes \(circle.* there are 3 folders \(ball"):
        resume_training(recipe(tmp_path / "others", tmp_path), source)


def test_the_average_is_what_is_evaluated_and_kept(shapes, tmp_path):
    cfg = recipe(shapes, tmp_path / "work", epochs=2)
    use_average(cfg)
    use_average(cfg)  # as when a run is resumed with --ema
    result = finetune(cfg)
    content = torch.load(result.checkpoint)
    average, last = content["state_dict"], content["ema_state_dict"]
    assert not torch.equal(average["backbone.head.weight"], last["module.backbone.head.weight"])
    accuracy = evaluate_classifier("vig_tiny", result.checkpoint, shapes, size=SIZE, workers=0)
    assert accuracy.top1 == pytest.approx(result.top1)
    again = recipe(shapes, tmp_path / "work")
    resume_training(again, str(tmp_path / "work" / "epoch_1.pth"))
    assert [hook.type for hook in again.custom_hooks].count("EMAHook") == 1


def test_an_unreadable_image_ends_the_training_with_its_name(shapes, tmp_path):
    for split in ("train", "val"):
        make_images(tmp_path / "set" / split, CLASSES, 2)
    (tmp_path / "set/train/square/1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"train/square/1\.png cannot be read"):
        finetune(recipe(tmp_path / "set", tmp_path / "work", epochs=2))


def test_folders_that_cannot_be_trained_on_are_refused(shapes, tmp_path):
    with pytest.raises(DataError, match=r"no folder .*train/train: .* needs train and val"):
        recipe(shapes / "train", tmp_path)
    make_images(tmp_path / "one" / "train", ("circle",), 1)
    make_images(tmp_path / "one" / "val", ("circle", "square"), 1)
    with pytest.raises(ConfigError, match="num_classes=1: expected at least 2"):
        finetune(recipe(tmp_path / "one", tmp_path / "work"))
    with pytest.raises(DataError, match=r"has folders that .*train has not: square"):
        ClassFolderDataset(tmp_path / "one/val", evaluation_transform("vig_tiny", 64), tmp_path / "one/train")
    with pytest.raises(ConfigError, match=r"--epochs 1: expected at least 2"):
        recipe(shapes, tmp_path, epochs=1)
    with pytest.raises(ConfigError, match=r"no 'model\.label_smothing'|did you mean"):
        change_fields(recipe(shapes, tmp_path), {"optim_wrapper.optimiser.lr": 1})


# Which folder is which class


def test_a_split_with_fewer_folders_has_the_classes_of_the_training(shapes, tmp_path):
    make_images(tmp_path, ("square", "triangle"), 1)
    dataset = ClassFolderDataset(tmp_path, evaluation_transform("vig_tiny", 64), class_root=shapes / "train")
    assert [dataset[i]["labels"] for i in range(2)] == [1, 2]
    assert dataset.metainfo["classes"] == CLASSES


def test_order_of_names_counts_only_where_nothing_else_says_and_the_number_fits():
    names = ["a", "b", "c"]
    assert map_classes(names, 3).indices == {"a": 0, "b": 1, "c": 2}
    assert "assumption" in map_classes(names, 3).reason
    with pytest.raises(ConfigError, match=r"3 folders, but the checkpoint has 1000 classes"):
        map_classes(names, 1000, synsets=imagenet_synsets())
    with pytest.raises(ConfigError, match="numbers"):
        map_classes(sorted(map(str, range(11))), 11)
    assert map_classes(sorted(map(str, range(9))), 9).indices["8"] == 8


def test_names_in_the_checkpoint_decide_and_fewer_folders_will_do():
    assert map_classes(["a", "c"], 3, ("c", "b", "a")).indices == {"a": 2, "c": 0}
    with pytest.raises(ConfigError, match=r"1 of 2 folders are no classes of the checkpoint: 'z'"):
        map_classes(["a", "z"], 3, ("c", "b", "a"))


def test_imagenets_synsets_are_known_by_name():
    synsets = imagenet_synsets()
    found = map_classes(["n01443537", "n03028079"], 1000, synsets=synsets)
    assert found.indices == {"n01443537": 1, "n03028079": 497}  # goldfish and church
    assert found.is_imagenet
    assert map_classes(sorted(synsets), 1000, synsets=synsets).indices == {name: i for i, name in enumerate(synsets)}


def test_a_file_of_classes_goes_before_names(tmp_path):
    file = tmp_path / "classes.txt"
    file.write_text("a 2\n\nwith space 0\n")
    assert map_classes(["a", "with space"], 3, ("a", "b", "c"), file).indices == {"a": 2, "with space": 0}
    with pytest.raises(ConfigError, match=r"lacks 1 of 2 folders: 'b'"):
        map_classes(["a", "b"], 3, class_file=file)
    for line in ("a 3", "a", "a x"):
        file.write_text(line)
        with pytest.raises(ConfigError, match=r"line 1: .* expected FOLDER INDEX"):
            map_classes(["a"], 3, class_file=file)


def test_folders_of_another_layout_are_refused_with_the_expected_one(shapes, tmp_path):
    assert split_folder(shapes, "val") == shapes / "val"
    assert split_folder(shapes / "val", "val") == shapes / "val"
    with pytest.raises(DataError, match=r"no folder .*nothing: expected a folder for each class"):
        split_folder(tmp_path / "nothing", "val")
    (tmp_path / "0.JPEG").touch()
    with pytest.raises(DataError, match=r"no folders in it, but 1 files.*archive is flat"):
        class_folders(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"[Nn]o valid file for the classes empty"):
        ClassFolderDataset(tmp_path, evaluation_transform("vig_tiny", 64))


# Evaluation


def test_images_are_prepared_as_the_official_evaluation_does(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    (tmp_path / "a").mkdir()
    Image.fromarray(noise).save(tmp_path / "a" / "0.png")
    pixels = ClassFolderDataset(tmp_path, evaluation_transform("vig_tiny", 224))[0]["inputs"]
    resized = Image.fromarray(noise).resize((341, 256), Image.Resampling.BICUBIC)
    left, top = round((341 - 224) / 2), round((256 - 224) / 2)
    expected = np.asarray(resized.crop((left, top, left + 224, top + 224))) / 255
    expected = (expected - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    assert np.abs(pixels.numpy() - expected.transpose(2, 0, 1)).max() < 1e-5


def test_hits_are_counted_by_hand():
    logits = torch.tensor([[6.0, 5, 4, 3, 2, 1, 0]]).repeat(4, 1)
    assert hits(logits, torch.tensor([0, 1, 4, 5])).tolist() == [[1, 1], [0, 1], [0, 1], [0, 0]]
    assert hits(logits[:, :2], torch.tensor([0, 1, 0, 1]))[:, 0].tolist() == [1, 0, 1, 0]


class OneClass(nn.Module):
    """Every image is of one class."""

    def __init__(self, index: int, num_classes: int) -> None:
        super().__init__()
        self.index, self.num_classes = index, num_classes
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(torch.full(images.shape[:1], self.index), self.num_classes) + self.bias


def test_labels_are_the_indices_of_the_folders_in_the_classifier(tmp_path):
    make_images(tmp_path / "val", ("n01443537", "n03028079"), 3)
    (tmp_path / "val/n03028079/0.png").unlink()
    dataset, classes = evaluation_data("vig_tiny", tmp_path, 1000, size=SIZE)
    assert classes.is_imagenet
    shares = {index: measure(OneClass(index, 1000), dataset, workers=0).top1 for index in (0, 1, 497)}
    assert shares == pytest.approx({0: 0, 1: 60, 497: 40})


def test_logits_that_are_not_finite_are_an_error(shapes):
    model = OneClass(0, 3)
    model.bias.data[1] = torch.nan
    dataset, _ = evaluation_data("vig_tiny", shapes, 3, size=SIZE)
    with pytest.raises(ConfigError, match="not finite"):
        measure(model, dataset, workers=0)


def test_class_count_and_names_come_from_the_checkpoint(trained, tmp_path):
    model, names = build_from_file("vig_tiny", trained[0].checkpoint)
    assert (model.num_classes, names) == (3, CLASSES)
    assert not model.training
    model, names = build_from_file("vig_tiny", official_like(tmp_path / "official.pth"))
    assert (model.num_classes, names) == (1000, None)
    with pytest.raises(CheckpointError, match="does not fit"):
        build_from_file("vig_small", trained[0].checkpoint)


def test_a_published_number_is_compared_with_the_same_images_alone():
    assert against_published("vig_small", 81.75, 50_000, 224).endswith("top-1 81.7 %; this is +0.05")
    assert "not comparable, these are 10 images" in against_published("vig_small", 81.75, 10, 224)
    assert "not comparable, these are 256 pixels" in against_published("vig_small", 81.75, 50_000, 256)


# The command


def test_command_evaluates_past_images_that_it_cannot_read(tool, trained, shapes, tmp_path, capsys):
    common = ("--size", SIZE, "--workers", 0, "--device", "cpu", "--json", tmp_path / "accuracy.json")
    assert tool("eval", "vig_tiny", trained[0].checkpoint, shapes, *common) == 0
    whole = json.loads((tmp_path / "accuracy.json").read_text())
    assert whole["top1"] == pytest.approx(trained[0].top1)
    assert f"top-1 {trained[0].top1:.2f} % of 21 images" in capsys.readouterr().out
    make_images(tmp_path / "val", CLASSES, 7, seed=1)
    (tmp_path / "val/circle/0.png").write_bytes(b"")
    picture = tmp_path / "whole.jpg"
    draw(1, random.Random(0)).resize((200, 200)).save(picture)
    (tmp_path / "val/square/0.png").unlink()
    (tmp_path / "val/square/0.jpg").write_bytes(picture.read_bytes()[:2000])
    assert tool("eval", "vig_tiny", trained[0].checkpoint, tmp_path / "val", *common) == 1
    found = json.loads((tmp_path / "accuracy.json").read_text())
    assert found["images"] == 19
    assert len(found["unreadable"]) == 2
    error = capsys.readouterr().err
    assert "2 of 21 images could not be read" in error
    assert re.search(r"circle/0\.png cannot be read .*square/0\.jpg cannot be read \(OSError", error, re.DOTALL)


def test_command_says_what_is_wrong_with_the_command(tool, shapes, tmp_path, capsys):
    checkpoint = official_like(tmp_path / "official.pth")
    assert tool("eval", "vig_tiny", checkpoint, shapes) == 2
    assert "3 folders, but the checkpoint has 1000 classes" in capsys.readouterr().err
    assert tool("eval", "vig_tiny", tmp_path / "nothing.pth", shapes) == 2
    assert tool("eval", "vig_huge", checkpoint, shapes) == 2
    assert tool("eval", "vig_tiny", checkpoint, shapes, "--batch-size", 0) == 2
    assert tool("finetune", "vig_tiny", shapes, "--pretrained", tmp_path / "none") == 2
    assert "expected the official checkpoint of this backbone, vig_t_*.pth" in capsys.readouterr().err


def test_command_with_a_file_of_classes(tool, trained, shapes, tmp_path):
    classes, output = tmp_path / "classes.txt", tmp_path / "accuracy.json"
    for shift in (0, 1):
        classes.write_text("\n".join(f"{name} {(i + shift) % 3}" for i, name in enumerate(CLASSES)))
        options = ("--classes", classes, "--json", output, "--size", SIZE, "--workers", 0, "--device", "cpu")
        assert tool("eval", "vig_tiny", trained[0].checkpoint, shapes, *options) == 0
        top1 = json.loads(output.read_text())["top1"]
        assert (top1 == pytest.approx(trained[0].top1)) == (shift == 0)
        assert shift == 0 or top1 <= 100.001 - trained[0].top1


@pytest.mark.slow
def test_two_processes_fine_tune_and_are_resumed_by_one(run_python, shapes, tmp_path):
    common = ("vig_tiny", shapes, "--size", SIZE, "--workers", 0, "--work-dir", tmp_path / "work")
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    keep_both = ("--cfg-options", "default_hooks.checkpoint.max_keep_ckpts=2")
    options = ("--batch-size", 4, "--epochs", 2, "--launcher", "pytorch", "--amp", *keep_both)
    json_file = ("--json", tmp_path / "accuracy.json")
    run_python(*two, "tools/classify.py", "finetune", *common, *options, *json_file)
    trained = json.loads((tmp_path / "accuracy.json").read_text())
    run_python("tools/classify.py", "eval", "vig_tiny", trained["checkpoint"], shapes, "--size", SIZE, *json_file)
    accuracy = json.loads((tmp_path / "accuracy.json").read_text())
    assert (accuracy["images"], accuracy["top1"]) == (21, pytest.approx(trained["top1"]))
    (tmp_path / "work/epoch_2.pth").unlink()
    process = run_python("tools/classify.py", "finetune", *common, "--batch-size", 8, "--resume")
    assert "resumed epoch: 1, iter: 6" in process.stdout + process.stderr
    assert torch.load(tmp_path / "work/epoch_2.pth")["meta"]["iter"] == 12
