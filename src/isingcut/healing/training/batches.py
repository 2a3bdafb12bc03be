"""Make the micro-batches of a training, and plan its memory.

The samples of a step are in shuffled order. They are sorted by length, distributed to the
processes, and divided into micro-batches with little padding; a step's gradient does not depend on
the order or division. All steps have the same number of micro-batches in every process, as gradient
accumulation and sharded models require.

Micro-batch size and recomputation change the result by rounding only. They are chosen once per
training and kept when it resumes. A training that does not fit raises an error before it starts.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from isingcut.data.tokens import TokenSet
from isingcut.errors import InputError
from isingcut.files.healings import HealingMemory
from isingcut.formats.architectures.blocks import text_config
from isingcut.healing.job import Job, is_sharded, trainer_settings
from isingcut.measure.splitting import count_graph_bytes, fewer_tokens_to_fit
from isingcut.models.compute.divergence import CHUNK_ELEMENTS
from isingcut.models.device import BatchLimit, least_left
from isingcut.models.placement import devices_of, name_devices
from isingcut.options.machine import BATCH_TOKENS

# The overhead of a micro-batch (casting weights, adding gradients), as a number of tokens.
_EACH = 64
# Number of steps to estimate padding on, and of additional micro-batches per step to consider.
_LOOKED_AT = 8
_MORE = 16


@dataclass
class Steps(Sampler[list[int]]):
    """The micro-batches of a training, as a batch sampler.

    A step has the fewest micro-batches that are possible, or more to save padding.

    Args:
        lengths: number of tokens of each sample.
        batch: samples per optimiser step, over all processes.
        steps: number of optimiser steps.
        rank, size: rank of this process, and number of processes.
        seed: seed of the sample order.
        most: maximum tokens of a micro-batch, padding included; a single sample may have more.

    Attributes:
        micro_batches: micro-batches per step and process.
    """

    lengths: Sequence[int]
    batch: int
    steps: int
    rank: int
    size: int
    seed: int
    most: int

    def __post_init__(self) -> None:
        samples = len(self.lengths)
        order = list[int]()
        for epoch in range(math.ceil(self.steps * self.batch / samples)):
            shuffled = torch.Generator().manual_seed(self.seed + epoch)
            order += torch.randperm(samples, generator=shuffled).tolist()
        # The samples of each step, longest first.
        self._order = [
            sorted(order[first : first + self.batch], key=lambda i: -self.lengths[i])
            for first in range(0, self.steps * self.batch, self.batch)
        ]
        every = [
            [self.lengths[i] for i in samples_of_step[rank :: self.size]]
            for samples_of_step in self._order
            for rank in range(self.size)
        ]
        fewest = max(self._count_parts(lengths) for lengths in every)
        count = min(fewest + _MORE, self.batch // self.size)
        costs = np.zeros(count)
        for lengths in every[: _LOOKED_AT * self.size]:
            costs += [cost for cost, _ in divisions(lengths, count, self.most)]
            costs += _EACH * np.arange(1, count + 1)
        self.micro_batches = fewest + int(costs[fewest - 1 :].argmin())

    def __len__(self) -> int:
        return self.steps * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        for samples_of_step in self._order:
            mine = samples_of_step[self.rank :: self.size]
            lengths = [self.lengths[i] for i in mine]
            *_, (_, parts) = divisions(lengths, self.micro_batches, self.most)
            for part in parts:
                yield mine[part]

    def _count_parts(self, lengths: Sequence[int]) -> int:
        """Return the minimum number of parts of at most ``most`` tokens."""
        tried = enumerate(divisions(lengths, len(lengths), self.most), 1)
        return next(count for count, (cost, _) in tried if np.isfinite(cost))


def divisions(
    lengths: Sequence[int], count: int, most: int
) -> Iterator[tuple[float, list[slice]]]:
    """Divide samples into 1, 2, ... ``count`` parts with the least padding.

    Args:
        lengths: lengths of the samples, descending.
        count: maximum number of parts, at most the number of samples.
        most: maximum tokens of a part with several samples, padding included.

    Yields:
        for each number of parts, the cost in tokens with padding (infinite if no division fits),
        and the parts.

    Complexity: count x samples^2.
    """
    size = len(lengths)
    first = np.arange(size)[:, None]
    last = np.arange(1, size + 1)[None]
    area = np.asarray(lengths, dtype=float)[:, None] * (last - first)
    # Among divisions with equal padding, prefer parts of similar size.
    cost = np.where(last > first, area * (1 + 1e-6 * area), np.inf)
    cost[(area > most) & (last > first + 1)] = np.inf
    best = cost[0]
    cuts = []
    for n in range(count):
        if n:
            # total[i, j]: samples 0 to i in the previous parts, samples i + 1 to j in this part.
            total = best[:-1, None] + cost[1:]
            cuts.append(total.argmin(0) + 1)
            best = total.min(0)
        ends = [size]
        for cut in reversed(cuts):
            ends.append(int(cut[ends[-1] - 1]))
        yield float(best[-1]), [slice(*ends) for ends in pairwise([0, *reversed(ends)])]


def batch_of(tokens: TokenSet, rows: Sequence[int]) -> dict[str, Tensor]:
    """Make a batch for the student, padded on the right.

    ``labels`` are -100 except for predictions that count; the loss is divided by their number.
    """
    chosen = tokens.select(rows)
    counts = chosen.mask if chosen.counted is None else chosen.counted
    labels = chosen.input_ids.masked_fill(~counts, -100)
    # The first token of a row is never predicted.
    labels[:, 0] = -100
    batch = {
        "input_ids": chosen.input_ids,
        "attention_mask": chosen.mask.long(),
        "labels": labels,
    }
    return batch if chosen.counted is None else {**batch, "counted": chosen.counted}


# Maximum tokens of a micro-batch; larger ones save too little time for their memory.
_MOST = {"cpu": 2048, "cuda": 16384}
# Tokens of the sample to count activations on; fewer if the student is on the CPU, not the GPU.
_COUNTED = 512
_COUNTED_APART = 32
# Bytes per trained parameter.
_GRADIENT = 4
_MOMENTS = 8


def plan_memory(
    job: Job, student: Any, batch: int, *, placed: bool = True
) -> HealingMemory:
    """Choose micro-batch size and recomputation for the free memory, unless `--trainer` sets them.

    Args:
        student: the model to train, with its loss installed and its attention chosen.
        batch: sequences per optimiser step, over all processes.
        placed: whether the student is on its device; if not, it is on the CPU, because it does not
            fit or because FSDP or DeepSpeed shard it.

    Raises:
        InputError: the training does not fit, even with one sample per micro-batch. Sharded
            trainings are not checked, because FSDP and DeepSpeed may use host memory.

    Complexity: forward passes over 768 tokens.
    """
    settings = trainer_settings(job.config)
    device = job.teacher.device
    # With several devices, memory use is assumed to be spread evenly.
    devices = devices_of(job.teacher.model)
    lengths = job.tokens.mask.sum(1)
    longest = int(lengths.max())
    row = batch_of(job.tokens, [int(lengths.argmax())])
    wanted = min(_MOST.get(device.type, BATCH_TOKENS), longest * batch)
    each, again, fixed = _activations(job, student, row)
    terms = _terms(job, student, settings)
    words = int(text_config(job.teacher.model).vocab_size)
    logit = job.teacher.dtype.itemsize

    def around(tokens: int) -> float:
        """Return the activation bytes not proportional to the tokens, including the loss."""
        # Logits of both models, and the gradient of the loss.
        return fixed + 3 * logit * min(CHUNK_ELEMENTS, words * tokens)

    here = terms["teacher"] + (terms["weights"] if placed else 0)
    needed = sum(terms.values()) - here
    room = len(devices) * least_left(devices) - needed - around(max(wanted, longest))
    names = ("gradient_checkpointing", "activation_checkpointing")
    chosen = [settings[name] for name in names if settings.get(name) is not None]
    recompute = chosen[0] if chosen else room < each * longest
    of_token = again if recompute else each
    terms["activations of one sample"] = around(longest) + longest * of_token
    total = len(devices) * least_left(devices, "100%") + here
    if not is_sharded(settings) and (sum(terms.values()) > total or not placed):
        parts = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in terms.items())
        lora = "" if job.config.lora_rank else "--method lora, "
        shards = "fsdp: true in --trainer, " if job.processes.size > 1 else ""
        raise InputError(
            f"training with --method {job.config.method} needs {sum(terms.values()) / 1e9:.3g} GB "
            f"({parts}), but {name_devices(job.teacher)} has {total / 1e9:.3g} GB for it; use "
            f"{lora}{shards}a smaller --length or a device with more memory"
        )
    most = max(longest, min(wanted, int(room / of_token)))
    if "gradient_accumulation_steps" in settings:
        most = settings.get("per_device_train_batch_size", 8) * longest
    return HealingMemory(most=most, recompute=recompute)


def _terms(
    job: Job, student: nn.Module, settings: Mapping[str, Any]
) -> dict[str, float]:
    """Return the bytes that a training keeps on the device of each process, by purpose."""
    ranks = job.processes.size if is_sharded(settings) else 1
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad) / ranks
    # Other optimisers of transformers use less memory, which is not counted.
    moments = str(settings.get("optim", "adamw_torch")).startswith("adamw_torch")
    teacher = _storages(job.teacher.model)
    own = [size for place, size in _storages(student).items() if place not in teacher]
    return {
        "weights": sum(own) / ranks,
        "gradients": _GRADIENT * trained,
        "moments": _MOMENTS * trained * moments,
        "teacher": sum(teacher.values()),
    }


def _storages(model: nn.Module) -> dict[tuple[torch.device, int], int]:
    """Return the bytes of each storage of a model's tensors."""
    tensors = (t for t in (*model.parameters(), *model.buffers()) if not t.is_meta)
    storages = ((t.device, t.untyped_storage()) for t in tensors)
    return {
        (device, storage.data_ptr()): storage.nbytes() for device, storage in storages
    }


def _activations(
    job: Job, student: Any, row: dict[str, Tensor]
) -> tuple[float, float, float]:
    """Count the bytes that a forward pass keeps for the backward pass.

    They are measured on a sample.

    Returns:
        bytes per token; bytes per token with recomputation; and bytes that do not depend on the
        tokens, such as weights in the compute dtype.
    """
    device = next(student.parameters()).device
    text = text_config(job.teacher.model)
    blocks = job.teacher.stack.depth - len(job.removed.layers)
    entering = 4 * blocks * int(text.hidden_size)
    dtype = job.teacher.dtype

    def kept(tokens: int) -> int:
        given = {k: v[:, :tokens].to(device) for k, v in row.items()}
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return count_graph_bytes(
                student, lambda: student(**given, alone=True)["loss"]
            )

    def count_saved(length: int) -> tuple[float, float]:
        few = max(1, length // 2)
        less, more = map(kept, (few, length))
        each = max(1.0, (more - less) / max(1, length - few))
        return each, max(0.0, less - each * few)

    length = _COUNTED if device.type == job.teacher.device.type else _COUNTED_APART
    length = min(length, row["input_ids"].shape[1])
    each, fixed = fewer_tokens_to_fit(BatchLimit(device), length, 1, count_saved)
    # The gradient of the logits is computed in the forward pass and never recomputed.
    logits = job.teacher.dtype.itemsize * int(text.vocab_size)
    return each, each / blocks + entering + logits, fixed
