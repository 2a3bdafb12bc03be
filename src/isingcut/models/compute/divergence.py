"""KL and NLL of rows of logits against reference logits.

`RowSums` reads logits once, in pieces of the vocabulary. `divergence` and `divergence_from_stream`
compute the KL summed over rows, with gradients for training.
For one position with reference logits l and logits q, and p = softmax(l),

    NLL = log Z(q) - q[label]
    KL(p || softmax(q)) = sum_v p_v (l_v - q_v) + log Z(q) - log Z(l)

Both need one pass over q: a running maximum and sum of exponentials (M. Milakov and N. Gimelshein,
Online normalizer calculation for softmax, arXiv 1805.02867), and the weighted sum of differences.
The difference l - q is formed before it is weighted: sums of p l and of p q alone, with logits of
size 10 to 30, would cost float32 four digits of the KL.

p is not stored but recomputed from l. In bfloat16, l has half the bytes of p, and on a CPU one more
exponential costs less than reading p from memory.

On CPUs, compiled loops read bfloat16 or float32 logits once. They get logits as integer bits
(`bits`), because numba does not support bfloat16.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import njit, types
from numba.extending import overload
from torch import Tensor

# Columns summed in float32 before their sum is added to a float64 total.
_BLOCK = 2048
# Elements (rows times columns) for each additional thread.
_WORTH_A_THREAD = 1 << 17

_compiled = partial(njit, cache=True, nogil=True)
_f = np.float32
_LOG2_E = _f(1.44269504)
_LN2_HIGH = _f(0.693359375)
_LN2_LOW = _f(-2.12194440e-4)
_LOWEST = _f(-87.0)
_HALF = _f(0.5)
_ONE = _f(1.0)
# exp(r) = 1 + r + r^2 (1/2 + r/6 + ...) on |r| <= ln(2) / 2: the coefficients of Cephes' expf.
_C0 = _f(1.9875691500e-4)
_C1 = _f(1.3981999507e-3)
_C2 = _f(8.3334519073e-3)
_C3 = _f(4.1665795894e-2)
_C4 = _f(1.6666665459e-1)
_C5 = _f(5.0000001201e-1)
_FINITE = _f(-3.0e38)


def value_of(bits: Any) -> Any:
    """Reinterpret an int32 as a float32, or an int16 as the upper 16 bits of a float32."""


@overload(value_of)
def _value_of(bits):  # type: ignore[no-untyped-def]
    if bits == types.int16:
        return lambda bits: np.int32(bits << 16).view(np.float32)
    return lambda bits: np.int32(bits).view(np.float32)


def in_order(bits: Any) -> Any:
    """Map a float's bits to an integer with the same order. The function is its own inverse.

    The compiler vectorises a maximum over integers, but not over floats, because it would have to
    preserve NaN.
    """


@overload(in_order)
def _in_order(bits):  # type: ignore[no-untyped-def]
    # numba widens the results of integer operations, so each is converted back.
    kind = getattr(np, bits.name)
    sign = bits.bitwidth - 1
    others = bits.maxval
    return lambda bits: kind(bits ^ ((bits >> sign) & others))


def stored_as(value: Any, like: Any) -> Any:
    """Return the bits of a float32 in the integer type of ``like``; for int16, those of the value
    rounded to bfloat16, ties to even."""


@overload(stored_as)
def _stored_as(value, like):  # type: ignore[no-untyped-def]
    def round_to_upper(value, like):  # type: ignore[no-untyped-def]
        whole = np.float32(value).view(np.int32)
        return np.int16((whole + ((whole >> 16) & 1) + 0x7FFF) >> 16)

    if like == types.int16:
        return round_to_upper
    return lambda value, like: np.float32(value).view(np.int32)


@_compiled(fastmath={"contract"})
def exp_of(x):  # type: ignore[no-untyped-def]
    """Compute exp(x) in float32 for x <= 0, to about 1e-7; NaN stays NaN."""
    x = _LOWEST if x < _LOWEST else x
    n = np.int32(x * _LOG2_E - _HALF)
    f = np.float32(n)
    r = x - f * _LN2_HIGH - f * _LN2_LOW
    y = ((((_C0 * r + _C1) * r + _C2) * r + _C3) * r + _C4) * r + _C5
    y = y * (r * r) + r + _ONE
    return y * value_of(np.int32((n + np.int32(127)) << np.int32(23)))


@_compiled(fastmath={"reassoc", "contract", "nsz"})
def _sums(q, reference, top, log_z):  # type: ignore[no-untyped-def]
    """Sum exp(q - top) and, if there is a reference, p (l - q) over a piece of one row."""
    total = np.float32(0)
    difference = np.float32(0)
    if reference.shape[0] == 0:
        for v in range(q.shape[0]):
            total += exp_of(value_of(q[v]) - top)
    else:
        for v in range(q.shape[0]):
            x = value_of(q[v])
            y = value_of(reference[v])
            total += exp_of(x - top)
            # A masked token has l = -inf and weight 0.
            apart = y - x if y > _FINITE else np.float32(0)
            difference += exp_of(y - log_z) * apart
    return total, difference


@_compiled()
def accumulate(q, reference, log_z, top, total, difference):  # type: ignore[no-untyped-def]
    """Add the logits ``q`` of a piece of the vocabulary to the running sums."""
    rows, columns = q.shape
    for t in range(rows):
        for a in range(0, columns, _BLOCK):
            b = min(a + _BLOCK, columns)
            piece = q[t, a:b]
            largest = in_order(piece[0])
            for v in range(b - a):
                # max() would widen the integers.
                largest = (
                    in_order(piece[v]) if in_order(piece[v]) > largest else largest
                )
            new = max(top[t], value_of(in_order(largest)))
            exponentials, apart = _sums(
                piece, reference[t, a:b], new, np.float32(log_z[t])
            )
            total[t] = (
                total[t] * np.exp(np.float64(top[t]) - np.float64(new)) + exponentials
            )
            difference[t] += apart
            top[t] = new


@_compiled()
def softmax_gradient(logits, log_z, labels, scale):  # type: ignore[no-untyped-def]
    """Replace logits by scale (softmax - one-hot)."""
    for t in range(logits.shape[0]):
        row = logits[t]
        z = np.float32(log_z[t])
        s = scale[t]
        at_label = (exp_of(value_of(row[labels[t]]) - z) - _ONE) * s
        for v in range(row.shape[0]):
            row[v] = stored_as(exp_of(value_of(row[v]) - z) * s, row[v])
        row[labels[t]] = stored_as(at_label, row[labels[t]])


@_compiled()
def softmax_difference(logits, log_z, reference, reference_log_z, out):  # type: ignore[no-untyped-def]
    """Write softmax(logits) - softmax(reference) to ``out``."""
    for t in range(logits.shape[0]):
        q = logits[t]
        p = reference[t]
        row = out[t]
        z = np.float32(log_z[t])
        y = np.float32(reference_log_z[t])
        for v in range(row.shape[0]):
            row[v] = stored_as(
                exp_of(value_of(q[v]) - z) - exp_of(value_of(p[v]) - y), row[v]
            )


@_compiled(fastmath={"reassoc", "contract", "nsz"})
def _dot(a, b):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for k in range(a.shape[0]):
        total += value_of(a[k]) * value_of(b[k])
    return total


@_compiled()
def fill_row_dots(a, b, out):  # type: ignore[no-untyped-def]
    """Fill ``out`` with the dot product of each row of ``a`` with that of ``b``, in float64."""
    for t in range(a.shape[0]):
        total = 0.0
        for k in range(0, a.shape[1], _BLOCK):
            total += _dot(a[t, k : k + _BLOCK], b[t, k : k + _BLOCK])
        out[t] = total


def bits(x: Tensor) -> npt.NDArray[Any]:
    """Return the bits of a bfloat16 tensor as int16, or of a float32 tensor as int32.

    The array shares the memory of a contiguous tensor.
    """
    kind = torch.int16 if x.dtype == torch.bfloat16 else torch.int32
    return np.asarray(x.detach().contiguous().view(kind).numpy())


def can_compile(x: Tensor) -> bool:
    """Whether the compiled loops take a tensor: bfloat16 or float32 on a CPU."""
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float32)


def run_in_threads(loop: Callable[..., object], *arrays: npt.NDArray[Any]) -> None:
    """Call ``loop`` on the rows of arrays, in several threads if the first one is large enough."""
    threads = min(torch.get_num_threads(), 1 + arrays[0].size // _WORTH_A_THREAD)
    if threads == 1:
        loop(*arrays)
        return
    parts = (np.array_split(array, threads) for array in arrays)
    list(_pool(torch.get_num_threads(), os.getpid()).map(loop, *parts))


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    # One pool for each process: a fork inherits the object, but not its threads.
    return ThreadPoolExecutor(threads, thread_name_prefix="isingcut-vocabulary")


CHUNK_ELEMENTS = 1 << 26
"""Maximum number of logits computed at a time."""
_BUFFER_ELEMENTS = 1 << 22
# Elements that stay in a CPU's cache while they are read three times.
_CACHED_ELEMENTS = 1 << 19


class RowSums:
    """Running sums over the vocabulary for R positions.

    Args:
        labels: (R,) int64, the next token at each position.
        reference_log_z: (R,) log Z of the reference; None to compute only the NLL.
    """

    def __init__(self, labels: Tensor, reference_log_z: Tensor | None = None) -> None:
        self.labels = labels
        rows = len(labels)
        device = labels.device
        # Finite, because the first piece may be masked completely, and inf - inf is NaN.
        self._top = torch.full((rows,), torch.finfo(torch.float32).min, device=device)
        self._total = torch.zeros(rows, dtype=torch.float64, device=device)
        self._difference = self._total.clone()
        self._picked = torch.zeros(rows, device=device)
        # NaN, so that a KL without a reference is not taken for a number.
        none = torch.full_like(self._total, torch.nan)
        self._reference_log_z = none if reference_log_z is None else reference_log_z

    def add(
        self, logits: Tensor, offset: int = 0, reference: Tensor | None = None
    ) -> None:
        """Add the logits of a piece of the vocabulary to the sums.

        Args:
            logits: (R, C), logits of the piece.
            offset: index of the first column in the vocabulary.
            reference: (R, C), reference logits of the same piece.
        """
        if can_compile(logits):
            self._add_compiled(logits, offset, reference)
        else:
            self._add(logits, offset, reference)

    def _pick(self, logits: Tensor, offset: int) -> None:
        label = self.labels - offset
        width = logits.shape[1]
        inside = (label >= 0) & (label < width)
        picked = logits.detach().gather(1, label.clamp(0, width - 1)[:, None])[:, 0]
        self._picked = torch.where(inside, picked.float(), self._picked)

    def _add(self, logits: Tensor, offset: int, reference: Tensor | None) -> None:
        self._pick(logits, offset)
        q = widen(logits)
        top = torch.maximum(self._top, q.amax(1).float())
        exponentials = (q - top[:, None]).exp_().sum(1, dtype=torch.float64)
        self._total = self._total * (self._top.double() - top).exp() + exponentials
        self._top = top
        if reference is not None:
            same = widen(reference)
            p = (same - self._reference_log_z.to(same.dtype)[:, None]).exp_()
            apart = torch.where(same > -3.0e38, same - q, 0.0)
            self._difference += torch.linalg.vecdot(p, apart).double()

    def _add_compiled(
        self, logits: Tensor, offset: int, reference: Tensor | None
    ) -> None:
        # `expand_as` fails if the sizes are unequal; the loops would read beyond the end.
        same = bits(logits[:, :0] if reference is None else reference.expand_as(logits))
        self._pick(logits, offset)
        kept = (self._reference_log_z, self._top, self._total, self._difference)
        run_in_threads(accumulate, bits(logits), same, *(x.numpy() for x in kept))

    @property
    def log_z(self) -> Tensor:
        """log Z, (R,) float64: logarithm of the sum of exponentials."""
        return self._total.log() + self._top

    @property
    def nll(self) -> Tensor:
        """NLL of the labels, (R,) float64, in nats."""
        return (self.log_z - self._picked).double()

    @property
    def kl(self) -> Tensor:
        """KL(reference || logits), (R,) float64, in nats."""
        return (self._difference + (self.log_z - self._reference_log_z)).double()


def widen(x: Tensor) -> Tensor:
    """Convert to float32 (float64 stays), for sums over the vocabulary and the hidden states."""
    return x if x.dtype == torch.float64 else x.float()


def softmax(logits: Tensor, log_z: Tensor) -> Tensor:
    """Compute the probabilities (R, V) of logits whose log Z (R,) is known."""
    wide = widen(logits)
    return (wide - log_z.to(wide.dtype)[:, None]).exp_()


class _Divergence(torch.autograd.Function):
    """Sum over rows of KL(softmax(teacher) || softmax(student)).

    Rows are processed in chunks, so that no float32 copy of all logits exists. A chunk's gradient
    is computed with its value and kept in the logits' dtype. On a CPU, compiled loops process a
    few rows at a time from the cache.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        compiled = can_compile(student)
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        gradient = torch.empty(student.shape, dtype=student.dtype, device=total.device)
        none = torch.zeros(len(student), dtype=torch.int64, device=total.device)
        elements = _CACHED_ELEMENTS if compiled else _BUFFER_ELEMENTS
        step = max(1, elements // student.shape[-1])
        chunks = (torch.split(x, step) for x in (student, teacher, gradient, none))
        for q, p, toward, labels in zip(*chunks, strict=True):
            theirs = RowSums(labels)
            theirs.add(p)
            mine = RowSums(labels, theirs.log_z)
            mine.add(q, reference=p)
            total += mine.kl.sum()
            ends = mine.log_z, theirs.log_z
            if compiled:
                both = bits(q), ends[0].numpy(), bits(p), ends[1].numpy()
                run_in_threads(softmax_difference, *both, bits(toward))
            else:
                toward.copy_(softmax(q, ends[0]) - softmax(p, ends[1]))
        ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grads[0]), None


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum KL(teacher || student) of logits (n, V) over the rows, in nats; differentiable in the
    student."""
    summed: Any = _Divergence
    total: Tensor = summed.apply(student, teacher)
    return total


Head = Callable[[Tensor], Tensor]


def divergence_from_stream(
    student: Tensor,
    head: Head,
    teacher: Tensor,
    teacher_head: Head,
    vocabulary: int,
) -> Tensor:
    """Compute `divergence` from the inputs of the heads, with the logits of one chunk of rows at a
    time.

    Args:
        student: (n, D), input of the student's head.
        head: the student's head, from (m, D) to logits (m, V).
        teacher: (n, D'), input of the teacher's head.
        vocabulary: size V of the vocabulary.

    Memory: the gradient of all logits, n V in the logits' dtype, until the backward pass.
    """
    rows = max(1, CHUNK_ELEMENTS // vocabulary)
    total = torch.zeros((), device=student.device)
    pairs = zip(torch.split(student, rows), torch.split(teacher, rows), strict=True)
    for hidden, other in pairs:
        with torch.no_grad():
            target = teacher_head(other)
        total = total + divergence(head(hidden), target)
    return total
