"""KL and NLL of rows of logits against reference logits.

The package has them in two forms. Where no gradient is wanted they are sums over rows, here. Where
one is, it is written out as softmax less a target: `head` for measurements, `healing.training.kl`
for training.

`RowSums` reads logits once, in pieces of the vocabulary; `row_kl` is for rows that are there whole.
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

import numpy as np
import torch
from torch import Tensor

from isingcut.ising.states import Floats
from isingcut.models.compute.kernels import accumulate, bits, compiled_for, in_threads


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
