"""Training of Faster, Mask and Cascade R-CNN on the whole batch at once.

    custom_imports = dict(imports=["vig_backbone"])
    model = dict(type="BatchedMaskRCNN")  # or BatchedFasterRCNN, BatchedCascadeRCNN

mmdet's heads assign, sample and compute targets image by image, and read a number back from the device at nearly every
turn. The heads here do the same arithmetic on padded tensors of fixed size, with weights 0 and 1 in place of
selections. Parameters, configs and predictions are those of the stock heads; see each class for what differs. Either
head works with the stock class of the other, and in any detector, by its own name.
"""

from .detector import BatchedCascadeRCNN, BatchedFasterRCNN, BatchedMaskRCNN
from .roi_head import BatchedRoIHead
from .rpn_head import BatchedRPNHead

__all__ = ["BatchedCascadeRCNN", "BatchedFasterRCNN", "BatchedMaskRCNN", "BatchedRPNHead", "BatchedRoIHead"]
