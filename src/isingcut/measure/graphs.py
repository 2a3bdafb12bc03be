"""Blocks with their gates, and their graphs: kept between the way there and the way back where
there is room, so that what was computed is not computed again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from isingcut.measure.gates import gated_block
from isingcut.models.replay import Recording


@dataclass(frozen=True)
class GatedBlock:
    """A block with its gates, ready for backward.

    Attributes:
        alpha: place of the gates (B,) in its graph.
        before: place of the stream before the block; None: it takes no gradient.
        after: place of the stream after it.
    """

    alpha: GradientEdge
    before: GradientEdge | None
    after: GradientEdge

    def backward(self, toward: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients in the gates (B,) and in the stream before the block, from that after it."""
        wanted = [self.alpha, *([self.before] if self.before else [])]
        gradients = torch.autograd.grad(self.after, wanted, toward)
        return gradients[0], gradients[-1]


def gated(recording: Recording, block: int, before: Tensor, gate: str) -> tuple[GatedBlock, Tensor]:
    """Run a block that is open, for a backward pass while it still is; and the stream after it."""
    alpha = torch.ones(len(before), device=before.device, requires_grad=True)
    # A stream out of another block's graph is not cut off from it: a leaf would hold its values
    # until its gradient is there. Nothing that enters the first block requires a gradient.
    if not before.requires_grad:
        before = before.detach().requires_grad_(block > 0)
    into = get_gradient_edge(before) if before.requires_grad else None
    after = gated_block(recording, block, before, alpha, gate, ones=True)
    return GatedBlock(get_gradient_edge(alpha), into, get_gradient_edge(after)), after


class Graphs:
    """Keeps graphs of the last blocks on the way there, as many as there is room for.

    Args:
        room: bytes they may take.
        each: bytes of one graph, at most.
    """

    def __init__(self, room: int, each: int) -> None:
        self._room, self._each = room, each
        self._kept: dict[tuple[int, int], GatedBlock] = {}

    def has_room(self, left: int) -> bool:
        """Whether all of ``left`` graphs, this one and those to come, may be kept."""
        return left * self._each <= self._room

    def run(
        self, recording: Recording, block: int, batch: int, before: Tensor, gate: str
    ) -> Tensor:
        """Run a block and keep its graph; the stream (B, T, D) that comes out of it."""
        self._kept[block, batch], after = gated(recording, block, before, gate)
        self._room -= self._each
        return after

    def take(self, block: int, batch: int) -> GatedBlock | None:
        """The graph of a block; None if it was not kept."""
        return self._kept.pop((block, batch), None)
