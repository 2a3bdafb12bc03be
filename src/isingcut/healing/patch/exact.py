"""A cut behind a block whose last layer writes straight to the stream: least squares, solved once.

The block's output is linear in the layer's weights, so that it need not be run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isingcut.data.tokens import TokenSet
from isingcut.healing.patch.absorb import Write, observe
from isingcut.healing.patch.files import Patch
from isingcut.healing.patch.least_squares import Moments, bytes_of, fit_ridge
from isingcut.models.memory import allowance
from isingcut.models.replay import Recording

_HELD_OUT_EVERY = 4


@dataclass(frozen=True, eq=False)
class ExactCut:
    """One cut on the way to its patch.

    Attributes:
        p: the block before it.
        last: the last block that goes.
        write: the layer of block p that absorbs the map.
        reads: as `LinearPatch.reads`.
        seen: of each batch the output (B, T, D) of block p in the patched model, and the features
            (B, T, F') of which a change of it is linear.
    """

    p: int
    last: int
    write: Write
    reads: bool
    seen: list[tuple[Tensor, Tensor]]

    def fitted(
        self, batches: Sequence[TokenSet], original: Sequence[Tensor], patched: list[Tensor]
    ) -> Patch | None:
        """Fit the cut; ``patched`` moves on past block p, the patch applied.

        Args:
            original: of each batch the original's stream after the cut.

        Returns:
            None where no map is better than none on the rows held out.
        """
        device = original[0].device
        moments = moments_for(self.write, device, reads=self.reads)
        for b, (output, x) in enumerate(self.seen):
            target = original[b].double() - output.double()
            weights = weights_of(original[b])
            for side, rows in zip(moments, sides(batches, b, device), strict=True):
                side.add(x[rows], target[rows], weights[rows])
        solution = fit_ridge(*moments)
        change = solution.map.to(device)
        for b, (output, x) in enumerate(self.seen):
            patched[b] = (output.double() + x.double() @ change.T).to(output.dtype)
        if solution.strength is None:
            return None
        weight, bias = folded(solution.map, self.write, reads=self.reads)
        record = {
            "removed": [self.p + 1, self.last],
            "block": self.p,
            "layer": self.write.path,
            "ridge": solution.strength,
            "held_out_error_left": solution.held_out,
            "exact": True,
            "tokens": moments[0].rows + moments[1].rows,
        }
        return Patch(self.p, self.write.path, weight, bias, record)


def observed(
    recordings: Sequence[Recording],
    patched: Sequence[Tensor],
    p: int,
    last: int,
    write: Write,
    *,
    reads: bool,
) -> ExactCut:
    """Run block ``p`` of the patched model and keep what the fit needs of it."""
    seen = []
    for recording, stream in zip(recordings, patched, strict=True):
        output, read, written = observe(recording, p, stream, write)
        seen.append((output, features(read, written, write, reads=reads)))
    return ExactCut(p, last, write, reads, seen)


def features(read: Tensor, written: Tensor, write: Write, *, reads: bool) -> Tensor:
    """Features (B, T, F') of which the change of the layer's output is linear."""
    if not reads:
        return written
    if write.bias is None:
        return read
    return torch.cat([read, torch.ones_like(read[..., :1])], dim=-1)


def folded(change: Tensor, write: Write, *, reads: bool) -> tuple[Tensor, Tensor | None]:
    """The layer's new weight and bias: the change of the stream, undone by the scale."""
    change = change.cpu()
    weight = write.weight.cpu().double()
    bias = None if write.bias is None else write.bias.cpu().double()
    if not reads:
        # The layer's output v becomes v + map v / s.
        weight = weight + change @ weight / write.scale
        bias = None if bias is None else bias + change @ bias / write.scale
    elif bias is None:
        weight = weight + change / write.scale
    else:
        weight = weight + change[:, :-1] / write.scale
        bias = bias + change[:, -1] / write.scale
    return (weight.T if write.transposed else weight).contiguous(), bias


def features_of(write: Write, *, reads: bool) -> int:
    """How many features a map has: what the layer writes, or what it reads."""
    width, size = write.weight.shape
    if not reads:
        return int(width)
    return int(size) + (write.bias is not None)


def moments_for(write: Write, device: torch.device, *, reads: bool) -> list[Moments]:
    """Empty second moments of the rows to fit and of those held out, where there is room."""
    size = features_of(write, reads=reads)
    if bytes_of(size) > allowance("", device).left:
        device = torch.device("cpu")
    return [Moments(size, write.weight.shape[0], device) for _ in range(2)]


def sides(batches: Sequence[TokenSet], b: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which real tokens (B, T) of batch ``b`` are to fit, and which are held out."""
    batch = batches[b]
    mask = batch.mask.to(device)
    held = (batch.index % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1).to(device)
    # Too few samples for one in four.
    if sum(each.samples for each in batches) < _HELD_OUT_EVERY:
        held = (batch.index == 0).to(device)
    return mask & ~held[:, None], mask & held[:, None]


def weights_of(original: Tensor) -> Tensor:
    """The weight (B, T) of each token's error: one over its mean square, float64."""
    return 1 / original.double().square().mean(-1).clamp_min(1e-12)
