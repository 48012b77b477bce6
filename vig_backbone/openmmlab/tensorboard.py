"""Curves of a training in TensorBoard, beside the log that the other tools read."""

from __future__ import annotations

from importlib.util import find_spec

from mmengine.config import Config

from .errors import ConfigError

BACKEND = "TensorboardVisBackend"


def use_tensorboard(cfg: Config) -> None:
    """Let a training write its curves for TensorBoard as well, into TIME/vis_data of the work dir.

    Raises:
        ConfigError: the package is not installed.
    """
    if find_spec("tensorboard") is None:
        raise ConfigError("--tensorboard needs a package that is not installed: pip install tensorboard")
    backends = list(cfg.visualizer.get("vis_backends") or [dict(type="LocalVisBackend")])
    if not any(backend.get("type") == BACKEND for backend in backends):
        cfg.visualizer.vis_backends = [*backends, dict(type=BACKEND)]
