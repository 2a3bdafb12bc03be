"""What a training computes at a time here, and what it computes twice, for the memory there is.

Neither changes what is learned by more than rounding; it is decided once for a training, which
goes on with it when it is resumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isingcut.healing.job import Job
from isingcut.healing.training.kl import CHUNK_ELEMENTS
from isingcut.models.architectures import find_stack, text_config
from isingcut.models.compute.tuning import kept_bytes
from isingcut.models.memory import allowance
from isingcut.options.types import BATCH_TOKENS

# More tokens at a time save nothing that is worth their memory.
_MOST = {"cpu": 2048, "cuda": 16384}
# Of the sample whose activations are counted.
_COUNTED = 512


@dataclass(frozen=True)
class Way:
    """How one training is computed.

    Attributes:
        most: tokens of a micro-batch, padding included; a single sample may have more.
        recompute: activations are computed again in the backward pass.
    """

    most: int
    recompute: bool


def way_of(job: Job, student: Any, row: dict[str, Tensor]) -> Way:
    """The way for this machine's memory, where the options leave it open.

    Args:
        student: the model that is trained, its loss installed, its attention chosen, on its device.
        row: the batch of the longest sample.

    Complexity: the forward passes of 768 tokens.
    """
    config, device = job.config, job.teacher.device
    longest = int(job.tokens.mask.sum(1).max())
    wanted = min(_MOST.get(device.type, BATCH_TOKENS), longest * config.sequences)
    half = job.teacher.dtype == torch.bfloat16
    each, fixed = _activations(student, row, half=half)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    vocabulary = int(text_config(job.teacher.model).vocab_size)
    # Gradients and AdamW's two moments, float32; both models' logits and the loss' gradient.
    fixed += 12 * trained + 12 * min(CHUNK_ELEMENTS, vocabulary * max(wanted, longest))
    room = allowance("", device).left - fixed
    recompute = config.gradient_checkpointing
    if recompute is None:
        recompute = room < each * longest
    if recompute:
        blocks = len(find_stack(job.teacher.model)) - len(job.removed)
        each = each / blocks + 4 * blocks * int(text_config(job.teacher.model).hidden_size)
        # The gradient of the logits is formed with them and never computed again.
        each += (2 if half else 4) * vocabulary
    most = max(longest, min(wanted, int(room / each)))
    if config.micro_batch is not None:
        most = config.micro_batch * longest
    return Way(most, recompute)


def _activations(student: Any, row: dict[str, Tensor], *, half: bool) -> tuple[float, float]:
    """Bytes kept for the backward pass: for each token, and whatever the tokens."""
    length = min(_COUNTED, row["input_ids"].shape[1])
    few = max(1, length // 2)
    less, more = (
        _kept(student, {k: v[:, :n] for k, v in row.items()}, half=half) for n in (few, length)
    )
    each = max(1.0, (more - less) / max(1, length - few))
    return each, max(0.0, less - each * few)


def _kept(student: Any, batch: dict[str, Tensor], *, half: bool) -> int:
    device = next(student.parameters()).device
    given = {k: v.to(device) for k, v in batch.items()}
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        return kept_bytes(student, lambda: student(**given)["loss"])
