"""A model's head taken apart from its blocks, where that computes the same logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isingcut.models.architectures import text_config


def separable(model: Any) -> tuple[Any, Any] | None:
    """The decoder and the output layer, where ``output(decoder(ids))`` are the model's logits.

    Tried on a few tokens: a model that scales or caps its logits afterwards (Granite, Gemma 2)
    gives None, and its logits are taken as its own forward pass gives them.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if decoder is None or output is None or decoder is model:
        return None
    size = int(text_config(model).vocab_size)
    ids = torch.arange(5, device=model.device)[None] % size
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            whole = model(input_ids=ids, use_cache=False).logits
            parts = output(stream_of(decoder(input_ids=ids, use_cache=False)))
    except (TypeError, RuntimeError, AttributeError):
        return None
    finally:
        model.train(training)
    return (decoder, output) if torch.equal(whole, parts) else None


def stream_of(output: Any) -> Tensor:
    """What a decoder returns for the head."""
    found: Tensor = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
    return found
