"""The models that are compared by default, and configs made to differ in their model alone."""

from pathlib import Path

from _step_configs import Variant, drop_pretrained, find_config, parse_options, parse_variant
from mmengine.config import Config, ConfigDict

from vig_backbone.openmmlab.configuration import load_config, use_amp
from vig_backbone.openmmlab.errors import ConfigError
from vig_backbone.openmmlab.fast_loading import use_fast_loading

FOLDERS = {"mmseg": "seg_configs", "mmdet": "det_configs"}
EVALUATIONS = 8
# Parameters of stock backbones that have several dimensions, and yet no weight decay in their own configs.
UNDECAYED = ("pos_embed", "cls_token", "relative_position_bias_table")
RECORDER = "_compare_recorder"  # beside tools/train.py, where Python then looks for modules

_SEGMENTERS = (
    "ViG-S=seg_configs/upernet_vig_s.py",
    "ViG-H-T=seg_configs/upernet_hier_vig_t.py",
    "DeiT-S=mmseg::vit/vit_deit-s16_mln_upernet_8xb2-160k_ade20k-512x512.py@model.backbone.img_size=(256,256)",
    "Swin-T=mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py",
)
_DETECTORS = (
    "ViG-S=det_configs/mask_rcnn_vig_s.py",
    "ViG-H-T=det_configs/mask_rcnn_hier_vig_t.py",
    "ResNet-50=mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
    "Swin-T=mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py",
)
PRESETS = {"segmentation": _SEGMENTERS, "detection": _DETECTORS}


def parse_variants(text: str) -> list[Variant]:
    """The rows of a preset, or one row; ArgumentTypeError for what is neither."""
    return [parse_variant(each) for each in PRESETS.get(text, (text,))]


def is_stock(variant: Variant) -> bool:
    return "::" in variant.config


def load_row(variant: Variant, data: str, options: list[str]) -> Config:
    """A config with the data set and schedule of `data` laid over it, to be trained from scratch.

    Data, schedule, optimizer and its settings, hooks and drop path are then those of every row. What a config does them
    with stays its own: classes of the model, the preprocessor, the optimizer's wrapper and the reading of losses.

    Args:
        data: NAME of the ``_base_/data_NAME.py`` in the folder of this repository that is for the config's task.
        options: KEY=VALUE for every row; those of the variant come after them.

    Raises:
        ConfigError: if the config cannot be read, or an option names what is not there.
    """
    file = find_config(variant.config)
    plain = load_config(file)
    overlay = Path(__file__).parents[1] / FOLDERS[plain.default_scope] / "_base_" / f"data_{data}.py"
    cfg = load_config(file, str(overlay), parse_options([*options, *variant.options]))
    if "drop_path_rate" not in plain.model.backbone:  # a convolutional network
        cfg.model.backbone.pop("drop_path_rate", None)
    _learn_from_scratch(cfg)
    if cfg.model.data_preprocessor.type.startswith("Fast"):
        use_fast_loading(cfg)
    if cfg.optim_wrapper.get("constructor") is None:
        _set_optimizer(cfg)
    return cfg


def _learn_from_scratch(cfg: Config) -> None:
    """No weights from anywhere, and no part that only makes sense with them."""
    drop_pretrained(cfg.model)
    cfg.load_from, cfg.resume = None, False
    backbone = cfg.model.backbone
    if backbone.get("frozen_stages", -1) >= 0:
        backbone.frozen_stages = -1
    if backbone.get("norm_eval"):
        backbone.norm_eval = False


def _set_optimizer(cfg: Config) -> None:
    """Our recipes' one for mmengine's own constructor: no weight decay of 1-D parameters and position embeddings."""
    given = cfg.optim_wrapper.optimizer
    cfg.optim_wrapper.optimizer = ConfigDict(
        type="AdamW", lr=given.lr, betas=(0.9, 0.999), weight_decay=given.weight_decay, fused=True
    )
    undecayed = {name: dict(decay_mult=0.0) for name in UNDECAYED}
    cfg.optim_wrapper.paramwise_cfg = ConfigDict(flat_decay_mult=0.0, norm_decay_mult=0.0, custom_keys=undecayed)


def set_run(
    cfg: Config, folder: Path, record: Path, seed: int, length: int | None, workers: int, amp: str | None
) -> None:
    """What the command line says: where to, how long, how. `length` is in steps, or in epochs where there are any."""
    cfg.work_dir = str(folder)
    cfg.randomness = dict(seed=seed)
    set_length(cfg, length)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.update(num_workers=workers, persistent_workers=workers > 0)
    if amp:
        use_amp(cfg, amp)
    cfg.default_hooks.checkpoint.update(interval=-1, save_last=False)
    cfg.custom_hooks = [*cfg.get("custom_hooks", []), dict(type="TrainingRecorder", file=str(record))]
    imports = cfg.get("custom_imports", {}).get("imports", [])
    cfg.custom_imports = dict(imports=[*imports, "vig_backbone", RECORDER], allow_failed_imports=False)


def set_length(cfg: Config, length: int | None) -> None:
    """Train so long (None: as the config says) and evaluate about 8 times; the schedule is stretched.

    Raises:
        ConfigError: for a schedule other than a warm-up, and a decay until the end.
    """
    field = "max_epochs" if "max_epochs" in cfg.train_cfg else "max_iters"
    before = cfg.train_cfg[field]
    length = length or before
    cfg.train_cfg.update({field: length, "val_interval": max(1, round(length / EVALUATIONS))})
    warm_up, decay = cfg.param_scheduler
    if decay.get("end") != before or warm_up.get("by_epoch", True):
        raise ConfigError(f"param_scheduler {cfg.param_scheduler}: expected a warm-up in steps and a decay to {before}")
    decay.end = length
    if field == "max_iters":
        warm_up.end = min(warm_up.end, max(1, length // 10))
