"""The blocks that one state removes, in all forms in which a cut needs them."""

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Removed:
    """The removed blocks of one state, and what they leave of their layers.

    `BlockStack.remove` makes it from block numbers, `find_removed` with the tensors to write.

    Attributes:
        blocks: the removed blocks, ascending.
        layers: the layers that have no block left, ascending; the blocks, unless layers are split.
        attention, mlps: the layers that stay without their mixer, and those without their MLP.
        zeroed: the stored tensors of these parts: they stay in a checkpoint, as zeros.
    """

    blocks: tuple[int, ...]
    layers: tuple[int, ...]
    attention: Collection[int] = ()
    mlps: Collection[int] = ()
    zeroed: Collection[str] = ()
