# Mask R-CNN on ViG-H-B: the native pyramid of strides 4, 8, 16 and 32, FPN on top, 3x, images of several sizes.
_base_ = ["./_base_/mask_rcnn.py", "./_base_/coco_3x_ms.py"]
model = dict(
    backbone=dict(_delete_=True, type="HierViG", arch="base", drop_path_rate=0.6),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
