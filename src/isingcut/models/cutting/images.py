"""Two prompts with an image each, for a model that takes images: what a proof shows it beside text.

A checkpoint's own processor makes them where it has one that loads. Else they are made by rule:
pixels as large as the configuration says, in the forms that transformers' models take them, and as
many image tokens in the prompt as the model makes features of them. The model itself says which
form is right: with another one it fails.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isingcut.errors import ModelError
from isingcut.memory import raise_if_exhausted
from isingcut.models.cutting.image_forms import (
    WORDS,
    ImageInputs,
    first_number,
    image_forms,
    parameters,
)
from isingcut.models.loading import one_line, quiet_transformers

_PIXELS = ("pixel_values", "image_patches", "flattened_patches", "aspect_ratio_ids")
_TOKENS = (
    "image_token_id",
    "image_token_index",
    "image_token",
    "img_context_token_id",
    "video_token_id",
)
# Where an image stands, told by a mask instead of a token (Kosmos-2).
_PLACES = "image_embeds_position_mask"
_RESERVED = re.compile(r"_token(_id|_index)?$")
# Logits are compared at the end of a prompt, behind the image, where all of it is seen.
_KEPT = 32
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_PROCESSOR_SIDE = 64
_QUESTION = "What is in this picture, and why?"


def takes_images(model: Any) -> bool:
    """Whether a model's forward pass has a place for images."""
    return any(name in parameters(model.forward) for name in _PIXELS)


def with_images(
    model: Any, folder: Path, words: Tensor, *, trust_remote_code: bool = False
) -> ImageInputs:
    """Two prompts that the model takes.

    The rows differ in their images alone; a model that does not notice took none of them.

    Args:
        model: it takes images.
        folder: its checkpoint, which may have a processor.
        words: (2, T) token ids to put around the images.

    Raises:
        ModelError: it takes none of the prompts; what went wrong with the likeliest.
    """
    accepted = parameters(model.forward)
    reason = ""
    for make in _prompts(model, folder, words, trust_remote_code):
        try:
            with torch.no_grad(), quiet_transformers():
                inputs = {key: value for key, value in make().items() if key in accepted}
                if "logits_to_keep" in accepted:
                    inputs["logits_to_keep"] = torch.tensor(_KEPT)
                logits = logits_of(model, inputs)
        except Exception as error:
            raise_if_exhausted(error)
            reason = reason or one_line(error)
            continue
        if logits.shape[0] == 2 and not torch.equal(logits[0, -1], logits[1, -1]):
            return inputs
        reason = reason or "another image gives the same logits"
    raise ModelError(reason or "no way is known to make one of its configuration")


def logits_of(model: Any, inputs: ImageInputs) -> Tensor:
    """Logits of prompts with images."""
    given: dict[str, Any] = _placed(model, inputs)
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


def _placed(model: Any, inputs: ImageInputs) -> ImageInputs:
    return {
        key: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for key, value in inputs.items()
    }


def _prompts(
    model: Any, folder: Path, words: Tensor, trust: bool
) -> Iterator[Callable[[], ImageInputs]]:
    """Ways to make two prompts, the likeliest first; each may fail in any way."""
    if any((folder / name).is_file() for name in _PROCESSOR_FILES):
        yield lambda: _processed(folder, trust)
    token = _image_token(model)
    for pixels in image_forms(model):
        yield partial(_by_rule, model, words, token, pixels)


def _by_rule(model: Any, words: Tensor, token: int | None, pixels: ImageInputs) -> ImageInputs:
    placed = token is not None or _PLACES in parameters(model.forward)
    count = _features(model, pixels) if placed else 0
    return {**_prompt(model, words, token, count), **pixels}


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


def _image_token(model: Any) -> int | None:
    config = model.config
    if isinstance(table := getattr(config, "vocabulary_map", None), dict) and "<image>" in table:
        return int(table["<image>"])
    return first_number(config, _TOKENS)


def reserved_tokens(config: Any) -> set[int]:
    """Token ids that a configuration gives a meaning of their own, those of images among them."""
    found = {v for k, v in vars(config).items() if _RESERVED.search(k) and isinstance(v, int)}
    table = getattr(config, "vocabulary_map", None)
    if isinstance(table, dict):
        found |= {i for name, i in table.items() if name.startswith(("<image>", "IMGIMG"))}
    return found


def _features(model: Any, pixels: ImageInputs) -> int:
    """How many feature vectors the model makes of one image: so many tokens stand for it."""
    if "aspect_ratio_ids" in pixels:
        return 1  # The text attends to the image: mllama.
    names = ("get_image_features", "get_video_features")
    places = (model, getattr(model, "model", model))
    found = (getattr(place, name, None) for name in names for place in places)
    features: Any = next(filter(None, found), None) or model.get_image_features
    return _rows(features(**_placed(model, pixels), return_dict=True)) // 2


def _rows(found: Any) -> int:
    """Feature vectors in what a model makes of its images."""
    if isinstance(found, Tensor):
        return found.shape[:-1].numel()
    if isinstance(found, (list, tuple)) and not hasattr(found, "pooler_output"):
        return sum(map(_rows, found))
    for name in ("pooler_output", "deepstack_features", "last_hidden_state"):
        value = getattr(found, name, None)
        if value is not None:
            # Of features for several text blocks, (block, features), the first.
            return _rows(value[0][1] if name == "deepstack_features" else value)
    return 0


def _prompt(model: Any, words: Tensor, token: int | None, count: int) -> ImageInputs:
    """Token ids of both rows: words, the image between its marks, words.

    Where nothing stands for an image in the text, the words alone: the blocks look at it.
    """
    words = words[:1, : 2 * WORDS].cpu()
    marks = [
        [] if mark is None else [mark]
        for mark in (
            first_number(
                model.config, ("vision_start_token_id", "boi_token_id", "boi_token_index")
            ),
            first_number(model.config, ("vision_end_token_id", "eoi_token_id", "eoi_token_index")),
        )
    ]
    before, after = marks if count else ([], [])
    stands = int(words[0, 0]) if token is None else token
    image = torch.tensor([[*before, *[stands] * count, *after]], dtype=torch.long)
    ids = torch.cat((words[:, :WORDS], image, words[:, WORDS:]), dim=1).expand(2, -1).clone()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    accepted = parameters(model.forward)
    start = WORDS + len(before)
    there = torch.zeros_like(ids)
    there[:, start : start + count] = 1
    for name in ("mm_token_type_ids", "token_type_ids", _PLACES):
        if name in accepted:
            inputs[name] = there
    return inputs
