"""`tuned`: fit as `linear`, and tune the layers next to each cut.

Tuning takes a few optimiser steps on the loss itself. The least-squares fit at a cut brings the
residual stream as close to the original's as one layer can, but ignores the effect of the remaining
error on later blocks. So the linear layers of the blocks before and after each cut are trained on

    the mean over predictions of KL(original || patched), nats,

by AdamW with steps relative to each layer's size, for one epoch: twice as many tokens help more
than a second epoch. The blocks before the first tuned one run once; gradients end there. One sample
in eight is for validation: the tuned weights are kept if they lower the KL on these samples. The
maps must not be fitted on them either, because a map of a wide layer nearly memorises its samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isingcut.console.progress import Bar
from isingcut.data.tokens import TokenSet
from isingcut.errors import FitError
from isingcut.files.cuts import PatchedCut, PatchTuning, TunedLayer
from isingcut.formats.libraries import one_line
from isingcut.healing.job import Job
from isingcut.healing.patch.files import (
    Patch,
    StoredLayers,
    apply_patches,
    find_obstacle,
    runs,
)
from isingcut.healing.patch.layers import list_linear_layers
from isingcut.healing.repairs.base import Kept, Repaired
from isingcut.healing.repairs.linear import Linear
from isingcut.measure.splitting import attempt, bytes_of_backward, fewer_tokens_to_fit
from isingcut.memory import raise_if_exhausted
from isingcut.models.compute.divergence import divergence
from isingcut.models.compute.head import (
    select_predictions,
    split_predictions,
    sum_losses,
)
from isingcut.models.device import allowance, least_left
from isingcut.models.replay import Recording, Replay

__all__ = ["Tuned"]

HELD_OUT_EVERY = 8
LEAST_SAMPLES = 4
SHARES = (1.0, 0.5, 0.25)
"""Shares of the free memory that tuning uses, each after the one before was too large."""
STEP_TOKENS = 512
"""Approximate predictions per optimiser step; at least one sample."""
BYTES = 16
"""Host memory per tuned parameter, in bytes: weight, gradient, two moments."""
RATE = 0.003
WIDTH = 576
"""Largest change of a weight per step, relative to the root mean square of its layer's weights, for
a stream of this width; smaller for wider models, where more weights change at once."""


@dataclass(frozen=True)
class Tuned:
    """A least-squares map at each cut, and then the layers next to it tuned."""

    passes: ClassVar[float] = 4.0
    trains: ClassVar[bool] = True

    def patch(
        self,
        job: Job,
        tokens: TokenSet,
        layers: StoredLayers | None = None,
        kept: Kept | None = None,
    ) -> Repaired:
        """Fit as `linear` and tune; where that is impossible, the record of the fit says why."""
        try:
            if job.teacher.streamed:
                raise FitError(
                    "the model is streamed from disk, but tuning needs it in memory"
                )
            tokens, held_out = split_samples(tokens)
        except FitError as e:
            found = Linear().patch(job, tokens, layers, kept)
            found.record.tuning = PatchTuning(left_out=str(e))
            return found
        found = Linear().patch(job, tokens, layers, kept)
        limit = job.teacher.replay.limit
        longest = int(tokens.mask.sum(1).max())

        def tune_with(share: float, count: int) -> Repaired:
            given = (job, tokens, held_out, found.patches, layers)
            patches, found.record.tuning = tune(*given, at_a_time=count, share=share)
            return Repaired(patches, found.record)

        why = f"{limit.device} is out of memory for tuning the patch"
        fewer = partial(fewer_tokens_to_fit, limit)
        for share in SHARES:
            tuning = partial(tune_with, share)
            try:
                made: Repaired | None = attempt(
                    partial(fewer, STEP_TOKENS, longest, tuning), True
                )
            except FitError as e:
                why = str(e)
                break
            if made is not None:
                return made
            limit.release()
        found.record.tuning = PatchTuning(left_out=why)
        return found


def split_samples(tokens: TokenSet) -> tuple[TokenSet, TokenSet]:
    """Split samples into those for fitting and tuning, and those for validation.

    Raises:
        FitError: too few samples.
    """
    if tokens.samples < LEAST_SAMPLES:
        raise FitError(
            f"tuning a patch needs at least {LEAST_SAMPLES} samples, one of them for validation; "
            f"there are {tokens.samples}"
        )
    every = min(HELD_OUT_EVERY, tokens.samples)
    validation = torch.arange(tokens.samples) % every == every - 1
    return tokens.select((~validation).nonzero()[:, 0]), tokens.select(
        validation.nonzero()[:, 0]
    )


def tune(
    job: Job,
    tokens: TokenSet,
    held_out: TokenSet,
    patches: Sequence[Patch],
    stored: StoredLayers | None = None,
    *,
    at_a_time: int = STEP_TOKENS,
    share: float = 1.0,
) -> tuple[list[Patch], PatchTuning]:
    """Tune fitted patches on the loss.

    Cost: one pass of the original over the tokens, and one forward and backward pass of the patched
    model from the first cut on. Memory: `BYTES` of the host per tuned number; on the device
    a copy of the layers, a gradient, the hidden states of all tokens twice, and the activations of
    one micro-batch. If memory does not suffice for all linear layers, those whose output is as
    wide as the stream come first.

    Args:
        job: the cut; its original model must be in memory.
        tokens: the samples for tuning.
        held_out: the validation samples, not used for the patches either.
        patches: the fitted patches of this state.
        stored: the checkpoint to write the layers to; None: any layer may be tuned.
        at_a_time: tokens per micro-batch; changes results by rounding only.
        share: share of the free memory to use.

    Returns:
        the patches of all changed layers; and the record of the tuning.

    Raises:
        FitError: too little memory, no layer to tune, or the model cannot be differentiated.
    """
    replay = job.teacher.replay
    removed = job.removed
    together = min(job.config.batch_tokens, STEP_TOKENS)
    adjacent = [
        b for a, z in runs(removed) for b in (a - 1, z + 1) if 0 <= b < len(replay)
    ]
    adjacent = sorted(set(adjacent) - set(removed))
    # Rather fewer tokens at a time than fewer layers.
    wanted = sum(p.nbytes for i in adjacent for p in replay.blocks[i].parameters())
    wanted += 2 * replay.bytes_per_token * int(tokens.mask.sum())
    room = share * least_left(replay.places) - wanted
    longest = int(tokens.mask.sum(1).max())
    each = bytes_of_backward(replay)
    while at_a_time > longest and at_a_time * each > room:
        at_a_time = max(longest, at_a_time // 2)
    train, validation = (
        _Text(part, together, at_a_time) for part in (tokens, held_out)
    )
    # Not inference mode, because the recording takes part in the backward pass.
    batches = len(train.batches) + len(validation.batches)
    with torch.no_grad(), job.progress("reading the text of the patch", batches) as bar:
        found = train.read(replay, adjacent, removed, bar)
        validation.read(replay, adjacent, removed, bar)
    fitted = {(p.block, p.path): p for p in patches}
    # A tuned float8 layer would be stored as bfloat16, so tune it only if it is patched already.
    found = [
        one
        for one in found
        if one[:2] in fitted or stored is None or not stored.float8(one[0], one[1])
    ]
    found = [one for one in found if not find_obstacle(replay, stored, *one[:3])]
    layers = choose_layers(found, max(at_a_time, longest) * each, share)
    tuned = {
        (b, path): _Layer(module, fitted.get((b, path))) for b, path, module in layers
    }
    suffix = [i for i in range(adjacent[0], len(replay)) if i not in set(removed)]
    steps = min(len(train.groups), max(1, round(train.predictions / STEP_TOKENS)))
    rates = [{"params": [layer.weight], "size": layer.size} for layer in tuned.values()]
    rate = RATE * min(1.0, WIDTH / train.entered[0].shape[-1])
    optimiser = torch.optim.AdamW(rates, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    used = [layer.patch(key, layer.used) for key, layer in tuned.items()]
    with (
        apply_patches(replay.blocks, used),
        job.progress("tuning the patch", steps) as bar,
    ):
        kl = [validation.divergence(suffix)]
        for taken in range(steps):
            # Four warm-up steps, and a cosine.
            share = min(1.0, (taken + 1) / 4) * (
                0.5 + 0.5 * math.cos(math.pi * taken / steps)
            )
            for group in optimiser.param_groups:
                group["lr"] = rate * group["size"] * share
            for batch in train.part(taken, steps):
                train.backward(batch, suffix)
            optimiser.step()
            for layer in tuned.values():
                layer.place()
            optimiser.zero_grad()
            bar.advance(1)
        kl.append(validation.divergence(suffix))
    if not kl[-1] < kl[0]:
        tuned = {}
    record = PatchTuning(
        layers=[TunedLayer(block=block, layer=path) for block, path in tuned],
        of=len(found) if len(layers) < len(found) else 0,
        steps=steps,
        predictions=train.predictions,
        held_out_predictions=validation.predictions,
        held_out_kl=kl,
    )
    new = [layer.patch(key, layer.weight.detach()) for key, layer in tuned.items()]
    return [p for p in patches if (p.block, p.path) not in tuned] + new, record


def choose_layers(
    layers: Sequence[tuple[int, str, Any, bool]], beside: int, share: float = 1.0
) -> list[tuple[int, str, Any]]:
    """Return the layers that memory suffices for; those as wide as the stream come first.

    Args:
        layers: block, path, module, and whether the layer is as wide as the stream.
        beside: bytes of each device for a micro-batch.
        share: share of the free memory to use.

    Raises:
        FitError: there is no layer, or too little memory for any.
    """
    if not layers:
        raise FitError(
            "the blocks next to the cuts have no linear layer that can be tuned"
        )
    # One gradient is on the device at a time.
    beside += max(module.weight.nbytes for _, _, module, _ in layers)
    host = torch.device("cpu")
    homes = {module.weight.device for _, _, module, _ in layers}
    room = {home: share * allowance("", home).left - beside for home in homes}
    room[host] = share * allowance("", host).left
    chosen = set[int]()
    for i, (_, _, module, _) in sorted(
        enumerate(layers), key=lambda one: not one[1][3]
    ):
        needed = {
            module.weight.device: module.weight.nbytes,
            host: BYTES * module.weight.numel(),
        }
        short = [place for place, size in needed.items() if size > room[place]]
        if not short:
            chosen.add(i)
            for place, size in needed.items():
                room[place] -= size
    if not chosen:
        (*_, place) = short
        raise FitError(
            f"tuning a layer needs {needed[place] / 1e9:.1f} GB of "
            f"{'host memory' if place == host else place}, but {room[place] / 1e9:.1f} GB are free"
        )
    return [
        (block, path, module)
        for i, (block, path, module, _) in enumerate(layers)
        if i in chosen
    ]


class _Layer:
    """A layer to tune: float32 weights on the CPU, with a copy for the model.

    Attributes:
        weight: the weight that the optimiser updates.
        used: copy of the weight in the layer's dtype and on its device; may share its memory.
    """

    def __init__(self, module: Any, fitted: Patch | None) -> None:
        self.fitted = fitted
        own: Tensor = module.weight
        start = own if fitted is None else fitted.weight
        self.weight = nn.Parameter(start.detach().cpu().float().clone())
        self.used = nn.Parameter(self.weight.detach().to(own))
        # At once, so that the device never has the gradients of all layers.
        hook = partial(_collect, self.weight)
        self.used.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        bias = module.bias if fitted is None or fitted.bias is None else fitted.bias
        self.bias = None if bias is None else bias.detach().cpu()
        self.size = float(self.weight.detach().square().mean().sqrt())

    @torch.no_grad()
    def place(self) -> None:
        """Copy the current weights to the model."""
        self.used.copy_(self.weight)

    def patch(self, key: tuple[int, str], weight: Tensor) -> Patch:
        record = PatchedCut(block=key[0], layer=key[1])
        return Patch(
            *key,
            weight,
            self.bias,
            record if self.fitted is None else self.fitted.record,
        )


def _collect(weight: Tensor, used: Tensor) -> None:
    """Move the gradient of one micro-batch from a copy to its weight, and add it there."""
    assert used.grad is not None
    gradient = used.grad.cpu().float()
    used.grad = None
    weight.grad = gradient if weight.grad is None else weight.grad + gradient


class _Text:
    """The micro-batches of a text, with their data that is constant during tuning.

    Attributes:
        batches: the micro-batches.
        groups: indices of the micro-batches whose gradients are accumulated together.
        calls: the recorded calls of the blocks.
        entered: hidden states before the first tuned block.
        left: the original's hidden states after its last block.
    """

    def __init__(self, tokens: TokenSet, batch_tokens: int, at_a_time: int) -> None:
        self.batches = list[TokenSet]()
        self.groups = list[range]()
        self.calls = list[Recording]()
        self.entered = list[Tensor]()
        self.left = list[Tensor]()
        for together in tokens.batches(batch_tokens):
            few = together.batches(at_a_time)
            self.groups.append(range(len(self.batches), len(self.batches) + len(few)))
            self.batches += few

    @property
    def predictions(self) -> int:
        return sum(batch.tokens for batch in self.batches)

    def read(
        self, replay: Replay, adjacent: Sequence[int], removed: Sequence[int], bar: Bar
    ) -> list[tuple[int, str, Any, bool]]:
        """Run the original, and record the data that is constant during tuning.

        Returns:
            the linear layers of the blocks ``adjacent`` to cuts, in the form of `choose_layers`.
        """
        found: list[tuple[int, str, Any, bool]] = []
        for batch in self.batches:
            call = replay.record(batch.input_ids)
            stream = entered = call.entered
            for i in range(len(replay)):
                if i == adjacent[0] and not any(b < i for b in removed):
                    entered = stream
                if i in adjacent and batch is self.batches[0]:
                    layers, _ = list_linear_layers(call, i, stream)
                    width = stream.shape[-1]
                    found += [
                        (i, path, m, out.shape[-1] == width) for path, m, out in layers
                    ]
                stream = call.block(i, stream)
            self.calls.append(call)
            self.entered.append(entered)
            self.left.append(stream)
            bar.advance(1)
        return found

    def part(self, at: int, parts: int) -> list[int]:
        """Return the indices of the micro-batches of one step; groups are in random order."""
        order = torch.randperm(
            len(self.groups), generator=torch.Generator().manual_seed(0)
        ).tolist()
        return [batch for group in order[at::parts] for batch in self.groups[group]]

    def backward(self, batch: int, suffix: Sequence[int]) -> None:
        """Add the gradient of one micro-batch to the layers' gradients."""
        try:
            left, end = self._logits(batch, suffix)
            found = []
            for student, rows in zip(end, self.batches[batch].predicted, strict=True):
                with torch.no_grad():
                    target = select_predictions(next(left), rows)
                found.append(divergence(select_predictions(student, rows), target))
            loss = sum(found[1:], found[0]) / STEP_TOKENS
            loss.backward()  # type: ignore[no-untyped-call]
        except (NotImplementedError, RuntimeError) as e:
            raise_if_exhausted(e)
            raise FitError(f"the model cannot be differentiated: {one_line(e)}") from e

    @torch.no_grad()
    def divergence(self, suffix: Sequence[int]) -> float:
        """Return KL(original || patched), nats per prediction."""
        total = 0.0
        for b, batch in enumerate(self.batches):
            before, after = (
                split_predictions(one, batch) for one in self._logits(b, suffix)
            )
            total += float(sum_losses(before, after, batch)[2].sum())
        return total / self.predictions

    def _logits(self, batch: int, suffix: Sequence[int]) -> list[Iterator[Tensor]]:
        """Return iterators over the samples' logits (T, V), of the original and of the patched."""
        call = self.calls[batch]
        stream = self.entered[batch]
        for i in suffix:
            stream = call.block(i, stream)
        numbers = range(len(stream))
        return [
            map(call.logits, streams, numbers) for streams in (self.left[batch], stream)
        ]
