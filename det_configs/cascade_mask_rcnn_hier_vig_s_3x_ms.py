# Cascade Mask R-CNN on ViG-H-S: the native pyramid of strides 4, 8, 16 and 32, FPN on top, 3x, images of several sizes.
_base_ = ["./_base_/cascade_mask_rcnn.py", "./_base_/coco_3x_ms.py"]
model = dict(
    backbone=dict(_delete_=True, type="HierViG", arch="small", drop_path_rate=0.3),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
