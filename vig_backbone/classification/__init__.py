"""Classification of folders in ImageNet's layout: the accuracy of a checkpoint, and fine-tuning on any classes.

On torchvision (folders of images), timm (transforms of evaluation and training) and mmengine's runner:
``pip install -e '.[openmmlab,classify]'``.
"""

from .evaluation import Accuracy, build_from_file, evaluate_classifier, evaluation_data, measure
from .finetuning import finetune, finetuning_config
from .training import ImageClassifier, TopAccuracy  # registers them, too

__all__ = [
    "Accuracy",
    "ImageClassifier",
    "TopAccuracy",
    "build_from_file",
    "evaluate_classifier",
    "evaluation_data",
    "finetune",
    "finetuning_config",
    "measure",
]
