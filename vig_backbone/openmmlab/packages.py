"""mmengine's look-up of installed packages without `pkg_resources`, which setuptools removed in version 82.

Configs that inherit from installed packages (``mmdet::...``) need the look-up; mmengine 0.10 does it through
`pkg_resources` alone.
"""

from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

import mmengine.config.config
import mmengine.hub.hub
import mmengine.utils
import mmengine.utils.package_utils


def is_installed(package: str) -> bool:
    """Whether a distribution or an importable package of this name is there."""
    try:
        distribution(package)
        return True
    except PackageNotFoundError:
        spec = find_spec(package)
        return spec is not None and spec.origin is not None


def get_installed_path(package: str) -> str:
    """The folder of an installed package, given the name of its distribution or its import name.

    Raises:
        PackageNotFoundError: if there is no such package.
    """
    names = [package]
    try:
        files = distribution(package).files or []
        names += [file.parts[0] for file in files if len(file.parts) == 2 and file.name == "__init__.py"]
    except PackageNotFoundError:
        pass
    for name in names:
        spec = find_spec(name)
        if spec is not None and spec.origin is not None:
            return str(Path(spec.origin).parent)
    raise PackageNotFoundError(package)


def work_without_pkg_resources() -> None:
    """Where `pkg_resources` is gone, make mmengine use the two functions above. Idempotent."""
    if find_spec("pkg_resources") is not None:
        return
    for function in (is_installed, get_installed_path):
        for module in (
            mmengine.utils.package_utils,
            mmengine.utils,
            mmengine.config.config,
            mmengine.hub.hub,
        ):
            if hasattr(module, function.__name__):
                setattr(module, function.__name__, function)
