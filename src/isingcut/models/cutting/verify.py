"""Verify a cut: the reloaded checkpoint must compute what the original with skipped blocks does.

A model that takes images is also tested on two prompts with an image each. The checkpoint's own
processor makes them; without one, a cut is verified on text only.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isingcut.errors import CheckpointError, ModelError, VerificationError
from isingcut.memory import raise_if_exhausted
from isingcut.models.architectures.blocks import (
    find_stack,
    image_needed,
    language_model,
    on_text_alone,
    skipped,
    text_config,
    text_model,
)
from isingcut.models.architectures.cuts import written_out
from isingcut.models.cutting.sharing import fits, share
from isingcut.models.fit import is_mtp
from isingcut.models.load import as_transformers_does
from isingcut.models.loading import one_line, quiet_transformers
from isingcut.models.safetensors_files import read_config
from isingcut.models.streaming.replay import StreamedReplay, open_model
from isingcut.models.streaming.store import Buffers

ImageInputs = dict[str, Tensor]

_PIXELS = ("pixel_values", "image_patches", "flattened_patches", "aspect_ratio_ids")
_RESERVED = re.compile(r"_token(_id|_index)?$")
# Logits are compared at the end of a prompt, behind the image, where all of it is seen.
_KEPT = 32
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_PROCESSOR_SIDE = 64
_QUESTION = "What is in this picture, and why?"


def parameters(function: Any) -> set[str]:
    """Names of a function's parameters, whatever decorates it."""
    return set(inspect.signature(inspect.unwrap(function)).parameters)


def takes_images(model: Any) -> bool:
    """Whether a model's forward pass has a place for images."""
    return any(name in parameters(model.forward) for name in _PIXELS)


def process_images(
    model: Any, folder: Path, words: Tensor, *, trust_remote_code: bool = False
) -> ImageInputs:
    """Two prompts of the processor in a checkpoint's folder, which the model takes.

    Args:
        model: it takes images.
        folder: its checkpoint.
        words: (2, T) token ids; a processor brings its own.

    Raises:
        ModelError: there is no processor, it does not load, or the model does not take its prompts.
    """
    if not any((folder / name).is_file() for name in _PROCESSOR_FILES):
        raise ModelError("the checkpoint has no processor")
    return try_images(model, lambda: _processed(folder, trust_remote_code))


def try_images(model: Any, make: Callable[[], ImageInputs]) -> ImageInputs:
    """Two prompts, once the model has taken them.

    The rows differ in their images alone; a model that does not notice took none of them.

    Raises:
        ModelError: it does not take them, or making them failed.
    """
    accepted = parameters(model.forward)
    try:
        with torch.no_grad(), quiet_transformers():
            inputs = {key: value for key, value in make().items() if key in accepted}
            if "logits_to_keep" in accepted:
                inputs["logits_to_keep"] = torch.tensor(_KEPT)
            logits = logits_of(model, inputs)
    except Exception as error:
        raise_if_exhausted(error)
        raise ModelError(one_line(error)) from error
    if logits.shape[0] != 2 or torch.equal(logits[0, -1], logits[1, -1]):
        raise ModelError("two different images give the same logits")
    return inputs


def logits_of(model: Any, inputs: ImageInputs) -> Tensor:
    """Logits of prompts with images."""
    given: dict[str, Any] = on_device_of(model, inputs)
    if "logits_to_keep" in given:
        given["logits_to_keep"] = int(given["logits_to_keep"])
    with _forgotten(model):
        logits: Tensor = model(**given, use_cache=False).logits
    return logits


@contextlib.contextmanager
def _forgotten(model: Any) -> Iterator[None]:
    """Take back what modules note down meanwhile: Qwen-VL keeps an image's positions for later."""
    before = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if value is None or isinstance(value, Tensor)
    ]
    try:
        yield
    finally:
        for module, name, value in before:
            vars(module)[name] = value


def on_device_of(model: Any, inputs: ImageInputs) -> ImageInputs:
    """Inputs on the device of a model, and in its dtype."""
    return {
        key: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for key, value in inputs.items()
    }


def _processed(folder: Path, trust: bool) -> ImageInputs:
    import numpy as np
    from PIL import Image
    from transformers import AutoProcessor

    factory: Any = AutoProcessor
    processor = factory.from_pretrained(folder, trust_remote_code=trust)
    shape = (2, _PROCESSOR_SIDE, _PROCESSOR_SIDE, 3)
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    prompt = _processor_prompt(processor)
    return dict(
        processor(
            text=[prompt, prompt],
            images=[[Image.fromarray(image)] for image in noise],
            return_tensors="pt",
            padding=True,
        )
    )


def _processor_prompt(processor: Any) -> str:
    content = [{"type": "image"}, {"type": "text", "text": _QUESTION}]
    token: str = processor.image_token
    if getattr(processor, "chat_template", None):
        said: str = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        if token in said:
            return said
    return f"{token} {_QUESTION}"


def reserved_tokens(config: Any) -> set[int]:
    """Token ids that a configuration gives a meaning of their own, those of images among them."""
    found = {v for k, v in vars(config).items() if _RESERVED.search(k) and isinstance(v, int)}
    table = getattr(config, "vocabulary_map", None)
    if isinstance(table, dict):
        found |= {i for name, i in table.items() if name.startswith(("<image>", "IMGIMG"))}
    return found


_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
_HALF_TOLERANCE = 2e-2


def tolerance(dtype: torch.dtype) -> float:
    """Largest `relative_difference` of logits that a dtype's rounding explains."""
    return _TOLERANCE.get(dtype, _HALF_TOLERANCE)


def relative_difference(expected: torch.Tensor, got: torch.Tensor) -> float:
    """Largest difference of two tensors, each entry's relative to its own size or the usual one.

    Relative to the larger of the two, because rounding grows with an entry, and an entry near 0
    is a sum of usual ones. The usual size is taken at each position alone, as `usual_size` says.
    The largest entry is not used as scale: masked logits are the smallest float, and relative to
    them no difference is large.

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
            f"{name}: greedy generation with a cache differs from generation without at token "
            f"{at} (their logits differ by {gap:.1e} of their usual size)"
        )


# Wrong states that a proof is tried on at most.
_WRONG = 4
# Tokens generated by a model that is read from disk for each of them.
_STREAMED_TOKENS = 3


@dataclass(frozen=True)
class Compared:
    """A cut and its original, compared on prompts of one kind.

    Args:
        inputs: ``"text"``, or ``"text and an image"``.
        difference: the largest logit difference, as `relative_difference` has it.
        wrong: the same of the cut and the original without the blocks ``instead``.
        instead: the blocks of another state: the first that the comparison distinguishes from the
            cut, or the last that was tried.
        distinguished: whether the comparison distinguishes that state from the cut.
    """

    inputs: str
    difference: float
    wrong: float
    instead: tuple[int, ...]
    distinguished: bool


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
    def distinguishes(self) -> bool:
        """Whether each comparison distinguishes the cut from another state."""
        return all(c.distinguished for c in self.comparisons)

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
            f"the proof on {c.inputs} cannot distinguish this cut from another one: without blocks "
            f"{' '.join(map(str, c.instead))} instead, logits differ by {c.wrong:.1e} of their "
            "size; these blocks compute the same, or nothing"
            for c in self.comparisons
            if not c.distinguished
        ]
        if self.inside:
            said.append(self.inside)
        if self.unseen:
            said.append(
                "the cut is verified on text only: the model takes images, but no image could "
                f"be made ({self.unseen}); test it on an image"
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
    images: Callable[..., ImageInputs] = process_images,
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
        images: makes prompts with images, for a model that takes them.
        trust_remote_code: as in ``from_pretrained``.

    Raises:
        VerificationError: it does not load, or it computes something else.
        ArchitectureError: the original does not run on text alone.
    """
    source_model.eval()
    if cut is None:
        cut, streamed = _opened(source_model, removed, out, trust_remote_code)
        if streamed:
            prompts, new_tokens = 1, min(new_tokens, _STREAMED_TOKENS)
    tokens = random_tokens(source_model, 2, length)
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
                f"the checkpoint {out} fails on {kind}, but the original without blocks "
                f"{sorted(removed)} does not: {one_line(error)}"
            ) from error
        difference = relative_difference(expected, got)
        if not difference <= allowed:
            raise VerificationError(
                f"the checkpoint {out} differs from the original without blocks "
                f"{sorted(removed)} on {kind}: logits differ by {difference:.2e} of their size "
                f"(expected at most {allowed:.0e})"
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
        pictures = images(source_model, out, tokens, trust_remote_code=trust_remote_code)
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


def verify_streamed(
    source: StreamedReplay,
    removed: Sequence[int],
    out: Path,
    *,
    new_tokens: int = _STREAMED_TOKENS,
    images: Callable[..., ImageInputs] = process_images,
    trust_remote_code: bool = False,
) -> Proof:
    """`verify` for an original that is streamed: a block of each model is in memory at a time.

    Complexity: the original is read twice, the cut model once and twice per new token.
    """
    cut = _streamed(out, source.model, trust_remote_code, source.store.buffers)
    return verify(
        source.model, removed, out, cut=cut, prompts=1, new_tokens=new_tokens, images=images
    )


def _opened(model: Any, removed: Sequence[int], out: Path, trust: bool) -> tuple[Any, bool]:
    """Open a cut next to its original in memory; also return whether the cut had to be streamed."""
    if fits(out, model.dtype):
        cut = reload(out, dtype=model.dtype, trust_remote_code=trust)
        cut.requires_grad_(False)
        if share(cut, model, removed):
            return cut, False
        del cut
    return _streamed(out, model, trust), True


def _streamed(out: Path, original: Any, trust: bool, buffers: Buffers | None = None) -> Any:
    """A cut whose blocks are read from disk when they are run.

    Raises:
        VerificationError: it does not load, or holds tensors that it has no use for.
    """
    place = {"dtype": original.dtype, "device": original.device}
    try:
        with quiet_transformers():
            cut, store, _ = open_model(out, **place, trust_remote_code=trust, buffers=buffers)
    except (ModelError, CheckpointError) as error:
        raise VerificationError(f"the checkpoint {out} does not load: {error}") from error
    _refuse_tensors(out, "unexpected_keys", store.reader.unexpected)
    return cut


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
        _refuse_tensors(out, problem, sorted(map(str, report.get(problem) or ())))
    return model


def _refuse_tensors(out: Path, problem: str, names: Sequence[str]) -> None:
    if names and problem == "unexpected_keys":
        # A model is loaded without its layers for multi-token prediction.
        text = written_out(read_config(out))
        names = [name for name in names if not is_mtp(name, text)]
    if names:
        raise VerificationError(
            f"the checkpoint {out} reloads with {problem.replace('_', ' ')}: {', '.join(names[:3])}"
        )


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
