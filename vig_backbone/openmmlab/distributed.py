"""Several processes without a GPU, which mmengine alone does not start: gloo, and DDP without device ids."""

import torch
import torch.distributed as dist
from mmengine.config import Config

from .errors import ConfigError


def prepare_processes(cfg: Config, launcher: str) -> None:
    """Set up `cfg` for `launcher` ('none', 'pytorch' or 'slurm'); where there is no GPU, start gloo here."""
    cfg.launcher = launcher
    if launcher == "none" or torch.cuda.is_available():
        return
    if launcher != "pytorch":
        raise ConfigError(f"--launcher {launcher} without a GPU: start CPU processes with torchrun (--launcher pytorch)")
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    cfg.model_wrapper_cfg = dict(
        type="MMDistributedDataParallel",
        device_ids=None,
        broadcast_buffers=False,
        find_unused_parameters=cfg.get("find_unused_parameters", False),
    )
    _replace_type(cfg._cfg_dict, {"SyncBN": "BN"})  # SyncBN exists on GPUs only


def _replace_type(node: object, names: dict[str, str]) -> None:
    """Rename `type` throughout a nested config, in place."""
    if isinstance(node, dict):
        if node.get("type") in names:
            node["type"] = names[node["type"]]
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for child in node:
            _replace_type(child, names)
