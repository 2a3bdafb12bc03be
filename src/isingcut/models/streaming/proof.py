"""The proof of a cut when neither the original nor the cut model fits the memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isingcut.errors import CheckpointError, ModelError, VerificationError
from isingcut.models.architectures import find_stack, skipped
from isingcut.models.architectures.families import stop_rescaling
from isingcut.models.cutting.verify import random_tokens, relative_difference, tolerance
from isingcut.models.loading import quiet_transformers
from isingcut.models.parts import EMBED, HEAD
from isingcut.models.streaming.replay import StreamedReplay, open_model

# Of the largest logit: two tokens so close to each other may change places by rounding.
_TIE = 1e-3


def verify_streamed(
    source: StreamedReplay,
    removed: Sequence[int],
    out: Path,
    *,
    new_tokens: int = 3,
    trust_remote_code: bool = False,
) -> float:
    """What `models.cutting.verify` proves, with a block of each model in memory at a time.

    The checkpoint's forward pass is transformers' own; the original's kept blocks are replayed.
    Generation reads the model once per token, so that it is short here, and of one prompt: the
    tokens of `generate` with a cache are compared with those that one pass without a cache over
    prompt and tokens gives.

    Args:
        source: the original.
        removed: the blocks that ``out`` lacks.
        out: the checkpoint to prove.
        new_tokens: generated tokens compared.

    Returns:
        the largest logit difference, relative to the largest logit.

    Raises:
        VerificationError: it does not load, or it computes something else.

    Complexity: the original is read once, the cut model twice and once per new token.
    """
    dtype = source.dtype
    try:
        with quiet_transformers():
            cut, store, _ = open_model(
                out,
                dtype=dtype,
                device=source.device,
                trust_remote_code=trust_remote_code,
                buffers=source.store.buffers,
            )
    except (ModelError, CheckpointError) as error:
        raise VerificationError(f"the checkpoint {out} does not load: {error}") from error
    if store.reader.unexpected:
        raise VerificationError(
            f"the checkpoint {out} reloads with unexpected keys: "
            f"{', '.join(store.reader.unexpected[:3])}"
        )
    stop_rescaling(cut)
    tokens = random_tokens(source.model, 2, 24)
    with torch.inference_mode():
        expected = _replayed(source, tokens, removed)
        got = cut(tokens, use_cache=False).logits
    difference = relative_difference(expected, got)
    if not difference <= tolerance(dtype):
        raise VerificationError(
            f"the checkpoint {out} does not compute what the original does without blocks "
            f"{sorted(removed)}: logits differ by {difference:.2e} of their size "
            f"(at most {tolerance(dtype):.0e} is expected)"
        )
    _check_generation(source.model, cut, tokens[:1], removed, new_tokens, str(out))
    return difference


def _replayed(source: StreamedReplay, tokens: Tensor, removed: Sequence[int]) -> Tensor:
    """Logits (B, T, V) of the original without the blocks, which are not read."""
    kept = [i for i in range(len(source)) if i not in set(removed)]
    stream = tokens.new_empty(0)
    for part in source.store.sweep([EMBED, *kept, HEAD]):
        if part == EMBED:
            recording = source.record(tokens)
            stream = recording.entered
        elif part == HEAD:
            break
        else:
            assert isinstance(part, int)
            stream = recording.block(part, stream)
    return torch.stack([recording.logits(stream[s], s) for s in range(len(tokens))])


def _check_generation(
    original: Any, cut: Any, prompt: Tensor, removed: Sequence[int], count: int, name: str
) -> None:
    options = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": count,
        "min_new_tokens": count,
        "do_sample": False,
        "num_beams": 1,
        "use_cache": True,
    }
    with torch.no_grad():
        try:
            cached = cut.generate(prompt, **options)
        except Exception as error:
            raise VerificationError(
                f"{name} loads but does not generate: {type(error).__name__}: {error}"
            ) from error
        logits = cut(cached[:, :-1], use_cache=False).logits[0, prompt.shape[1] - 1 :].float()
        new = cached[0, prompt.shape[1] :]
        best, size = logits.max(-1).values, logits.abs().amax(-1)
        gaps = (best - logits.gather(1, new[:, None])[:, 0]) / size
        if float(gaps.max()) <= _TIE:
            return
        # A model may not agree with its own cache: see `verify.check_generation`.
        with skipped(original, find_stack(original), removed):
            again = original.generate(prompt, **options)
    if torch.equal(again, cached):
        return
    raise VerificationError(
        f"{name}: greedy generation with a cache gives another token than without at position "
        f"{prompt.shape[1] + int(gaps.argmax())} (their logits differ by {float(gaps.max()):.1e} "
        "of the largest)"
    )
