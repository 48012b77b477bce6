"""What the counters behind published tables see, beside and instead of the products that run.

Swin's tables, which others compare with, come from mmdet's and mmseg's `get_flops.py` of that time, that is mmcv 1's
`get_model_complexity_info`, with the products of attention on top. That counter hooks modules: convolutions (with
biases), linear layers (without), norms but SyncBN, ReLUs, pooling and upsampling; what a forward method does by itself,
it does not see (with us: norms inside blocks). Auxiliary heads do not run.

Checked, in GFLOPs. Hooks alone: 742.36 of Cascade Mask R-CNN and 236.08 of UperNet at 512 x 512, both on Swin-T, as
users of Swin's repositories measured; 239.32 of RetinaNet on ResNet-50, as in mmdet's documentation. With attention, as
published: 745 of that cascade, 267 of Mask R-CNN, 945, 1038 and 1188 of UperNet on Swin-T, S and B.

The paper of ViG (arXiv 2405.18425) counts its plain models without the down-projection of SwiGLU, which the official
code calls as a function: there is no module to hook.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ...vig import SwiGLU

NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.PReLU, nn.ELU, nn.LeakyReLU)
POOLING = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)


def extras_of_module(module: nn.Module, inputs: tuple, output: Any) -> int:
    """What mmcv's counter adds to the products, for one call of a module."""
    if not isinstance(output, Tensor):
        return 0
    if isinstance(module, _ConvNd):
        return 0 if module.bias is None else output.numel()
    if isinstance(module, NORMS):
        affine = getattr(module, "affine", False) or getattr(module, "elementwise_affine", False)
        return inputs[0].numel() * (2 if affine else 1)
    if isinstance(module, POOLING):
        return inputs[0].numel()
    return output.numel() if isinstance(module, (*ACTIVATIONS, nn.Upsample)) else 0


def unseen_modules(model: nn.Module) -> set[str]:
    """Names of the modules whose products the published counts leave out."""
    return {f"{name}.down_proj".lstrip(".") for name, module in model.named_modules() if isinstance(module, SwiGLU)}
