"""KL(teacher || student) of logits, a few rows of the vocabulary at a time.

The float32 copies of a batch of logits (tokens x vocabulary) never exist whole: rows are taken in
chunks, each chunk's gradient is formed with its value and kept in the logits' own dtype. Where the
head is separable (`rounds.separable`), the logits themselves exist only a chunk at a time, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from isingcut.models.compute.divergence import row_kl

CHUNK_ELEMENTS = 1 << 26
"""Elements of logits looked at together, at most."""
_BUFFER_ELEMENTS = 1 << 22


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
        return gradient * grads[0].to(gradient.dtype), None, None


class _TailedDivergence(torch.autograd.Function):
    """Sum over rows of the KL of a `TopK` from the student, its tail as one outcome."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, indices: Tensor, logp: Tensor, tail: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        gradient = torch.empty_like(student)
        step = max(1, _BUFFER_ELEMENTS // student.shape[-1])
        for a in range(0, len(student), step):
            top, target = indices[a : a + step], logp[a : a + step].float()
            mass = tail[a : a + step].float()
            logq = torch.log_softmax(student[a : a + step].float(), dim=-1)
            chosen = logq.gather(1, top)
            log_tail = logq.scatter(1, top, float("-inf")).logsumexp(-1)
            p = target.exp()
            value = (p * (target - chosen)).sum(-1)
            value = value + torch.where(mass > 0, mass * (mass.log() - log_tail), 0.0)
            total += value.sum(dtype=torch.float64)
            q = logq.exp_()
            # A tail token's target is its share of the student's own tail.
            share = torch.where(mass > 0, 1 - (mass.log() - log_tail).exp(), 1.0)
            part = q * share[:, None]
            part.scatter_(1, top, q.gather(1, top) - p)
            gradient[a : a + step] = part
        ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None, None


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
        chunk_elements: logits computed together; a single chunk is not computed again in the
            backward pass, several are.
        vocabulary: V.
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
        total = total + checkpoint(part, student[piece], other, use_reentrant=False)
    return total
