"""Patch a checkpoint: fit a map at each cut, tune the layers beside it, write and verify.

Tuning takes a few steps on the loss itself, for the layers beside each cut.
Least squares at a cut brings the residual stream as near to the original's as one layer can, and
knows nothing of what the rest of the model makes of the error that is left. So the linear layers of
the blocks before and behind each cut go on from there, for

    the mean over predictions of KL(original || patched), nats,

by AdamW with steps relative to each layer's own size. The blocks before the first of them are run
once; gradients end there. One sample in eight is held out: the weights of the lowest divergence on
those are kept, which may be the ones that tuning began with. The maps that it begins with must not
have seen them either: a map of a wide layer knows what it was fitted to nearly by heart.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from isingcut.data.tokens import TokenSet
from isingcut.errors import ArchitectureError, FitError, MemoryExhaustedError
from isingcut.files.documents import (
    CutProof,
    PatchedCut,
    PatchRecord,
    PatchTuning,
    TunedLayer,
    UnpatchedCut,
)
from isingcut.healing.job import Job
from isingcut.healing.patch.files import (
    Patch,
    StoredLayers,
    apply_patches,
    find_obstacle,
    runs,
    write_patched,
)
from isingcut.healing.patch.layers import list_linear_layers, list_writers
from isingcut.healing.patch.linear import Fitted, fit_patches
from isingcut.measure.splitting import fewer_tokens_to_fit
from isingcut.measure.work import Work
from isingcut.memory import convert_memory_errors, raise_if_exhausted
from isingcut.models.architectures.blocks import find_stack, stack_modules
from isingcut.models.compute.divergence import divergence
from isingcut.models.cutting.verify import verify, verify_streamed
from isingcut.models.device import allowance
from isingcut.models.loading import one_line
from isingcut.models.replay import Recording, Replay

CANNOT = (ArchitectureError, FitError)
"""Why a patch is left out where no option names it: the model, or too little text or memory."""
HELD_OUT_EVERY = 8
LEAST_SAMPLES = 4
EPOCHS = 2
STEP_TOKENS = 2048
"""Predictions of an optimiser step, about."""
BYTES = 20
"""Host memory for a number that is tuned: itself, its gradient, two moments, the best so far."""
RATE, WIDTH = 0.004, 576
"""The highest change of a weight in one step, over the root mean square of its layer's weights, in
a model whose stream is so wide; in wider ones it is less, since more of them change at once."""


def patch_checkpoint(job: Job, out: Path) -> PatchRecord:
    """Fit on the job's first `patch_tokens` tokens, write ``out`` and verify it.

    Raises:
        ArchitectureError, FitError: as `fit_patches`; nothing was written.
    """
    model = job.teacher.model
    stack = find_stack(model)
    replay = job.replay or Replay(model, stack_modules(model, stack))
    tokens = _first(job.tokens, job.config.patch_tokens)
    work = Work(job.config.batch_tokens, job.progress)
    layers = StoredLayers(job.start, job.removed)
    held_out, why = None, ""
    if job.config.tunes:
        try:
            if job.replay is not None:
                raise FitError("the model is streamed from disk, and tuning needs it whole")
            tokens, held_out = split_samples(tokens)
        except FitError as e:
            why = str(e)

    def fit_with(count: int) -> Fitted:
        work = Work(count, job.progress)
        return fit_patches(replay, stack.kinds, tokens, job.removed, work, layers)

    def tune_with(count: int) -> tuple[list[Patch], PatchTuning]:
        given = (job.removed, fitted.patches, work, layers)
        assert held_out is not None
        return tune(replay, tokens, held_out, *given, at_a_time=count)

    longest = int(tokens.mask.sum(1).max())
    fitted = fewer_tokens_to_fit(replay.limit, job.config.batch_tokens, longest, fit_with)
    patches, tuning = fitted.patches, None
    if held_out is not None:
        try:
            with convert_memory_errors():
                patches, tuning = fewer_tokens_to_fit(replay.limit, STEP_TOKENS, longest, tune_with)
        except FitError as e:
            why = str(e)
        except MemoryExhaustedError:
            why = f"{replay.device} has no memory left to tune the patch"
    if why:
        tuning = PatchTuning(left_out=why)
    stored = write_patched(layers, patches, out)
    trust = job.config.trust_remote_code
    with apply_patches(replay.blocks, stored):
        if job.replay is None:
            proof = verify(model, job.removed, out, trust_remote_code=trust)
        else:
            proof = verify_streamed(job.replay, job.removed, out, trust_remote_code=trust)
    return PatchRecord(
        maps=fitted.maps,
        changed=any(p.record.changed for p in stored),
        cuts=[p.record for p in fitted.patches],
        tuning=tuning,
        unpatched=fitted.unpatched,
        proof=CutProof(**proof.record),
    )


def unpatched(removed: Sequence[int], why: Exception) -> PatchRecord:
    """The record of a patch that no cut of a state could take."""
    reasons = [UnpatchedCut(removed=list(ends), reason=str(why)) for ends in runs(removed)]
    return PatchRecord(cuts=[], changed=False, unpatched=reasons)


def _first(tokens: TokenSet, most: int) -> TokenSet:
    """The first samples, two at least, of about ``most`` tokens together."""
    seen = tokens.mask.sum(1).cumsum(0)
    rows = max(2, int((seen < most).sum()) + 1)
    return tokens.select(range(min(rows, tokens.samples)))


def split_samples(tokens: TokenSet) -> tuple[TokenSet, TokenSet]:
    """What patches are fitted to and tuned on, and what is held out.

    Raises:
        FitError: too few samples.
    """
    if tokens.samples < LEAST_SAMPLES:
        raise FitError(
            f"tuning a patch needs {LEAST_SAMPLES} samples or more, one of them held out; "
            f"there are {tokens.samples}"
        )
    every = min(HELD_OUT_EVERY, tokens.samples)
    held = torch.arange(tokens.samples) % every == every - 1
    return tokens.select((~held).nonzero()[:, 0]), tokens.select(held.nonzero()[:, 0])


def tune(
    replay: Replay,
    tokens: TokenSet,
    held_out: TokenSet,
    removed: Sequence[int],
    patches: Sequence[Patch],
    work: Work,
    stored: StoredLayers | None = None,
    *,
    at_a_time: int = STEP_TOKENS,
) -> tuple[list[Patch], PatchTuning]:
    """Go on from fitted patches.

    Cost: one pass of the original over the tokens, and `EPOCHS` forward and backward passes of the
    patched model from the first cut on. Memory: `BYTES` of the host for each number that is tuned,
    of the device a copy of the layers, its gradient, the streams of all tokens twice, and the
    activations of one micro-batch. Where not all linear layers fit the host, those that write to
    the stream are tuned alone.

    Args:
        replay: the original model, in memory.
        tokens: that layers are tuned on.
        held_out: that neither they nor the patches have seen.
        removed: the blocks that go.
        patches: fitted to the cuts of this state.
        stored: the checkpoint that they must be written to; None: any layer will do.
        at_a_time: tokens that are computed at a time; it changes rounding alone.

    Returns:
        all layers that are not the original's now; and what was done and won.

    Raises:
        FitError: too little memory, or the model cannot be differentiated.
    """
    train, held = (
        _Text(part, min(work.batch_tokens, STEP_TOKENS), at_a_time) for part in (tokens, held_out)
    )
    beside = [b for a, z in runs(removed) for b in (a - 1, z + 1) if 0 <= b < len(replay)]
    beside = sorted(set(beside) - set(removed))
    # Not inference mode: what is recorded takes part in the backward pass.
    with torch.no_grad():
        found = train.read(replay, beside, removed)
        held.read(replay, beside, removed)
    fitted = {(p.block, p.path): p for p in patches}
    # What is stored as float8 would become bfloat16: only where a map has made it so already.
    found = [
        one
        for one in found
        if one[:2] in fitted or stored is None or not stored.float8(one[0], one[1])
    ]
    layers = _that_fit([one for one in found if not find_obstacle(replay, stored, *one[:3])])
    tuned = {(b, path): _Layer(module, fitted.get((b, path))) for b, path, module in layers}
    suffix = [i for i in range(beside[0], len(replay)) if i not in set(removed)]
    parts = min(len(train.groups), max(1, round(train.predictions / STEP_TOKENS)))
    steps = EPOCHS * parts
    rates = [{"params": [layer.weight], "size": layer.size} for layer in tuned.values()]
    rate = RATE * min(1.0, WIDTH / train.entered[0].shape[-1])
    optimiser = torch.optim.AdamW(rates, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    kl: list[float] = []
    best: dict[tuple[int, str], Tensor] = {}
    with _in_place(tuned.values()), work.progress("tuning the patch", steps) as bar:
        kl.append(held.divergence(suffix))
        for taken in range(steps):
            epoch, at = divmod(taken, parts)
            for group in optimiser.param_groups:
                group["lr"] = rate * group["size"] * _share(taken, steps)
            for batch in train.part(epoch, at, parts):
                train.backward(batch, suffix)
                for layer in tuned.values():
                    layer.collect()
            optimiser.step()
            for layer in tuned.values():
                layer.place()
            optimiser.zero_grad()
            bar.advance(1)
            if at == parts - 1:
                kl.append(held.divergence(suffix))
                if kl[-1] == min(kl):
                    best = {key: layer.weight.detach().clone() for key, layer in tuned.items()}
    record = PatchTuning(
        layers=[TunedLayer(block=block, layer=path) for block, path in best],
        steps=steps,
        predictions=EPOCHS * train.predictions,
        held_out_predictions=held.predictions,
        held_out_kl=kl,
    )
    new = [tuned[key].patch(key, weight) for key, weight in best.items()]
    return [p for p in patches if (p.block, p.path) not in best] + new, record


def _that_fit(layers: Sequence[tuple[int, str, Any, bool]]) -> list[tuple[int, str, Any]]:
    """All layers, or those that write to the stream, as far as host memory goes.

    Args:
        layers: block, path, module, and whether it is as wide as the stream.
    """
    room = allowance("", torch.device("cpu")).left
    for wanted in (layers, [one for one in layers if one[3]]):
        needed = BYTES * sum(module.weight.numel() for _, _, module, _ in wanted)
        if wanted and needed <= room:
            return [(block, path, module) for block, path, module, _ in wanted]
    if not layers:
        raise FitError("the blocks beside the cuts have no linear layer that can be tuned")
    raise FitError(
        f"tuning a patch needs {needed / 1e9:.1f} GB of host memory, and {room / 1e9:.1f} GB are "
        "left"
    )


class _Layer:
    """A layer whose weights are tuned: in float32 on the CPU, with a copy that the model uses.

    Attributes:
        weight: what the optimiser steps.
        used: its copy in the layer's dtype on the layer's device; itself where that is the same.
    """

    def __init__(self, module: Any, fitted: Patch | None) -> None:
        self.module, self.fitted = module, fitted
        own: Tensor = module.weight
        start = own if fitted is None else fitted.weight
        self.weight = nn.Parameter(start.detach().float().cpu().clone())
        self.used: Tensor = self.weight
        if (own.device, own.dtype) != (self.weight.device, self.weight.dtype):
            self.used = self.weight.detach().to(own).requires_grad_(True)
        bias = module.bias if fitted is None or fitted.bias is None else fitted.bias
        self.bias = None if bias is None else bias.detach().to(own.device)
        self.size = float(self.weight.detach().square().mean().sqrt())

    def forward(self, x: Tensor) -> Tensor:
        weight = self.used.to(x.dtype)
        if not isinstance(self.module, nn.Linear):
            weight = weight.T
        return linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))

    def collect(self) -> None:
        """Add the gradient of one micro-batch."""
        if self.used is self.weight or self.used.grad is None:
            return
        gradient = self.used.grad.cpu().float()
        self.used.grad = None
        self.weight.grad = gradient if self.weight.grad is None else self.weight.grad + gradient

    @torch.no_grad()
    def place(self) -> None:
        """Let the model use the weights as they are now."""
        if self.used is not self.weight:
            self.used.copy_(self.weight)

    def patch(self, key: tuple[int, str], weight: Tensor) -> Patch:
        bias = None if self.bias is None else self.bias.cpu()
        record = PatchedCut(block=key[0], layer=key[1])
        return Patch(*key, weight, bias, record if self.fitted is None else self.fitted.record)


class _Text:
    """Batches, and what of them does not change while layers are tuned.

    Attributes:
        batches: that are computed at a time.
        groups: the batches whose gradients are formed together, whatever is computed at a time.
        calls: how the blocks are called.
        entered: the streams that enter the first tuned block.
        left: the original's streams behind its last block.
    """

    def __init__(self, tokens: TokenSet, batch_tokens: int, at_a_time: int) -> None:
        self.batches, self.groups = list[TokenSet](), list[range]()
        self.calls, self.entered, self.left = list[Recording](), list[Tensor](), list[Tensor]()
        for together in tokens.batches(batch_tokens):
            few = [together]
            if together.input_ids.numel() > at_a_time:
                few = together.batches(at_a_time)
            self.groups.append(range(len(self.batches), len(self.batches) + len(few)))
            self.batches += few

    @property
    def predictions(self) -> int:
        return sum(batch.tokens for batch in self.batches)

    def read(
        self, replay: Replay, beside: Sequence[int], removed: Sequence[int]
    ) -> list[tuple[int, str, Any, bool]]:
        """Run the original.

        Returns:
            the linear layers of the blocks ``beside`` cuts, as `_that_fit` takes them.
        """
        found: list[tuple[int, str, Any, bool]] = []
        for batch in self.batches:
            call = replay.record(batch.input_ids)
            stream = entered = call.entered
            for i in range(len(replay)):
                if i == beside[0] and not any(b < i for b in removed):
                    entered = stream
                if i in beside and batch is self.batches[0]:
                    writes = {p for p, _, _ in list_writers(call, replay.blocks[i], i, stream)}
                    layers = list_linear_layers(call, replay.blocks[i], i, stream)
                    found += [(i, path, m, path in writes) for path, m in layers.items()]
                stream = call.block(i, stream)
            self.calls.append(call)
            self.entered.append(entered)
            self.left.append(stream)
        return found

    def part(self, epoch: int, at: int, parts: int) -> list[int]:
        """The batches of step ``at`` of an epoch, which takes them in an order of its own."""
        order = torch.randperm(
            len(self.groups), generator=torch.Generator().manual_seed(epoch)
        ).tolist()
        return [batch for group in order[at::parts] for batch in self.groups[group]]

    def backward(self, batch: int, suffix: Sequence[int]) -> None:
        """Add the gradient of one batch."""
        try:
            loss = self._summed(batch, suffix) / STEP_TOKENS
            loss.backward()  # type: ignore[no-untyped-call]
        except (NotImplementedError, RuntimeError) as e:
            raise_if_exhausted(e)
            raise FitError(f"the model cannot be differentiated: {one_line(e)}") from e

    def divergence(self, suffix: Sequence[int]) -> float:
        """KL(original || patched), nats a prediction."""
        with torch.no_grad():
            total = sum(float(self._summed(b, suffix)) for b in range(len(self.batches)))
        return total / self.predictions

    def _summed(self, batch: int, suffix: Sequence[int]) -> Tensor:
        tokens, call, stream = self.batches[batch], self.calls[batch], self.entered[batch]
        for i in suffix:
            stream = call.block(i, stream)
        total = torch.zeros((), device=stream.device)
        for s, rows in enumerate(tokens.predicted.to(stream.device)):
            with torch.no_grad():
                target = call.logits(self.left[batch][s], s)[:-1][rows]
            total = total + divergence(call.logits(stream[s], s)[:-1][rows], target)
        return total


def _share(taken: int, steps: int) -> float:
    """Of the highest rate: rising over four steps, then falling as a cosine."""
    return min(1.0, (taken + 1) / 4) * (0.5 + 0.5 * math.cos(math.pi * taken / steps))


@contextlib.contextmanager
def _in_place(layers: Iterable[_Layer]) -> Iterator[None]:
    """The tuned weights in the model while the context lasts."""
    before: list[tuple[dict[str, Any], Callable[..., Any] | None]] = []
    try:
        for layer in layers:
            own = layer.module.__dict__
            before.append((own, own.get("forward")))
            own["forward"] = layer.forward
        yield
    finally:
        for own, forward in before:
            if forward is None:
                del own["forward"]
            else:
                own["forward"] = forward
