"""Models in folders in the style of the hub: what was saved comes back, anything else is refused."""

from pathlib import Path

import pytest
import torch
from golden import set_golden_weights
from torch import Tensor, nn

from vig_backbone import CheckpointError, build_backbone
from vig_backbone.classifier import build_classifier
from vig_backbone.pretrained import from_pretrained, save_pretrained

pytest.importorskip("safetensors")


def outputs(model: nn.Module) -> list[Tensor]:
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model.eval()(image)
    return list(out) if isinstance(out, tuple) else [out]


@pytest.mark.parametrize("name", ["vig_tiny", "hier_vig_tiny"])
@pytest.mark.parametrize(
    ("build", "options"), [(build_backbone, {"out_indices": (1, 3)}), (build_classifier, {"num_classes": 3})]
)
def test_saved_model_comes_back(name, build, options, tmp_path):
    model = set_golden_weights(build(name, **options))
    again = from_pretrained(save_pretrained(model, tmp_path / "model"))
    assert type(again) is type(model)
    assert not again.training
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), outputs(again), strict=True))


def test_options_come_before_those_that_were_saved(tmp_path):
    folder = save_pretrained(build_backbone("vig_tiny", out_indices=(1,)), tmp_path)
    model = from_pretrained(folder, out_indices=(2, 5), with_cp=True)
    assert (model.out_indices, model.with_cp) == ((2, 5), True)
    with pytest.raises(CheckpointError, match="describes no model"):
        from_pretrained(folder, no_such_argument=1)


def test_timm_loads_the_folder_of_a_classifier(tmp_path):
    timm = pytest.importorskip("timm")
    model = set_golden_weights(build_classifier("vig_tiny", num_classes=4))
    again = timm.create_model(f"local-dir:{save_pretrained(model, tmp_path)}", pretrained=True)
    assert torch.equal(outputs(model)[0], outputs(again)[0])


def test_other_models_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="a Linear cannot be saved this way"):
        save_pretrained(nn.Linear(2, 2), tmp_path)


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"architecture": ')


def another_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"architecture": "vit_base", "model_type": "vit"}')


def another_size(folder: Path) -> None:
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("vig_tiny", "vig_small"))


DAMAGE = {
    "is damaged": break_config,
    "is of another kind of model": another_model,
    r"does not fit ViG\(arch='small'\).*These are the weights of ViG\(arch='tiny'\)": another_size,
    "no config.json in": lambda folder: (folder / "config.json").unlink(),
    "no checkpoint at": lambda folder: (folder / "model.safetensors").unlink(),
    "cannot be read as a checkpoint": lambda folder: (folder / "model.safetensors").write_bytes(b"\x10\x00"),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damaged_folder_is_refused(message, tmp_path):
    save_pretrained(build_backbone("vig_tiny"), tmp_path)
    DAMAGE[message](tmp_path)
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path)


def test_hub_repository_is_fetched_by_its_id(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    model = set_golden_weights(build_backbone("vig_tiny"))
    folder, asked = save_pretrained(model, tmp_path), []

    def download(repo_id: str, filename: str, revision: str | None = None) -> str:
        asked.append((repo_id, filename, revision))
        return str(folder / filename)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    again = from_pretrained("someone/vig@v1.0")
    assert asked == [("someone/vig", "config.json", "v1.0"), ("someone/vig", "model.safetensors", "v1.0")]
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), outputs(again), strict=True))


def test_hub_out_of_reach_says_what_to_do_offline(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def download(*arguments: object, **options: object) -> str:
        raise hub.errors.LocalEntryNotFoundError("no connection\nand more")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    with pytest.raises(CheckpointError, match=r"cannot be reached \(no connection\)\. Offline: copy config\.json"):
        from_pretrained("someone/vig")


@pytest.mark.parametrize("source", ["/no/such/folder", "nothing", "a/b/c"])
def test_what_is_neither_folder_nor_hub_id_is_refused(source):
    with pytest.raises(CheckpointError, match=f"no folder {source}"):
        from_pretrained(source)
