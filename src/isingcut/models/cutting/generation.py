"""The second half of a proof: generating with a cache gives what it gives without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from isingcut.errors import VerificationError
from isingcut.memory import raise_if_exhausted
from isingcut.models.cutting.difference import tolerance, usual_size

# Between two logits that a cache may turn around, of their usual size.
_TIE = 1e-3


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
            raise_if_exhausted(error)
            raise VerificationError(
                f"{name} loads but does not generate: {type(error).__name__}: {error}"
            ) from error
        unequal = (cached != plain).nonzero()
        if len(unequal) == 0:
            continue
        at = int(unequal[0])
        with torch.no_grad():
            logits = model(input_ids=plain[None, :at], use_cache=False).logits[0].float()
            both = logits[-1, torch.stack([plain[at], cached[at]])]
            # Large logits, rounded in steps above the usual size's in bfloat16.
            gap = float(
                (both[0] - both[1]).abs() / both.abs().max().clamp(usual_size(logits)[-1, 0])
            )
            if gap <= max(_TIE, tolerance(model.dtype)):
                continue
            if reference is not None and torch.equal(reference(row, with_mask)[0], cached):
                continue
        raise VerificationError(
            f"{name}: greedy generation with a cache gives another token than without at "
            f"position {at} (their logits differ by {gap:.1e} of their usual size)"
        )
