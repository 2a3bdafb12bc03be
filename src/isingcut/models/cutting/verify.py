"""The proof of a cut: the reloaded checkpoint computes what the skipped original does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
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
# Between two logits that a cache may turn around, of their usual size.
_TIE = 1e-3
# Wrong states that a proof is tried on at most.
_WRONG = 4


@dataclass(frozen=True)
class Proof:
    """What the comparison of a cut with its original showed.

    Args:
        difference: the largest logit difference, as `relative_difference` has it.
        wrong: the same of the cut and the original without the blocks ``instead``.
        instead: blocks that it does not lack: the first other state that was told from it, or
            the last that was tried.
        told: whether the proof would have noticed that state.
    """

    difference: float
    wrong: float
    instead: tuple[int, ...]
    told: bool

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the proof does not show, a line each."""
        if self.told:
            return ()
        blocks = " ".join(map(str, self.instead))
        return (
            f"the proof cannot tell this cut from others: without blocks {blocks} instead, logits "
            f"differ by {self.wrong:.1e} of their size; those blocks do the same, or nothing",
        )


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
) -> Proof:
    """Reload ``out`` with plain transformers and compare it with the original, blocks skipped.

    The checkpoint is loaded in the original's dtype (float32 when the original is), so equal
    means equal: on random tokens, logits to 1e-5 of their size in float32; and greedy generation
    with a cache gives the tokens that it gives without one. The original with other blocks
    skipped must differ from it, or the comparison shows nothing. Where some such states do not
    differ, the blocks are alike or idle and the cut is what it should be: the proof says so.

    Args:
        source_model: the original.
        removed: the blocks that ``out`` lacks.
        out: the checkpoint to prove.
        cut: it, where it is not to be loaded whole.
        length: tokens of each of the two sequences compared.
        prompts: of these, how many are gone on with.
        new_tokens: generated tokens compared.
        trust_remote_code: as in ``from_pretrained``.

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
    stack = find_stack(source_model)
    with torch.no_grad():
        got = cut(input_ids=tokens, use_cache=False).logits

    def from_original(blocks: Sequence[int]) -> float:
        with torch.no_grad(), skipped(source_model, stack, blocks):
            return relative_difference(source_model(input_ids=tokens, use_cache=False).logits, got)

    difference = from_original(removed)
    allowed = tolerance(source_model.dtype)
    if not difference <= allowed:
        raise VerificationError(
            f"the checkpoint {out} does not compute what the original does without blocks "
            f"{sorted(removed)}: logits differ by {difference:.2e} of their size "
            f"(at most {allowed:.0e} is expected)"
        )

    def skipped_original(row: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        with skipped(source_model, stack, removed):
            result: torch.Tensor = source_model.generate(row, use_cache=True, **options)
        return result

    check_generation(cut, tokens[:prompts], new_tokens, str(out), skipped_original)
    for instead in islice(_other_states(len(stack), removed), _WRONG):
        wrong = from_original(instead)
        if wrong > allowed:
            break
    return Proof(difference, wrong, tuple(instead), wrong > allowed)


def _other_states(count: int, removed: Sequence[int]) -> Iterator[list[int]]:
    """States that lack another block in the place of one, its nearest neighbours first.

    Whether they are legal does not matter: a skipped block is run, only its output is not used.
    """
    gone = set(removed)
    if not gone:
        yield from ([j] for j in range(count))
    for distance in range(1, count):
        for i in sorted(gone):
            for j in (i - distance, i + distance):
                if 0 <= j < count and j not in gone:
                    yield sorted(gone - {i} | {j})


def tolerance(dtype: torch.dtype) -> float:
    """Largest `relative_difference` of logits that a dtype's rounding explains."""
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
            logits = model(input_ids=plain[None, :at], use_cache=False).logits[0].float()
            gap = float((logits[-1, plain[at]] - logits[-1, cached[at]]).abs())
            gap /= float(usual_size(logits)[-1])
            if gap <= max(_TIE, tolerance(model.dtype)):
                continue
            if reference is not None and torch.equal(reference(row, with_mask)[0], cached):
                continue
        raise VerificationError(
            f"{name}: greedy generation with a cache gives another token than without at "
            f"position {at} (their logits differ by {gap:.1e} of their usual size)"
        )


def random_tokens(model: Any, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """(batch, length) random token ids of the model's vocabulary, on its device."""
    generator = torch.Generator().manual_seed(seed)
    size = int(text_config(model).vocab_size)
    low = min(8, size // 2)  # special ids come first in most vocabularies
    return torch.randint(low, size, (batch, length), generator=generator).to(model.device)


def relative_difference(expected: torch.Tensor, got: torch.Tensor) -> float:
    """Largest difference of two tensors, each entry's relative to its own size or the usual one.

    Relative to the larger of the two, because rounding grows with an entry, and an entry near 0
    is a sum of usual ones. The usual size is taken at each position alone, as `usual_size` says.
    The largest entry is no scale: masked logits hold the smallest float, and beside them no
    difference is large.

    Args:
        expected, got: (..., V); positions first, logits or channels last.

    Returns:
        0 where all is equal, masked entries and infinities included; infinite for other shapes,
        where either holds NaN, and where only one is infinite.
    """
    if expected.shape != got.shape:
        return float("inf")
    this, that = (x.detach().cpu().double().flatten(0, -2) for x in (expected, got))
    size = torch.maximum(this.abs(), usual_size(this))
    ratio = ((this - that).abs() / size).nan_to_num(nan=float("inf"), posinf=float("inf"))
    return float(ratio.masked_fill(this == that, 0.0).max())


def usual_size(logits: torch.Tensor) -> torch.Tensor:
    """(P, 1) median size of the entries at each of P positions, (P, V) in.

    Entries that are the same at every position are not computed from the text (masks, padding of
    the vocabulary) and do not count, where any differ; nor do infinite ones. Further entries may
    be as large as they like, as long as they are fewer than half.
    """
    differ = (logits != logits[:1]).any(0)
    counted = logits.isfinite() & (differ | ~differ.any())
    return logits.abs().masked_fill(~counted, float("nan")).nanmedian(-1, keepdim=True).values
