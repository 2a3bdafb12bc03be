"""The cuts of one state, fitted from front to back on streams that are kept between blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from isingcut.data.tokens import TokenSet
from isingcut.errors import ArchitectureError, FitError
from isingcut.healing.patch.absorb import Write, find_write
from isingcut.healing.patch.approximate import ApproximateCut
from isingcut.healing.patch.exact import ExactCut, features_of, observed
from isingcut.healing.patch.files import Patch, StoredLayers
from isingcut.healing.patch.gains import gained_writes
from isingcut.healing.patch.least_squares import bytes_of
from isingcut.models.memory import allowance
from isingcut.models.replay import Replay

_NOTHING_BEFORE = (
    "block 0 is removed, so that nothing stands before the first cut to absorb a patch; heal by "
    "distillation instead, or keep block 0 (--keep 0)"
)
_CANDIDATES = 2
"""How many layers are fitted where none writes straight to the stream."""


class Fitting:
    """Patches of cuts that are given in their order.

    Args:
        replay: the original model.
        kinds: what each block does.
        batches: the tokens.
        stored: the checkpoint that patches must be written to; None: any layer will do.
        reads: as `LinearPatch.reads`.
        done: is told how many blocks were run on a batch.
    """

    def __init__(
        self,
        replay: Replay,
        kinds: Sequence[str],
        batches: Sequence[TokenSet],
        stored: StoredLayers | None,
        *,
        reads: bool,
        done: Callable[[int], None],
    ) -> None:
        self._replay, self._kinds, self._batches = replay, kinds, batches
        self._stored, self._reads, self._done = stored, reads, done
        self._recordings = [replay.record(b.input_ids) for b in batches]
        # The original's and the patched model's streams, before block `at`.
        self._original = [r.entered for r in self._recordings]
        self._patched = list(self._original)
        self._at = 0

    def cut(self, first: int, last: int) -> Patch | str:
        """The patch of the cut that removes blocks ``first`` to ``last``; or why it has none."""
        p = first - 1
        exact: ExactCut | None = None
        entered = self._patched
        for i in self._sweep(self._at, last):
            if i == p:
                entered = self._patched
                exact = self._straight(p, last)
            if i < p or (i == p and exact is None):
                self._patched = self._after(i, self._patched)
            self._original = self._after(i, self._original)
            self._done(len(self._batches) * (1 + (i <= p)))
        self._at = last + 1
        if p < 0:
            return _NOTHING_BEFORE
        if exact is None:
            return self._approximate(p, last, entered)
        self._patched = list(self._patched)
        patch = exact.fitted(self._batches, self._original, self._patched)
        return patch or _no_better(p, [exact.write.path])

    def _straight(self, p: int, last: int) -> ExactCut | None:
        """A cut behind a layer that writes straight to the stream; None where there is none."""
        recording, block, kind = self._recordings[0], self._replay.blocks[p], self._kinds[p]
        write = find_write(recording, block, p, self._original[0], kind)
        if write is None or unfit(self._replay, self._stored, p, write.path, write.module):
            return None
        reads = self._reads_for(write)
        return observed(self._recordings, self._patched, p, last, write, reads=reads)

    def _approximate(self, p: int, last: int, entered: Sequence[Tensor]) -> Patch | str:
        """The patch of a layer that writes to the stream but for a gain."""
        patch: Patch | None = None
        block, reasons, usable = self._replay.blocks[p], [], []
        for _ in self._sweep(p, p):
            for gained in gained_writes(self._recordings[0], block, p, entered[0]):
                reason = unfit(
                    self._replay, self._stored, p, gained.write.path, gained.write.module
                )
                if reason:
                    reasons.append(reason)
                else:
                    usable.append(gained)
            cut = ApproximateCut(
                self._recordings,
                self._batches,
                self._replay.blocks,
                p,
                last,
                entered,
                self._original,
                all(self._reads_for(gained.write) for gained in usable[:_CANDIDATES]),
            )
            patch = cut.fitted(usable[:_CANDIDATES])
            if patch is not None:
                self._patched = cut.advanced(patch)
        if patch is not None:
            return patch
        if usable:
            return _no_better(p, [gained.write.path for gained in usable[:_CANDIDATES]])
        why = reasons or ["no linear layer of it writes to the residual stream, not even by gains"]
        return (
            f"block {p} ({self._kinds[p]}) cannot absorb a patch: {'; '.join(why)}; heal by "
            "distillation instead"
        )

    def _after(self, i: int, streams: Sequence[Tensor]) -> list[Tensor]:
        return [r.block(i, s) for r, s in zip(self._recordings, streams, strict=True)]

    def _sweep(self, first: int, last: int) -> Iterator[int]:
        for i in self._replay.store.sweep(range(first, last + 1)):
            assert isinstance(i, int)
            yield i

    def _reads_for(self, write: Write) -> bool:
        """Whether to map what a layer reads; where its moments do not fit, what it writes.

        Raises:
            FitError: neither fits, or the streams of so many tokens do not beside a streamed model.
        """
        width, size = write.weight.shape
        host = allowance("", torch.device("cpu")).left
        reads = self._reads and bytes_of(features_of(write, reads=True)) <= host
        if not reads and bytes_of(width) > host:
            raise FitError(
                f"fitting a patch to a stream of {width} channels needs "
                f"{bytes_of(width) / 1e9:.1f} GB of host memory, and {host / 1e9:.1f} GB are free"
            )
        stream = sum(self._replay.stream_bytes(batch) for batch in self._batches)
        # Both models' streams, a block's output and what its layer reads.
        needed = stream * (3 + size / width)
        room = self._replay.room(self._batches[0])
        if needed > room:
            raise FitError(
                f"fitting a patch on {sum(int(b.mask.sum()) for b in self._batches)} tokens needs "
                f"{needed / 1e9:.2f} GB beside the streamed model, and {room / 1e9:.2f} GB are "
                "left; give fewer --patch-tokens"
            )
        return reads


def unfit(replay: Replay, stored: StoredLayers | None, block: int, path: str, module: Any) -> str:
    """Why a layer cannot take new weights; empty where it can.

    Args:
        stored: the checkpoint that they must be written to; None: any layer will do.
    """
    weight = module.weight
    if not weight.is_floating_point() or weight.element_size() < 2:
        return f"the weights of its {path} are quantised; patch the unquantised model"
    owners = [
        name
        for name, other in replay.model.named_parameters(remove_duplicate=False)
        if other is weight or _same_memory(other, weight)
    ]
    if len(owners) > 1:
        return f"its {path} is shared with another part of the model ({owners[-1]})"
    if stored is not None:
        try:
            stored.layer(block, path, weight.shape, bias=module.bias is not None)
        except ArchitectureError as refusal:
            return str(refusal)
    return ""


def _same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two parameters of a streamed model are views of the same place in a buffer."""
    return one.shape == other.shape and 0 != one.data_ptr() == other.data_ptr()


def _no_better(p: int, paths: Sequence[str]) -> str:
    return (
        f"no map of block {p}'s {' or '.join(paths)} is better than none on tokens held out; give "
        "more --patch-tokens, or heal by distillation"
    )
