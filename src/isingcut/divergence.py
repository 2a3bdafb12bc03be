"""KL and NLL of rows of logits against reference logits, read once, in pieces of the vocabulary.

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

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

Floats = npt.NDArray[np.float64]

# Columns whose exponentials are summed in float32, before float64 takes the sum.
_BLOCK = 2048
# Rows times columns that are worth a second thread.
_WORTH_A_THREAD = 1 << 17

_f = np.float32
_LOG2_E, _LN2_HIGH, _LN2_LOW = _f(1.44269504), _f(0.693359375), _f(-2.12194440e-4)
_LOWEST, _HALF, _ONE = _f(-87.0), _f(0.5), _f(1.0)
# exp(r) = 1 + r + r^2 (1/2 + r/6 + ...) on |r| <= ln(2) / 2: the coefficients of Cephes' expf.
_C0, _C1, _C2 = _f(1.9875691500e-4), _f(1.3981999507e-3), _f(8.3334519073e-3)
_C3, _C4, _C5 = _f(4.1665795894e-2), _f(1.6666665459e-1), _f(5.0000001201e-1)
_FINITE = _f(-3.0e38)


def _float_of(context: Any, bits: Any) -> Any:
    """The float32 whose bits, or whose upper 16 bits, an int32 or int16 holds."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (value,) = arguments
        word = ir.IntType(32)
        if bits.bitwidth == 16:
            value = builder.shl(builder.zext(value, word), ir.Constant(word, 16))
        return builder.bitcast(value, ir.FloatType())

    return types.float32(bits), code


def _integer_in_order(context: Any, bits: Any) -> Any:
    """A float's bits as an integer of the same order; its own inverse.

    A maximum over integers is vectorised by the compiler, one over floats is not: it would have to
    keep NaN in its place.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (value,) = arguments
        width = bits.bitwidth
        kind = ir.IntType(width)
        sign = builder.ashr(value, ir.Constant(kind, width - 1))
        return builder.xor(value, builder.and_(sign, ir.Constant(kind, 2 ** (width - 1) - 1)))

    return bits(bits), code


_value: Any = intrinsic(_float_of)
_ordered: Any = intrinsic(_integer_in_order)


@njit(cache=True, nogil=True, fastmath={"contract"})
def _exp(x):  # type: ignore[no-untyped-def]
    """exp(x) in float32 for x <= 0, to about 1e-7; NaN stays NaN."""
    x = _LOWEST if x < _LOWEST else x
    n = np.int32(x * _LOG2_E - _HALF)
    f = np.float32(n)
    r = x - f * _LN2_HIGH - f * _LN2_LOW
    y = ((((_C0 * r + _C1) * r + _C2) * r + _C3) * r + _C4) * r + _C5
    y = y * (r * r) + r + _ONE
    return y * _value(np.int32((n + np.int32(127)) << np.int32(23)))


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _sums(q, reference, top, log_z):  # type: ignore[no-untyped-def]
    """Of one row's piece: sum exp(q - top), and sum p (l - q) where there is a reference."""
    total = np.float32(0)
    difference = np.float32(0)
    if reference.shape[0] == 0:
        for v in range(q.shape[0]):
            total += _exp(_value(q[v]) - top)
    else:
        for v in range(q.shape[0]):
            x, y = _value(q[v]), _value(reference[v])
            total += _exp(x - top)
            # A masked word has l = -inf and no weight.
            apart = y - x if y > _FINITE else np.float32(0)
            difference += _exp(y - log_z) * apart
    return total, difference


@njit(cache=True, nogil=True)
def _accumulate(  # type: ignore[no-untyped-def]
    q, reference, offset, log_z, labels, top, total, difference, picked, first, last
):
    """Take the columns q, which are columns ``offset`` and on of the vocabulary, into the sums."""
    columns = q.shape[1]
    for t in range(first, last):
        label = labels[t] - offset
        if 0 <= label < columns:
            picked[t] = _value(q[t, label])
        for a in range(0, columns, _BLOCK):
            b = min(a + _BLOCK, columns)
            piece = q[t, a:b]
            largest = _ordered(piece[0])
            for v in range(b - a):
                # Not max(): it would widen the integers.
                largest = _ordered(piece[v]) if _ordered(piece[v]) > largest else largest
            new = max(top[t], _value(_ordered(largest)))
            exponentials, apart = _sums(piece, reference[t, a:b], new, np.float32(log_z[t]))
            total[t] = total[t] * np.exp(np.float64(top[t]) - np.float64(new)) + exponentials
            difference[t] += apart
            top[t] = new


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    # Of this process: a fork inherits the object, but not its threads.
    return ThreadPoolExecutor(threads, thread_name_prefix="isingcut-divergence")


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
        if logits.device.type == "cpu" and logits.dtype != torch.float64:
            self._add_compiled(logits, offset, reference)
        else:
            self._add(logits, offset, reference)

    def _add_compiled(self, logits: Tensor, offset: int, reference: Tensor | None) -> None:
        q = _bits(logits)
        rows = len(self._labels)
        if reference is None:
            same, log_z = np.zeros((rows, 0), q.dtype), self._total.numpy()
        else:
            assert self._reference_log_z is not None
            same, log_z = _bits(reference), self._reference_log_z.numpy()
        arrays = (self._labels, self._top, self._total, self._difference, self._picked)
        labels, top, total, difference, picked = (x.numpy() for x in arrays)

        def part(first: int, last: int) -> None:
            _accumulate(q, same, offset, log_z, labels, top, total, difference, picked, first, last)

        threads = min(torch.get_num_threads(), 1 + q.size // _WORTH_A_THREAD)
        if threads == 1:
            part(0, rows)
        else:
            bounds = np.linspace(0, rows, threads + 1).astype(int).tolist()
            list(_pool(torch.get_num_threads(), os.getpid()).map(part, bounds[:-1], bounds[1:]))

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
            apart = torch.where(same > float(_FINITE), same - q, 0.0)
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


def _bits(logits: Tensor) -> npt.NDArray[Any]:
    """The numbers' bits as int16 (bfloat16) or int32 (float32, to which other types are put)."""
    if logits.dtype == torch.bfloat16:
        return np.ascontiguousarray(logits.detach().view(torch.int16).numpy())
    return np.ascontiguousarray(logits.detach().float().view(torch.int32).numpy())


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
