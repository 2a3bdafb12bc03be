"""`linear-patch`: at each cut, a least-squares map folded into the block before it.

A kept block p before a run of removed blocks p+1 .. q writes s W z to the residual stream, z
the input of its last linear layer (an MLP's down-projection, a mixer's output projection). With r
the rest of its output and y the original model's stream after block q, the patch is the W' that
minimises

    sum_t w_t | y_t - r_t - s W' z_t |^2  +  ridge |change|^2

over the real tokens, w_t = 1 / |y_t|^2 (all later readers normalise the stream first; without
the weight a few tokens of huge norm decide everything). Either W' = (1 + T) W with T (D, D),
which maps what the layer writes, or W' = W + T with T (D, F), which maps what it reads. The ridge
draws towards the unpatched layer. W' has the shape of W: no parameter is added.

Where every such layer passes a norm, a gate or experts on its way to the stream, s becomes a gain
c_k g_t of channel and token (`patch.gains`), and what a map leaves of the error is measured by
running the block with it (`patch.approximate`).

Cuts are fitted from front to back. r and z come from the model with all earlier cuts made and
patched, y from the original, so that a later patch also mends what earlier ones left.

Source: the idea of ReplaceMe, arXiv 2505.02819, section 2 (one run of blocks, T of the first kind,
its least-squares objective). Ours differs in the weight, in the second kind, in the held-out
ridge and in treating several cuts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from isingcut.data.tokens import TokenSet
from isingcut.errors import ArchitectureError, FitError, MemoryExhaustedError
from isingcut.healing.job import Job
from isingcut.healing.patch.files import Patch, StoredLayers, applied, runs, write_patched
from isingcut.healing.patch.fitting import Fitting
from isingcut.healing.training.tune import STEP_TOKENS, Tuned, parted, tune
from isingcut.measure.splitting import fewer_tokens_to_fit
from isingcut.measure.work import Work
from isingcut.memory import convert_memory_errors
from isingcut.models.architectures import find_stack, stack_modules
from isingcut.models.cutting.verify import verify, verify_streamed
from isingcut.models.replay import Replay

__all__ = ["LinearPatch"]


@dataclass(frozen=True, eq=False)
class Fitted:
    """What was fitted at the cuts of one state.

    Attributes:
        patches: one for each cut that has one, in their order.
        unpatched: the other cuts, ``{"removed": [first, last], "reason": why}`` each.
    """

    patches: list[Patch]
    unpatched: list[dict[str, Any]]


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

        A model that is streamed from disk is read once, up to the last cut; a block that can be
        patched only approximately twice.

        Args:
            replay: the original model.
            kinds: what each block does, for messages.
            tokens: every fourth sample is held out to choose the ridge.
            removed: the blocks that go.
            stored: the checkpoint that patches must be written to; None: any layer will do.

        Raises:
            ArchitectureError: no cut can be patched, with the reasons.
            FitError: fewer than two samples, or a streamed model leaves no memory for them.
        """
        if tokens.samples < 2:
            raise FitError("a patch needs at least two samples: one is held out to choose it")
        cuts = runs(removed)
        batches = tokens.batches(work.batch_tokens)
        found = Fitted([], [])
        total = len(batches) * (2 * cuts[-1][1] + 2 - len(removed))
        with (
            torch.inference_mode(),
            work.progress(f"fitting a patch, cuts: {len(cuts)}", total) as bar,
        ):
            fitting = Fitting(replay, kinds, batches, stored, reads=self.reads, done=bar.advance)
            for first, last in cuts:
                patch = fitting.cut(first, last)
                if isinstance(patch, Patch):
                    found.patches.append(patch)
                else:
                    found.unpatched.append({"removed": [first, last], "reason": patch})
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
        held_out, tuning = None, None
        if job.config.tunes:
            tokens, held_out, tuning = _parted(job, tokens)

        def fitted_with(count: int) -> Fitted:
            work = Work(count, job.progress)
            return fit.fit(replay, stack.kinds, tokens, job.removed, work, layers)

        longest = int(tokens.mask.sum(1).max())
        fitted = fewer_tokens_to_fit(replay.limit, job.config.batch_tokens, longest, fitted_with)
        patches = fitted.patches
        if held_out is not None:
            patches, tuning = _tuned(job, replay, tokens, held_out, patches, work, layers)
        stored = write_patched(layers, patches, out)
        trust = job.config.trust_remote_code
        with applied(replay.blocks, stored):
            if job.replay is None:
                proof = verify(model, job.removed, out, trust_remote_code=trust)
            else:
                proof = verify_streamed(job.replay, job.removed, out, trust_remote_code=trust)
        return {
            "maps": job.config.patch_maps,
            "changed": any(p.record["changed"] for p in stored),
            "cuts": [p.record for p in fitted.patches],
            "tuning": tuning,
            "unpatched": fitted.unpatched,
            "proof": proof.record,
        }


def _parted(job: Job, tokens: TokenSet) -> tuple[TokenSet, TokenSet | None, dict[str, Any] | None]:
    """What to fit and tune on, and what to hold out; all, nothing and why, where none is tuned."""
    if job.replay is not None:
        why = "the model is streamed from disk, and tuning needs it whole"
        return tokens, None, {"left_out": why}
    try:
        return *parted(tokens), None
    except FitError as e:
        return tokens, None, {"left_out": str(e)}


def _tuned(
    job: Job,
    replay: Replay,
    tokens: TokenSet,
    held_out: TokenSet,
    patches: list[Patch],
    work: Work,
    layers: StoredLayers,
) -> tuple[list[Patch], dict[str, Any]]:
    """Patches that were tuned, and how; the given ones and why where that cannot be."""

    def tuned_with(count: int) -> Tuned:
        return tune(replay, tokens, held_out, job.removed, patches, work, layers, at_a_time=count)

    longest = int(tokens.mask.sum(1).max())
    try:
        with convert_memory_errors():
            found = fewer_tokens_to_fit(replay.limit, STEP_TOKENS, longest, tuned_with)
    except FitError as e:
        return patches, {"left_out": str(e)}
    except MemoryExhaustedError:
        return patches, {"left_out": f"{replay.device} has no memory left to tune the patch"}
    return found.patches, found.record


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
