"""KL and NLL of rows of logits against reference logits.

`RowSums` reads logits once, in pieces of the vocabulary; `row_kl` is for rows that are there whole;
`divergence` and `divergence_from_stream` are their sum as autograd takes it, to train on.
For one position with reference logits l and logits q, and p = softmax(l),

    NLL = log Z(q) - q[label]
    KL(p || softmax(q)) = sum_v p_v (l_v - q_v) + log Z(q) - log Z(l)

Both need one pass over q: a running maximum and sum of exponentials (M. Milakov and N. Gimelshein,
Online normalizer calculation for softmax, arXiv 1805.02867), and the weighted sum of differences.
The difference l - q is formed before it is weighted: sums of p l and of p q alone, with logits of
size 10 to 30, would cost float32 four digits of the KL.

p is not kept but computed again from l, which has half its bytes in bfloat16: on a CPU one more
exponential costs less than reading p from memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isingcut.ising.states import Floats
from isingcut.models.compute.kernels import (
    accumulate,
    bits,
    compiled_for,
    in_threads,
    softmax_difference,
)

CHUNK_ELEMENTS = 1 << 26
"""Elements of logits looked at together, at most."""
_BUFFER_ELEMENTS = 1 << 22
# What stays in a CPU's cache while it is read three times.
_CACHED_ELEMENTS = 1 << 19


def row_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p || q) of each row (R,), nats, from log-probabilities (R, V)."""
    found: Tensor = torch.linalg.vecdot(logp.exp(), logp - logq)
    return found


class RowSums:
    """Running sums over the vocabulary for R positions.

    Args:
        labels: (R,) int64, the next token of each.
        reference_log_z: (R,) log Z of the reference; None for the NLL alone.
    """

    def __init__(self, labels: Tensor, reference_log_z: Tensor | None = None) -> None:
        self._labels, self._reference_log_z = labels, reference_log_z
        rows, device = len(labels), labels.device
        self._wide = torch.float32 if device.type == "mps" else torch.float64
        self._top = torch.full((rows,), -torch.inf, device=device)
        self._total = torch.zeros(rows, dtype=self._wide, device=device)
        self._difference = torch.zeros(rows, dtype=self._wide, device=device)
        self._picked = torch.zeros(rows, device=device)

    def add(self, logits: Tensor, offset: int = 0, reference: Tensor | None = None) -> None:
        """Take in columns ``offset`` and on of the vocabulary.

        Args:
            logits: (R, C).
            offset: the first column's place in the vocabulary.
            reference: (R, C), the reference's logits in these columns.
        """
        if compiled_for(logits):
            self._add_compiled(logits, offset, reference)
        else:
            self._add(logits, offset, reference)

    def _add_compiled(self, logits: Tensor, offset: int, reference: Tensor | None) -> None:
        q = bits(logits)
        rows = len(self._labels)
        if reference is None:
            same, log_z = np.zeros((rows, 0), q.dtype), self._total.numpy()
        else:
            assert self._reference_log_z is not None
            same, log_z = bits(reference), self._reference_log_z.numpy()
        arrays = (self._labels, self._top, self._total, self._difference, self._picked)
        labels, top, total, difference, picked = (x.numpy() for x in arrays)

        def part(first: int, last: int) -> None:
            accumulate(q, same, offset, log_z, labels, top, total, difference, picked, first, last)

        in_threads(part, rows, q.size)

    def _add(self, logits: Tensor, offset: int, reference: Tensor | None) -> None:
        q = _wide(logits)
        label = self._labels - offset
        inside = (label >= 0) & (label < q.shape[1])
        found = q.gather(1, label.clamp(0, q.shape[1] - 1)[:, None])[:, 0].float()
        self._picked = torch.where(inside, found, self._picked)
        top = torch.maximum(self._top, q.amax(1).float())
        exponentials = (q - top[:, None]).exp_().sum(1, dtype=self._wide)
        self._total = self._total * (self._top.to(self._wide) - top).exp() + exponentials
        self._top = top
        if reference is not None:
            assert self._reference_log_z is not None
            same = _wide(reference)
            p = (same - self._reference_log_z.to(same.dtype)[:, None]).exp_()
            apart = torch.where(same > -3.0e38, same - q, 0.0)
            self._difference += torch.linalg.vecdot(p, apart).to(self._wide)

    @property
    def log_z(self) -> Tensor:
        """(R,) float64: logarithm of the sum of exponentials."""
        return self._total.log() + self._top

    @property
    def nll(self) -> Floats:
        """(R,) float64 on the CPU, nats."""
        return np.asarray((self.log_z - self._picked).double().cpu().numpy())

    @property
    def kl(self) -> Floats:
        """(R,) float64 on the CPU, nats: KL of the reference to these logits."""
        assert self._reference_log_z is not None
        kl = self._difference + (self.log_z - self._reference_log_z)
        return np.asarray(kl.double().cpu().numpy())


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _Divergence(torch.autograd.Function):
    """Sum over rows of KL(softmax(teacher) || softmax(student)).

    The float32 copies of all logits never exist: rows are taken in chunks, each chunk's gradient is
    formed with its value and kept in the logits' own dtype; on a CPU compiled loops read a few
    rows from its cache.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        if _compiles(student):
            found, gradient = _compiled(student, teacher)
            ctx.save_for_backward(gradient)
            return found
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        gradient = torch.empty_like(student)
        step = max(1, _BUFFER_ELEMENTS // student.shape[-1])
        for a in range(0, len(student), step):
            logp = torch.log_softmax(teacher[a : a + step].float(), dim=-1)
            logq = torch.log_softmax(student[a : a + step].float(), dim=-1)
            total += row_kl(logp, logq).sum(dtype=torch.float64)
            gradient[a : a + step] = logq.exp_().sub_(logp.exp_())
        ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grads[0]), None


def _compiles(logits: Tensor) -> bool:
    return compiled_for(logits) and logits.dtype in (torch.bfloat16, torch.float32)


def _compiled(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the rows' KL and its gradient, on a CPU."""
    gradient = torch.empty(student.shape, dtype=student.dtype)
    total, labels = 0.0, torch.zeros(len(student), dtype=torch.int64)
    step = max(1, _CACHED_ELEMENTS // student.shape[-1])
    for a in range(0, len(student), step):
        rows = slice(a, a + step)
        q, p, none = student[rows].detach(), teacher[rows], labels[rows]
        theirs = RowSums(none)
        theirs.add(p)
        mine = RowSums(none, theirs.log_z)
        mine.add(q, reference=p)
        total += float(mine.kl.sum())
        given = (bits(q), mine.log_z.numpy(), bits(p), theirs.log_z.numpy(), bits(gradient[rows]))
        in_threads(partial(softmax_difference, *given), len(q), q.numel())
    return torch.tensor(total, dtype=torch.float32), gradient


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over rows of KL(teacher || student) of logits (n, V), nats; differentiable in the
    student."""
    summed: Any = _Divergence
    found: Tensor = summed.apply(student, teacher)
    return found


Head = Callable[[Tensor], Tensor]


def divergence_from_stream(
    student: Tensor,
    head: Head,
    teacher: Tensor,
    teacher_head: Head,
    chunk_elements: int = CHUNK_ELEMENTS,
    vocabulary: int = 1,
) -> Tensor:
    """`divergence` from what enters the heads; logits exist one chunk of rows at a time.

    Args:
        student: (n, D), what the student's head reads.
        head: (m, D) to logits (m, V).
        teacher: (n, D'), what the teacher's head reads.
        chunk_elements: logits computed together.
        vocabulary: V.

    Memory: the gradient of all logits until the backward pass, n V in the logits' dtype.
    """
    rows = max(1, chunk_elements // vocabulary)

    def part(hidden: Tensor, other: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher_head(other)
        return divergence(head(hidden), target)

    if len(student) <= rows:
        return part(student, teacher)
    total = torch.zeros((), device=student.device)
    for a in range(0, len(student), rows):
        total = total + part(student[a : a + rows], teacher[a : a + rows])
    return total
