"""`linear`: fit a least-squares map at each cut, and fold it into the block before the cut.

A kept block p before a run of removed blocks p+1 .. q writes s W z to the residual stream, with z
the input of its last linear layer (an MLP's down-projection, a mixer's output projection). With r
the rest of its output and y the original model's stream after block q, the patch is the W' that
minimises

    sum_t w_t | y_t - r_t - s W' z_t |^2  +  ridge |change|^2

over the real tokens, w_t = 1 / |y_t|^2 (all later layers normalise the stream first; without the
weight, a few tokens of huge norm would dominate). W' = W + T with T (D, F) maps the layer's input;
if memory does not suffice for its moments, W' = (1 + T) W with T (D, D) maps its output; if it
does not suffice for these either, the cut stays unpatched. The ridge
term penalises the change of the layer. W' has the shape of W, so no parameter is added. The block's
output is linear in W', so the block need not run again.

If a norm, a gate or experts follow every such layer, s becomes a gain c_k g_t of channel and token
(`layers`). With constant gains the block's output is linear in its weights, and least squares gives
a map for each ridge strength. The best is chosen by running the block again with the new weights on
the validation rows.

Cuts are fitted from front to back. r and z come from the model with all earlier cuts made and
patched, y from the original, so that a later patch also corrects the error of earlier ones.

Source: the idea of ReplaceMe, arXiv 2505.02819, section 2 (one run of blocks, T of the second kind,
its least-squares objective). The fit here differs in the weight, in T of the first kind, in the
ridge chosen by validation, and in treating several cuts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from isingcut.data.tokens import TokenSet
from isingcut.errors import ArchitectureError, FitError
from isingcut.files.cuts import PatchedCut, PatchRecord, UnpatchedCut
from isingcut.formats.architectures.blocks import find_stack
from isingcut.healing.job import Job
from isingcut.healing.patch.files import (
    Patch,
    StoredLayers,
    apply_patches,
    find_obstacle,
    runs,
)
from isingcut.healing.patch.layers import (
    Write,
    find_scaled_writes,
    find_write,
    observe,
    token_gains,
)
from isingcut.healing.patch.ridge import Moments, RidgeFit, Rows, bytes_of, fit_ridge
from isingcut.healing.repairs.base import Repaired
from isingcut.measure.splitting import attempt, fewer_tokens_to_fit
from isingcut.measure.streams import Kept, SampleStreams
from isingcut.measure.work import Work
from isingcut.models.device import allowance
from isingcut.models.replay import Replay

__all__ = ["Linear"]

_CPU = torch.device("cpu")
_HELD_OUT_EVERY = 4
_CANDIDATES = 2
"""Number of layers to fit if none writes directly to the stream."""


@dataclass(frozen=True)
class Linear:
    """A least-squares map at each cut."""

    passes: ClassVar[float] = 2.0
    trains: ClassVar[bool] = False

    def patch(
        self,
        job: Job,
        tokens: TokenSet,
        layers: StoredLayers | None = None,
        kept: Kept | None = None,
    ) -> Repaired:
        """Fit with as many tokens at a time as the memory allows; as `fit_patches`."""
        replay = job.teacher.replay

        def fit(count: int) -> Repaired:
            work = Work(count, job.progress)
            return fit_patches(replay, tokens, job.removed.blocks, work, layers, kept)

        longest = int(tokens.mask.sum(1).max())
        count = job.config.batch_tokens
        made = attempt(
            lambda: fewer_tokens_to_fit(replay.limit, count, longest, fit), True
        )
        if made is None:
            replay.limit.release()
            raise FitError(f"{replay.device} is out of memory for fitting a patch")
        return made


def fit_patches(
    replay: Replay,
    tokens: TokenSet,
    removed: Sequence[int],
    work: Work,
    stored: StoredLayers | None = None,
    kept: Kept | None = None,
) -> Repaired:
    """Fit patches for the cuts of a state, in two forward passes over the tokens, without heads.

    A streamed model is read once, up to the last cut; the block before each cut is read twice.

    Args:
        replay: the original model.
        tokens: every fourth sample is for validation, to choose the ridge.
        removed: the removed blocks.
        stored: the checkpoint to write the patches to; None: any layer is allowed.
        kept: as in `make_patches`.

    Raises:
        ArchitectureError: no cut can be patched, with the reasons.
        FitError: fewer than two samples, or too little memory next to a streamed model.
    """
    if tokens.samples < 2:
        raise FitError("a patch needs at least two samples, one of them for validation")
    ends = runs(removed)
    batches = tokens.batches(work.batch_tokens)
    patches = list[Patch]()
    unpatched = list[UnpatchedCut]()
    total = len(batches) * (2 * ends[-1][1] + 2 - len(removed))
    with (
        torch.inference_mode(),
        work.progress(f"fitting a patch, cuts: {len(ends)}", total) as bar,
    ):
        fitting = _Fitting(replay, batches, stored, bar.advance, kept)
        for first, last in ends:
            patch = fitting.fit_cut(first, last)
            if isinstance(patch, Patch):
                patches.append(patch)
            else:
                unpatched.append(UnpatchedCut(removed=[first, last], reason=patch))
    if not patches:
        raise ArchitectureError("; ".join(cut.reason for cut in unpatched))
    maps = "reads" if all(patch.record.reads for patch in patches) else "writes"
    cuts = [patch.record for patch in patches]
    record = PatchRecord(
        maps=maps, changed=True, cuts=cuts, unpatched=unpatched, tuning=None
    )
    return Repaired(patches, record, fitting.original())


# The cuts of a state ------------------------------------------------------------------


@dataclass(eq=False)
class _Fitting:
    """Fits the cuts in order, and keeps the hidden states between them.

    Args:
        replay: the original model.
        batches: the tokens.
        stored: the checkpoint to write the patches to; None: any layer is allowed.
        done: function called with the number of block runs that were finished.
        kept: as in `make_patches`.
    """

    replay: Replay
    batches: Sequence[TokenSet]
    stored: StoredLayers | None
    done: Callable[[int], None]
    kept: Kept | None
    ways: ClassVar[tuple[bool, ...]] = (True, False)
    """Whether to map inputs of layers: first if true, and outputs if memory does not suffice."""

    def __post_init__(self) -> None:
        self._kinds = find_stack(self.replay.model).kinds
        self._recordings = [self.replay.record(b.input_ids) for b in self.batches]
        self._tokens = sum(int(b.mask.sum()) for b in self.batches)
        # Hidden states of both models, before and after a block.
        needed = 4 * sum(map(self.replay.stream_bytes, self.batches))
        room = self.replay.room(self.batches[0])
        if self.replay.streamed and needed > room:
            raise FitError(
                f"fitting a patch on {self._tokens} tokens needs {needed / 1e9:.2f} GB beside the "
                f"streamed model, but {room / 1e9:.2f} GB are free; lower --patch-tokens"
            )
        # The original's and the patched model's hidden states before block `_at`.
        self._original: Sequence[Tensor] = [r.entered for r in self._recordings]
        self._patched: Sequence[Tensor] = self._original
        self._at = 0
        self._cuts = tuple[tuple[int, int], ...]()
        self._before: Sequence[Tensor] = ()

    def fit_cut(self, first: int, last: int) -> Patch | str:
        """Return the patch for removing blocks ``first`` to ``last``, or why there is none."""
        self._cuts += ((first, last),)
        count = len(self.batches)
        key = count, self._cuts
        result: Patch | str
        original = self.kept.original.get((count, last)) if self.kept else None
        if self.kept and original and (known := self.kept.find(key)):
            streams, result = known
            self._patched = self._bring(last, streams)
            self._original = original
        else:
            result = self._fit_new(first, last)
            if self.kept:
                self.kept.keep(key, self._patched, result)
        self._at = last + 1
        return result

    def _fit_new(self, first: int, last: int) -> Patch | str:
        """Run both models up to a cut, and fit its patch."""
        p = first - 1
        alike = len(self._cuts) == 1
        for i in map(int, self.replay.store.sweep(range(self._at, last + 1))):
            if alike and i <= p:
                self._patched = self._original
            elif i < p:
                self._patched = self._after(i, self._patched)
            self._original = self._original_after(i)
            self.done(len(self.batches) * (1 + (i <= p)))
        if p < 0:
            return (
                "block 0 is removed, so no block before the first cut can absorb a patch; heal by "
                "distillation instead, or keep block 0 (--keep 0)"
            )
        # To the device of block p, to compare them with its output.
        both = self._original, self._patched
        self._original, entered = (self._bring(p, streams) for streams in both)
        result: Patch | str = ""
        if alike and not self.replay.streamed:
            self._before = [stream.cpu() for stream in entered]
        for _ in self.replay.store.sweep([p]):
            result = self._fit_block(p, last, entered)
            patches = [result] if isinstance(result, Patch) else []
            with apply_patches(self.replay, patches):
                self._patched = self._after(p, entered)
        return result

    def original(self) -> SampleStreams | None:
        """Return the original's hidden states before the first patched block and after the last
        cut, if both were computed and the model is in memory."""
        p = self._cuts[0][0] - 1
        known = self.kept.original if self.kept else {}
        before = self._before or known.get((len(self.batches), p - 1))
        if not before:
            return None
        return SampleStreams(self.batches, {p: before, self._at: self._original})

    def _fit_block(self, p: int, last: int, entered: Sequence[Tensor]) -> Patch | str:
        """Patch a layer of block p: one that writes directly to the stream, or else the best of a
        few that write with a gain, by validation error.

        Args:
            entered: for each batch the patched model's hidden states before block p.
        """
        reasons = list[str]()
        usable = list[Write]()
        patches = list[Patch]()
        kind = self._kinds[p]
        direct = find_write(self._recordings[0], p, entered[0], kind)
        if direct is not None and not self._obstacle(p, direct):
            usable.append(direct)
        else:
            for write in find_scaled_writes(self._recordings[0], p, entered[0]):
                if reason := self._obstacle(p, write):
                    reasons.append(reason)
                else:
                    usable.append(write)
        tried = usable[:_CANDIDATES]
        for write in tried:
            try:
                patches += self._fit_write(p, last, entered, write)
            except FitError as e:
                reasons.append(str(e))
        if patches:
            return min(patches, key=lambda patch: patch.record.held_out_error_left or 0)
        if usable and not reasons:
            paths = " or ".join(write.path for write in tried)
            return (
                f"no linear map in {paths} of block {p} lowers the error on validation tokens; "
                "raise --patch-tokens, or heal by distillation"
            )
        why = reasons or ["none of its linear layers writes to the residual stream"]
        return (
            f"block {p} ({kind}) cannot absorb a patch: {'; '.join(why)}; heal by distillation "
            "instead"
        )

    def _obstacle(self, p: int, write: Write) -> str:
        return find_obstacle(self.replay, self.stored, p, write.path, write.module)

    def _fit_write(
        self, p: int, last: int, entered: Sequence[Tensor], write: Write
    ) -> list[Patch]:
        """Return the patch of one layer, if it lowers the error; for a layer with a
        gain, the one whose block output has the least validation error."""
        record = PatchedCut(
            removed=[p + 1, last],
            block=p,
            layer=write.path,
            exact=write.gains is None,
            tokens=self._tokens,
        )
        left: Callable[[Tensor], float] | None = None
        gains = write.gains
        if gains is not None:
            before = self._error(p, entered, None)
            if not before:
                # The removed blocks change nothing.
                return []

            def left(change: Tensor) -> float:
                patch = Patch(p, write.path, write.fold(change), record)
                return self._error(p, entered, patch) / before

        def add(moments: Sequence[Moments]) -> None:
            for b, recording in enumerate(self._recordings):
                output, read, written = observe(recording, p, entered[b], write)
                x = write.features(read)
                target = self._original[b].float() - output.float()
                if gains is not None:
                    of_tokens = token_gains(recording, p, entered[b], write, written)
                    x = x * of_tokens[..., None]
                    target = torch.where(gains != 0, target / gains, 0.0)
                weights = _weights(self._original[b])
                for side, rows in zip(moments, self._sides(b), strict=True):
                    side.add(x[rows], target[rows], weights[rows])

        fit = self._fit(write, add, left)
        if fit is None:
            return []
        record.ridge = fit.strength
        record.held_out_error_left = fit.held_out
        record.reads = write.reads
        return [Patch(p, write.path, write.fold(fit.map), record)]

    def _error(self, p: int, entered: Sequence[Tensor], patch: Patch | None) -> float:
        """Return the weighted squared error on the validation rows, with block p patched."""
        total = 0.0
        with apply_patches(self.replay, [patch] if patch else []):
            for b, recording in enumerate(self._recordings):
                rows = self._sides(b)[1]
                if not bool(rows.any()):
                    continue
                output = recording.block(p, entered[b])
                squares = (self._original[b].float() - output.float()).square().sum(-1)
                total += float((squares * _weights(self._original[b]))[rows].sum())
        return total

    def _fit(
        self,
        write: Write,
        add: Callable[[Sequence[Moments]], None],
        left: Callable[[Tensor], float] | None = None,
    ) -> RidgeFit | None:
        """Fit a map of the layer's input on the device, or on the CPU if the device is full; if
        neither has the memory, a map of its output.

        Args:
            add: function that adds all rows to the moments of the fit and validation rows.
            left: as in `fit_ridge`.

        Raises:
            FitError: there is too little memory for both maps.
        """
        width = len(write.whole)
        for write.reads in self.ways:
            kind = Rows if self._tokens <= write.mapped else Moments
            needed = bytes_of(write.mapped, width)
            for place in dict.fromkeys((self._original[0].device, _CPU)):

                def fit(kind: type[Moments] = kind, place: torch.device = place) -> Any:
                    both = (
                        kind(write.mapped, width, place),
                        kind(write.mapped, width, place),
                    )
                    add(both)
                    return [fit_ridge(*both, left)]

                if needed <= allowance("", place).left:
                    if fits := attempt(fit, True):
                        return fits[0]  # type: ignore[no-any-return]
                    self.replay.limit.release()
        raise FitError(
            f"fitting a map of {write.path} needs {needed / 1e9:.1f} GB of host memory, and "
            f"{allowance('', _CPU).left / 1e9:.1f} GB are free"
        )

    def _sides(self, b: int) -> tuple[Tensor, Tensor]:
        """Return the masks (B, T) of the real tokens of batch ``b`` to fit and to validate on."""
        batch = self.batches[b]
        device = self._original[b].device
        mask = batch.mask.to(device)
        validation = (batch.index % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1).to(device)
        # With too few samples to take one in four, validate on the first.
        if sum(each.samples for each in self.batches) < _HELD_OUT_EVERY:
            validation = (batch.index == 0).to(device)
        return mask & ~validation[:, None], mask & validation[:, None]

    def _original_after(self, i: int) -> Sequence[Tensor]:
        key = len(self.batches), i
        if self.kept and key in self.kept.original:
            return self.kept.original[key]
        after = self._after(i, self._bring(i, self._original))
        if self.kept:
            self.kept.keep_original(key, after)
        return after

    def _after(self, i: int, streams: Sequence[Tensor]) -> list[Tensor]:
        return [r.block(i, s) for r, s in zip(self._recordings, streams, strict=True)]

    def _bring(self, i: int, streams: Sequence[Tensor]) -> list[Tensor]:
        return [
            r.move_to_block(i, s)
            for r, s in zip(self._recordings, streams, strict=True)
        ]


def _weights(original: Tensor) -> Tensor:
    """Return the weight (B, T) of each token's error: one over its mean square."""
    return 1 / original.float().square().mean(-1).clamp_min(1e-12)
