"""Models outside Python: ONNX files, programs of `torch.export`, packages of AOTInductor. docs/export.md says how."""

from .errors import ExportError
from .formats import FORMATS, Exported, ImageSize, export_model
from .prepare import prepare

__all__ = ["FORMATS", "ExportError", "Exported", "ImageSize", "export_model", "prepare"]
