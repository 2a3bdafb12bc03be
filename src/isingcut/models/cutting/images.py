"""Two prompts with an image each, for a model that takes images: what a proof shows it beside text.

The checkpoint's own processor makes them. Where none loads, a cut is proven on text only.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isingcut.errors import ModelError
from isingcut.memory import raise_if_exhausted
from isingcut.models.loading import one_line, quiet_transformers

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
        raise ModelError("another image gives the same logits")
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
