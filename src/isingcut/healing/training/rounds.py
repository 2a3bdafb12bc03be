"""The distilled loss of a batch, computed inside the student's own forward pass.

The student's `forward` is replaced by one that returns the summed divergence, so that everything
that wraps a model (DDP, FSDP, DeepSpeed, autocast, gradient checkpointing) wraps the loss too, and
no logits leave the forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isingcut.healing.training.kl import TopK, divergence, divergence_from_stream, stacked, top_k
from isingcut.models.architectures import text_config
from isingcut.models.compute.head import entering
from isingcut.models.text_alone import text_model


@dataclass(frozen=True, eq=False)
class Objective:
    """What the student is trained for.

    Attributes:
        teacher: the original, frozen, on the student's device; None with `TopK` targets.
        temperature: softens both distributions.
        pairs: (student block, teacher block) after which hidden states should agree.
        hidden_weight: weight of that.
    """

    teacher: Any
    temperature: float = 1.0
    pairs: Sequence[tuple[int, int]] = ()
    hidden_weight: float = 0.0


def separable(model: Any) -> tuple[Any, Any] | None:
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


def install(student: Any, plain: Any, objective: Objective) -> None:
    """Make ``student(input_ids, attention_mask, ...)`` return ``{"loss": sum over predictions}``.

    Args:
        student: the model that is trained, perhaps a peft wrapper.
        plain: the transformers model inside it.
    """
    text = text_model(plain)
    forward = text.forward
    teacher = None if objective.teacher is None else text_model(objective.teacher)
    parts = separable(text)
    other = None if teacher is None else separable(teacher)
    size = text.get_output_embeddings().weight.shape[0] if parts else 1
    hidden = bool(objective.hidden_weight)

    def read(whole: Any, taken: Any, ids: Tensor, rows: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """What predicts the next tokens, (n, D) for a head or (n, V), and the hidden states.

        Padding is on the right, where no real token sees it: the models need no mask.
        """
        options = {"use_cache": False, "output_hidden_states": hidden}
        output = taken[0](ids, **options) if taken else whole(ids, **options)
        stream = stream_of(output) if taken else output.logits
        return stream[:, :-1][rows], output.hidden_states if hidden else ()

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
        indices: Tensor | None = None,
        logp: Tensor | None = None,
        tail: Tensor | None = None,
        **ignored: Any,
    ) -> dict[str, Tensor]:
        rows = (attention_mask if counted is None else counted)[:, 1:].bool()
        given, states = read(forward, parts, input_ids, rows)
        target: Tensor | TopK
        others: Sequence[Tensor] = ()
        if indices is not None and logp is not None and tail is not None:
            target = TopK(indices[:, :-1][rows], logp[:, :-1][rows], tail[:, :-1][rows])
        else:
            with torch.no_grad(), torch.autocast(input_ids.device.type, enabled=False):
                target, others = read(teacher, parts and other, input_ids, rows)
        if parts:
            loss = divergence_from_stream(
                given, parts[1], target, teacher_head, objective.temperature, vocabulary=size
            )
        else:
            loss = divergence(given, target, objective.temperature)
        # A check looks at the divergence alone.
        if hidden and text.training:
            real = attention_mask.bool()
            loss = loss + objective.hidden_weight * _mismatch(
                states, others, objective.pairs, real, rows
            )
        return {"loss": loss}

    student.forward = distilled


def _mismatch(
    states: Sequence[Tensor],
    others: Sequence[Tensor],
    pairs: Sequence[tuple[int, int]],
    real: Tensor,
    rows: Tensor,
) -> Tensor:
    """Squared distance of hidden states relative to the teacher's size, mean over the pairs,
    summed over tokens and scaled to as many tokens as there are predictions."""
    total = torch.zeros((), device=real.device)
    for s, t in pairs:
        mine, theirs = states[s + 1][real].float(), others[t + 1][real].float()
        total = total + ((mine - theirs).square().sum(-1) / theirs.square().sum(-1)).sum()
    return total / len(pairs) * (rows.sum() / real.sum())


def targets(teacher: Any, ids: Tensor, k: int) -> TopK:
    """The teacher's `TopK` (B, T, k) at every position of a batch, padded ones included."""
    with torch.no_grad():
        logits = text_model(teacher)(input_ids=ids, use_cache=False).logits
    return stacked([top_k(row, k) for row in logits])
