"""Short runs for tests/test_distributed.py, as one process or started by torchrun: records what each of them did.

    distributed_runs.py FOLDER DATA RUN [RUN ...]

A RUN is a function of this module; what it returns goes to FOLDER/RUN_RANK_of_PROCESSES.pt.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import HOOKS, MODELS, TRANSFORMS
from mmengine.runner import Runner
from mmengine.structures import InstanceData

import vig_backbone  # noqa: F401
from vig_backbone.openmmlab.configuration import load_config
from vig_backbone.openmmlab.distributed import prepare_processes
from vig_backbone.openmmlab.fsdp import use_fsdp
from vig_backbone.openmmlab.run import build_runner, evaluate, resume_from, train

FOLDER, DATA = Path(sys.argv[1]), Path(sys.argv[2])
BATCH = 4  # of all processes together


@HOOKS.register_module()
class Record(Hook):
    """What a run saw, drew and lost, iteration by iteration."""

    def __init__(self) -> None:
        self.images: list[list[str]] = []
        self.draws: list[list[float]] = []
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.dice: list[float] = []

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        samples = data_batch["data_samples"]
        self.images.append([Path(sample.img_path).stem for sample in samples])
        self.draws.append([sample.get("draw") for sample in samples])
        self.rates.append(runner.optim_wrapper.get_lr()["lr"][0])
        self.dice.append(np.random.get_state()[1].sum() + torch.get_rng_state().sum().item())

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        self.losses.append(outputs["loss"].item())


@HOOKS.register_module()
class BreakOneBatch(Hook):
    """The second step's images are not finite in the second process."""

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        runner.model.data_preprocessor.mean.fill_(torch.nan if (batch_idx, runner.rank) == (1, 1) else 120.0)


@TRANSFORMS.register_module()
class Draw:
    """Stands for an augmentation: what it draws becomes part of the sample."""

    count = 0

    def __call__(self, sample: dict) -> dict:
        Draw.count += 1
        return {**sample, "draw": float(np.random.rand())}


@MODELS.register_module()
class JitteredTruth(BaseModel):
    """A detector whose metrics are neither 0 nor 1: it finds most objects, and those a few pixels off."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, inputs: list, data_samples: list, mode: str) -> list:
        for sample in data_samples:
            dice = torch.Generator().manual_seed(sample.img_id)
            truth = sample.gt_instances[: max(1, len(sample.gt_instances) - 1)]
            count = len(truth)
            shift = int(torch.randint(0, 3, (), generator=dice))
            sample.pred_instances = InstanceData(
                bboxes=truth.bboxes.tensor + 3 * torch.rand(count, 4, generator=dice),
                scores=torch.rand(count, generator=dice),
                labels=truth.labels,
                masks=truth.masks.to_tensor(torch.bool, "cpu").roll(shift, dims=-1),
            )
        return data_samples


def segmentation(name: str, seed: int | None = 0, workers: int = 0) -> Config:
    """UperNet on ViG-T, four iterations, without what differs between one batch of 4 and two of 2: batch norms."""
    cfg = load_config("seg_configs/upernet_vig_t.py", "toy")
    cfg.work_dir = str(FOLDER / name)
    norm = dict(type="GN", num_groups=4)
    cfg.model.data_preprocessor.size = (64, 64)
    cfg.model.neck.norm_cfg = norm
    for part in ("decode_head", "auxiliary_head"):
        cfg.model[part].update(norm_cfg=norm, channels=16)
    for split in ("train", "val", "test"):
        loader = cfg[f"{split}_dataloader"]
        loader.update(num_workers=workers, persistent_workers=workers > 0)
        loader.dataset.data_root = str(DATA / "ade")
    cfg.train_dataloader.batch_size = BATCH // world_size()
    cfg.train_dataloader.dataset.pipeline = [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations", reduce_zero_label=True),
        dict(type="Draw"),
        dict(type="PackSegInputs", meta_keys=("img_path", "img_shape", "ori_shape", "draw")),
    ]
    for split in ("val", "test"):  # odd, so that one process has an image less; the last batch is smaller
        cfg[f"{split}_dataloader"].update(batch_size=2)
        cfg[f"{split}_dataloader"].dataset.indices = 5
    cfg.train_cfg.update(max_iters=4, val_begin=5)
    cfg.optim_wrapper.optimizer.update(lr=1e-3, eps=1e-3)  # eps: rounding of small gradients is not blown up
    cfg.default_hooks.checkpoint.update(interval=2)
    cfg.custom_hooks = [dict(type=name) for name in ("CheckDataHook", "FiniteStepsHook", "DataOrderHook", "Record")]
    cfg.randomness = dict(seed=seed)
    return cfg


def run(cfg: Config, fsdp: bool = False) -> dict:
    """Train; returns what was recorded."""
    if fsdp:
        use_fsdp(cfg, launcher())
    prepare_processes(cfg, launcher())
    Draw.count = 0
    runner = train(cfg)
    record = next(hook for hook in runner.hooks if isinstance(hook, Record))
    wrapper = dict(wrapper=type(runner.model).__name__, views=getattr(runner.model, "gradient_as_bucket_view", None))
    return {**vars(record), **wrapper, "loaded": Draw.count, "skipped": runner.optim_wrapper.skipped}


def plain() -> dict:
    return run(segmentation(f"plain_{world_size()}"))


def repeated_with_separate_buckets() -> dict:
    cfg = segmentation("repeated")
    cfg.model_wrapper_cfg = dict(gradient_as_bucket_view=False)
    return run(cfg)


def other_seed() -> dict:
    cfg = segmentation("other_seed", seed=1, workers=2)
    cfg.train_cfg.max_iters = 2
    return run(cfg)


def sharded() -> dict:
    """With a validation in which one process has three batches and the other two."""
    cfg = segmentation("sharded")
    cfg.train_cfg.update(val_begin=1, val_interval=2)
    cfg.val_dataloader.update(batch_size=1, sampler=dict(type="DefaultSampler", shuffle=False, round_up=False))
    return run(cfg, fsdp=True)


def resumed(source: str, name: str, fsdp: bool = False) -> dict:
    cfg = segmentation(name, seed=None)
    resume_from(cfg, str(FOLDER / source / "iter_2.pth"))
    return run(cfg, fsdp)


def two_resume_one() -> dict:
    return resumed("plain_1", "two_resume_one")


def one_resumes_two() -> dict:
    return resumed("plain_2", "one_resumes_two")


def sharded_in_bfloat16() -> dict:
    cfg = segmentation("sharded_in_bfloat16")
    cfg.train_cfg.max_iters = 3
    cfg.optim_wrapper.update(type="FiniteAmpOptimWrapper", dtype="bfloat16", clip_grad=dict(max_norm=1.0))
    cfg.custom_hooks.append(dict(type="BreakOneBatch"))
    return run(cfg, fsdp=True)


def sharded_resume_one() -> dict:
    return resumed("plain_1", "sharded_resume_one", fsdp=True)


def one_resumes_sharded() -> dict:
    return resumed("sharded", "one_resumes_sharded")


def evaluated() -> dict:
    """The segmenter that two processes trained."""
    cfg = segmentation(f"evaluated_{world_size()}")
    prepare_processes(cfg, launcher())
    return evaluate(cfg, FOLDER / "plain_2" / "iter_4.pth")


def detections() -> dict:
    cfg = load_config("det_configs/mask_rcnn_hier_vig_t.py", "toy")
    cfg.work_dir = str(FOLDER / f"detections_{world_size()}")
    cfg.model = dict(type="JitteredTruth")
    cfg.test_dataloader.update(batch_size=2, num_workers=0, persistent_workers=False)
    cfg.test_dataloader.dataset.update(data_root=str(DATA / "coco"), indices=5)
    cfg.test_evaluator.ann_file = str(DATA / "coco/annotations/instances_val2017.json")
    cfg.custom_hooks = []
    prepare_processes(cfg, launcher())
    return build_runner(cfg).test()


def world_size() -> int:
    return 2 if launcher() == "pytorch" else 1


def launcher() -> str:
    return "pytorch" if "RANK" in os.environ else "none"


if __name__ == "__main__":
    for name in sys.argv[3:]:
        torch.save(globals()[name](), FOLDER / f"{name}_{os.environ.get('RANK', 0)}_of_{world_size()}.pt")
