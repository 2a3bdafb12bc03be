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

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isingcut.data.tokens import TokenSet
from isingcut.errors import ArchitectureError, InputError
from isingcut.healing.job import Job
from isingcut.healing.patch.absorb import Write, find_write, observe
from isingcut.healing.patch.files import Patch, applied, runs, write_patched
from isingcut.healing.patch.least_squares import Moments, fit_ridge
from isingcut.measure.work import Work
from isingcut.models.architectures import find_stack, stack_modules
from isingcut.models.cutting.verify import verify
from isingcut.models.replay import Recording, Replay

__all__ = ["LinearPatch"]

_HELD_OUT_EVERY = 4


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
    ) -> list[Patch]:
        """Patches for all cuts of a state; two forward passes over the tokens, without heads.

        Args:
            replay: the original model.
            kinds: what each block does, for messages.
            tokens: every fourth sample is held out to choose the ridge.
            removed: the blocks that go.

        Raises:
            ArchitectureError: a cut whose neighbour cannot absorb a map, with the reason.
            InputError: fewer than two samples.
        """
        if tokens.samples < 2:
            raise InputError("a patch needs at least two samples: one is held out to choose it")
        cuts = runs(removed)
        gone = set(removed)
        batches = tokens.batches(work.batch_tokens)
        with torch.inference_mode():
            recordings = [replay.record(b.input_ids) for b in batches]
            writes = _writes(replay, kinds, recordings[0], cuts)
            # The original's and the patched model's streams, at the block reached so far.
            original = [r.entered for r in recordings]
            patched = list(original)
            found, at = [], 0
            total = len(batches) * (2 * cuts[-1][1] + 2 - len(gone))
            with work.progress(f"fitting a patch, cuts: {len(cuts)}", total) as bar:
                for (first, last), write in zip(cuts, writes, strict=True):
                    p = first - 1
                    for b, recording in enumerate(recordings):
                        for i in range(at, last + 1):
                            original[b] = recording.block(i, original[b])
                        for i in (i for i in range(at, p) if i not in gone):
                            patched[b] = recording.block(i, patched[b])
                        bar.advance(last + 1 - at + sum(i not in gone for i in range(at, p)))
                    patch = self._fit_one(batches, recordings, original, patched, p, last, write)
                    found.append(patch)
                    bar.advance(len(batches))
                    at = last + 1
        return found

    def heal(self, job: Job, out: Path) -> dict[str, Any]:
        """Fit on the job's first `patch_tokens` tokens, write ``out`` and verify it."""
        model = job.teacher.model
        stack = find_stack(model)
        replay = Replay(model, stack_modules(model, stack))
        fit = LinearPatch(reads=job.config.patch_maps == "reads")
        tokens = _first(job.tokens, job.config.patch_tokens)
        work = Work(job.config.batch_tokens, job.progress)
        patches = fit.fit(replay, stack.kinds, tokens, job.removed, work)
        stored = write_patched(job.start, job.removed, patches, out)
        with applied(replay.blocks, stored):
            trust = job.config.trust_remote_code
            proof = verify(model, job.removed, out, trust_remote_code=trust)
        records = [p.record for p in stored]
        return {
            "maps": job.config.patch_maps,
            "changed": any(r["changed"] for r in records),
            "cuts": records,
            "proof": proof.record,
        }

    def _fit_one(
        self,
        batches: Sequence[TokenSet],
        recordings: Sequence[Recording],
        original: list[Tensor],
        patched: list[Tensor],
        p: int,
        last: int,
        write: Write,
    ) -> Patch:
        """Fit one cut; ``patched`` moves on past block p, the patch applied."""
        width, features = write.weight.shape
        size = features + (write.bias is not None) if self.reads else width
        device = original[0].device
        moments = [Moments(size, width, device) for _ in range(2)]
        kept = []
        for b, (batch, recording) in enumerate(zip(batches, recordings, strict=True)):
            output, read, written = observe(recording, p, patched[b], write)
            x = self._features(read, written, write)
            target = original[b].double() - output.double()
            weights = 1 / original[b].double().square().mean(-1).clamp_min(1e-12)
            mask = batch.mask.to(device)
            held = (batch.index % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1).to(device)
            if _few(batches):
                held = (batch.index == 0).to(device)
            for side, rows in zip(
                moments, (mask & ~held[:, None], mask & held[:, None]), strict=True
            ):
                side.add(x[rows], target[rows], weights[rows])
            kept.append((output, x))
        solution = fit_ridge(*moments)
        for b, (output, x) in enumerate(kept):
            patched[b] = (output.double() + x.double() @ solution.map.T).to(output.dtype)
        weight, bias = self._folded(solution.map, write)
        record = {
            "removed": [p + 1, last],
            "block": p,
            "layer": write.path,
            "ridge": solution.strength,
            "held_out_error_left": solution.held_out,
            "tokens": moments[0].rows + moments[1].rows,
        }
        return Patch(p, write.path, weight, bias, record)

    def _features(self, read: Tensor, written: Tensor, write: Write) -> Tensor:
        """Features (B, T, F') of which the change of the block's output is linear."""
        if not self.reads:
            return written
        if write.bias is None:
            return read
        return torch.cat([read, torch.ones_like(read[..., :1])], dim=-1)

    def _folded(self, change: Tensor, write: Write) -> tuple[Tensor, Tensor | None]:
        """The layer's new weight and bias: the change of the stream, undone by the scale."""
        weight, bias = write.weight, write.bias
        if not self.reads:
            # The layer's output v becomes v + map v / s.
            weight = weight + change @ weight / write.scale
            bias = None if bias is None else bias + change @ bias / write.scale
        elif bias is None:
            weight = weight + change / write.scale
        else:
            weight = weight + change[:, :-1] / write.scale
            bias = bias + change[:, -1] / write.scale
        return (weight.T if write.transposed else weight).contiguous(), bias


def _first(tokens: TokenSet, most: int) -> TokenSet:
    """The first samples, two at least, of about ``most`` tokens together."""
    held = tokens.mask.sum(1).cumsum(0)
    rows = max(2, int((held < most).sum()) + 1)
    return tokens.select(range(min(rows, tokens.samples)))


def _few(batches: Sequence[TokenSet]) -> bool:
    """Too few samples for one in four."""
    return sum(b.samples for b in batches) < _HELD_OUT_EVERY


def _writes(
    replay: Replay, kinds: Sequence[str], recording: Recording, cuts: Sequence[tuple[int, int]]
) -> list[Write]:
    """The layer that absorbs each cut's map; refused before anything is fitted."""
    if cuts[0][0] == 0:
        raise ArchitectureError(
            "block 0 is removed, so that nothing stands before the first cut to absorb a patch; "
            "heal by distillation instead, or keep block 0 (--keep 0)"
        )
    stream, found, needed = recording.entered, [], [first - 1 for first, _ in cuts]
    for i in range(max(needed) + 1):
        if i in needed:
            write = find_write(recording, replay.blocks[i], i, stream, kinds[i])
            _refuse_shared(replay, i, write)
            found.append(write)
        stream = recording.block(i, stream)
    return found


def _refuse_shared(replay: Replay, i: int, write: Write) -> None:
    owners = [
        name
        for name, p in replay.model.named_parameters(remove_duplicate=False)
        if p is write.module.weight
    ]
    if len(owners) > 1:
        raise ArchitectureError(
            f"block {i} cannot absorb a patch: its {write.path} is shared with another part of the "
            f"model ({owners[-1]})"
        )
