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
from isingcut.memory import is_memory_exhausted
from isingcut.models.device import synchronise
from isingcut.models.placement import devices_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_DECODE_PROMPT = 16
# Standard error of a median over that of a mean, for normal errors: sqrt(pi / 2).
_MEDIAN_ERROR = 1.2533

BATCH = 32
"""Sequences of the batched decoding."""
PREFILL = "prefill_tokens_per_second"
DECODE = "decode_tokens_per_second"
BATCHED = "batched_decode_tokens_per_second"
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

    The batch size is 1, whose decoding on a GPU mostly waits for the launches of kernels. On a GPU,
    decoding is also measured with `BATCH` sequences, if they fit its memory.

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
    short = ids[:, :_DECODE_PROMPT]

    def time_call(
        model: PreTrainedModel, work: Callable[..., object], *arguments: Any
    ) -> float:
        synchronise(*devices_of(model))
        began = clock()
        work(*arguments)
        synchronise(*devices_of(model))
        return clock() - began

    def time_decoding(model: PreTrainedModel, rows: int) -> float:
        start = short.expand(rows, -1).to(model.device)
        first = time_call(model, decode_tokens, model, start, 1)
        return time_call(model, decode_tokens, model, start, 1 + new_tokens) - first

    tokens = {PREFILL: ids.shape[1], DECODE: new_tokens}
    if all(model.device.type != "cpu" for model in models.values()):
        tokens[BATCHED] = BATCH * new_tokens
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            text = ids.to(model.device)
            reading = time_call(model, partial(model, input_ids=text, use_cache=True))
            times = {PREFILL: reading, DECODE: time_decoding(model, 1)}
            try:
                times |= {
                    k: time_decoding(model, BATCH) for k in tokens if k == BATCHED
                }
            except Exception as error:
                if not is_memory_exhausted(error):
                    raise
                # It is not timed any more.
                del tokens[BATCHED]
            if repeat:
                seconds[name].append(times)
    return {
        name: {
            k: v
            for key, count in tokens.items()
            for k, v in _rate(
                model, key, count, [s[key] for s in seconds[name]]
            ).items()
        }
        for name, model in models.items()
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
