"""Which operators of mmcv's compiled module the stand-in serves, and which it does not."""

from __future__ import annotations

import re

_BOXES_TORCH = "plain torch: vectorised polygon clipping"
_DEFORM = "`torchvision.ops.deform_conv2d`"
_FOCAL = "plain torch: closed-form loss and gradient"
_CARAFE = "plain torch: loop over kernel taps"

SUPPORTED = {
    "nms": "`torchvision.ops.nms`",
    "softnms": "plain torch: one step per kept box",
    "nms_match": "plain torch: one step per kept box",
    "bbox_overlaps": "plain torch",
    "box_iou_rotated": _BOXES_TORCH,
    "box_iou_quadri": _BOXES_TORCH,
    "nms_rotated": _BOXES_TORCH,
    "nms_quadri": _BOXES_TORCH,
    "roi_align_forward": "`torchvision.ops.roi_align` (avg), plain torch (max)",
    "roi_align_backward": "`torchvision.ops.roi_align` (avg), plain torch (max)",
    "roi_pool_forward": "plain torch: gathered bins",
    "roi_pool_backward": "plain torch: gathered bins",
    "deform_roi_pool_forward": "plain torch: bilinear samples",
    "deform_roi_pool_backward": "plain torch: bilinear samples",
    "border_align_forward": "plain torch: bilinear samples",
    "border_align_backward": "plain torch: bilinear samples",
    "deform_conv_forward": _DEFORM,
    "deform_conv_backward_input": _DEFORM,
    "deform_conv_backward_parameters": _DEFORM,
    "modulated_deform_conv_forward": _DEFORM,
    "modulated_deform_conv_backward": _DEFORM,
    "sigmoid_focal_loss_forward": _FOCAL,
    "sigmoid_focal_loss_backward": _FOCAL,
    "softmax_focal_loss_forward": _FOCAL,
    "softmax_focal_loss_backward": _FOCAL,
    "ms_deform_attn_forward": "plain torch: `grid_sample` per level",
    "ms_deform_attn_backward": "plain torch: `grid_sample` per level",
    "psamask_forward": "plain torch: gather per row",
    "psamask_backward": "plain torch: gather per row",
    "carafe_forward": _CARAFE,
    "carafe_backward": _CARAFE,
    "carafe_naive_forward": _CARAFE,
    "carafe_naive_backward": _CARAFE,
    "masked_im2col_forward": "plain torch: indexing",
    "masked_col2im_forward": "plain torch: indexing",
    "sync_bn_backward_data": "plain torch",
    "sync_bn_backward_param": "plain torch",
    "sync_bn_forward_mean": "plain torch",
    "sync_bn_forward_output": "plain torch",
    "sync_bn_forward_var": "plain torch",
    "upfirdn2d": "plain torch: zero insertion and `conv2d`",
    "fused_bias_leakyrelu": "plain torch",
    "get_compiler_version": "text",
    "get_compiling_cuda_version": "text",
}

UNSUPPORTED = frozenset(
    {
        "active_rotated_filter_backward",
        "active_rotated_filter_forward",
        "assign_score_withk_backward",
        "assign_score_withk_forward",
        "ball_query_forward",
        "bezier_align_backward",
        "bezier_align_forward",
        "bias_act",
        "chamfer_distance_backward",
        "chamfer_distance_forward",
        "contour_expand",
        "convex_giou",
        "convex_iou",
        "correlation_backward",
        "correlation_forward",
        "diff_iou_rotated_sort_vertices_forward",
        "dynamic_point_to_voxel_backward",
        "dynamic_point_to_voxel_forward",
        "dynamic_voxelize_forward",
        "filtered_lrelu",
        "filtered_lrelu_act_",
        "furthest_point_sampling_forward",
        "furthest_point_sampling_with_dist_forward",
        "fused_indice_conv_forward",
        "gather_points_backward",
        "gather_points_forward",
        "get_indice_pairs_2d_backward",
        "get_indice_pairs_2d_forward",
        "get_indice_pairs_3d_backward",
        "get_indice_pairs_3d_forward",
        "get_indice_pairs_4d_forward",
        "group_points_backward",
        "group_points_forward",
        "hard_voxelize_forward",
        "indice_conv_backward",
        "indice_conv_forward",
        "indice_maxpool_backward",
        "indice_maxpool_forward",
        "iou3d_boxes_overlap_bev_forward",
        "iou3d_nms3d_forward",
        "iou3d_nms3d_normal_forward",
        "knn_forward",
        "min_area_polygons",
        "pixel_group",
        "points_in_boxes_all_forward",
        "points_in_boxes_cpu_forward",
        "points_in_boxes_part_forward",
        "points_in_polygons_forward",
        "prroi_pool_backward",
        "prroi_pool_coor_backward",
        "prroi_pool_forward",
        "riroi_align_rotated_backward",
        "riroi_align_rotated_forward",
        "roi_align_rotated_backward",
        "roi_align_rotated_forward",
        "roiaware_pool3d_backward",
        "roiaware_pool3d_forward",
        "roipoint_pool3d_forward",
        "rotated_feature_align_backward",
        "rotated_feature_align_forward",
        "stack_ball_query_forward",
        "stack_group_points_backward",
        "stack_group_points_forward",
        "three_interpolate_backward",
        "three_interpolate_forward",
        "three_nn_forward",
        "tin_shift_backward",
        "tin_shift_forward",
    }
)


def unsupported_message(name: str) -> str:
    """Text of the error that calling the unsupported operator ``name`` raises."""
    public = re.sub(r"_(forward|backward).*$", "", name)
    return (
        f"mmcv operator '{name}' ({public}) is not served by the stand-in for mmcv._ext. Two ways out: "
        "install the full compiled mmcv (2.0.x to 2.1.x, built for this torch) in place of mmcv-lite, "
        "or choose a head or operator that needs only the supported operators (docs/operators.md)."
    )
