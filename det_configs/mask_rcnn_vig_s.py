# Mask R-CNN on ViG-S: ViTDet's simple feature pyramid, strides 4 to 64 from the last map (stride 16).
_base_ = ["./_base_/mask_rcnn.py", "./_base_/coco_1x.py"]
model = dict(
    backbone=dict(_delete_=True, type="ViG", arch="small", out_indices=(11,), drop_path_rate=0.2),
    neck=dict(_delete_=True, type="SimpleFeaturePyramid", in_channels=384, out_channels=256, num_outs=5),
)
