# Mask R-CNN as ViTDet has it (arXiv 2203.16527): a pyramid from the last map of a plain backbone, a deeper RPN, four
# convolutions in the box head, LayerNorm in all of it.
_base_ = "./mask_rcnn.py"
norm_cfg = dict(type="LayerNorm2d", requires_grad=True)
model = dict(
    neck=dict(_delete_=True, type="SimpleFeaturePyramid", in_channels=384, out_channels=256, num_outs=5),
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=dict(type="Shared4Conv1FCBBoxHead", conv_out_channels=256, norm_cfg=norm_cfg),
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)
