"""Calibration text sampled from the model itself, so that no data is needed at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING

import torch

from isingcut.console.progress import Progress, silent
from isingcut.data.encoder import Encoder
from isingcut.data.generation import finite_logits, only
from isingcut.data.tokens import distinct
from isingcut.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ROWS = 32
_ATTEMPTS = 4


def generated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    counts: Mapping[str, int],
    length: int,
    seed: int,
    progress: Progress = silent,
) -> dict[str, list[list[int]]]:
    """Distinct samples of exactly ``length`` tokens per split, at temperature 1 from BOS.

    Sampling goes on past an end-of-sequence token, as packed text does. The samples form one
    sequence, which depends on the model and the seed only; the splits take theirs from it in
    the order of ``counts``. Cost: ``length`` cached decoding steps per 32 samples.

    Raises:
        CalibrationError: the tokenizer has no token to start from, or the model repeats itself.
    """
    start = tokenizer.bos_token_id
    if start is None:
        start = tokenizer.eos_token_id
    if start is None:
        raise CalibrationError(
            "the source 'self' needs a tokenizer with a beginning or end token; choose another "
            "--calibration"
        )
    Encoder(tokenizer, model).checked([start])
    needed = sum(counts.values())
    batches = -(-needed // _ROWS)
    with progress("sampling text from the model", batches) as bar:

        def sampled() -> Iterator[list[int]]:
            for batch in range(_ATTEMPTS * batches):
                yield from _sampled(model, start, length, seed * 1_000_003 + batch)
                bar.advance(1)

        stream = distinct(sampled())
        rows = {name: list(islice(stream, count)) for name, count in counts.items()}
    found = sum(map(len, rows.values()))
    if found < needed:
        raise CalibrationError(
            f"the model repeats itself: sampling it gave {found} different samples of {length} "
            f"tokens, {needed} are needed; raise --length or choose another --calibration"
        )
    return rows


@torch.no_grad()
def _sampled(model: PreTrainedModel, start: int, length: int, seed: int) -> list[list[int]]:
    """One batch of samples."""
    prompt = torch.full((_ROWS, 1), start, dtype=torch.int64, device=model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    with only(model, pad_token_id=start, **sampling) as generative, torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        out = generative.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=length - 1,
            logits_processor=finite_logits(model),
        )
    rows: list[list[int]] = out.cpu().tolist()
    return rows
