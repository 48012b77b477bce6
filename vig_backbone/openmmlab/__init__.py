"""The bridge to OpenMMLab, set up by `import vig_backbone` wherever mmengine is installed.

Registers the backbones, necks and hooks, answers for `mmcv._ext` where mmcv was installed without its compiled
operators, lets checkpoints of mmengine resume under torch's safe loading, its loader take `.safetensors`, and its
configs load without `pkg_resources`.
"""

from . import mmcv_ext
from .packages import work_without_pkg_resources
from .quick_configs import format_once, read_metafiles_once
from .registration import register_modules
from .safe_load import allow_mmengine_checkpoints
from .safetensors_loader import register_safetensors

mmcv_ext.install()
register_modules()
allow_mmengine_checkpoints()
register_safetensors()
work_without_pkg_resources()
format_once()
read_metafiles_once()
