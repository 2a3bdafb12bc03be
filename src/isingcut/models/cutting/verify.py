"""The proof of a cut: the reloaded checkpoint computes what the skipped original does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from isingcut.errors import VerificationError
from isingcut.models.architectures import find_stack, skipped, text_config
from isingcut.models.architectures.families import stop_rescaling
from isingcut.models.load import as_transformers_does
from isingcut.models.loading import quiet_transformers

_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
_HALF_TOLERANCE = 2e-2


def verify(
    source_model: Any,
    removed: Sequence[int],
    out: Path,
    *,
    cut: Any = None,
    length: int = 24,
    prompts: int = 2,
    new_tokens: int = 16,
    trust_remote_code: bool = False,
) -> float:
    """Reload ``out`` with plain transformers and compare it with the original, blocks skipped.

    The checkpoint is loaded in the original's dtype (float32 when the original is), so equal
    means equal: on random tokens, logits to 1e-5 of their largest size in float32; and greedy
    generation with a cache gives the tokens that it gives without one.

    Args:
        source_model: the original.
        removed: the blocks that ``out`` lacks.
        out: the checkpoint to prove.
        cut: it, where it is not to be loaded whole.
        length: tokens of each of the two sequences compared.
        prompts: of these, how many are gone on with.
        new_tokens: generated tokens compared.
        trust_remote_code: as in ``from_pretrained``.

    Returns:
        the largest logit difference, relative to the largest logit.

    Raises:
        VerificationError: it does not load, or it computes something else.
    """
    source_model.eval()
    if cut is None:
        cut = reload(out, dtype=source_model.dtype, trust_remote_code=trust_remote_code)
        cut.to(source_model.device)
    tokens = random_tokens(source_model, 2, length)
    for model in (source_model, cut):
        stop_rescaling(model)
    with torch.no_grad():
        with skipped(source_model, find_stack(source_model), removed):
            expected = source_model(tokens, use_cache=False).logits
        got = cut(tokens, use_cache=False).logits
    difference = relative_difference(expected, got)
    allowed = tolerance(source_model.dtype)
    if not difference <= allowed:
        raise VerificationError(
            f"the checkpoint {out} does not compute what the original does without blocks "
            f"{sorted(removed)}: logits differ by {difference:.2e} of their size "
            f"(at most {allowed:.0e} is expected)"
        )

    def skipped_original(row: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        with skipped(source_model, find_stack(source_model), removed):
            result: torch.Tensor = source_model.generate(row, use_cache=True, **options)
        return result

    check_generation(cut, tokens[:prompts], new_tokens, str(out), skipped_original)
    return difference


def tolerance(dtype: torch.dtype) -> float:
    """Largest logit difference that a dtype's rounding explains, relative to the largest logit."""
    return _TOLERANCE.get(dtype, _HALF_TOLERANCE)


def reload(out: Path, *, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """Load a checkpoint with plain transformers, refusing one with missing or extra tensors.

    Raises:
        VerificationError: transformers cannot load it, or invents or ignores tensors.
    """
    try:
        with quiet_transformers():
            model, report = as_transformers_does(out, dtype, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise VerificationError(
            f"the checkpoint {out} does not load: {type(error).__name__}: {error}"
        ) from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(problem):
            names = sorted(map(str, report[problem]))[:3]
            raise VerificationError(
                f"the checkpoint {out} reloads with {problem.replace('_', ' ')}: {', '.join(names)}"
            )
    return model


def check_generation(
    model: Any,
    tokens: torch.Tensor,
    new_tokens: int,
    name: str,
    reference: Callable[[torch.Tensor, dict[str, Any]], torch.Tensor] | None = None,
) -> None:
    """Greedy tokens with a cache must be those without one, but for near-ties.

    Where they are not, the original may not agree with itself either (a router between two
    experts, a cache of another kind than the mask). So tokens of the cached original with the
    same blocks skipped are accepted too: the same computation, done with every block's own cache.

    Args:
        model: the cut model.
        tokens: (B, T) prompts; one is generated at a time, because RWKV's cached steps in
            transformers mix the sequences of a batch.
        new_tokens: tokens to generate.
        name: what to call the model in messages.
        reference: generates with the skipped original, given a prompt and options.

    Raises:
        VerificationError: they differ, or `generate` fails.
    """
    options = {
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "num_beams": 1,
    }
    for row in torch.split(tokens, 1):
        with_mask = {**options, "attention_mask": torch.ones_like(row)}
        try:
            with torch.no_grad():
                cached = model.generate(row, use_cache=True, **with_mask)[0]
                plain = model.generate(row, use_cache=False, **with_mask)[0]
        except Exception as error:
            raise VerificationError(
                f"{name} loads but does not generate: {type(error).__name__}: {error}"
            ) from error
        unequal = (cached != plain).nonzero()
        if len(unequal) == 0:
            continue
        at = int(unequal[0])
        with torch.no_grad():
            logits = model(plain[None, :at], use_cache=False).logits[0, -1].float()
            gap = float((logits[plain[at]] - logits[cached[at]]).abs() / logits.abs().max())
            if gap <= 1e-3:  # rounding
                continue
            if reference is not None and torch.equal(reference(row, with_mask)[0], cached):
                continue
        raise VerificationError(
            f"{name}: greedy generation with a cache gives another token than without at "
            f"position {at} (their logits differ by {gap:.1e} of the largest)"
        )


def random_tokens(model: Any, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """(batch, length) random token ids of the model's vocabulary, on its device."""
    generator = torch.Generator().manual_seed(seed)
    size = int(text_config(model).vocab_size)
    low = min(8, size // 2)  # special ids come first in most vocabularies
    return torch.randint(low, size, (batch, length), generator=generator).to(model.device)


def relative_difference(expected: torch.Tensor, got: torch.Tensor) -> float:
    """Largest absolute difference over the largest expected size; infinite for other shapes."""
    if expected.shape != got.shape:
        return float("inf")
    scale = float(expected.abs().max().float())
    return float((expected - got).abs().max().float()) / max(scale, 1e-12)
