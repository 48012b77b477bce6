"""RoI features from a pyramid without asking the device which RoIs belong to which level."""

import torch
from mmcv.ops import RoIAlign
from mmdet.models.roi_heads.roi_extractors import BaseRoIExtractor, SingleRoIExtractor
from torch import Tensor
from torchvision.ops import roi_align

# A box of no size here takes no samples, or with a fixed number of samples only zeros from outside the map.
_NOWHERE = -1e6


def pool(extractor: BaseRoIExtractor, maps: tuple[Tensor, ...], rois: Tensor) -> Tensor:
    """Features [K, C, h, w] of RoIs [K, 5] (image, x1, y1, x2, y2), each from the level that its size asks for.

    Equal to `extractor`. mmdet selects the RoIs of each level, which waits for the device four times. Here every level
    sees all RoIs, those of other levels moved out of the map where they give zeros, and the levels are added up.
    RoIs stay in float32 under autocast, where mmdet rounds coordinates to the type of the maps.

    Extractors other than SingleRoIExtractor with averaging RoIAlign are called as they are.
    """
    maps = maps[: extractor.num_inputs]
    if not _can_add_up(extractor):
        return extractor(maps, rois)
    levels = extractor.map_roi_levels(rois, len(maps)).unsqueeze(1)  # [K, 1]
    nowhere = rois.clone()
    nowhere[:, 1:] = _NOWHERE
    features = None
    for level, (layer, feature_map) in enumerate(zip(extractor.roi_layers, maps)):
        mine = torch.where(levels == level, rois, nowhere)
        options = (layer.output_size, layer.spatial_scale, layer.sampling_ratio, layer.aligned)
        part = roi_align(feature_map.float(), mine, *options)
        features = part if features is None else features.add_(part)
    return features.to(maps[0].dtype)


def _can_add_up(extractor: BaseRoIExtractor) -> bool:
    averages = all(isinstance(layer, RoIAlign) and layer.pool_mode == "avg" for layer in extractor.roi_layers)
    return type(extractor) is SingleRoIExtractor and averages
