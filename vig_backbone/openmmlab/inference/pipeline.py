"""The test pipeline of a config for images that are in memory and have no annotation."""

from __future__ import annotations

from typing import Any

import numpy as np
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope

from ..errors import ConfigError
from ..fast_loading import pipelines

LOADER = "LoadImageFromFile"
OVERLAP = 3  # windows of sliding inference overlap by one part in this many


class ImagePipeline:
    """Prepares images for the model as the config's test pipeline does, less reading files and annotations.

    Raises:
        ConfigError: no test pipeline, or one that reads something other than colour images.
    """

    def __init__(self, cfg: Config) -> None:
        transforms = list(_test_pipeline(cfg))
        loader = transforms[0] if transforms else {}
        if _kind(loader) != LOADER or loader.get("color_type", "color") != "color":
            raise ConfigError(
                f"test_dataloader.dataset.pipeline.0 is {dict(loader)}: prediction reads images itself and stands for "
                f"{LOADER} with color_type='color' alone"
            )
        self.to_float32 = loader.get("to_float32", False)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            self.transform = Compose(_without_annotations(transforms[1:]))

    def __call__(self, image: np.ndarray) -> dict[str, Any]:
        """RGB [H, W, 3] -> `inputs` and `data_samples` for `test_step`; lists of them for test-time augmentation."""
        image = np.ascontiguousarray(image[..., ::-1])  # OpenMMLab's order is BGR
        if self.to_float32:
            image = image.astype(np.float32)
        size = image.shape[:2]
        return self.transform(dict(img=image, img_path=None, img_id=0, img_shape=size, ori_shape=size))


def use_window(cfg: Config, side: int) -> None:
    """Segment images at their own resolution, in overlapping square windows of `side` pixels.

    Raises:
        ConfigError: for a detector, which has no such mode.
    """
    if cfg.default_scope != "mmseg":
        raise ConfigError("--window: detectors see an image as a whole; sliding windows are for segmentation")
    if side < 32:
        raise ConfigError(f"--window {side}: expected at least 32 pixels")
    stride = side - side // OVERLAP
    settings = {**cfg.model.get("test_cfg", {}), "mode": "slide", "crop_size": (side, side), "stride": (stride, stride)}
    cfg.model.test_cfg = ConfigDict(settings)
    transforms = _test_pipeline(cfg)
    transforms[:] = [each for each in transforms if _kind(each) != "Resize"]


def _test_pipeline(cfg: Config) -> list:
    found = next(pipelines(cfg.get("test_dataloader", {}).get("dataset", ConfigDict())), None)
    if found is None:
        raise ConfigError("the config has no test_dataloader.dataset.pipeline, which says how to prepare an image")
    return found


def _without_annotations(node: list) -> list:
    """Also inside the lists of TestTimeAug, where an empty list would leave no way through."""
    kept = []
    for each in node:
        if isinstance(each, list | tuple):
            each = _without_annotations(each)
            if each:
                kept.append(each)
        elif "Annotations" not in _kind(each):
            if "transforms" in each:
                each = ConfigDict(each, transforms=_without_annotations(each["transforms"]))
            kept.append(each)
    return kept


def _kind(transform: dict) -> str:
    """The name of its class without the scope."""
    return str(transform.get("type")).rpartition(".")[2]
