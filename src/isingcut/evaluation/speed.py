"""Measure prefill and decode speed of two models."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from isingcut.data.generation import decode_tokens
from isingcut.data.tokens import TokenSet
from isingcut.errors import ModelError
from isingcut.models.device import synchronise
from isingcut.models.placement import devices_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_DECODE_PROMPT = 16
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
    after a short prompt, without the prompt's time.

    Args:
        sample: its first row, unpadded, is the text for prefill.
        repeats: timed rounds.
        clock: function that returns the time in seconds.
    """
    ids = sample.input_ids[:1, : int(sample.mask[0].sum())]

    def time_call(
        model: PreTrainedModel, work: Callable[..., object], *arguments: Any
    ) -> float:
        synchronise(*devices_of(model))
        began = clock()
        work(*arguments)
        synchronise(*devices_of(model))
        return clock() - began

    tokens = {PREFILL: ids.shape[1], DECODE: new_tokens}
    seconds: dict[str, dict[str, list[float]]]
    seconds = {name: {key: [] for key in tokens} for name in models}
    for _ in range(repeats + 1):
        for name, model in models.items():
            text = ids.to(model.device)
            start = text[:, :_DECODE_PROMPT]
            reading = time_call(model, partial(model, input_ids=text, use_cache=True))
            first = time_call(model, decode_tokens, model, start, 1)
            whole = time_call(model, decode_tokens, model, start, 1 + new_tokens)
            seconds[name][PREFILL].append(reading)
            seconds[name][DECODE].append(whole - first)
    # The first round is the warm-up.
    return {
        name: {
            k: v
            for key, taken in own.items()
            for k, v in _rate(models[name], key, tokens[key], taken[1:]).items()
        }
        for name, own in seconds.items()
    }


def _rate(
    model: PreTrainedModel, key: str, tokens: int, seconds: list[float]
) -> dict[str, float | None]:
    """Return the tokens per second of the median repeat, and their standard error (relatively, that
    of the seconds)."""
    middle = statistics.median(seconds)
    if middle <= 0:
        raise ModelError(
            f"{key} of {model.name_or_path} was measured as {tokens} tokens in {middle:g} s; the "
            "clock is too coarse or the machine too busy: run again, or pass --skip-speed"
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
