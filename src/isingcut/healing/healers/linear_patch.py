"""`linear-patch`: at each cut, a least-squares map folded into the block before it.

A kept block p before a run of removed blocks p+1 .. q writes s W z to the residual stream, z
the input of its last linear layer (an MLP's down-projection). With r the rest of its output and
y the original model's stream after block q, the patch is the W' that minimises

    sum_t w_t | y_t - r_t - s W' z_t |^2  +  ridge |change|^2

over the real tokens, w_t = 1 / |y_t|^2 (all later readers normalise the stream first; without
the weight a few tokens of huge norm decide everything). Either W' = (1 + T) W with T (D, D),
which maps what the layer writes, or W' = W + T with T (D, F), which maps what it reads. The ridge
draws towards the unpatched layer. W' has the shape of W: no parameter is added.

Cuts are fitted from front to back. r and z come from the model with all earlier cuts made and
patched, y from the original, so that a later patch also mends what earlier ones left.

Source: the idea of ReplaceMe, arXiv 2505.02819, section 2 (one run of blocks, T of the first kind,
its least-squares objective). Ours differs in the weight, in the second kind, in the held-out
ridge and in treating several cuts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isingcut.data.tokens import TokenSet
from isingcut.errors import ArchitectureError, FitError
from isingcut.healing.job import Job
from isingcut.healing.patch.absorb import Write, find_write
from isingcut.healing.patch.exact import observed
from isingcut.healing.patch.files import Patch, StoredLayers, applied, runs, write_patched
from isingcut.measure.work import Work
from isingcut.models.architectures import find_stack, stack_modules
from isingcut.models.cutting.verify import verify
from isingcut.models.replay import Recording, Replay
from isingcut.models.streaming.proof import verify_streamed

__all__ = ["LinearPatch"]

_NOTHING_BEFORE = (
    "block 0 is removed, so that nothing stands before the first cut to absorb a patch; heal by "
    "distillation instead, or keep block 0 (--keep 0)"
)


@dataclass(frozen=True, eq=False)
class Fitted:
    """What was fitted at the cuts of one state.

    Attributes:
        patches: one for each cut that has one, in their order.
        unpatched: the other cuts, ``{"removed": [first, last], "reason": why}`` each.
    """

    patches: list[Patch]
    unpatched: list[dict[str, Any]]

    def refuse(self, first: int, last: int, reason: str) -> None:
        """Leave a cut without a patch."""
        self.unpatched.append({"removed": [first, last], "reason": reason})


@dataclass(frozen=True)
class LinearPatch:
    """The closed-form patch.

    Attributes:
        reads: map what the layer reads, (D, F) unknowns, rather than what it writes, (D, D).
    """

    reads: bool = True

    def fit(
        self,
        replay: Replay,
        kinds: Sequence[str],
        tokens: TokenSet,
        removed: Sequence[int],
        work: Work,
        stored: StoredLayers | None = None,
    ) -> Fitted:
        """Patches for the cuts of a state; two forward passes over the tokens, without heads.

        A model that is streamed from disk is read once, up to the last cut.

        Args:
            replay: the original model.
            kinds: what each block does, for messages.
            tokens: every fourth sample is held out to choose the ridge.
            removed: the blocks that go.
            stored: the checkpoint that patches must be written to; None: any layer will do.

        Raises:
            ArchitectureError: no cut has a neighbour that can absorb a map, with the reasons.
            FitError: fewer than two samples, or a streamed model leaves no memory for them.
        """
        if tokens.samples < 2:
            raise FitError("a patch needs at least two samples: one is held out to choose it")
        cuts = runs(removed)
        batches = tokens.batches(work.batch_tokens)
        found = Fitted([], [])
        with torch.inference_mode():
            recordings = [replay.record(b.input_ids) for b in batches]
            # The original's and the patched model's streams, at the block reached so far.
            original = [r.entered for r in recordings]
            patched, at = list(original), 0
            total = len(batches) * (2 * cuts[-1][1] + 2 - len(removed))
            with work.progress(f"fitting a patch, cuts: {len(cuts)}", total) as bar:
                for first, last in cuts:
                    p, cut = first - 1, None
                    for i in _sweep(replay, at, last):
                        if i == p:
                            write = _write(replay, kinds, recordings[0], p, original[0], stored)
                            if isinstance(write, Write):
                                _check_room(replay, batches, write)
                                parts = (recordings, patched, p, last, write)
                                cut = observed(*parts, reads=self.reads)
                            else:
                                found.refuse(first, last, write)
                        if i < p or (i == p and cut is None):
                            patched = _advanced(recordings, i, patched)
                        original = _advanced(recordings, i, original)
                        bar.advance(len(batches) * (1 + (i <= p)))
                    if p < 0:
                        found.refuse(first, last, _NOTHING_BEFORE)
                    elif cut is not None:
                        patch = cut.fitted(batches, original, patched)
                        if patch is None:
                            found.refuse(first, last, _no_better(cut.write, p))
                        else:
                            found.patches.append(patch)
                    at = last + 1
        if not found.patches:
            raise ArchitectureError(_reasons(found.unpatched))
        return found

    def heal(self, job: Job, out: Path) -> dict[str, Any]:
        """Fit on the job's first `patch_tokens` tokens, write ``out`` and verify it.

        Raises:
            ArchitectureError, FitError: as `fit`; nothing was written.
        """
        model = job.teacher.model
        stack = find_stack(model)
        replay = job.replay or Replay(model, stack_modules(model, stack))
        fit = LinearPatch(reads=job.config.patch_maps == "reads")
        tokens = _first(job.tokens, job.config.patch_tokens)
        work = Work(job.config.batch_tokens, job.progress)
        layers = StoredLayers(job.start, job.removed)
        try:
            fitted = fit.fit(replay, stack.kinds, tokens, job.removed, work, layers)
        except torch.OutOfMemoryError as e:
            raise FitError(
                f"{replay.device} has no memory left to fit a patch on {tokens.samples} samples; "
                "give fewer --patch-tokens, or --device cpu"
            ) from e
        stored = write_patched(layers, fitted.patches, out)
        trust = job.config.trust_remote_code
        with applied(replay.blocks, stored):
            if job.replay is None:
                proof = verify(model, job.removed, out, trust_remote_code=trust)
            else:
                proof = verify_streamed(job.replay, job.removed, out, trust_remote_code=trust)
        records = [p.record for p in stored]
        return {
            "maps": job.config.patch_maps,
            "changed": any(r["changed"] for r in records),
            "cuts": records,
            "unpatched": fitted.unpatched,
            "proof": proof.record,
        }


def _sweep(replay: Replay, first: int, last: int) -> Iterator[int]:
    for i in replay.store.sweep(range(first, last + 1)):
        assert isinstance(i, int)
        yield i


def _advanced(recordings: Sequence[Recording], i: int, streams: Sequence[Tensor]) -> list[Tensor]:
    """The streams after block ``i``."""
    return [r.block(i, stream) for r, stream in zip(recordings, streams, strict=True)]


def _no_better(write: Write, p: int) -> str:
    return (
        f"no map of block {p}'s {write.path} is better than none on tokens held out; give "
        "more --patch-tokens, or heal by distillation"
    )


def _reasons(unpatched: Sequence[dict[str, Any]]) -> str:
    if len(unpatched) == 1:
        return str(unpatched[0]["reason"])
    each = (f"{_blocks(*cut['removed'])}: {cut['reason']}" for cut in unpatched)
    return f"no cut can absorb a patch; {'; '.join(each)}"


def _blocks(first: int, last: int) -> str:
    return f"block {first}" if first == last else f"blocks {first} to {last}"


def _first(tokens: TokenSet, most: int) -> TokenSet:
    """The first samples, two at least, of about ``most`` tokens together."""
    held = tokens.mask.sum(1).cumsum(0)
    rows = max(2, int((held < most).sum()) + 1)
    return tokens.select(range(min(rows, tokens.samples)))


def _write(
    replay: Replay,
    kinds: Sequence[str],
    recording: Recording,
    p: int,
    stream: Tensor,
    stored: StoredLayers | None,
) -> Write | str:
    """The layer of block ``p`` that absorbs a cut's map; or why there is none."""
    try:
        write = find_write(recording, replay.blocks[p], p, stream, kinds[p])
        _refuse_shared(replay, p, write)
        if stored is not None:
            shape = write.module.weight.shape
            stored.layer(p, write.path, shape, bias=write.bias is not None)
    except ArchitectureError as refusal:
        return str(refusal)
    return write


def _check_room(replay: Replay, batches: Sequence[TokenSet], write: Write) -> None:
    """Refuse more tokens than a streamed model leaves memory for.

    Raises:
        FitError: with what to lower.
    """
    width, features = write.weight.shape
    stream = sum(replay.stream_bytes(batch) for batch in batches)
    # Both models' streams, the block's output and what the layer reads; second moments, doubled.
    needed = stream * (3 + features / width) + 4 * 8 * features * features
    room = replay.room(batches[0])
    if needed > room:
        raise FitError(
            f"fitting a patch on {sum(int(b.mask.sum()) for b in batches)} tokens needs "
            f"{needed / 1e9:.2f} GB beside the streamed model, and {room / 1e9:.2f} GB are left; "
            "give fewer --patch-tokens"
        )


def _refuse_shared(replay: Replay, i: int, write: Write) -> None:
    weight = write.module.weight
    owners = [
        name
        for name, p in replay.model.named_parameters(remove_duplicate=False)
        # Parts of a streamed model are views of one buffer; the others' have no memory.
        if p is weight or (p.shape == weight.shape and 0 != p.data_ptr() == weight.data_ptr())
    ]
    if len(owners) > 1:
        raise ArchitectureError(
            f"block {i} cannot absorb a patch: its {write.path} is shared with another part of the "
            f"model ({owners[-1]})"
        )
