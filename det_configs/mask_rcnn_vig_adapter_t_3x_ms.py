# Mask R-CNN on ViG-T with a ViT-Adapter: strides 4, 8, 16 and 32, FPN on top, 3x, images of several sizes.
_base_ = ["./_base_/mask_rcnn.py", "./_base_/coco_3x_ms.py"]
model = dict(
    backbone=dict(_delete_=True, type="ViGAdapter", arch="tiny", drop_path_rate=0.1),
    neck=dict(in_channels=[192] * 4),
)
optim_wrapper = dict(
    optimizer=dict(lr=2e-4, weight_decay=0.01),  # the larger models: 1e-4 and 0.05
    paramwise_cfg=dict(layer_decay_rate=0.85),
)
