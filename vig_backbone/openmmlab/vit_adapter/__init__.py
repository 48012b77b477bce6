"""ViT-Adapter (arXiv 2205.08534) on plain ViG: a pyramid at strides 4, 8, 16 and 32 for any detector or segmenter.

    custom_imports = dict(imports=["vig_backbone"])
    model = dict(backbone=dict(_delete_=True, type="ViGAdapter", arch="small"), neck=dict(in_channels=[384] * 4))

A small convolutional network sees the image beside ViG. Deformable attention carries its features into the tokens
(injectors) and the tokens back into its pyramid (extractors), four times over the twelve blocks.
"""

from .backbone import ViGAdapter

__all__ = ["ViGAdapter"]
