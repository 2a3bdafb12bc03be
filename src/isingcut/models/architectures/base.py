"""What a block and a block stack are: plain numbers, no torch tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """One removable block of the residual stream.

    Args:
        index: position in the stack, from 0.
        path: module path in the loaded model, for example ``"model.layers.3"``.
        kind: what it does, parts joined by ``+``: ``"attention+mlp"``,
            ``"sliding-attention+moe"``, ``"mamba2"``, ``"mlp"``, ...
        parameters: number of parameters.
        bytes: their size in the dtype they are held in.
        active_parameters: parameters one token touches (top-k of the experts).
        kv_bytes_per_token: key and value cache per token, in the model's dtype.
        state_bytes: recurrent and convolution state per sequence, in the model's dtype.
    """

    index: int
    path: str
    kind: str
    parameters: int
    bytes: int
    active_parameters: int
    kv_bytes_per_token: int
    state_bytes: int


@dataclass(frozen=True)
class BlockStack:
    """All removable blocks of a model, in the order the residual stream meets them."""

    path: str
    blocks: tuple[Block, ...]

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every block, in order."""
        return tuple(block.kind for block in self.blocks)
