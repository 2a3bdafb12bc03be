"""Which part of a model is given text: most are given it whole, some do not run without an image.

BLIP's classes ask for pixels. The language model inside them is a causal one of its own, with
embedding, blocks and head, and computes on text what the whole model would.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from isingcut.errors import ArchitectureError, IsingcutError
from isingcut.memory import raise_if_exhausted
from isingcut.models.architectures import find_stack
from isingcut.models.loading import one_line

# Why a model that holds a language model of its own does not run on text alone; empty: it does.
_REASONS: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def text_model(model: Any) -> Any:
    """What of a model is given text: itself, or the language model inside where it needs an image.

    One that holds none of its own is not tried, and fails where it is used.
    """
    return language_model(model) if image_needed(model) else model


def language_model(model: Any) -> Any:
    """The causal language model inside a model that owns its blocks; the model where none does."""
    if not isinstance(model, nn.Module):
        return model
    inner = [
        (path, module)
        for path, module in model.named_modules()
        if path and getattr(module, "can_generate", bool)()
    ]
    if not inner:
        return model
    stack = find_stack(model)
    return next((module for path, module in inner if stack.path.startswith(f"{path}.")), model)


def image_needed(model: Any) -> str:
    """Why a model is given text by way of the language model inside it; empty where it is not.

    Four tokens are tried, once for each model.
    """
    inner = language_model(model)
    if inner is model:
        return ""
    if model not in _REASONS:
        ids = torch.zeros((1, 4), dtype=torch.long, device=model.device)
        reason = ""
        try:
            with torch.no_grad(), on_text_alone(model):
                model(input_ids=ids, use_cache=False)
        except ArchitectureError as error:
            reason = one_line(error.__cause__ or error)
        _REASONS[model] = reason
    return _REASONS[model]


@contextlib.contextmanager
def on_text_alone(model: Any) -> Iterator[None]:
    """Turn what a model raises meanwhile, being given text only, into one line.

    Raises:
        ArchitectureError: it raised something.
    """
    try:
        yield
    except (torch.AcceleratorError, IsingcutError):
        raise  # the machine's fault, or said already
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise_if_exhausted(error)
        raise ArchitectureError(
            f"{type(model).__name__} does not run on text alone, so that it can be neither "
            f"measured nor proven: {one_line(error)}"
        ) from error
