"""Predictions of a trained detector or segmenter for images and videos, as NumPy arrays, pictures and files.

    from vig_backbone.openmmlab.inference import Predictor

    predictor = Predictor("det_configs/mask_rcnn_vig_t.py", "epoch_12.pth", device="cuda")
    for result in predictor(["a.jpg", "b.jpg"], batch_size=2):
        print(result.names, result.boxes, result.scores)

On the config's test pipeline and the model's own `test_step`, not on DetInferencer and MMSegInferencer. Those go on
with half a checkpoint where it does not fit, stop at the first file that cannot be read, read no videos, build the
data set of the config, and number label maps instead of naming them.
"""

from .drawing import Painter
from .images import ImageError, read_image
from .inputs import Source, find_sources
from .job import Failure, Frame, predict_sources
from .predictor import Predictor
from .results import Detections, LabelMap
from .writer import ResultWriter

__all__ = [
    "Detections",
    "Failure",
    "Frame",
    "ImageError",
    "LabelMap",
    "Painter",
    "Predictor",
    "ResultWriter",
    "Source",
    "find_sources",
    "predict_sources",
    "read_image",
]
