"""Several processes: what mmengine's data-parallel training is set to, and gloo where there is no GPU."""

import atexit

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from torch import nn

from .errors import ConfigError


class GlooDataParallel(MMDistributedDataParallel):
    """mmengine's data-parallel wrapper for models on the CPU, where SyncBN does not exist and BN stands in."""

    def __init__(self, module: nn.Module, device_ids: list[int] | None = None, **kwargs) -> None:
        super().__init__(module=revert_sync_batchnorm(module), device_ids=None, **kwargs)


def prepare_processes(cfg: Config, launcher: str) -> None:
    """Set up `cfg` for `launcher` ('none', 'pytorch' or 'slurm'); where there is no GPU, start gloo here.

    `cfg.model_wrapper_cfg` holds arguments of DistributedDataParallel; what it states goes before what is set here.

    Raises:
        ConfigError: for Slurm without a GPU.
    """
    cfg.launcher = launcher
    if launcher == "none":
        return
    on_gpus = torch.cuda.is_available()
    if not on_gpus and launcher != "pytorch":
        raise ConfigError(
            f"--launcher {launcher} without a GPU: start CPU processes with torchrun (--launcher pytorch)"
        )
    cfg.model_wrapper_cfg = {**_data_parallel(cfg), **(cfg.get("model_wrapper_cfg") or {})}
    if on_gpus:
        return
    if cfg.model_wrapper_cfg.type == "MMDistributedDataParallel":
        cfg.model_wrapper_cfg.type = "GlooDataParallel"
    if not dist.is_initialized():
        dist.init_process_group("gloo")
        atexit.register(_leave)


def _data_parallel(cfg: Config) -> dict:
    """Gradients live in the buckets that are sent: a copy of them less in memory, and no copying."""
    return dict(
        type="MMDistributedDataParallel",
        broadcast_buffers=False,
        find_unused_parameters=cfg.get("find_unused_parameters", False),
        gradient_as_bucket_view=True,
    )


def _leave() -> None:
    """gloo's threads must not outlive the interpreter: it aborts."""
    if dist.is_initialized():
        dist.destroy_process_group()
