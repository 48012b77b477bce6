"""Images of a folder with their classes: torchvision's reader of folders, timm's transforms.

timm has the transforms that the official code evaluates and trains with: RandAugment, and the bicubic resizing of
Pillow in front of the middle crop. torchvision's own resizing of tensors gives other pixels.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmengine.registry import DATASETS
from PIL import Image
from torchvision.datasets import ImageFolder

from ..classifier import evaluation_settings
from ..openmmlab.errors import ConfigError, DataError
from .folders import class_folders

# As DeiT, which the official code follows: two operations an image, of magnitude 9.
AUGMENTATION = "rand-m9-mstd0.5-inc1"


@DATASETS.register_module()
class ClassFolderDataset(ImageFolder):
    """Images of the class folders in `root`: ``dict(inputs=[3, H, W], labels=int)``.

    Args:
        root: has a folder for each class.
        transform: arguments of `timm.data.create_transform`.
        class_root: whose folders, sorted, are the classes (default: `root`); `root` may have fewer.
        indices: of the class of each folder in `root`, instead.

    Raises:
        DataError: folders without images, or that are no classes; from an item, an image that cannot be read.
        ConfigError: a `transform` that does not exist.
    """

    def __init__(
        self,
        root: str | Path,
        transform: Mapping[str, Any],
        class_root: str | Path | None = None,
        indices: Mapping[str, int] | None = None,
    ) -> None:
        if indices is None:
            classes = class_folders(class_root or root)
            self.metainfo = dict(classes=tuple(classes))
            known = {name: i for i, name in enumerate(classes)}
            if strangers := [name for name in class_folders(root) if name not in known]:
                raise DataError(f"{root} has folders that {class_root} has not: {', '.join(strangers[:3])}")
            indices = {name: known[name] for name in class_folders(root)}
        self._indices = dict(indices)
        try:
            super().__init__(str(root), build_transform(transform), loader=read_rgb)
        except FileNotFoundError as error:  # a folder without images
            raise DataError(f"{root}: {error}".rstrip()) from error

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """For torchvision, which asks once."""
        return list(self._indices), self._indices

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, label = self.samples[index]
        return dict(inputs=self.transform(self.loader(path)), labels=label)


def read_rgb(path: str) -> Image.Image:
    """An image as the official code reads it; DataError for what Pillow cannot decode.

    Not by `vig_backbone.data.image_files`, which also refuses files that lack their end marker alone: an accuracy
    would not be of the published images any more.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error ...
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {error}). Replace or remove it") from error


def build_transform(settings: Mapping[str, Any]) -> Callable[[Image.Image], Any]:
    """timm's transform of an image."""
    create_transform = timm_data().create_transform
    try:
        return create_transform(**settings)
    except TypeError as error:
        raise ConfigError(f"transform: {error}; expected arguments of timm.data.create_transform") from error


def evaluation_transform(name: str, size: int) -> dict[str, Any]:
    """How the official code evaluates the classifier `name`, at `size` pixels instead of 224."""
    settings = evaluation_settings(name)
    return dict(
        input_size=(3, size, size), **{key: settings[key] for key in ("interpolation", "crop_pct", "mean", "std")}
    )


def training_transform(name: str, size: int) -> dict[str, Any]:
    """A part of 8 to 100 % of the image, flipped or not, and RandAugment."""
    settings = evaluation_settings(name)
    return dict(
        input_size=(3, size, size),
        is_training=True,
        auto_augment=AUGMENTATION,
        **{key: settings[key] for key in ("interpolation", "mean", "std")},
    )


def imagenet_synsets() -> list[str]:
    """The 1000 in the order of the classes, from timm's list."""
    return timm_data().ImageNetInfo("imagenet-1k").label_names()


def timm_data() -> Any:
    """The module `timm.data`; ConfigError where timm is not installed."""
    try:
        from timm import data
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"classification needs the package {error.name}, which is not installed: pip install -e '.[classify]'"
        ) from error
    return data
