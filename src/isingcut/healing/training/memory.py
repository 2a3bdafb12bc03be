"""What a training computes at a time here, and what it computes twice, for the memory there is.

Neither changes what is learned by more than rounding; it is decided once for a training, which
goes on with it when it is resumed. A training that cannot fit is refused before it begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isingcut.errors import InputError
from isingcut.healing.job import Job
from isingcut.healing.trainer_file import is_sharded, trainer_settings
from isingcut.measure.splitting import fewer_tokens_to_fit
from isingcut.memory import is_memory_exhausted
from isingcut.models.architectures import find_stack, text_config
from isingcut.models.compute.divergence import CHUNK_ELEMENTS
from isingcut.models.compute.tuning import kept_bytes
from isingcut.models.device import BatchLimit
from isingcut.models.memory import allowance
from isingcut.options.config import BATCH_TOKENS

# More tokens at a time save nothing that is worth their memory.
_MOST = {"cpu": 2048, "cuda": 16384}
# Of the sample whose activations are counted, and of one that is counted on the CPU for a GPU.
_COUNTED, _COUNTED_APART = 512, 32
# Bytes of a trained number.
_GRADIENT, _MOMENTS = 4, 8
_ACTIVATIONS = "activations of one sample"


@dataclass(frozen=True)
class MemoryPlan:
    """How one training is computed in the memory there is.

    Attributes:
        most: tokens of a micro-batch, padding included; a single sample may have more.
        recompute: activations are computed again in the backward pass.
    """

    most: int
    recompute: bool


@dataclass(frozen=True)
class _Activations:
    """Bytes that a forward pass leaves for the backward pass.

    Attributes:
        each: of a token.
        again: of a token where the blocks are computed again.
        fixed: whatever the tokens, such as weights in the dtype that is computed in.
        vocabulary: words of the model.
        logit: of each of them.
    """

    each: float
    again: float
    fixed: float
    vocabulary: int
    logit: int

    def of(self, tokens: int, *, recompute: bool) -> float:
        """Of so many tokens, the loss included."""
        return self.around(tokens) + tokens * (self.again if recompute else self.each)

    def around(self, tokens: int) -> float:
        """Of so many tokens, what is not in proportion to them."""
        # Logits of both models, and the gradient of the loss.
        return self.fixed + 3 * self.logit * min(CHUNK_ELEMENTS, self.vocabulary * tokens)


def plan_memory(
    job: Job, student: Any, row: dict[str, Tensor], batch: int, *, placed: bool = True
) -> MemoryPlan:
    """The plan for this machine's memory, where the `--trainer` file leaves it open.

    Args:
        student: the model that is trained, its loss installed, its attention chosen.
        row: the batch of the longest sample.
        batch: sequences of an optimiser step, over all processes.
        placed: the student is on its device; else it is on the CPU, because it does not fit or
            for FSDP or DeepSpeed to shard.

    Raises:
        InputError: the training does not fit, even with one sample at a time. One that is sharded
            is not refused: FSDP and DeepSpeed may keep parts of it in host memory.

    Complexity: the forward passes of 768 tokens.
    """
    settings, device = trainer_settings(job.config), job.teacher.device
    longest = int(job.tokens.mask.sum(1).max())
    wanted = min(_MOST.get(device.type, BATCH_TOKENS), longest * batch)
    kept, terms = _activations(job, student, row), _terms(job, student, settings)
    here = terms["teacher"] + (terms["weights"] if placed else 0)
    needed = sum(terms.values()) - here
    room = allowance("", device).left - needed - kept.around(max(wanted, longest))
    names = ("gradient_checkpointing", "activation_checkpointing")
    said = [settings[name] for name in names if settings.get(name) is not None]
    recompute = said[0] if said else room < kept.each * longest
    terms[_ACTIVATIONS] = kept.of(longest, recompute=recompute)
    total = allowance("100%", device).left + here
    if not is_sharded(settings) and (sum(terms.values()) > total or not placed):
        parts = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in terms.items())
        lora = "" if job.config.lora_rank else "--method lora, "
        raise InputError(
            f"training with --method {job.config.method} takes {sum(terms.values()) / 1e9:.3g} GB "
            f"({parts}), and {device} has {total / 1e9:.3g} GB for it; give {lora}a smaller "
            "--length or a device with more memory"
        )
    most = max(longest, min(wanted, int(room / (kept.again if recompute else kept.each))))
    if "gradient_accumulation_steps" in settings:
        most = settings.get("per_device_train_batch_size", 8) * longest
    return MemoryPlan(most, recompute)


def _terms(job: Job, student: nn.Module, settings: Mapping[str, Any]) -> dict[str, float]:
    """Bytes of what a training keeps on the device of each process."""
    ranks = job.processes.size if is_sharded(settings) else 1
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad) / ranks
    # Others of transformers' optimisers keep less.
    optimiser = str(settings.get("optim", "adamw_torch"))
    teacher = _storages(job.teacher.model)
    own = [size for place, size in _storages(student).items() if place not in teacher]
    return {
        "weights": sum(own) / ranks,
        "gradients": _GRADIENT * trained,
        "moments": _MOMENTS * trained if optimiser.startswith("adamw_torch") else 0,
        "teacher": sum(teacher.values()),
    }


def _storages(model: nn.Module) -> dict[tuple[torch.device, int], int]:
    """Bytes of each storage that a model's tensors are in."""
    tensors = (t for t in (*model.parameters(), *model.buffers()) if not t.is_meta)
    storages = ((t.device, t.untyped_storage()) for t in tensors)
    return {(device, storage.data_ptr()): storage.nbytes() for device, storage in storages}


def _activations(job: Job, student: Any, row: dict[str, Tensor]) -> _Activations:
    """Counted on a sample; where memory ends even so, no more than what enters the blocks."""
    device = next(student.parameters()).device
    text, logit = text_config(job.teacher.model), job.teacher.dtype.itemsize
    blocks = len(find_stack(job.teacher.model)) - len(job.removed)
    vocabulary, entering = int(text.vocab_size), 4 * blocks * int(text.hidden_size)
    half = job.teacher.dtype == torch.bfloat16

    def counted(length: int) -> tuple[float, float]:
        few = max(1, length // 2)
        less, more = (_kept(student, row, n, half=half) for n in (few, length))
        each = max(1.0, (more - less) / max(1, length - few))
        return each, max(0.0, less - each * few)

    length = _COUNTED if device.type == job.teacher.device.type else _COUNTED_APART
    length = min(length, row["input_ids"].shape[1])
    try:
        each, fixed = fewer_tokens_to_fit(BatchLimit(device), length, 1, counted)
    except Exception as e:
        if not is_memory_exhausted(e):
            raise
        each, fixed = float(entering), 0.0
    # The gradient of the logits is formed with them and never computed again.
    again = each / blocks + entering + logit * vocabulary
    return _Activations(each, again, fixed, vocabulary, logit)


def _kept(student: Any, row: dict[str, Tensor], tokens: int, *, half: bool) -> int:
    device = next(student.parameters()).device
    given = {k: v[:, :tokens].to(device) for k, v in row.items()}
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        return kept_bytes(student, lambda: student(**given, alone=True)["loss"])
