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
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isingcut.data.tokens import TokenSet
from isingcut.errors import FitError, one_line
from isingcut.files.cuts import PatchedCut, PatchTuning, TunedLayer
from isingcut.healing.job import Job
from isingcut.healing.patch.files import (
    Patch,
    StoredLayers,
    apply_patches,
    find_obstacle,
    runs,
)
from isingcut.healing.patch.layers import list_linear_layers
from isingcut.healing.repairs.base import Repaired
from isingcut.healing.repairs.linear import Linear
from isingcut.measure.splitting import attempt, bytes_of_backward, fewer_tokens_to_fit
from isingcut.measure.streams import Kept, SampleStreams
from isingcut.memory import raise_if_exhausted
from isingcut.models.compute.divergence import divergence
from isingcut.models.compute.head import (
    select_predictions,
    split_predictions,
    sum_losses,
)
from isingcut.models.device import allowance, least_left, synchronise
from isingcut.models.replay import Recording, Replay

__all__ = ["Tuned"]

HELD_OUT_EVERY = 8
LEAST_SAMPLES = 4
SHARES = (1.0, 0.5, 0.25)
"""Shares of the free memory that tuning uses, each after the one before was too large."""
STEP_TOKENS = 512
"""Approximate predictions per optimiser step; at least one sample."""
BYTES = 18
"""Memory per tuned parameter, in bytes, where it is optimised: weight, gradient and two moments in
float32, and the model's copy in bfloat16, or on the host a gradient that arrived."""
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
        limit = job.teacher.replay.limit
        why = f"{limit.device} is out of memory for tuning the patch"
        shares: tuple[float, ...] = SHARES
        try:
            if job.teacher.streamed:
                raise FitError(
                    "the model is streamed from disk, but tuning needs it in memory"
                )
            samples = split_samples(tokens)
            tokens = samples[0]
        except FitError as e:
            why = str(e)
            shares = ()
        linear = Linear().patch(job, tokens, layers, kept)
        longest = tokens.input_ids.shape[1]
        # On a card a whole step at a time, so that gradients are moved once.
        most = STEP_TOKENS if limit.device.type == "cpu" else 2 * STEP_TOKENS
        for share in shares:

            def tune_with(count: int, share: float = share) -> Any:
                given = (job, samples, linear, layers)
                return tune(*given, at_a_time=count, share=share)

            fewer = partial(fewer_tokens_to_fit, limit, most, longest, tune_with)
            try:
                made = attempt(fewer, True)
            except FitError as e:
                why = str(e)
                break
            if made is not None:
                patches, linear.record.tuning = made
                return Repaired(patches, linear.record)
            limit.release()
        linear.record.tuning = PatchTuning(left_out=why)
        return linear


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
    samples: tuple[TokenSet, TokenSet],
    linear: Repaired,
    stored: StoredLayers | None = None,
    *,
    at_a_time: int = STEP_TOKENS,
    share: float = 1.0,
) -> tuple[list[Patch], PatchTuning]:
    """Tune fitted patches on the loss.

    Cost: the original's blocks after the last cut, and one forward and backward pass of the patched
    model from the first cut on. Memory: on the device a copy of the layers, a gradient, the hidden
    states of all tokens twice, and the activations of one micro-batch; and there or on the host
    `BYTES` per tuned number. If memory does not suffice for all linear layers, those whose output
    is as wide as the stream come first.

    Args:
        job: the cut; its original model must be in memory.
        samples: those for tuning and those for validation, not used for the patches either,
            as from `split_samples`.
        linear: the fitted patches of this state.
        stored: the checkpoint to write the layers to; None: any layer may be tuned.
        at_a_time: tokens per micro-batch; changes results by rounding only.
        share: share of the free memory to use.

    Returns:
        the patches of all changed layers; and the record of the tuning.

    Raises:
        FitError: too little memory, no layer to tune, or the model cannot be differentiated.
    """
    tokens, held_out = samples
    replay = job.teacher.replay
    removed = job.removed.blocks
    neighbours = {b for a, z in runs(removed) for b in (a - 1, z + 1)}
    adjacent = sorted(neighbours & {*range(len(replay))} - {*removed})
    # Rather fewer tokens at a time than fewer layers, but at least the longest sample.
    each = bytes_of_backward(replay)
    wanted = sum(p.nbytes for i in adjacent for p in replay.blocks[i].parameters())
    wanted += 2 * replay.bytes_per_token * tokens.tokens
    room = share * least_left(replay.places) - wanted
    batch_tokens = job.config.batch_tokens
    at_a_time = min(at_a_time, batch_tokens, int(room // each))
    at_a_time = max(at_a_time, tokens.input_ids.shape[1])
    groups = tokens.batches(min(batch_tokens, STEP_TOKENS))
    steps = min(len(groups), max(1, round(tokens.tokens / STEP_TOKENS)))
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))
    texts = (
        torch.cat([groups[i].index for i in order[taken::steps]])
        for taken in range(steps)
    )
    splits = [_split(tokens, rows, at_a_time) for rows in texts]
    # Without a gradient, more tokens take no more memory.
    validated = held_out.batches(batch_tokens)
    # Not inference mode, because the recording takes part in the backward pass.
    count = len(validated) + sum(map(len, splits))
    with torch.no_grad(), job.progress("reading the text of the patch", count) as bar:

        def read(batch: TokenSet, known: SampleStreams | None) -> _Batch:
            bar.advance(1)
            return _Batch.read(replay, batch, removed, adjacent[0], known)

        train = [[read(batch, linear.original) for batch in split] for split in splits]
        validation = [read(batch, None) for batch in validated]
        listed = _list_layers(train[0][0], adjacent)
    fitted = {(p.block, p.path): p for p in linear.patches}
    # A tuned float8 layer would be stored as bfloat16, so tune it only if it is patched already.
    usable = [
        one
        for one in listed
        if (one[:2] in fitted or stored is None or not stored.float8(*one[:2]))
        and not find_obstacle(replay, stored, *one[:3])
    ]
    layers = choose_layers(usable, at_a_time * each, share)
    tuned = {layer[:2]: _copy_layer(*layer, fitted.get(layer[:2])) for layer in layers}
    weights = [(own, used.parameters["weight"]) for own, used in tuned.values()]
    sent = dict[Any, Tensor]()
    for own, used in weights:
        used.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            partial(_collect, own, sent)
        )
    suffix = sorted({*range(adjacent[0], len(replay))} - {*removed})
    rate = RATE * min(1.0, WIDTH / train[0][0].entered.shape[-1])
    rates = [
        {"params": [own], "lr": rate * float(own.detach().square().mean().sqrt())}
        for own, _ in weights
    ]
    optimiser = torch.optim.AdamW(
        rates, lr=rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )

    def factor(taken: int) -> float:
        """Return the share of the learning rate: four warm-up steps, and a cosine."""
        return min(1.0, (taken + 1) / 4) * (
            0.5 + 0.5 * math.cos(math.pi * taken / steps)
        )

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    with (
        apply_patches(replay, [used for _, used in tuned.values()]),
        job.progress("tuning the patch", steps) as bar,
    ):
        kl = [_measure_kl(validation, suffix)]
        for batches in train:
            for batch in batches:
                batch.backward(suffix)
                if sent:
                    synchronise(*replay.places)
                for own, gradient in sent.items():
                    _add(own, gradient)
            optimiser.step()
            schedule.step()
            with torch.no_grad():
                for own, used in weights:
                    # From the pinned memory that the gradient came in.
                    used.copy_(sent.get(own, own).copy_(own), non_blocking=True)
            optimiser.zero_grad()
            bar.advance(1)
        kl.append(_measure_kl(validation, suffix))
    if not kl[1] < kl[0]:
        tuned = {}
    record = PatchTuning(
        layers=[TunedLayer(block=block, layer=path) for block, path in tuned],
        of=len(usable) if len(layers) < len(usable) else 0,
        steps=steps,
        predictions=tokens.tokens,
        held_out_predictions=held_out.tokens,
        held_out_kl=kl,
    )
    patches = [p for p in linear.patches if (p.block, p.path) not in tuned]
    for own, patch in tuned.values():
        patch.parameters["weight"] = own.detach().cpu()
        patches.append(patch)
    return patches, record


def choose_layers(
    layers: Sequence[tuple[int, str, Any, bool]], beside: int, share: float = 1.0
) -> list[tuple[int, str, Any, torch.device]]:
    """Return the layers that memory suffices for, those as wide as the stream first, each with the
    place of its optimiser's state: its device if there is room beside all copies, else the host.

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
    weights = [module.weight for _, _, module, _ in layers]
    beside += max(weight.nbytes for weight in weights)
    host = torch.device("cpu")
    room = {
        home: share * allowance("", home).left - beside
        for home in {weight.device for weight in weights}
    }
    room[host] = share * allowance("", host).left
    spare = room.copy()
    for weight in weights:
        spare[weight.device] -= weight.nbytes
    chosen = []
    for layer in sorted(layers, key=lambda one: not one[3]):
        weight = layer[2].weight
        state = BYTES * weight.numel()
        home = weight.device
        place = home if state <= spare[home] else host
        needed = {home: weight.nbytes, place: state}
        short = [device for device, size in needed.items() if size > room[device]]
        if not short:
            chosen.append((*layer[:3], place))
            spare[place] -= state
            for device, size in needed.items():
                room[device] -= size
    if not chosen:
        place = short[-1]
        raise FitError(
            f"tuning a layer needs {needed[place] / 1e9:.1f} GB of "
            f"{'host memory' if place == host else place}, but {room[place] / 1e9:.1f} GB are free"
        )
    return chosen


def _copy_layer(
    block: int, path: str, module: Any, place: torch.device, fitted: Patch | None
) -> tuple[nn.Parameter, Patch]:
    """Return the float32 weight of a layer on ``place``, which the optimiser updates, and a patch
    with a copy in the layer's dtype on its device, which the model uses."""
    start = dict(module.named_parameters(recurse=False))
    start |= fitted.parameters if fitted else {}
    start = {name: value.detach().cpu() for name, value in start.items()}
    weight = nn.Parameter(start["weight"].to(place, torch.float32, copy=True))
    copy = nn.Parameter(weight.detach().to(module.weight))
    record = fitted.record if fitted else PatchedCut(block=block, layer=path)
    return weight, Patch(block, path, {**start, "weight": copy}, record)


def _collect(weight: Any, sent: dict[Any, Tensor], used: Any) -> None:
    """Add the gradient of one micro-batch from a copy to its weight, or send it to the host."""
    # At once, so that the device never has the gradients of all layers; to pinned memory.
    gradient = used.grad.to(weight.device, non_blocking=True)
    used.grad = None
    if weight.device == used.device:
        _add(weight, gradient)
    else:
        sent[weight] = gradient


def _add(weight: Any, gradient: Tensor) -> None:
    """Add the gradient of one micro-batch to those before."""
    if weight.grad is None:
        weight.grad = gradient.float()
    else:
        weight.grad += gradient


def _split(tokens: TokenSet, rows: Tensor, at_a_time: int) -> list[TokenSet]:
    """Return some samples in micro-batches, with their rows in ``tokens``."""
    text = tokens.select(rows)
    batches = [text] if text.positions <= at_a_time else text.batches(at_a_time)
    return [replace(batch, index=rows[batch.index]) for batch in batches]


def _list_layers(
    batch: _Batch, adjacent: Sequence[int]
) -> list[tuple[int, str, Any, bool]]:
    """List the linear layers of the blocks ``adjacent`` to cuts, in the form of `choose_layers`."""
    linear = list[tuple[int, str, Any, bool]]()
    call = batch.call
    stream = batch.entered
    width = stream.shape[-1]
    for i in range(adjacent[0], adjacent[-1] + 1):
        layers = list_linear_layers(call, i, stream)[0] if i in adjacent else ()
        linear += [(i, path, m, out.shape[-1] == width) for path, m, out in layers]
        stream = call.block(i, stream)
    return linear


@dataclass(frozen=True, eq=False)
class _Batch:
    """A micro-batch, with its data that is constant during tuning.

    Attributes:
        tokens: its samples.
        call: the recorded calls of the blocks.
        entered: hidden states before the first tuned block.
        left: the original's hidden states after its last block.
    """

    tokens: TokenSet
    call: Recording
    entered: Tensor
    left: Tensor

    @classmethod
    def read(
        cls,
        replay: Replay,
        tokens: TokenSet,
        removed: Sequence[int],
        first: int,
        known: SampleStreams | None,
    ) -> _Batch:
        """Run the original, from the last of its ``known`` hidden states on.

        Args:
            tokens: with the rows of ``known`` as `index`.
            first: the first tuned block.
        """
        call = replay.record(tokens.input_ids)
        stream = entered = call.entered
        start = 0
        if known:
            rows = tokens.index.tolist()
            width = entered.shape[1]
            before, start = known.blocks
            entered = known.of(before, rows, width).to(replay.places[before])
            stream = known.of(start, rows, width).to(replay.places[start - 1])
        for i in range(start, len(replay)):
            # If block 0 is removed, all blocks before the first tuned one are.
            if i == first and 0 not in removed:
                entered = stream
            stream = call.block(i, stream)
        return cls(tokens, call, entered, stream)

    def backward(self, suffix: Sequence[int]) -> None:
        """Add the gradient to the layers' gradients."""
        try:
            left, end = self.logits(suffix)
            losses = []
            for student, rows in zip(end, self.tokens.predicted, strict=True):
                with torch.no_grad():
                    target = select_predictions(next(left), rows)
                losses.append(divergence(select_predictions(student, rows), target))
            loss = sum(losses[1:], losses[0]) / STEP_TOKENS
            loss.backward()  # type: ignore[no-untyped-call]
        except (NotImplementedError, RuntimeError) as e:
            raise_if_exhausted(e)
            raise FitError(f"the model cannot be differentiated: {one_line(e)}") from e

    def logits(self, suffix: Sequence[int]) -> list[Iterator[Tensor]]:
        """Return iterators over the samples' logits (T, V), of the original and of the patched."""
        stream = self.entered
        for i in suffix:
            stream = self.call.block(i, stream)
        numbers = range(len(stream))
        return [
            map(self.call.logits, streams, numbers) for streams in (self.left, stream)
        ]


@torch.no_grad()
def _measure_kl(batches: Sequence[_Batch], suffix: Sequence[int]) -> float:
    """Return KL(original || patched), nats per prediction."""
    total = 0.0
    for batch in batches:
        before, after = (
            split_predictions(one, batch.tokens) for one in batch.logits(suffix)
        )
        total += float(sum_losses(before, after, batch.tokens)[2].sum())
    return total / sum(batch.tokens.tokens for batch in batches)
