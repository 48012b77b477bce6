"""The table of a folder of configs, as its README shows it."""

from dataclasses import dataclass

from mmengine.config import Config

from ..errors import ConfigError
from .report import Report

BEGIN, END = "<!-- made by tools/flops.py --table: begin -->", "<!-- made by tools/flops.py --table: end -->"
MODELS = {"MaskRCNN": "Mask R-CNN", "CascadeRCNN": "Cascade Mask R-CNN", "UPerHead": "UperNet"}
FAMILIES = {"ViG": "ViG", "HierViG": "ViG-H", "ViGAdapter": "ViG"}
SUFFIXES = {"ViGAdapter": " + adapter"}
HEADER = [
    "| config | model | backbone | schedule | parameters (M), all / backbone | GFLOPs, all: paper-style / true "
    "| GFLOPs, backbone: paper-style / true |",
    "|---|---|---|---|---|---|---|",
]


@dataclass(frozen=True)
class Row:
    """A config, what it is called in the table, and what it costs; `backbone` names one that is not ours."""

    name: str
    cfg: Config
    report: Report
    backbone: str | None = None


def format_table(rows: list[Row]) -> list[str]:
    """Lines of Markdown."""
    return [*HEADER, *map(_format, rows)]


def replace_table(text: str, lines: list[str]) -> str:
    """The text of a README with these lines between its two markers.

    Raises:
        ConfigError: if it lacks one of them.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"no place for the table: expected the lines {BEGIN} and {END}")
    return "\n".join([head + begin, "", *lines, "", end + tail])


def _format(row: Row) -> str:
    model, backbone = row.report.model, row.report.backbone
    cells = [
        f"`{row.name}`" if "::" in row.name else f"[{row.name}]({row.name})",
        _model(row.cfg),
        row.backbone or _backbone(row.cfg),
        _schedule(row.cfg),
        f"{model.parameters / 1e6:.1f} / {backbone.parameters / 1e6:.1f}",
        f"{model.published / 1e9:.0f} / {model.macs / 1e9:.0f}",
        f"{backbone.published / 1e9:.1f} / {backbone.macs / 1e9:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _model(cfg: Config) -> str:
    """By its detector, or by the head of a segmenter."""
    head = cfg.model.get("decode_head")
    name = head.type if head else cfg.model.type.removeprefix("Batched")
    return MODELS.get(name, name)


def _backbone(cfg: Config) -> str:
    settings = cfg.model.backbone
    if settings.type not in FAMILIES:
        return settings.type
    return f"{FAMILIES[settings.type]}-{settings.arch[0].upper()}{SUFFIXES.get(settings.type, '')}"


def _schedule(cfg: Config) -> str:
    """As in the names of configs: 1x is 12 epochs of COCO; iterations, and the side of a crop."""
    if epochs := cfg.train_cfg.get("max_epochs"):
        return f"{epochs} epochs" if epochs % 12 else f"{epochs // 12}x"
    crop = cfg.get("crop_size")
    return f"{cfg.train_cfg.max_iters // 1000}k{f', {crop[0]}²' if crop else ''}"
