"""Sharded data parallel: each process holds its part of parameters, gradients and optimizer state (PyTorch's FSDP2).

A block's parameters are whole only while it computes. The model is sharded in place and mmengine's Runner does the
rest. mmengine's own FSDPStrategy needs FlexibleRunner, and PyTorch's first FSDP, which is deprecated.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import broadcast, get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm
from mmengine.runner import Runner
from mmengine.utils import apply_to
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from .. import hier_vig, vig
from .errors import ConfigError
from .finite_steps import FiniteAmpOptimWrapper, FiniteOptimWrapper

BLOCKS = (vig.Block, hier_vig.Block)
SHARDED_WRAPPERS = {"FiniteOptimWrapper": "ShardedOptimWrapper", "FiniteAmpOptimWrapper": "ShardedAmpOptimWrapper"}


def use_fsdp(cfg: Config, launcher: str) -> None:
    """Train `cfg` sharded over the processes of `launcher`; call it after `use_amp`.

    Raises:
        ConfigError: for a single process, and for what does not go with sharded parameters.
    """
    if launcher == "none":
        raise ConfigError("--fsdp spreads a model over several processes: start them (see tools/launch), --launcher")
    wrapper = cfg.optim_wrapper.get("type")
    if wrapper not in SHARDED_WRAPPERS:
        raise ConfigError(
            f"--fsdp: optim_wrapper.type={wrapper!r}, expected {' or '.join(map(repr, SHARDED_WRAPPERS))}"
        )
    if cfg.optim_wrapper.get("dtype") == "float16":
        raise ConfigError("--fsdp: losses cannot be scaled for sharded gradients, use bfloat16 instead of float16")
    if cfg.get("compile") or cfg.model.backbone.get("compile"):
        raise ConfigError("--fsdp does not go with compile")
    if any(hook.get("type") == "EMAHook" for hook in cfg.get("custom_hooks", [])):
        raise ConfigError("--fsdp: EMAHook copies the whole model into each process; leave it out of custom_hooks")
    cfg.optim_wrapper.type = SHARDED_WRAPPERS[wrapper]
    cfg.runner_type = "ShardedRunner"


class ShardedRunner(Runner):
    """mmengine's Runner for a sharded model; checkpoints hold whole tensors, as those of any other run."""

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Initialise the weights, the same in all processes, then shard them; arguments of DDP have no meaning here."""
        model = model.to(get_device())
        if get_device() == "cpu":
            model = revert_sync_batchnorm(model)
        elif self.cfg.get("sync_bn"):
            model = convert_sync_batchnorm(model, self.cfg.sync_bn)
        model.init_weights()
        for tensor in model.state_dict().values():
            broadcast(tensor)
        shard(model)
        return model

    def _init_model_weights(self) -> None:
        """They were initialised before they were sharded."""

    def register_hooks(self, default_hooks: dict | None = None, custom_hooks: list | None = None) -> None:
        """As in mmengine, and WholeInValidationHook."""
        super().register_hooks(default_hooks, custom_hooks)
        self.register_hook(WholeInValidationHook())

    def build_optim_wrapper(self, optim_wrapper: dict | FiniteOptimWrapper) -> FiniteOptimWrapper:
        """As in mmengine; the optimizer takes the state of checkpoints, which is whole."""
        is_new = isinstance(optim_wrapper, dict)
        built = super().build_optim_wrapper(optim_wrapper)
        if is_new:
            built.optimizer.register_load_state_dict_pre_hook(_shard_optimizer_state)
        return built

    def save_checkpoint(self, *args, **kwargs) -> None:
        """As in mmengine: the first process writes; all of them hand over what they hold."""
        with _whole_tensors(self.model, self.optim_wrapper.optimizer):
            super().save_checkpoint(*args, **kwargs)


class WholeInValidationHook(Hook):
    """Whole parameters in every process while it validates.

    Processes would wait for each other in every block; with sliding windows, images take different numbers of them.
    """

    def before_val(self, runner: Runner) -> None:
        _keep_whole(runner.model, True)

    def after_val(self, runner: Runner) -> None:
        _keep_whole(runner.model, False)


class ShardedOptimWrapper(FiniteOptimWrapper):
    """FiniteOptimWrapper for gradients of which each process holds a part."""

    def _norms(self, params: list[nn.Parameter]) -> Tensor:
        parts = [p.grad.to_local() for p in params]
        squares = torch.stack(torch._foreach_norm(parts, dtype=torch.float32)).square()  # [len(params)]
        dist.all_reduce(squares)
        return squares.sqrt()

    def _clip(self, params: list[nn.Parameter]) -> Tensor | None:
        norm = super()._clip(params)
        return None if norm is None else norm.full_tensor()


class ShardedAmpOptimWrapper(ShardedOptimWrapper, FiniteAmpOptimWrapper):
    """The same in bfloat16, in place of FiniteAmpOptimWrapper."""


def shard(model: nn.Module) -> None:
    """Shard in place: every block of a backbone by itself, and the rest of the model."""
    mesh = init_device_mesh(get_device(), (get_world_size(),))
    for module in model.modules():
        if isinstance(module, BLOCKS):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    model.register_load_state_dict_pre_hook(_shard_weights)


def _keep_whole(model: nn.Module, whole: bool) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(not whole, recurse=False)
            module.unshard() if whole else module.reshard()


def _shard_weights(module: nn.Module, state_dict: dict, *_: object) -> None:
    """Before weights are loaded: take this process's part of those of a checkpoint."""
    for name, param in module.named_parameters():
        if name in state_dict and state_dict[name].shape == param.shape:  # another shape is reported on loading
            state_dict[name] = _part(state_dict[name], param)


def _shard_optimizer_state(optimizer: torch.optim.Optimizer, state_dict: dict) -> dict:
    """Before an optimizer's state is loaded: take this process's part; state that is one number stays whole."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    state = dict(state_dict["state"])
    for number, param in zip(numbers, params):
        if number in state:
            state[number] = {
                name: _part(value, param) if isinstance(value, Tensor) and value.shape == param.shape else value
                for name, value in state[number].items()
            }
    return {**state_dict, "state": state}


def _part(whole: Tensor, like: DTensor) -> DTensor:
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)


@contextmanager
def _whole_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, `state_dict()` of both gives whole tensors, on the CPU; in processes but the first, empty ones."""
    weights, state = (apply_to(x.state_dict(), _is_sharded, _gather) for x in (model, optimizer))
    hooks = [
        model.register_state_dict_post_hook(lambda module, found, prefix, metadata: found.update(weights)),
        optimizer.register_state_dict_post_hook(lambda optimizer, found: state),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_sharded(value: object) -> bool:
    return isinstance(value, DTensor)


def _gather(part: DTensor) -> Tensor:
    whole = part.full_tensor()
    return whole.cpu() if is_main_process() else whole.new_empty(0)
