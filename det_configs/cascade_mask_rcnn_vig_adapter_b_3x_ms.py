# Cascade Mask R-CNN on ViG-B with a ViT-Adapter: strides 4, 8, 16 and 32, FPN on top, 3x, images of several sizes.
_base_ = ["./_base_/cascade_mask_rcnn.py", "./_base_/coco_3x_ms.py"]
model = dict(
    backbone=dict(_delete_=True, type="ViGAdapter", arch="base", drop_path_rate=0.3),
    neck=dict(in_channels=[768] * 4),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.85))
