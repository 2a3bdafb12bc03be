"""What a training computes at a time here, and what it computes twice, for the memory there is.

Neither changes what is learned by more than rounding; it is decided once for a training, which
goes on with it when it is resumed. A training that cannot fit is refused before it begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from isingcut.errors import InputError
from isingcut.healing.checks import stored_dtype
from isingcut.healing.job import Job
from isingcut.healing.trainer_file import is_sharded, trainer_settings
from isingcut.healing.training.kl import CHUNK_ELEMENTS
from isingcut.measure.splitting import fewer_tokens_to_fit
from isingcut.memory import is_memory_exhausted
from isingcut.models.architectures import find_stack, text_config
from isingcut.models.compute.tuning import kept_bytes
from isingcut.models.device import BatchLimit
from isingcut.models.fp8 import DTYPES
from isingcut.models.memory import allowance
from isingcut.options.spellings import parse_healing
from isingcut.options.types import BATCH_TOKENS

# More tokens at a time save nothing that is worth their memory.
_MOST = {"cpu": 2048, "cuda": 16384}
# Of the sample whose activations are counted, and of one that is counted on the CPU for a GPU.
_COUNTED, _COUNTED_APART = 512, 32
# Bytes of a trained number.
_WEIGHT, _GRADIENT, _MOMENTS = 4, 4, 8
# Tokens of a sample that are worth a training.
_SHORTEST = 16
_ACTIVATIONS = "activations of one sample"


@dataclass(frozen=True)
class Way:
    """How one training is computed.

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


def way_of(job: Job, student: Any, row: dict[str, Tensor], *, placed: bool = True) -> Way:
    """The way for this machine's memory, where the options leave it open.

    Args:
        student: the model that is trained, its loss installed, its attention chosen.
        row: the batch of the longest sample.
        placed: the student is on its device; else it is on the CPU, because it does not fit or
            for FSDP or DeepSpeed to shard.

    Raises:
        InputError: the training does not fit, even with one sample at a time. One that is sharded
            is not refused: FSDP and DeepSpeed may keep parts of it in host memory.

    Complexity: the forward passes of 768 tokens.
    """
    config, device = job.config, job.teacher.device
    longest = int(job.tokens.mask.sum(1).max())
    wanted = min(_MOST.get(device.type, BATCH_TOKENS), longest * config.sequences)
    kept, terms = _activations(job, student, row), _terms(job, student)
    here = terms["teacher"] + (terms["weights"] if placed else 0)
    needed = sum(terms.values()) - here
    room = allowance("", device).left - needed - kept.around(max(wanted, longest))
    recompute = config.gradient_checkpointing
    if recompute is None:
        recompute = room < kept.each * longest
    terms[_ACTIVATIONS] = kept.of(longest, recompute=recompute)
    total = allowance("100%", device).left + here
    if not is_sharded(config) and (sum(terms.values()) > total or not placed):
        raise _refusal(job, student, kept, terms, total)
    most = max(longest, min(wanted, int(room / (kept.again if recompute else kept.each))))
    if config.micro_batch is not None:
        most = config.micro_batch * longest
    return Way(most, recompute)


def _terms(job: Job, student: nn.Module) -> dict[str, float]:
    """Bytes of what a training keeps on the device of each process."""
    ranks = job.processes.size if is_sharded(job.config) else 1
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad) / ranks
    # Others of transformers' optimisers keep less.
    optimiser = str(trainer_settings(job.config).get("optim", "adamw_torch"))
    # Where kept answers stand for it, it is elsewhere.
    teacher = {
        place: size
        for place, size in _storages(job.teacher.model).items()
        if place[0].type == job.teacher.device.type
    }
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
    if "indices" not in given:
        # In the place of the teacher's answers, of which nothing is kept.
        none = torch.zeros((*given["input_ids"].shape, 1), device=device)
        given |= {"indices": none.long(), "logp": none, "tail": none[..., 0]}
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        return kept_bytes(student, lambda: student(**given)["loss"])


def _refusal(
    job: Job, student: nn.Module, kept: _Activations, terms: dict[str, float], total: float
) -> InputError:
    """What a training takes, and the options with which it would fit, in one line."""
    parts = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in terms.items())
    options = " or ".join(_that_fit(job, student, kept, terms, total))
    cpu = "" if job.teacher.device.type == "cpu" else ", or --device cpu"
    return InputError(
        f"training with --method {job.config.method} takes {sum(terms.values()) / 1e9:.3g} GB "
        f"({parts}), and {job.teacher.device} has {total / 1e9:.3g} GB for it; "
        + (f"{options} would fit" if options else f"take a device with more memory{cpu}")
    )


def _that_fit(
    job: Job, student: nn.Module, kept: _Activations, terms: dict[str, float], total: float
) -> Iterator[str]:
    """Options with which a training fits, with shorter samples where it must be."""
    config, longest = job.config, int(job.tokens.mask.sum(1).max())
    rest = sum(terms.values()) - terms[_ACTIVATIONS]
    recompute = config.gradient_checkpointing is not False
    ways = {}
    if config.method != "lora":
        linear = [m for m in student.modules() if isinstance(m, nn.Linear)]
        adapters = config.lora_rank * sum(m.in_features + m.out_features for m in linear)
        lora = (_WEIGHT + _GRADIENT + _MOMENTS) * adapters + terms["teacher"]
        if job.teacher.dtype not in (torch.float32, DTYPES[stored_dtype(job.start)]):
            # Weights that the teacher's dtype cannot hold are not shared.
            lora += terms["weights"]
        ways["--method lora "] = (lora, replace(kept, fixed=0.0))
    timed = parse_healing(config.effort)[1] is not None
    taken = config.top_k or config.hidden_weight or config.temperature != 1 or timed
    if job.teacher.device.type != "cpu" and not taken:
        # Nothing is shared then.
        alone = rest - terms["teacher"] - terms["weights"] + sum(_storages(student).values())
        ways["--top-k 64 "] = (alone, kept)
    ways[""] = (rest, kept)
    for name, (size, found) in ways.items():
        length = longest
        while length >= _SHORTEST and size + found.of(length, recompute=recompute) > total:
            length //= 2
        if length >= min(longest, _SHORTEST):
            yield f"{name}--length {length}" if length < longest else name.strip()
    if not recompute and rest + kept.of(longest, recompute=True) <= total:
        yield "--gradient-checkpointing"
