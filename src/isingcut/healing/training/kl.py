"""KL(teacher || student) of logits, a few rows of the vocabulary at a time.

The float32 copies of a batch of logits (tokens x vocabulary) never exist whole: rows are taken in
chunks, each chunk's gradient is formed with its value and kept in the logits' own dtype; on a CPU
compiled loops read a few rows from its cache (`compute.kernels`). Where the head is separable
(`rounds.separable`), the logits themselves exist only a chunk at a time, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from isingcut.models.compute.divergence import RowSums, row_kl
from isingcut.models.compute.kernels import (
    bits,
    compiled_for,
    in_threads,
    softmax_difference,
    softmax_gradient,
)

CHUNK_ELEMENTS = 1 << 26
"""Elements of logits looked at together, at most."""
_BUFFER_ELEMENTS = 1 << 22
# What stays in a CPU's cache while it is read three times.
_CACHED_ELEMENTS = 1 << 19
# A logit that counts nothing, and of which no infinity comes.
_NEVER = -3.0e38


@dataclass(frozen=True)
class TopK:
    """A teacher's distribution, its k likeliest tokens a row and the mass of all others.

    Attributes:
        indices: (n, k) int64.
        logp: (n, k) log-probabilities.
        tail: (n,) probability of all other tokens together.
    """

    indices: Tensor
    logp: Tensor
    tail: Tensor

    def rows(self, part: slice) -> TopK:
        """Some rows."""
        return TopK(self.indices[part], self.logp[part], self.tail[part])


def top_k(logits: Tensor, k: int) -> TopK:
    """The `TopK` of logits (n, V)."""
    logp = torch.log_softmax(logits.float(), dim=-1)
    best, indices = logp.topk(min(k, logp.shape[-1]), dim=-1)
    # From the tail's own terms: 1 - sum would lose all digits of a small one.
    tail = logp.scatter(1, indices, float("-inf")).logsumexp(-1).exp()
    return TopK(indices, best, tail)


def stacked(rows: Sequence[TopK]) -> TopK:
    """Those of several samples (S, T, k) as one."""
    return TopK(
        torch.stack([row.indices for row in rows]),
        torch.stack([row.logp for row in rows]),
        torch.stack([row.tail for row in rows]),
    )


class _Divergence(torch.autograd.Function):
    """Sum over rows of KL(softmax(teacher / t) || softmax(student / t))."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        if temperature == 1 and _compiles(student):
            found, gradient = _compiled(student, teacher)
            ctx.save_for_backward(gradient)
            return found
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        gradient = torch.empty_like(student)
        step = max(1, _BUFFER_ELEMENTS // student.shape[-1])
        for a in range(0, len(student), step):
            logp = torch.log_softmax(teacher[a : a + step].float() / temperature, dim=-1)
            logq = torch.log_softmax(student[a : a + step].float() / temperature, dim=-1)
            total += row_kl(logp, logq).sum(dtype=torch.float64)
            gradient[a : a + step] = logq.exp_().sub_(logp.exp_()).div_(temperature)
        ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grads[0]), None, None


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


def _log_sum(logits: Tensor) -> Tensor:
    """(R,) float32: logarithm of each row's sum of exponentials."""
    if not _compiles(logits):
        return logits.float().logsumexp(-1)
    sums = RowSums(torch.zeros(len(logits), dtype=torch.int64))
    sums.add(logits)
    return sums.log_z.float()


def _softmax_times(logits: Tensor, log_z: Tensor, scale: Tensor, written_later: Tensor) -> None:
    """Put each row's softmax times its scale in the place of its logits.

    Args:
        written_later: (R,), a column of each row whose value does not matter.
    """
    if not _compiles(logits):
        logits.copy_((logits.float() - log_z[:, None]).exp_() * scale[:, None])
        return
    given = (bits(logits), log_z.numpy(), written_later.numpy(), scale.numpy())
    in_threads(partial(softmax_gradient, *given), len(logits), logits.numel())


class _TailedDivergence(torch.autograd.Function):
    """Sum over rows of the KL of a `TopK` from the student, its tail as one outcome."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, indices: Tensor, logp: Tensor, tail: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
        elements = _CACHED_ELEMENTS if _compiles(student) else _BUFFER_ELEMENTS
        step = max(1, elements // student.shape[-1])
        for a in range(0, len(student), step):
            rows = slice(a, a + step)
            top, target, mass = indices[rows], logp[rows].float(), tail[rows].float()
            part = gradient[rows].copy_(student[rows]).scatter_(1, top, _NEVER)
            picked = student[rows].gather(1, top).float()
            log_tail = _log_sum(part)
            log_z = torch.logaddexp(log_tail, picked.logsumexp(-1))
            chosen, log_tail = picked - log_z[:, None], log_tail - log_z
            p = target.exp()
            value = (p * (target - chosen)).sum(-1)
            value = value + torch.where(mass > 0, mass * (mass.log() - log_tail), 0.0)
            total += value.sum(dtype=torch.float64)
            # A tail token's target is its share of the student's own tail.
            share = torch.where(mass > 0, 1 - (mass.log() - log_tail).exp(), 1.0)
            _softmax_times(part, log_z, share, top[:, 0])
            part.scatter_(1, top, (chosen.exp() - p).to(part.dtype))
        ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grads[0]), None, None, None


def divergence(student: Tensor, teacher: Tensor | TopK, temperature: float = 1.0) -> Tensor:
    """Sum over rows of KL(teacher || student), nats; differentiable in the student.

    Args:
        student: logits (n, V).
        teacher: logits (n, V), or the `TopK` kept of them (temperature 1 only).
    """
    if isinstance(teacher, TopK):
        with_tail: Any = _TailedDivergence
        found: Tensor = with_tail.apply(student, teacher.indices, teacher.logp, teacher.tail)
        return found
    whole: Any = _Divergence
    result: Tensor = whole.apply(student, teacher, temperature)
    return result


Head = Callable[[Tensor], Tensor]


def divergence_from_stream(
    student: Tensor,
    head: Head,
    teacher: Tensor | TopK,
    teacher_head: Head | None,
    temperature: float = 1.0,
    chunk_elements: int = CHUNK_ELEMENTS,
    vocabulary: int = 1,
) -> Tensor:
    """`divergence` from what enters the heads; logits exist one chunk of rows at a time.

    Args:
        student: (n, D), what the student's head reads.
        head: (m, D) to logits (m, V).
        teacher: (n, D'), what the teacher's head reads, or a `TopK`.
        teacher_head: its head, None for a `TopK`.
        chunk_elements: logits computed together.
        vocabulary: V.

    Memory: the gradient of all logits until the backward pass, n V in the logits' dtype.
    """
    rows = max(1, chunk_elements // vocabulary)

    def part(hidden: Tensor, other: Tensor | TopK) -> Tensor:
        if isinstance(other, TopK):
            return divergence(head(hidden), other)
        assert teacher_head is not None
        with torch.no_grad():
            target = teacher_head(other)
        return divergence(head(hidden), target, temperature)

    if len(student) <= rows:
        return part(student, teacher)
    total = torch.zeros((), device=student.device)
    for a in range(0, len(student), rows):
        piece = slice(a, a + rows)
        other = teacher.rows(piece) if isinstance(teacher, TopK) else teacher[piece]
        total = total + part(student[piece], other)
    return total
