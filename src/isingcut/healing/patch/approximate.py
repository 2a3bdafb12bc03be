"""A cut behind a block whose layers all pass a norm, a gate or experts on their way to the stream.

With the gains of a layer (`gains`) held fixed the block's output is linear in its weights, and
least squares proposes a map for each ridge strength. What decides is the block itself: run again
with the new weights on the rows held out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isingcut.data.tokens import TokenSet
from isingcut.healing.patch.absorb import observe
from isingcut.healing.patch.exact import features, folded, moments_for, sides, weights_of
from isingcut.healing.patch.files import Patch, applied
from isingcut.healing.patch.gains import Gained, token_gains
from isingcut.healing.patch.least_squares import Moments, best_strength, ridge_map
from isingcut.models.replay import Recording


@dataclass(frozen=True, eq=False)
class Best:
    """The best map found so far.

    Attributes:
        change: the map, fitted to all rows.
        strength: its ridge strength.
        left: share of the held-out error that is left by the map of the other rows alone.
    """

    change: Tensor
    strength: float
    left: float


@dataclass(frozen=True, eq=False)
class ApproximateCut:
    """One cut behind a block that answers its layers' weights by gains.

    Attributes:
        recordings: of the batches.
        batches: the tokens.
        blocks: of the original.
        p: the block before the cut.
        last: the last block that goes.
        entered: of each batch the patched model's stream before block p.
        original: of each batch the original's stream after the cut.
        reads: as `LinearPatch.reads`.
    """

    recordings: Sequence[Recording]
    batches: Sequence[TokenSet]
    blocks: Sequence[nn.Module]
    p: int
    last: int
    entered: Sequence[Tensor]
    original: Sequence[Tensor]
    reads: bool

    def fitted(self, candidates: Sequence[Gained]) -> Patch | None:
        """The patch of the candidate that leaves the least of the held-out error.

        Returns:
            None where none leaves less than no patch at all.
        """
        found: tuple[Gained, Best] | None = None
        for gained in candidates:
            best = self._best(gained)
            if best is not None and (found is None or best.left < found[1].left):
                found = gained, best
        if found is None:
            return None
        gained, best = found
        record = {
            "removed": [self.p + 1, self.last],
            "block": self.p,
            "layer": gained.write.path,
            "ridge": best.strength,
            "held_out_error_left": best.left,
            "exact": False,
            "tokens": sum(int(b.mask.sum()) for b in self.batches),
        }
        return self._patch(gained, best.change, record)

    def advanced(self, patch: Patch | None) -> list[Tensor]:
        """The streams after block p, the patch applied."""
        with applied(self.blocks, [patch] if patch else []):
            return [
                r.block(self.p, stream)
                for r, stream in zip(self.recordings, self.entered, strict=True)
            ]

    def _best(self, gained: Gained) -> Best | None:
        before = self._error(None)
        fit, held = self._moments(gained)

        def left(strength: float) -> float:
            return self._error(self._patch(gained, ridge_map(fit, strength), {})) / before

        strength, error = best_strength(left)
        # Not a number is no gain either.
        if not error < 1:
            return None
        fit.absorb(held)
        return Best(ridge_map(fit, strength), strength, error)

    def _moments(self, gained: Gained) -> list[Moments]:
        """Second moments of the rows to fit and of those held out."""
        moments = moments_for(gained.write, self.original[0].device, reads=self.reads)
        alive = gained.channels != 0
        gains = torch.where(alive, gained.channels, 1.0)
        for b, recording in enumerate(self.recordings):
            entered = self.entered[b]
            output, read, written = observe(recording, self.p, entered, gained.write)
            tokens = token_gains(recording, self.p, entered, gained, written)
            x = features(read, written, gained.write, reads=self.reads).double()
            target = (self.original[b].double() - output.double()) / gains
            target = torch.where(alive, target, 0.0)
            weights = weights_of(self.original[b])
            for side, rows in zip(moments, sides(self.batches, b, target.device), strict=True):
                side.add((x * tokens[..., None])[rows], target[rows], weights[rows])
        return moments

    def _error(self, patch: Patch | None) -> float:
        """Weighted squares left on the rows held out, the block run with the patch."""
        total = 0.0
        with applied(self.blocks, [patch] if patch else []):
            for b, recording in enumerate(self.recordings):
                rows = sides(self.batches, b, self.original[b].device)[1]
                if not bool(rows.any()):
                    continue
                output = recording.block(self.p, self.entered[b])
                squares = (self.original[b].double() - output.double()).square().sum(-1)
                total += float((squares * weights_of(self.original[b]))[rows].sum())
        return total

    def _patch(self, gained: Gained, change: Tensor, record: dict[str, Any]) -> Patch:
        weight, bias = folded(change, gained.write, reads=self.reads)
        return Patch(self.p, gained.write.path, weight, bias, record)
