"""The proof of a cut: the reloaded checkpoint computes what the skipped original does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from isingcut.errors import ModelError, VerificationError
from isingcut.memory import raise_if_exhausted
from isingcut.models.architectures import find_stack, skipped, text_config
from isingcut.models.architectures.families import stop_rescaling
from isingcut.models.cutting.difference import relative_difference, tolerance
from isingcut.models.cutting.generation import check_generation
from isingcut.models.cutting.images import logits_of, reserved_tokens, takes_images, with_images
from isingcut.models.load import as_transformers_does
from isingcut.models.loading import one_line, quiet_transformers
from isingcut.models.text_alone import image_needed, language_model, on_text_alone, text_model

# Wrong states that a proof is tried on at most.
_WRONG = 4


@dataclass(frozen=True)
class Compared:
    """A cut and its original, compared on prompts of one kind.

    Args:
        inputs: ``"text"``, or ``"text and an image"``.
        difference: the largest logit difference, as `relative_difference` has it.
        wrong: the same of the cut and the original without the blocks ``instead``.
        instead: blocks that it does not lack: the first other state that was told from it, or
            the last that was tried.
        told: whether the comparison would have noticed that state.
    """

    inputs: str
    difference: float
    wrong: float
    instead: tuple[int, ...]
    told: bool


@dataclass(frozen=True)
class Proof:
    """What the comparisons of a cut with its original showed.

    Args:
        comparisons: of text, and of text and an image where the model takes one.
        unseen: why the model takes images and was given none; empty else.
        inside: what was given the text where the whole model is not, and why; empty else.
    """

    comparisons: tuple[Compared, ...]
    unseen: str = ""
    inside: str = ""

    @property
    def difference(self) -> float:
        """The largest logit difference of all comparisons."""
        return max(c.difference for c in self.comparisons)

    @property
    def told(self) -> bool:
        """Whether each comparison would have noticed another state."""
        return all(c.told for c in self.comparisons)

    @property
    def inputs(self) -> str:
        """What the model was given: ``"text"``, ``"text and an image"`` or ``"text only"``."""
        return "text only" if self.unseen else self.comparisons[-1].inputs

    @property
    def record(self) -> dict[str, Any]:
        """What the record of a checkpoint keeps of it."""
        remarks = list(self.remarks)
        return {"inputs": self.inputs, "difference": self.difference, "remarks": remarks}

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the proof does not show, a line each."""
        said = [
            f"the proof on {c.inputs} cannot tell this cut from others: without blocks "
            f"{' '.join(map(str, c.instead))} instead, logits differ by {c.wrong:.1e} of their "
            "size; those blocks do the same, or nothing"
            for c in self.comparisons
            if not c.told
        ]
        if self.inside:
            said.append(self.inside)
        if self.unseen:
            said.append(
                "the cut is proven on text only: the model takes images, and no image input could "
                f"be made ({self.unseen}); try it on an image"
            )
        return tuple(said)


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
        ArchitectureError: the original does not run on text alone.
    """
    source_model.eval()
    if cut is None:
        cut = reload(out, dtype=source_model.dtype, trust_remote_code=trust_remote_code)
        cut.to(source_model.device)
    tokens = random_tokens(source_model, 2, length)
    for model in (source_model, cut):
        stop_rescaling(model)
    stack = find_stack(source_model)
    allowed = tolerance(source_model.dtype)

    def compare(kind: str, logits: Callable[[Any], torch.Tensor]) -> Compared:
        def original(blocks: Sequence[int]) -> torch.Tensor:
            with torch.no_grad(), skipped(source_model, stack, blocks):
                return logits(source_model)

        expected = original(removed)
        try:
            with torch.no_grad():
                got = logits(cut)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise_if_exhausted(error)
            raise VerificationError(
                f"the checkpoint {out} fails on {kind}, which the original without blocks "
                f"{sorted(removed)} computes: {one_line(error)}"
            ) from error
        difference = relative_difference(expected, got)
        if not difference <= allowed:
            raise VerificationError(
                f"the checkpoint {out} does not compute what the original does without blocks "
                f"{sorted(removed)} on {kind}: logits differ by {difference:.2e} of their size "
                f"(at most {allowed:.0e} is expected)"
            )
        for instead in islice(_other_states(len(stack), removed), _WRONG):
            wrong = relative_difference(original(instead), got)
            if wrong > allowed:
                break
        return Compared(kind, difference, wrong, tuple(instead), wrong > allowed)

    def skipped_original(row: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        with skipped(source_model, stack, removed):
            result: torch.Tensor = text_model(source_model).generate(row, use_cache=True, **options)
        return result

    def on_text(model: Any) -> torch.Tensor:
        # A model that cannot be called so is refused; a cut of one that can is wrong.
        with on_text_alone(model) if model is source_model else nullcontext():
            logits: torch.Tensor = text_part(model)(input_ids=tokens, use_cache=False).logits
        return logits

    inside, text_part = _inside(source_model)
    found = [compare("text", on_text)]
    check_generation(text_part(cut), tokens[:prompts], new_tokens, str(out), skipped_original)
    if not takes_images(source_model):
        return Proof(tuple(found), inside=inside)
    try:
        pictures = with_images(source_model, out, tokens, trust_remote_code=trust_remote_code)
    except ModelError as error:
        return Proof(tuple(found), str(error), inside)
    found.append(compare("text and an image", lambda model: logits_of(model, pictures)))
    return Proof(tuple(found), inside=inside)


def _inside(model: Any) -> tuple[str, Callable[[Any], Any]]:
    """What of a model and of its cut is given text, said where it is not the whole."""
    reason = image_needed(model)
    if not reason:
        return "", lambda whole: whole
    said = (
        f"{type(model).__name__} does not run on text alone ({reason}): text was given to the "
        f"{type(language_model(model)).__name__} inside it"
    )
    return said, language_model


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


def reload(out: Path, *, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """Load a checkpoint with plain transformers, refusing one with missing or extra tensors.

    Raises:
        VerificationError: transformers cannot load it, or invents or ignores tensors.
    """
    try:
        with quiet_transformers():
            model, report = as_transformers_does(out, dtype, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise_if_exhausted(error)
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


def random_tokens(model: Any, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """(batch, length) random token ids of the model's vocabulary, on its device, none of an image.

    Where a model takes images, the ids that stand for them are no text.
    """
    generator = torch.Generator().manual_seed(seed)
    size = int(text_config(model).vocab_size)
    low = min(8, size // 2)  # special ids come first in most vocabularies
    tokens = torch.randint(low, size, (batch, length), generator=generator)
    special = torch.tensor(sorted(reserved_tokens(model.config)), dtype=torch.long)
    ordinary = next(i for i in range(low, size) if i not in special)
    return tokens.masked_fill(torch.isin(tokens, special), ordinary).to(model.device)
