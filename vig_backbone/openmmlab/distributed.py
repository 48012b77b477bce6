"""Several processes without a GPU, which mmengine alone does not start: gloo, and DDP without device ids."""

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
    """Set up `cfg` for `launcher` ('none', 'pytorch' or 'slurm'); where there is no GPU, start gloo here."""
    cfg.launcher = launcher
    if launcher == "none" or torch.cuda.is_available():
        return
    if launcher != "pytorch":
        raise ConfigError(
            f"--launcher {launcher} without a GPU: start CPU processes with torchrun (--launcher pytorch)"
        )
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    cfg.model_wrapper_cfg = dict(
        type="GlooDataParallel",
        broadcast_buffers=False,
        find_unused_parameters=cfg.get("find_unused_parameters", False),
    )
