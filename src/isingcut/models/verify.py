"""Verify a cut: the reloaded checkpoint must compute the same as the original with skipped blocks.

A model that takes images is also tested on two prompts with an image each. The checkpoint's own
processor makes them. Without a processor, a cut is verified on text only.
"""

import inspect
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isingcut.console.progress import Progress, silent
from isingcut.errors import CheckpointError, ModelError, VerificationError, one_line
from isingcut.files.cuts import CutProof
from isingcut.formats.architectures.blocks import (
    catch_text_errors,
    language_model,
    skip_blocks,
    text_config,
)
from isingcut.formats.architectures.cuts import read_decoder
from isingcut.formats.architectures.removed import Removed
from isingcut.formats.checkpoints import is_mtp
from isingcut.formats.libraries import convert_errors, quiet_transformers
from isingcut.formats.safetensors_files import read_config
from isingcut.memory import raise_if_exhausted
from isingcut.models.load import freeze, load_plain
from isingcut.models.sharing import fits, share
from isingcut.models.streaming.replay import StreamedReplay
from isingcut.models.streaming.store import Buffers, Store

ImageInputs = dict[str, Tensor]

_PIXELS = ("pixel_values", "image_patches", "flattened_patches", "aspect_ratio_ids")
_RESERVED = re.compile(r"_token(_id|_index)?$")
# How the names of a vocabulary's image tokens begin.
_IMAGES = ("<image>", "IMGIMG")
# Number of last positions of a prompt whose logits are compared: they come after the whole image.
_KEPT = 32
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_PROCESSOR_SIDE = 64
_QUESTION = "What is in this picture, and why?"


def parameters(function: Any) -> set[str]:
    """Return the names of a function's parameters, also of a decorated one."""
    return set(inspect.signature(inspect.unwrap(function)).parameters)


def process_images(
    model: Any, folder: Path, words: Tensor, *, trust_remote_code: bool = False
) -> ImageInputs:
    """Make two prompts with images by the processor in a checkpoint's folder.

    Args:
        model: a model that takes images.
        folder: folder of its checkpoint.
        words: (2, T) token ids; not used, because the processor makes its own.

    Raises:
        ModelError: the processor is missing, does not load, or makes prompts unfit for the model.
    """
    if not any((folder / name).is_file() for name in _PROCESSOR_FILES):
        raise ModelError("the checkpoint has no processor")
    return try_images(model, lambda: _run_processor(folder, trust_remote_code))


def try_images(model: Any, make: Callable[[], ImageInputs]) -> ImageInputs:
    """Make two prompts with images and check that the model takes them.

    The prompts differ only in their images. If their logits are equal, the model used no image.

    Raises:
        ModelError: the model does not take the prompts, or making them failed.
    """
    accepted = parameters(model.forward)
    try:
        with torch.no_grad(), quiet_transformers():
            inputs = {key: value for key, value in make().items() if key in accepted}
            logits = compute_logits(model, inputs)
    except Exception as error:
        raise_if_exhausted(error)
        raise ModelError(one_line(error)) from error
    if logits.shape[0] != 2 or torch.equal(logits[0, -1], logits[1, -1]):
        raise ModelError("two different images give the same logits")
    return inputs


def compute_logits(model: Any, inputs: ImageInputs) -> Tensor:
    """Compute the logits of prompts with images, at their last positions."""
    from transformers import BatchFeature

    given: dict[str, Any] = {**BatchFeature(inputs).to(model.device, model.dtype)}
    if "logits_to_keep" in parameters(model.forward):
        given["logits_to_keep"] = _KEPT
    logits: Tensor = model(**given, use_cache=False).logits
    for module in model.modules():
        # Qwen-VL stores the position offsets of an image for the text after it: reset them.
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None
    return logits


def _run_processor(folder: Path, trust: bool) -> ImageInputs:
    import numpy as np
    from PIL import Image
    from transformers import AutoProcessor

    factory: Any = AutoProcessor
    processor = factory.from_pretrained(folder, trust_remote_code=trust)
    shape = (2, _PROCESSOR_SIDE, _PROCESSOR_SIDE, 3)
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    prompt = f"{processor.image_token} {_QUESTION}"
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": _QUESTION}]
        filled = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        prompt = filled if processor.image_token in filled else prompt
    return dict(
        processor(
            text=[prompt, prompt],
            images=[[Image.fromarray(image)] for image in noise],
            return_tensors="pt",
            padding=True,
        )
    )


_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
_HALF_TOLERANCE = 2e-2


def tolerance(dtype: torch.dtype) -> float:
    """Return the largest `relative_difference` of logits that the rounding of a dtype explains."""
    return _TOLERANCE.get(dtype, _HALF_TOLERANCE)


def relative_difference(expected: torch.Tensor, got: torch.Tensor) -> float:
    """Return the largest difference of two tensors, relative to the size of each entry.

    The scale of an entry is its absolute value in ``expected`` or, if larger, the `usual_size` at
    its position: rounding grows with an entry, and an entry near 0 is a sum of terms of the usual
    size. The largest entry is not the scale, because masked logits are the smallest float, and
    relative to them no difference is large.

    Args:
        expected, got: (..., V); positions first, logits or channels last.

    Returns:
        0 if all entries are equal, including masked and infinite ones; infinity if the shapes
        differ, if either has NaN, or if only one of two entries is infinite.
    """
    if expected.shape != got.shape:
        return float("inf")
    this, that = (x.detach().cpu().double().flatten(0, -2) for x in (expected, got))
    size = torch.maximum(this.abs(), usual_size(this))
    ratio = ((this - that).abs() / size).nan_to_num(
        nan=float("inf"), posinf=float("inf")
    )
    return float(ratio.masked_fill(this == that, 0.0).max())


def usual_size(logits: torch.Tensor) -> torch.Tensor:
    """Return the median absolute value, (P, 1), at each of P positions of logits (P, V).

    Infinite entries do not count. Nor do entries that are equal at all positions, unless all are:
    they do not depend on the text (masks, padding of the vocabulary). Other entries may have any
    size, as long as they are fewer than half.
    """
    differ = (logits != logits[:1]).any(0)
    counted = logits.isfinite() & (differ | ~differ.any())
    return (
        logits.abs()
        .masked_fill(~counted, float("nan"))
        .nanmedian(-1, keepdim=True)
        .values
    )


# Largest difference of two logits, relative to their usual size, whose order a cache may change.
_TIE = 1e-3


def check_generation(
    model: Any,
    tokens: torch.Tensor,
    new_tokens: int,
    name: str,
    reference: Callable[[torch.Tensor, dict[str, Any]], Any] | None = None,
) -> None:
    """Check that greedy generation gives the same tokens with and without a cache, up to near-ties.

    The original may also give different tokens with a cache (a router between two experts, a cache
    of another kind than the mask). So the tokens of the original with the same blocks skipped and
    with a cache are accepted too: it computes the same, with a cache for every original block.

    Args:
        model: the cut model.
        tokens: (B, T) prompts; one is generated at a time, because RWKV's cached steps in
            transformers mix the sequences of a batch.
        new_tokens: tokens to generate.
        name: name of the model in messages.
        reference: function that generates with the skipped original, from a prompt and options.

    Raises:
        VerificationError: the tokens differ, or `generate` fails.
    """
    greedy = {
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "num_beams": 1,
        # Settings of the model's generation_config.json that need a tokenizer, or always a cache.
        "stop_strings": None,
        "prompt_lookup_num_tokens": None,
    }
    for row in torch.split(tokens, 1):
        options = {**greedy, "attention_mask": torch.ones_like(row)}
        broken = convert_errors(
            VerificationError, f"{name} loads but does not generate"
        )
        with torch.no_grad(), broken:
            cached = model.generate(row, use_cache=True, **options)[0]
            plain = model.generate(row, use_cache=False, **options)[0]
        unequal = (cached != plain).nonzero()
        if len(unequal) == 0:
            continue
        at = int(unequal[0])
        with torch.no_grad():
            output = model(input_ids=plain[None, :at], use_cache=False)
            logits = output.logits[0].float()
            both = logits[-1, torch.stack([plain[at], cached[at]])]
            # Relative to the larger of these and the usual size, as bfloat16 rounds by size.
            size = both.abs().max().clamp(usual_size(logits)[-1, 0])
            gap = float((both[0] - both[1]).abs() / size)
            if gap <= max(_TIE, tolerance(model.dtype)):
                continue
            if reference and torch.equal(reference(row, options)[0], cached):
                continue
        raise VerificationError(
            f"{name}: greedy generation with a cache differs from generation without at token "
            f"{at} (their logits differ by {gap:.1e} of their usual size)"
        )


# Tokens of each compared sequence.
_LENGTH = 24
NEW_TOKENS = 16
"""Tokens to generate after each of the compared sequences."""
# Tokens to generate with a streamed model, which is read from disk for each token.
_STREAMED_TOKENS = 3


def verify(
    source: Any,
    removed: Removed,
    out: Path,
    *,
    images: Callable[..., ImageInputs] = process_images,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> CutProof:
    """Reload ``out`` with plain transformers and compare it with the original, blocks skipped.

    The checkpoint is loaded in the original's dtype. Logits of random tokens must agree to 1e-5 of
    their size in float32, and greedy generation must give the same tokens with and without a cache.
    If the original is streamed, both models are read from disk, one block at a time, and one of the
    two sequences is continued.

    Args:
        source: the original, or its `StreamedReplay`.
        removed: the state of ``out``.
        out: the checkpoint to verify.
        images: function that makes prompts with images, for a model that takes them.
        trust_remote_code: as in ``from_pretrained``.
        progress: shows the comparisons.

    Raises:
        VerificationError: the checkpoint does not load, or computes something else.
        ArchitectureError: the original does not run on text alone.
    """
    buffers = source.store.buffers if isinstance(source, StreamedReplay) else None
    model: Any = source.model if isinstance(source, StreamedReplay) else source
    model.eval()
    prompts = tokens = random_tokens(model, 2, _LENGTH)
    allowed = tolerance(model.dtype)

    def compare(kind: str, logits: Callable[[Any], torch.Tensor]) -> float:
        with torch.no_grad(), skip_blocks(model, removed.blocks):
            expected = logits(model)
        broken = (
            f"the checkpoint {out} fails on {kind}, but the original without blocks "
            f"{[*removed.blocks]} does not"
        )
        with torch.no_grad(), convert_errors(VerificationError, broken):
            got = logits(cut).to(expected.device)
        difference = relative_difference(expected, got)
        if not difference <= allowed:
            raise VerificationError(
                f"the checkpoint {out} differs from the original without blocks "
                f"{[*removed.blocks]} on {kind}: logits differ by {difference:.2e} of their size "
                f"(expected at most {allowed:.0e})"
            )
        return difference

    def generate(row: torch.Tensor, options: dict[str, Any]) -> Any:
        with skip_blocks(model, removed.blocks):
            return inner.generate(row, use_cache=True, **options)

    def on_text(whole: Any) -> Any:
        # If the original does not run on text, it is refused. If only the cut fails, it is wrong.
        with catch_text_errors(whole) if whole is model else nullcontext():
            return language_model(whole)(input_ids=tokens, use_cache=False).logits

    inner = language_model(model)
    new_tokens = NEW_TOKENS
    remarks = []
    inputs = "text"
    if inner is not model:
        remarks.append(
            f"the text was given to the {type(inner).__name__} inside the {type(model).__name__}"
        )
    with progress("verifying the checkpoint", 3) as bar:
        cut, streamed = _open_cut(model, removed, out, trust_remote_code, buffers)
        if streamed:
            prompts = tokens[:1]
            new_tokens = _STREAMED_TOKENS
        bar.advance(1)
        difference = compare("text", on_text)
        bar.advance(1)
        check_generation(language_model(cut), prompts, new_tokens, str(out), generate)
        bar.advance(1)
    # A model that takes images.
    if not parameters(model.forward).isdisjoint(_PIXELS):
        try:
            pictures = images(model, out, tokens, trust_remote_code=trust_remote_code)
        except ModelError as error:
            inputs = "text only"
            remarks.append(
                "the cut is verified on text only: the model takes images, but no image could "
                f"be made ({error}); test it on an image"
            )
        else:
            inputs = "text and an image"
            other = compare(inputs, lambda whole: compute_logits(whole, pictures))
            difference = max(difference, other)
    return CutProof(inputs=inputs, difference=difference, remarks=remarks)


def _open_cut(
    original: Any,
    removed: Removed,
    out: Path,
    trust: bool,
    buffers: Buffers | None,
) -> tuple[Any, bool]:
    """Open a cut next to its original; also return whether it is streamed."""
    if buffers is None and fits(out, original.dtype):
        cut = reload(out, dtype=original.dtype, trust_remote_code=trust)
        freeze(cut)
        if share(cut, original, removed):
            return cut, False
        del cut
    place = {"dtype": original.dtype, "device": original.device}
    try:
        with quiet_transformers():
            store = Store(out, **place, buffers=buffers, trust_remote_code=trust)
    except (ModelError, CheckpointError) as error:
        raise VerificationError(
            f"the checkpoint {out} does not load: {error}"
        ) from error
    _refuse_keys(out, {"unexpected_keys": store.reader.unexpected})
    return store.model, True


def _refuse_keys(out: Path, report: Mapping[str, Collection[object]]) -> None:
    # Models are loaded without their layers for multi-token prediction.
    text = read_decoder(read_config(out)) if report.get("unexpected_keys") else {}
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(map(str, report.get(problem, ())))
        if names := [name for name in keys if not text or not is_mtp(name, text)][:3]:
            raise VerificationError(
                f"the checkpoint {out} reloads with {problem.replace('_', ' ')}: {', '.join(names)}"
            )


def reload(out: Path, *, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """Load a checkpoint with plain transformers; raise if tensors are missing or unexpected.

    Raises:
        VerificationError: transformers cannot load it, or tensors are missing, unexpected or of
            another shape.
    """
    unfit = convert_errors(VerificationError, f"the checkpoint {out} does not load")
    with quiet_transformers(), unfit:
        model, report = load_plain(out, dtype, trust_remote_code=trust_remote_code)
    _refuse_keys(out, report)
    return model


def random_tokens(model: Any, batch: int, length: int) -> torch.Tensor:
    """Draw (batch, length) token ids from the model's vocabulary, on its device.

    Ids that the configuration reserves, such as those of images, are not drawn.
    """
    generator = torch.Generator().manual_seed(0)
    size = int(text_config(model).vocab_size)
    low = min(8, size // 2)  # special ids come first in most vocabularies
    tokens = torch.randint(low, size, (batch, length), generator=generator)
    fields = vars(model.config)
    named = [v for name, v in fields.items() if _RESERVED.search(name)]
    images = fields.get("vocabulary_map") or {}
    named += [i for name, i in images.items() if name.startswith(_IMAGES)]
    special = torch.tensor([v for v in named if isinstance(v, int)], dtype=torch.long)
    ordinary = next(i for i in range(low, size) if i not in special)
    return tokens.masked_fill(torch.isin(tokens, special), ordinary).to(model.device)
