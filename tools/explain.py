#!/usr/bin/env python
"""What a trained ViG looks at: its receptive field, how long its scans remember, which branch contributes how much.

examples:
  python tools/explain.py det_configs/mask_rcnn_vig_t.py CHECKPOINT photo.jpg --out explained
  python tools/explain.py seg_configs/upernet_hier_vig_t.py CHECKPOINT photos --gates --blocks 0,3,-1
  python tools/explain.py vig_small vig_s_81p7acc.pth photo.jpg --size 512 --gates --blocks 5 --per-head
  python tools/explain.py seg_configs/upernet_vig_s.py work_dirs/demo/segmentation/iter_200.pth \\
      data/toy/ade/images/validation --data toy --erf

CONFIG is a config, or the name of a backbone: {backbones}.
With a config, images are prepared as by its test pipeline; with a name, as for ImageNet, with a shorter side of --size
pixels.

what is written, below the folder of --out; docs/explain.md says what is seen there:
  gates/NAME.png  of each image: memories of both scans, gates and shares of the branches, a row for each block
  blocks.png      the same as numbers over the depth, mean of all images
  erf.png         effective receptive field of the token in the middle of each output, mean of all images
  explain.json    all numbers (or the file of --json)

exit code: 0 all done, 2 wrong usage, an image that cannot be read, or a model without such blocks
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from _benchmark import write_json
from _command import run_command
from mmengine.config import DictAction
from mmengine.dataset import pseudo_collate
from torch import Tensor, nn

from vig_backbone.builder import BACKBONES, build_backbone
from vig_backbone.classifier import evaluation_settings
from vig_backbone.explain import ReceptiveField, effective_receptive_field, explain_blocks
from vig_backbone.explain.pictures import SHARES, draw_blocks, draw_fields, draw_profile
from vig_backbone.openmmlab.configuration import load_config
from vig_backbone.openmmlab.errors import ConfigError, DataError
from vig_backbone.openmmlab.inference import ImageError, Predictor, Source, find_sources, read_image
from vig_backbone.openmmlab.inference.model import find_device

ROWS = 4  # of a picture, where --blocks does not say which


class Picture(NamedTuple):
    """An image as it is, [., ., 3] uint8 in RGB, and as the backbone gets it, [3, H, W]."""

    name: str
    rgb: np.ndarray
    inputs: Tensor


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    description = __doc__.replace("{backbones}", ", ".join(BACKBONES))
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG", help="a config, or the name of a backbone")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="its weights")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image, folder (searched to any depth), glob")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: explain/CONFIG in --work-dir or work_dirs")
    parser.add_argument("--gates", action="store_true", help="blocks alone, not the receptive field")
    parser.add_argument("--erf", action="store_true", help="the receptive field alone, not the blocks")
    parser.add_argument(
        "--blocks", type=block_indices, metavar="N,N,..", help=f"rows of the pictures (default: {ROWS} blocks), or all"
    )
    parser.add_argument("--per-head", action="store_true", help="a row for each head of the blocks")
    parser.add_argument(
        "--size", type=int, metavar="N", help="shorter side, with the name of a backbone (default: 224)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the numbers (default: explain.json in --out)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    parser.add_argument("--data", metavar="NAME", help="another data set: 'toy' and 'hard' are embedded ones")
    parser.add_argument("--work-dir", metavar="DIR", help="folder for explain/CONFIG (default: work_dirs)")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="change the config")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    is_name = args.config in BACKBONES
    if is_name and (args.data or args.cfg_options):
        parser.error("--data and --cfg-options: expected a config, not the name of a backbone")
    if args.size is not None and (not is_name or args.size < 32):
        parser.error(
            "--size: expected the name of a backbone, and at least 32 pixels; configs say themselves how large"
        )
    if not (args.gates or args.erf):
        args.gates = args.erf = True
    if not args.gates and (args.blocks or args.per_head):
        parser.error("--blocks and --per-head: are of --gates")
    args.out = args.out or Path(args.work_dir or "work_dirs") / "explain" / Path(args.config).stem
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        parser.error(f"--json {args.json}: expected a file in a folder that exists")
    return args


def block_indices(text: str) -> list[int] | str:
    if text == "all":
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 0,5,-1, or all, got {text!r}") from None


@dataclass(frozen=True)
class Pictures:
    """The images, prepared one after the other whenever they are gone through: they may be more than memory holds."""

    sources: Sequence[Source]
    prepare: Callable[[np.ndarray], Tensor]

    def __len__(self) -> int:
        return len(self.sources)

    def __iter__(self) -> Iterator[Picture]:
        for source in self.sources:
            try:
                rgb = read_image(source.path)
                yield Picture(source.name, rgb, self.prepare(rgb))
            except ImageError as error:
                raise DataError(f"{source.path}: {error}") from error


def load(args: argparse.Namespace) -> tuple[nn.Module, Pictures]:
    """The backbone, in evaluation mode on its device, and the images as it gets them."""
    sources = find_sources(args.images, left_out=args.out)
    if videos := [str(source.path) for source in sources if source.is_video]:
        raise DataError(f"{', '.join(videos)}: a video; expected images")
    if args.config in BACKBONES:
        backbone = build_backbone(args.config, args.checkpoint).to(find_device(args.device)).eval()
        return backbone, Pictures(sources, partial(for_imagenet, args=args))
    predictor = Predictor(load_config(args.config, args.data, args.cfg_options), args.checkpoint, device=args.device)
    return predictor.model.backbone, Pictures(sources, partial(for_model, predictor))


def for_imagenet(rgb: np.ndarray, args: argparse.Namespace) -> Tensor:
    """Resized and normalised as for the official checkpoints, but as a whole."""
    factor = (args.size or 224) / min(rgb.shape[:2])
    width, height = (max(32, round(n * factor)) for n in (rgb.shape[1], rgb.shape[0]))
    resized = cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)
    settings = evaluation_settings(args.config)
    normalised = (resized.astype(np.float32) / 255 - np.float32(settings["mean"])) / np.float32(settings["std"])
    return torch.from_numpy(normalised).permute(2, 0, 1).contiguous()


def for_model(predictor: Predictor, rgb: np.ndarray) -> Tensor:
    """As the test pipeline and the preprocessor make it, less what they pad: our backbones take any size."""
    sample = predictor.prepare(rgb)
    height, width = sample["inputs"].shape[-2:]
    inputs = predictor.model.data_preprocessor(pseudo_collate([sample]), False)["inputs"]
    return inputs[0, :, :height, :width]


def explain_gates(backbone: nn.Module, pictures: Pictures, args: argparse.Namespace) -> dict[str, Any]:
    """Writes gates/NAME.png and blocks.png; returns numbers of each image, their mean, and with --per-head of heads."""
    device = next(backbone.parameters()).device
    images, heads = {}, {}
    for picture in pictures:
        inputs = picture.inputs[None].to(device)
        blocks = explain_blocks(backbone, inputs)
        images[picture.name] = [block.summary() for block in blocks]
        rows = chosen_rows(args.blocks, len(blocks))
        drawn = [blocks[i] for i in rows]
        if args.per_head:
            drawn = explain_blocks(backbone, inputs, rows, per_head=True)
            heads[picture.name] = [block.summary() for block in drawn]
        title = f"{picture.name}: what the token mixers of {Path(args.config).stem} do"
        save(draw_blocks(picture.rgb, tuple(picture.inputs.shape[1:]), drawn, title), args.out / "gates", picture.name)
    means = [mean_of(each) for each in zip(*images.values())]
    save(draw_profile(means, f"{Path(args.config).stem}: {count(pictures)}"), args.out, "blocks")
    return dict(images=images, mean=means) | (dict(heads=heads) if heads else {})


def chosen_rows(blocks: list[int] | str | None, depth: int) -> list[int]:
    """Indices from 0, ascending; by default ROWS of them from the first to the last."""
    if blocks == "all":
        return list(range(depth))
    if blocks is None:
        return sorted({round(i * (depth - 1) / (ROWS - 1)) for i in range(ROWS)})
    if wrong := [i for i in blocks if not -depth <= i < depth]:
        raise ConfigError(f"--blocks {','.join(map(str, wrong))}: the model has {depth}, 0 to {depth - 1}")
    return sorted({i % depth for i in blocks})


def mean_of(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of one block's numbers over the images."""
    fields = ("memory_forward", "memory_backward", "gate", "scan_share", "forward_share")
    means = {field: float(np.mean([summary[field] for summary in summaries])) for field in fields}
    return dict(name=summaries[0]["name"], **means)


def explain_field(backbone: nn.Module, pictures: Pictures, args: argparse.Namespace) -> dict[str, Any]:
    """Writes erf.png; returns numbers of each output of the backbone."""
    device = next(backbone.parameters()).device
    size = tuple(min(sides) for sides in zip(*(picture.inputs.shape[1:] for picture in pictures)))
    with torch.no_grad():
        outputs = len(backbone(torch.zeros(1, 3, *size, device=device)))
    fields = [
        effective_receptive_field(backbone, (middle(picture.inputs, size).to(device) for picture in pictures), output)
        for output in range(outputs)
    ]
    names = [f"output {i}, stride {field.stride[0]:g}" for i, field in enumerate(fields)]
    title = f"{Path(args.config).stem}: effective receptive field\nof the token in the middle, {count(pictures)}"
    save(draw_fields(dict(zip(names, fields)), title), args.out, "erf")
    return dict(image_size=size, outputs=[field_numbers(field) for field in fields])


def middle(image: Tensor, size: Sequence[int]) -> Tensor:
    """Height and width `size` of an image [3, H, W]."""
    y, x = ((n - m) // 2 for n, m in zip(image.shape[1:], size))
    return image[:, y : y + size[0], x : x + size[1]]


def field_numbers(field: ReceptiveField) -> dict[str, Any]:
    squares = {f"{share:.0%}": dict(side=field.side(share), area=field.area(share)) for share in SHARES}
    return dict(stride=field.stride[0], token=field.position, center=field.center, squares=squares)


def save(figure: Any, folder: Path, name: str) -> None:
    """Names may have folders in them."""
    path = folder / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(path)


def count(pictures: Pictures) -> str:
    return "one image" if len(pictures) == 1 else f"mean of {len(pictures)} images"


def print_numbers(content: dict[str, Any]) -> None:
    for block in content.get("gates", {}).get("mean", []):
        memories = "memory {memory_forward:7.1f} forward, {memory_backward:7.1f} backward".format(**block)
        shares = "gate {gate:.2f}, scan {scan_share:.2f}, forward {forward_share:.2f}".format(**block)
        print(f"{block['name']:20} {memories}; {shares}")
    for i, output in enumerate(content.get("erf", {}).get("outputs", [])):
        squares = ", ".join(f"{share} in {square['side']:.0f}" for share, square in output["squares"].items())
        print(f"output {i}, stride {output['stride']:g}: {squares} pixels a side")


def main(args: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore")  # of stock models, about arguments of stock configs
    torch.manual_seed(0)
    backbone, pictures = load(args)
    content: dict[str, Any] = dict(model=args.config, checkpoint=args.checkpoint)
    try:
        if args.gates:
            content["gates"] = explain_gates(backbone, pictures, args)
        if args.erf:
            content["erf"] = explain_field(backbone, pictures, args)
    except (ValueError, ImportError) as error:  # a model of another kind, or no matplotlib
        raise ConfigError(str(error)) from error
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.json or args.out / "explain.json"
    write_json(file, content)
    print(file)
    print_numbers(content)


if __name__ == "__main__":
    sys.exit(run_command(main, parse_args(None)))
