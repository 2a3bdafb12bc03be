"""The distilled loss of a batch, computed inside the student's own forward pass.

The student's `forward` is replaced by one that returns the summed divergence, so that everything
that wraps a model (DDP, FSDP, DeepSpeed, autocast, gradient checkpointing) wraps the loss too, and
no logits leave the forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isingcut.models.architectures.blocks import text_config, text_model
from isingcut.models.compute.divergence import divergence, divergence_from_stream
from isingcut.models.compute.head import entering


def split_head(model: Any) -> tuple[Any, Any] | None:
    """The decoder and the output layer, where ``output(decoder(ids))`` are the model's logits.

    Tried on a few tokens: a model that scales or caps its logits afterwards (Granite, Gemma 2)
    gives None, and its logits are taken as its own forward pass gives them.
    """
    decoder, output = (
        getattr(model, name, lambda: None)() for name in ("get_decoder", "get_output_embeddings")
    )
    if decoder is None or output is None or decoder is model:
        return None
    ids = torch.arange(5, device=model.device)[None] % int(text_config(model).vocab_size)
    training = model.training
    model.eval()
    try:
        inputs = entering(output, lambda: model(input_ids=ids, use_cache=False).logits)
        with torch.no_grad():
            stream = stream_of(decoder(input_ids=ids, use_cache=False))
        same = inputs is not None and torch.equal(inputs, stream)
    except (TypeError, RuntimeError, AttributeError):
        return None
    finally:
        model.train(training)
    return (decoder, output) if same else None


def stream_of(output: Any) -> Tensor:
    """What a decoder returns for the head."""
    found: Tensor = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
    return found


def install(student: Any, plain: Any, original: Any) -> None:
    """Make ``student(input_ids, attention_mask, ...)`` return ``{"loss": sum over predictions}``.

    Args:
        student: the model that is trained, perhaps a peft wrapper.
        plain: the transformers model inside it.
        original: the teacher, frozen, on the student's device.
    """
    text, teacher = text_model(plain), text_model(original)
    forward = text.forward
    parts, other = split_head(text), split_head(teacher)
    size = text.get_output_embeddings().weight.shape[0] if parts else 1

    def read(whole: Any, taken: Any, ids: Tensor, rows: Tensor) -> Tensor:
        """What predicts the next tokens, (n, D) for a head or (n, V).

        Padding is on the right, where no real token sees it: the models need no mask.
        """
        output = (taken[0] if taken else whole)(ids, use_cache=False)
        stream = stream_of(output) if taken else output.logits
        return stream[:, :-1][rows]

    def teacher_head(stream: Tensor) -> Tensor:
        if not other:
            return stream
        with torch.autocast(stream.device.type, enabled=False):
            found: Tensor = other[1](stream)
        return found

    def distilled(
        input_ids: Tensor,
        attention_mask: Tensor,
        counted: Tensor | None = None,
        *,
        alone: bool = False,
        **ignored: Any,
    ) -> dict[str, Tensor]:
        """The summed divergence; ``alone`` of the student from itself, to count its memory."""
        rows = (attention_mask if counted is None else counted)[:, 1:].bool()
        given, head = read(forward, parts, input_ids, rows), teacher_head
        if alone:
            target, head = given.detach(), parts[1] if parts else teacher_head
        else:
            with torch.no_grad(), torch.autocast(input_ids.device.type, enabled=False):
                target = read(teacher, parts and other, input_ids, rows)
        if not parts:
            return {"loss": divergence(given, target)}
        loss = divergence_from_stream(given, parts[1], target, head, vocabulary=size)
        return {"loss": loss}

    student.forward = distilled
