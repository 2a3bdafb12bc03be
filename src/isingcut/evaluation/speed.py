"""Measure prefill and decode speed of two models."""

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from isingcut.data.generation import decode_tokens
from isingcut.data.tokens import TokenSet
from isingcut.errors import ModelError
from isingcut.models.device import synchronise
from isingcut.models.placement import devices_of

DECODED = 16
"""Tokens of the text that decoding is timed after, unless a budget names another number."""
# A speed test begins no further round after this time.
_SECONDS = 60.0
# Standard error of a median over that of a mean, for normal errors: sqrt(pi / 2).
_MEDIAN_ERROR = 1.2533

PREFILL = "prefill_tokens_per_second"
DECODE = "decode_tokens_per_second"
SPEED_KEYS = (PREFILL, DECODE)
"""The keys that are missing in an evaluation without speed."""


@torch.no_grad()
def speed(
    models: Mapping[str, PreTrainedModel],
    sample: TokenSet,
    decoded: int = 0,
    *,
    new_tokens: int = 32,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float | None]]:
    """Measure prefill and decode tokens/s of each model, with errors (``_se``).

    The batch size is 1, whose decoding on a GPU mostly waits for the launches of kernels.

    Models alternate in every repeat, so that other load on the machine affects all of them. Each
    model is warmed up once. Figures are medians over the repeats, with the standard error of a
    median (normal errors assumed). Decoding is the time of ``new_tokens`` greedy steps with a cache
    after a prompt, without the prompt's time.

    Args:
        sample: its first row, unpadded, is the text for prefill.
        decoded: tokens of that prompt, the first row as often as needed; 0: `DECODED`.
        repeats: timed rounds; no further one begins after a minute.
        clock: function that returns the time in seconds.
    """
    ids = sample.input_ids[:1, : int(sample.mask[0].sum())]
    length = decoded or DECODED
    prompt = ids.repeat(1, -(-length // ids.shape[1]))[:, :length]

    def time_call(
        model: PreTrainedModel, work: Callable[..., object], *arguments: Any
    ) -> float:
        synchronise(*devices_of(model))
        began = clock()
        work(*arguments)
        synchronise(*devices_of(model))
        return clock() - began

    tokens = {PREFILL: ids.shape[1], DECODE: new_tokens}
    times = {name: {key: list[float]() for key in tokens} for name in models}
    last = time.monotonic() + _SECONDS
    for done in range(repeats + 1):
        if done and time.monotonic() > last:
            break
        for name, model in models.items():
            text = ids.to(model.device)
            start = prompt.to(model.device)
            reading = time_call(model, partial(model, input_ids=text, use_cache=True))
            first = time_call(model, decode_tokens, model, start, 1)
            whole = time_call(model, decode_tokens, model, start, 1 + new_tokens)
            times[name][PREFILL].append(reading)
            times[name][DECODE].append(whole - first)
    # The first round is the warm-up, if there is another.
    return {
        name: {
            k: v
            for key, taken in own.items()
            for k, v in _rate(
                models[name], key, tokens[key], taken[1:] or taken
            ).items()
        }
        for name, own in times.items()
    }


@torch.no_grad()
def time_decoding(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    decoded: int,
    *,
    new_tokens: int = 32,
) -> tuple[list[float], float]:
    """Return the seconds of each block in a decoding step, and those of the whole step.

    Figures are medians over the steps.

    Args:
        model: the model to generate with.
        decoded: tokens of the text before.
    """
    marks: list[list[float]] = [[] for _ in (*blocks, model)]

    def mark(i: int) -> Callable[..., None]:
        def read_clock(*_: Any) -> None:
            synchronise(*devices_of(model))
            marks[i].append(time.perf_counter())

        return read_clock

    with contextlib.ExitStack() as hooks:
        for i, block in enumerate(blocks):
            hooks.enter_context(block.register_forward_pre_hook(mark(i)))
            hooks.enter_context(block.register_forward_hook(mark(i)))
        hooks.enter_context(model.register_forward_pre_hook(mark(-1)))
        prompt = torch.ones(1, decoded, dtype=torch.long, device=model.device)
        decode_tokens(model, prompt, 1 + new_tokens)
    # The first pass reads the text.
    each = [float(np.median(np.diff(own)[2::2])) for own in marks[:-1]]
    return each, float(np.median(np.diff(marks[-1])[1:]))


def _rate(
    model: PreTrainedModel, key: str, tokens: int, seconds: list[float]
) -> dict[str, float | None]:
    """Return the tokens per second of the median repeat, and their standard error (relatively, that
    of the seconds)."""
    middle = statistics.median(seconds)
    if middle <= 0:
        raise ModelError(
            f"{key} of {model.name_or_path} was measured as {tokens} tokens in {middle:g} s; the "
            "clock is too coarse or the machine too busy: run again"
        )
    error = None
    if len(seconds) > 1:
        error = (
            _MEDIAN_ERROR
            * statistics.stdev(seconds)
            / len(seconds) ** 0.5
            * tokens
            / middle**2
        )
    return {key: tokens / middle, f"{key}_se": error}
