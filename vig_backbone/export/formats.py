"""The formats of exported models: writing each, and running it again as a function of the images."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .errors import ExportError

Run = Callable[[Tensor], list[Tensor]]
LARGEST = 8192  # pixels on a side of a graph with dynamic sizes
OPSET = 20


@dataclass(frozen=True)
class ImageSize:
    """Height and width of the images of a graph; other sizes go through it as well if it is dynamic."""

    height: int
    width: int
    dynamic: bool = False
    smallest: int = 33  # a side of one token, at stride 32, would be a case of its own


@dataclass(frozen=True)
class Exported:
    """A file that was written, and what runs it."""

    path: Path
    run: Run


def export_model(model: nn.Module, path: Path, format: str, size: ImageSize, outputs: Sequence[str]) -> Exported:
    """Write a prepared model (:func:`prepare`) that takes images [B, 3, H, W] and returns a tuple of tensors.

    Args:
        path: the file; its folder is made.
        format: ``'onnx'``, ``'torch'`` (a program of `torch.export`, .pt2) or ``'aot'`` (a package of AOTInductor,
            .pt2, compiled for the device on which the model is).
        outputs: names of the tensors that it returns, for ONNX.

    Raises:
        ExportError: a package is missing, or torch cannot export the model.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    return FORMATS[format](model, path, size, outputs)


def _program(model: nn.Module, size: ImageSize) -> tuple[ExportedProgram, Tensor]:
    """The graph of a model, and the images that it was made with."""
    device = next(model.parameters()).device
    images = torch.randn(1, 3, size.height, size.width, device=device)
    # A hint: torch cannot prove of a pyramid's formulas that they allow all sizes, and would refuse a `Dim` for it.
    side = Dim.DYNAMIC(min=size.smallest, max=LARGEST)
    shapes = ({2: side, 3: side},) if size.dynamic else None
    try:
        return torch.export.export(model, (images,), dynamic_shapes=shapes, strict=False), images
    except Exception as error:  # torch raises many types, for what it does not know and for sizes that it fixes
        reason = " ".join((str(error).strip().splitlines() or [type(error).__name__])[:2]).strip(" .")
        advice = ". Without --dynamic, sizes are fixed, which more models allow" if size.dynamic else ""
        raise ExportError(f"torch.export does not take this model: {reason}{advice}") from error


def _write_onnx(model: nn.Module, path: Path, size: ImageSize, outputs: Sequence[str]) -> Exported:
    _need("onnx", "onnxscript")
    program, images = _program(model, size)
    exporter = torch.onnx.export(
        program,
        (images,),
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=list(outputs),
        optimize=False,  # half of the time of an export, for what runtimes do themselves when they load a file
        verbose=False,
    )
    if size.dynamic:
        _name_sides(exporter.model)
    exporter.save(path, external_data=False)
    return Exported(path, _onnx_runner(path))


def _name_sides(model: "onnx_ir.Model") -> None:  # noqa: F821
    """Call the sides of the images `height` and `width`, and let those of the outputs follow without a formula."""
    import onnx_ir

    images = model.graph.inputs[0]
    images.shape = onnx_ir.Shape([1, 3, "height", "width"])
    for value in model.graph.outputs:
        sides = [d if isinstance(d, int) else f"{value.name}_{i}" for i, d in enumerate(value.shape)]
        value.shape = onnx_ir.Shape(sides)


def _onnx_runner(path: Path) -> Run:
    (runtime,) = _need("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors: warnings are about constants that it does not fold
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(x) for x in session.run(None, {"images": images.cpu().numpy()})]

    return run


def _write_program(model: nn.Module, path: Path, size: ImageSize, outputs: Sequence[str]) -> Exported:
    program, _ = _program(model, size)
    torch.export.save(program, path)
    return Exported(path, partial(_call, torch.export.load(path).module()))


def _write_package(model: nn.Module, path: Path, size: ImageSize, outputs: Sequence[str]) -> Exported:
    program, _ = _program(model, size)
    try:
        written = torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    except Exception as error:  # of the C++ compiler, or of Inductor
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(f"AOTInductor cannot compile this model (it needs a C++ compiler): {lines[0]}") from error
    return Exported(Path(written), partial(_call, torch._inductor.aoti_load_package(written)))


def _call(function: Callable[[Tensor], Tensor | Sequence[Tensor]], images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        out = function(images)
    return [out] if isinstance(out, Tensor) else list(out)


def _need(*names: str) -> list[ModuleType]:
    """Packages of the extra `export`; ExportError if one is not installed."""
    try:
        return [importlib.import_module(name) for name in names]
    except ModuleNotFoundError as error:
        raise ExportError(f"this needs the package {error.name}: pip install 'vig-dense[export]'") from error


FORMATS: dict[str, Callable[[nn.Module, Path, ImageSize, Sequence[str]], Exported]] = {
    "onnx": _write_onnx,
    "torch": _write_program,
    "aot": _write_package,
}
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "aot": ".aot.pt2"}
