"""Fine-tuning a classifier on the class folders of FOLDER/train, on mmengine's runner."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.config import Config

from ..classifier import CLASSIFIERS
from ..openmmlab.configuration import check_options
from ..openmmlab.errors import ConfigError, DataError
from ..openmmlab.run import train
from .data import evaluation_transform, timm_data, training_transform
from .folders import LAYOUT, class_folders
from .published import IMAGENET_SIZE, PUBLISHED

EPOCHS = 30
LEAST_EPOCHS = 2  # one of them to warm up


class Finetuned(NamedTuple):
    """`top1` of the best epoch in percent, and its checkpoint."""

    top1: float
    checkpoint: Path


def finetuning_config(
    name: str,
    folder: str | Path,
    work_dir: str | Path,
    pretrained: str | Path | None = None,
    epochs: int = EPOCHS,
    batch_size: int = 64,
    size: int = IMAGENET_SIZE,
    workers: int = 2,
    seed: int = 0,
) -> Config:
    """The recipe, for :func:`finetune`; any field can be changed before.

    AdamW, cosine schedule after a tenth of warm-up, label smoothing, RandAugment, and the drop path of the official
    training. From a checkpoint, the learning rate falls by 0.8 a block towards the stem.

    Args:
        name: as for :func:`build_classifier`.
        folder: has train/ and val/, each with a folder for each class.
        pretrained: path or URL of a checkpoint of this classifier, whose last layer is left out.
        batch_size: images a step of each process; the learning rate follows their sum.
        size: height and width in pixels.

    Raises:
        DataError: no such folders.
        ConfigError: a name or number that cannot be.
    """
    if name not in CLASSIFIERS:
        raise ConfigError(f"no classifier {name!r}: expected one of {', '.join(CLASSIFIERS)}")
    if epochs < LEAST_EPOCHS:
        raise ConfigError(f"--epochs {epochs}: expected at least {LEAST_EPOCHS}, one of them to warm up")
    timm_data()  # its absence is an error now, not from the first image
    train_root, val_root = _split(folder, "train"), _split(folder, "val")
    warm_up = max(1, epochs // 10)
    loader = dict(
        batch_size=batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        collate_fn=dict(type="default_collate"),
    )
    data = dict(type="ClassFolderDataset", class_root=str(train_root))
    fields = dict(
        custom_imports=dict(imports=["vig_backbone.classification"], allow_failed_imports=False),
        default_scope="mmengine",
        work_dir=str(work_dir),
        model=dict(
            type="ImageClassifier",
            name=name,
            num_classes=len(class_folders(train_root)),
            checkpoint=None if pretrained is None else str(pretrained),
            label_smoothing=0.1,
            drop_path_rate=PUBLISHED[name].drop_path_rate,
        ),
        train_dataloader=dict(
            **loader,
            sampler=dict(type="DefaultSampler", shuffle=True),
            dataset=dict(**data, root=str(train_root), transform=training_transform(name, size)),
        ),
        val_dataloader=dict(
            **loader,
            sampler=dict(type="DefaultSampler", shuffle=False),
            dataset=dict(**data, root=str(val_root), transform=evaluation_transform(name, size)),
        ),
        val_evaluator=dict(type="TopAccuracy"),
        train_cfg=dict(by_epoch=True, max_epochs=epochs, val_interval=1),
        val_cfg=dict(),
        optim_wrapper=dict(
            type="FiniteOptimWrapper",
            optimizer=dict(type="AdamW", lr=5e-4, betas=(0.9, 0.999), weight_decay=0.05, fused=True),
            clip_grad=dict(max_norm=5),
            constructor="ViGOptimWrapperConstructor",
            paramwise_cfg=dict(layer_decay_rate=1.0 if pretrained is None else 0.8),
        ),
        auto_scale_lr=dict(enable=True, base_batch_size=256),  # lr is that of 256 images a step
        param_scheduler=[
            dict(type="LinearLR", start_factor=1e-3, begin=0, end=warm_up, convert_to_iter_based=True),
            # A share of each group's own rate: an absolute end could lie above that of the stem.
            dict(
                type="CosineAnnealingLR",
                eta_min_ratio=0.01,
                begin=warm_up,
                end=epochs,
                T_max=epochs - warm_up,
                convert_to_iter_based=True,
            ),
        ],
        default_hooks=dict(
            runtime_info=dict(type="DeferredRuntimeInfoHook"),
            logger=dict(type="LoggerHook", interval=20, ignore_last=False),
            checkpoint=dict(
                type="AtomicCheckpointHook", interval=1, max_keep_ckpts=1, save_best="accuracy/top1", rule="greater"
            ),
        ),
        custom_hooks=[dict(type="FiniteStepsHook"), dict(type="DataOrderHook")],
        visualizer=dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")]),
        randomness=dict(seed=seed),
    )
    return Config(fields)


def change_fields(cfg: Config, options: dict[str, Any]) -> None:
    """Lay dotted names and values over the config; ConfigError for a field that is not there."""
    check_options(cfg, options)
    cfg.merge_from_dict(options)


def use_average(cfg: Config) -> None:
    """Evaluate and keep a moving average of the weights, over about the last tenth of the steps.

    An average over a fixed number of steps would hold on to the weights of the start in a short training.
    """
    if any(hook.type == "EMAHook" for hook in cfg.custom_hooks):
        return  # that of the run that is resumed
    average = dict(type="EMAHook", ema_type="MomentumAnnealingEMA", momentum=2e-4, gamma=10, update_buffers=True)
    cfg.custom_hooks = [*cfg.custom_hooks, average]


def finetune(cfg: Config) -> Finetuned:
    """Train as :func:`finetuning_config` and the tool's options have set up; the best epoch on val/.

    Raises:
        ConfigError: the config cannot be built.
        DataError: an image that cannot be read, or folders that do not fit each other.
        CheckpointError: a checkpoint that does not fit the model.
        NonFiniteError: the training has diverged.
    """
    runner = train(cfg)
    log = runner.message_hub
    return Finetuned(float(log.get_info("best_score")), Path(log.get_info("best_ckpt")))


def _split(folder: str | Path, split: str) -> Path:
    root = Path(folder) / split
    if not root.is_dir():
        raise DataError(f"no folder {root}: fine-tuning needs train and val, in each {LAYOUT.format(split=split)[9:]}")
    return root
