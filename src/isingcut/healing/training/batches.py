"""Which samples are computed together, and how many, for the memory there is.

A step takes its samples in a shuffled order. They are sorted by length, dealt to the processes, and
cut into micro-batches so that little padding is computed: what a step learns is the same in any
order and in any parts. Every step has as many micro-batches as every other, in every process, as
gradient accumulation and sharded models ask for.

How much is computed at a time, and what twice, changes what is learned by no more than rounding. It
is decided once for a training, which goes on with it when it is resumed. A training that cannot fit
is refused before it begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from isingcut.data.tokens import TokenSet
from isingcut.errors import InputError
from isingcut.files.documents import HealingMemory
from isingcut.healing.job import Job
from isingcut.healing.recipe import is_sharded, trainer_settings
from isingcut.measure.splitting import fewer_tokens_to_fit
from isingcut.memory import is_memory_exhausted
from isingcut.models.architectures.blocks import find_stack, text_config
from isingcut.models.compute.divergence import CHUNK_ELEMENTS
from isingcut.models.compute.tuning import kept_bytes
from isingcut.models.device import BatchLimit, allowance
from isingcut.options.config import BATCH_TOKENS

# A further micro-batch casts the weights and adds up their gradients once more: about as much work
# as so many tokens.
_EACH = 64
# Steps whose padding is looked at, and micro-batches more than needed that are thought of.
_LOOKED_AT, _MORE = 8, 16


@dataclass(frozen=True)
class Steps(Sampler[list[int]]):
    """The micro-batches of a training, one after the other, as a batch sampler.

    Args:
        lengths: tokens of each sample.
        batch: samples of an optimiser step, over all processes.
        steps: optimiser steps.
        rank, size: of this process, of how many.
        seed: of the order.
        most: tokens of a micro-batch, padding included; one sample may have more.
        micro_batches: of a step, in each process.
    """

    lengths: Sequence[int]
    batch: int
    steps: int
    rank: int
    size: int
    seed: int
    most: int
    micro_batches: int = 1

    def __len__(self) -> int:
        return self.steps * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.steps):
            mine = self._of(step)[self.rank :: self.size]
            lengths = [self.lengths[i] for i in mine]
            *_, (_, found) = divisions(lengths, self.micro_batches, self.most)
            for part in found:
                yield mine[part]

    def _of(self, step: int) -> list[int]:
        """The samples of a step, the longest first."""
        found: list[int] = []
        first, samples = step * self.batch, len(self.lengths)
        for place in range(first, first + self.batch):
            epoch, at = divmod(place, samples)
            if not found or at == 0:
                shuffled = torch.Generator().manual_seed(self.seed + epoch)
                order = torch.randperm(samples, generator=shuffled)
            found.append(int(order[at]))
        return sorted(found, key=lambda i: -self.lengths[i])

    def divide(self) -> Steps:
        """With as many micro-batches as every step needs, and more where they save padding."""
        every = [
            [self.lengths[i] for i in found[rank :: self.size]]
            for found in map(self._of, range(self.steps))
            for rank in range(self.size)
        ]
        fewest = max(_needed(lengths, self.most) for lengths in every)
        count = min(fewest + _MORE, self.batch // self.size)
        costs = np.zeros(count)
        for lengths in every[: _LOOKED_AT * self.size]:
            costs += [cost for cost, _ in divisions(lengths, count, self.most)]
            costs += _EACH * np.arange(1, count + 1)
        return replace(self, micro_batches=fewest + int(costs[fewest - 1 :].argmin()))


SMALL = 3
"""Of the steps whose time is taken, those of one sample."""


def timed_steps(samples: int, several: int, rank: int, size: int) -> list[list[int]]:
    """Steps whose time is taken, each one micro-batch: three of one sample, two of several.

    Args:
        samples: that there are.
        several: how many one process computes at a time.
        rank, size: of this process, of how many.
    """
    found = []
    for step, count in enumerate([1] * SMALL + [several] * 2):
        first = (step * size + rank) * several
        found.append([i % samples for i in range(first, first + count)])
    return found


def _needed(lengths: Sequence[int], most: int) -> int:
    """The fewest parts of at most so many tokens: each as long as can be."""
    found, start = 0, 0
    while start < len(lengths):
        found, start = found + 1, start + max(1, most // lengths[start])
    return found


def divisions(lengths: Sequence[int], count: int, most: int) -> Iterator[tuple[float, list[slice]]]:
    """Samples in 1, 2, ... ``count`` parts of the least padding.

    Args:
        lengths: descending.
        count: at most one part for each sample.
        most: tokens of a part of several samples, padding included.

    Returns:
        for each number of parts the tokens, padding included, infinite where no such parts have
        few enough, and the parts.

    Complexity: count x samples^2.
    """
    size = len(lengths)
    first, last = np.arange(size)[:, None], np.arange(1, size + 1)[None]
    area = np.asarray(lengths, dtype=float)[:, None] * (last - first)
    # Of parts with as little padding those of like size.
    cost = np.where(last > first, area * (1 + 1e-6 * area), np.inf)
    cost[(area > most) & (last > first + 1)] = np.inf
    best, cuts = cost[0], []
    for n in range(count):
        if n:
            # total[i, j]: the samples up to i in the parts before, those behind it up to j here.
            total = best[:-1, None] + cost[1:]
            cuts.append(total.argmin(0) + 1)
            best = total.min(0)
        yield float(best[-1]), _slices(cuts, size)


def _slices(cuts: Sequence[np.ndarray], size: int) -> list[slice]:
    found, end = [], size
    for cut in reversed(cuts):
        start = int(cut[end - 1])
        found.append(slice(start, end))
        end = start
    return [slice(0, end), *reversed(found)]


def batch_of(tokens: TokenSet, rows: Sequence[int]) -> dict[str, Tensor]:
    """Samples as the student takes them, padded on the right.

    ``labels`` are -100 but where a prediction counts; their count scales the loss.
    """
    chosen = tokens.select(rows)
    counts = chosen.mask if chosen.counted is None else chosen.counted
    labels = chosen.input_ids.masked_fill(~counts, -100)
    # The first token of a row is never predicted.
    labels[:, 0] = -100
    batch = {"input_ids": chosen.input_ids, "attention_mask": chosen.mask.long(), "labels": labels}
    return batch if chosen.counted is None else {**batch, "counted": chosen.counted}


# More tokens at a time save nothing that is worth their memory.
_MOST = {"cpu": 2048, "cuda": 16384}
# Of the sample whose activations are counted, and of one that is counted on the CPU for a GPU.
_COUNTED, _COUNTED_APART = 512, 32
# Bytes of a trained number.
_GRADIENT, _MOMENTS = 4, 8


def plan_memory(job: Job, student: Any, batch: int, *, placed: bool = True) -> HealingMemory:
    """The plan for this machine's memory, where the `--trainer` file leaves it open.

    Args:
        student: the model that is trained, its loss installed, its attention chosen.
        batch: sequences of an optimiser step, over all processes.
        placed: the student is on its device; else it is on the CPU, because it does not fit or
            for FSDP or DeepSpeed to shard.

    Raises:
        InputError: the training does not fit, even with one sample at a time. One that is sharded
            is not refused: FSDP and DeepSpeed may keep parts of it in host memory.

    Complexity: the forward passes of 768 tokens.
    """
    settings, device = trainer_settings(job.config), job.teacher.device
    lengths = job.tokens.mask.sum(1)
    longest, row = int(lengths.max()), batch_of(job.tokens, [int(lengths.argmax())])
    wanted = min(_MOST.get(device.type, BATCH_TOKENS), longest * batch)
    each, again, fixed = _activations(job, student, row)
    terms = _terms(job, student, settings)
    words, logit = int(text_config(job.teacher.model).vocab_size), job.teacher.dtype.itemsize

    def around(tokens: int) -> float:
        """Of activations what is not in proportion to the tokens, the loss included."""
        # Logits of both models, and the gradient of the loss.
        return fixed + 3 * logit * min(CHUNK_ELEMENTS, words * tokens)

    here = terms["teacher"] + (terms["weights"] if placed else 0)
    needed = sum(terms.values()) - here
    room = allowance("", device).left - needed - around(max(wanted, longest))
    names = ("gradient_checkpointing", "activation_checkpointing")
    said = [settings[name] for name in names if settings.get(name) is not None]
    recompute = said[0] if said else room < each * longest
    of_token = again if recompute else each
    terms["activations of one sample"] = around(longest) + longest * of_token
    total = allowance("100%", device).left + here
    if not is_sharded(settings) and (sum(terms.values()) > total or not placed):
        parts = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in terms.items())
        lora = "" if job.config.lora_rank else "--method lora, "
        raise InputError(
            f"training with --method {job.config.method} takes {sum(terms.values()) / 1e9:.3g} GB "
            f"({parts}), and {device} has {total / 1e9:.3g} GB for it; give {lora}a smaller "
            "--length or a device with more memory"
        )
    most = max(longest, min(wanted, int(room / of_token)))
    if "gradient_accumulation_steps" in settings:
        most = settings.get("per_device_train_batch_size", 8) * longest
    return HealingMemory(most=most, recompute=recompute)


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


def _activations(job: Job, student: Any, row: dict[str, Tensor]) -> tuple[float, float, float]:
    """Bytes that a forward pass leaves for the backward pass.

    Counted on a sample; where memory ends even so, no more than what enters the blocks.

    Returns:
        of a token; the same where the blocks are computed again; whatever the tokens, such as
        weights in the dtype that is computed in.
    """
    device = next(student.parameters()).device
    text = text_config(job.teacher.model)
    blocks = len(find_stack(job.teacher.model)) - len(job.removed)
    entering = 4 * blocks * int(text.hidden_size)
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
    logits = job.teacher.dtype.itemsize * int(text.vocab_size)
    return each, each / blocks + entering + logits, fixed


def _kept(student: Any, row: dict[str, Tensor], tokens: int, *, half: bool) -> int:
    device = next(student.parameters()).device
    given = {k: v[:, :tokens].to(device) for k, v in row.items()}
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        return kept_bytes(student, lambda: student(**given, alone=True)["loss"])
