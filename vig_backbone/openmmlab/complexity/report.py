"""What a model costs: its parameters, and the multiply-adds and activations of one image."""

from collections.abc import Iterator
from dataclasses import dataclass

from mmengine.config import Config
from mmengine.logging import print_log
from torch import nn

from ..errors import ConfigError
from .counter import Count, counting
from .published import unseen_modules
from .run import Size, build_model, run_model

DEFAULT_SIZES: dict[str, Size] = {"mmdet": (800, 1280), "mmseg": (512, 2048)}  # those of Swin's tables
LACKS_VALUES = (NotImplementedError, RuntimeError, TypeError)  # raised by operators that want more than shapes


@dataclass
class Cost:
    """Of a module with all that is in it.

    macs: multiply-adds of all products; published: as the counters of published tables count (`published.py`);
    activations: numbers that the products make.
    """

    parameters: int = 0
    macs: int = 0
    published: int = 0
    activations: int = 0


@dataclass(frozen=True)
class Report:
    """Costs by the names of the modules; the whole model is ``''``, the backbone ``'backbone'``."""

    size: Size
    modules: dict[str, Cost]

    @property
    def model(self) -> Cost:
        return self.modules[""]

    @property
    def backbone(self) -> Cost:
        return self.modules["backbone"]


def count_config(cfg: Config, size: Size | None = None) -> Report:
    """Count the model of a config of mmdet or mmseg for one image of `size` (height, width).

    Nothing is computed, tensors have shapes alone. Only a model that asks for their values runs on the CPU, which takes
    time and memory.

    Args:
        size: 800 x 1280 for detectors and 512 x 2048 for segmenters if None.

    Raises:
        ConfigError: if the model cannot be built, or does not run for an image of this size.
    """
    size = size or DEFAULT_SIZES[cfg.default_scope]
    try:
        return _count(cfg, size, "meta", let_through=LACKS_VALUES)
    except LACKS_VALUES as error:
        reason = f"needs the values of tensors, not their shapes alone ({_first_line(error)})"
        print_log(f"{cfg.model.type} {reason}: running it on the CPU", logger="current")
    return _count(cfg, size, "cpu")


def _count(cfg: Config, size: Size, device: str, let_through: tuple[type[Exception], ...] = ()) -> Report:
    model = build_model(cfg, device)
    with counting(model) as counts:
        try:
            run_model(model, size)
        except let_through:
            raise
        except Exception as error:  # a model may raise anything
            raise ConfigError(
                f"{cfg.model.type} does not run for one image of {size[0]} x {size[1]} pixels ({_first_line(error)}): "
                "expected a detector, with proposals (RPN and RoI heads) or without, or a segmenter, with heads that "
                "need the image alone, and a size that it takes (--size)"
            ) from error
    return Report(size, _sum_up(model, counts))


def _sum_up(model: nn.Module, counts: dict[str, Count]) -> dict[str, Cost]:
    """Costs of all modules, each with all that is in it, in the order of the model."""
    unseen = unseen_modules(model)
    costs = {name: Cost() for name, _ in model.named_modules()}
    for name, parameter in model.named_parameters():
        for around in _around(name.rpartition(".")[0]):
            costs[around].parameters += parameter.numel()
    for name, count in counts.items():
        for around in _around(name):
            costs[around].macs += count.macs
            costs[around].published += count.extras + (0 if name in unseen else count.macs)
            costs[around].activations += count.activations
    return costs


def _around(name: str) -> Iterator[str]:
    """A module and those that it is in: 'a.b' -> 'a.b', 'a', ''."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
