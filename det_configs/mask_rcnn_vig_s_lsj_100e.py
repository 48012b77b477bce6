# Mask R-CNN on ViG-S in the style of ViTDet: simple feature pyramid, heads with LayerNorm, large-scale jitter.
_base_ = ["./_base_/mask_rcnn_vitdet.py", "./_base_/coco_lsj_100e.py"]
model = dict(
    backbone=dict(_delete_=True, type="ViG", arch="small", out_indices=(11,), drop_path_rate=0.2),
    neck=dict(in_channels=384),
)
