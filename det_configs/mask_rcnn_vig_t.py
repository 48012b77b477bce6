# Mask R-CNN on ViG-T: ViTDet's simple feature pyramid, strides 4 to 64 from the last map (stride 16).
_base_ = ["./_base_/mask_rcnn.py", "./_base_/coco_1x.py"]
model = dict(
    backbone=dict(_delete_=True, type="ViG", arch="tiny", out_indices=(11,), drop_path_rate=0.1),
    neck=dict(_delete_=True, type="SimpleFeaturePyramid", in_channels=192, out_channels=256, num_outs=5),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=0.01))  # the larger models: 1e-4 and 0.05
