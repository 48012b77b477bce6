"""The classifiers in timm's registry: ``timm.create_model("vig_small", …)`` after ``import vig_backbone``.

Loaded when timm is, see `timm_hook.py`. Settings of the evaluation (224 pixels, bicubic, the middle 7/8 of the image)
are those of the official code, names of files those in its hub repository.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .checkpoint import CONTAINER_KEYS
from .classifier import CLASSIFIERS, Classifier, evaluation_settings

HUB_REPOSITORY = "hustvl/ViG"
# The exact name of the file of vig_tiny (vig_t_*.pth) is not known here: give it as `checkpoint_path`.
HUB_FILES = {
    "vig_small": "vig_s_81p7acc.pth",
    "vig_base": "vig_b_82p6acc.pth",
    "hier_vig_tiny": "vig_h_t_82p8acc.pth",
    "hier_vig_small": "vig_h_s_83p8acc.pth",
    "hier_vig_base": "vig_h_b_84p2acc.pth",
}


def _pretrained_cfg(name: str) -> dict[str, Any]:
    hub = dict(hf_hub_id=HUB_REPOSITORY, hf_hub_filename=HUB_FILES[name]) if name in HUB_FILES else {}
    return dict(
        **evaluation_settings(name),
        paper_name="ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention",
        paper_ids="arXiv:2405.18425",
        origin_url="https://github.com/hustvl/ViG",
        **hub,
    )


default_cfgs = generate_default_cfgs({f"{name}.in1k": _pretrained_cfg(name) for name in CLASSIFIERS})


def weights_of(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The weights out of what timm read from a file."""
    return next((state_dict[key] for key in CONTAINER_KEYS if key in state_dict), state_dict)


def _create(name: str, pretrained: bool, in_chans: int = 3, **options: Any) -> nn.Module:
    if in_chans != 3:
        raise ValueError(f"in_chans={in_chans}: {name} takes images of three channels; repeat or drop channels")
    out_indices = (2, 5, 8, 11) if name.startswith("vig") else (0, 1, 2, 3)
    return build_model_with_cfg(
        lambda in_chans, **settings: CLASSIFIERS[name](**settings),
        name,
        pretrained,
        pretrained_filter_fn=weights_of,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **options,
    )


def _register(name: str) -> None:
    def create(pretrained: bool = False, **options: Any) -> Classifier:
        return _create(name, pretrained, **options)

    create.__name__ = create.__qualname__ = name
    register_model(create)


for _name in CLASSIFIERS:
    _register(_name)
