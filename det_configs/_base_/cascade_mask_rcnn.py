# mmdet's Cascade Mask R-CNN, FPN on four maps; goes with one of coco_*.py.
_base_ = "mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py"
model = dict(
    type="BatchedCascadeRCNN",  # "CascadeRCNN" does the same image by image, and takes padding for image
    data_preprocessor=dict(type="FastDetPreprocessor"),
)
