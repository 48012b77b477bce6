"""What the authors state of the classifiers that they released."""

from typing import NamedTuple

IMAGENET_VALIDATION_IMAGES = 50_000
IMAGENET_SIZE = 224  # pixels, of training and evaluation


class Published(NamedTuple):
    """`top1`: percent on ImageNet's validation set; `drop_path_rate`: of their training."""

    top1: float
    drop_path_rate: float


# arXiv 2405.18425 and its code. The names of the released files state the same top-1, that of ViG-T aside.
PUBLISHED = {
    "vig_tiny": Published(77.2, 0.0),
    "vig_small": Published(81.7, 0.2),
    "vig_base": Published(82.6, 0.5),
    "hier_vig_tiny": Published(82.8, 0.2),
    "hier_vig_small": Published(83.8, 0.3),
    "hier_vig_base": Published(84.2, 0.6),
}


def against_published(name: str, top1: float, images: int, size: int) -> str:
    """A line that sets a top-1 on ImageNet's classes beside the published one, or says why it cannot be compared."""
    published = PUBLISHED[name].top1
    conditions = {
        f"{images:,} images": images == IMAGENET_VALIDATION_IMAGES,
        f"{size} pixels": size == IMAGENET_SIZE,
    }
    differing = [condition for condition, is_met in conditions.items() if not is_met]
    if not differing:
        return f"published for {name}: top-1 {published:.1f} %; this is {top1 - published:+.2f}"
    return (
        f"published for {name}: top-1 {published:.1f} % on {IMAGENET_VALIDATION_IMAGES:,} images at {IMAGENET_SIZE} "
        f"pixels; not comparable, these are {' at '.join(differing)}"
    )
