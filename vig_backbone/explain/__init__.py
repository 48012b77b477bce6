"""What a trained backbone looks at: its receptive field, memories of the scans, shares of the branches.

    from vig_backbone.explain import effective_receptive_field, explain_blocks, record_blocks

    field = effective_receptive_field(backbone, images)  # images [B, 3, H, W], normalised
    print(field.side(0.5), field.side(0.9))  # pixels
    for block in explain_blocks(backbone, images):
        print(block.name, block.scan_share.mean(), block.memory_forward.median())

With torch alone; pictures of it (`pictures.py`) need matplotlib. docs/explain.md says what each number means.
"""

from .blocks import BlockMaps, explain_blocks, record_blocks
from .mixing import MixerParts, split_mixer
from .receptive_field import ReceptiveField, effective_receptive_field

__all__ = [
    "BlockMaps",
    "MixerParts",
    "ReceptiveField",
    "effective_receptive_field",
    "explain_blocks",
    "record_blocks",
    "split_mixer",
]
