"""Constraints on a state: linear rows, each with a name and a reason in words.

Every constraint becomes `LinearConstraint` rows here: exactly M blocks, counts per block kind,
budgets, keep and drop lists, and the legality rows of an architecture. `options.parsed` parses the
typed forms (``attention=2,moe=3``, ``params=25%``, ``0,1,5-8``).
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from isingcut.errors import InputError
from isingcut.ising.states import Bools, Floats, read_whole

Sense = Literal["==", "<=", ">="]


@dataclass(frozen=True, eq=False)
class LinearConstraint:
    """One row: coefficients.x (sense) rhs.

    Args:
        name: short unique name, for messages: ``"count"``, ``"keep 3"``, ``"budget params"``.
        coefficients: (N,).
        sense: ``"=="``, ``"<="`` or ``">="``.
        rhs: right-hand side.
        reason: the constraint in words, for messages.
    """

    name: str
    coefficients: Floats
    sense: Sense
    rhs: float
    reason: str = ""

    def __post_init__(self) -> None:
        row = np.array(self.coefficients, dtype=np.float64)
        if row.ndim != 1 or not np.isfinite(row).all() or not np.isfinite(self.rhs):
            raise InputError(
                f"constraint {self.name!r} needs a vector of finite coefficients and a finite rhs"
            )
        if self.sense not in ("==", "<=", ">="):
            raise InputError(f"constraint {self.name!r}: sense must be ==, <= or >=")
        row.setflags(write=False)
        vars(self).update(coefficients=row, rhs=float(self.rhs))

    @property
    def tolerance(self) -> float:
        """The largest difference between a sum and ``rhs`` that counts as rounding."""
        return 1e-9 * max(1.0, abs(self.rhs), float(np.abs(self.coefficients).sum()))

    def interval(self) -> tuple[float, float]:
        """Return the smallest and largest allowed value of coefficients.x, with tolerance."""
        low = -np.inf if self.sense == "<=" else self.rhs - self.tolerance
        high = np.inf if self.sense == ">=" else self.rhs + self.tolerance
        return low, high

    def satisfied(self, states: ArrayLike) -> Bools:
        """Return (S,) whether each state of (S, N) satisfies the row."""
        value = np.asarray(states, dtype=np.float64) @ self.coefficients
        low, high = self.interval()
        return (value >= low) & (value <= high)

    def describe(self) -> str:
        """Return name and reason, for messages."""
        return f"{self.name} ({self.reason})" if self.reason else self.name


def count(n: int, m: int) -> LinearConstraint:
    """Require that exactly ``m`` of ``n`` blocks are removed."""
    m = read_whole(m, "the number of removed blocks")
    if not 0 <= m <= n:
        raise InputError(
            f"cannot remove {m} of {n} blocks; choose a number from 0 to {n}"
        )
    return LinearConstraint(
        "count", np.ones(n), "==", m, f"exactly {m} of {n} blocks removed"
    )


def kind_counts(
    kinds: Sequence[str], counts: Mapping[str, int]
) -> list[LinearConstraint]:
    """Require exactly ``counts[kind]`` removed blocks of each kind, and none of other kinds."""
    present = Counter(kinds)
    for kind, wanted in counts.items():
        if kind not in present:
            raise InputError(
                f"no block is of kind {kind!r}; this model has "
                + ", ".join(f"{k} ({v})" for k, v in present.items())
            )
        if not 0 <= read_whole(wanted, f"the number of {kind} blocks") <= present[kind]:
            raise InputError(f"cannot remove {wanted} {kind} blocks of {present[kind]}")
    rows = []
    for kind, total in present.items():
        wanted = counts.get(kind, 0)
        mask = np.array([k == kind for k in kinds], dtype=np.float64)
        reason = f"exactly {wanted} of {total} {kind} blocks removed"
        rows.append(
            LinearConstraint(f"remove {kind}={wanted}", mask, "==", wanted, reason)
        )
    return rows


def _unit_rows(
    n: int, indices: Iterable[int], verb: str, value: int
) -> list[LinearConstraint]:
    rows = []
    for i in sorted({read_whole(i, f"a block to {verb}") for i in indices}):
        if not 0 <= i < n:
            raise InputError(
                f"cannot {verb} block {i}: blocks are numbered 0 to {n - 1}"
            )
        row = np.eye(1, n, i)[0]
        what = "stays" if verb == "keep" else "is removed"
        rows.append(
            LinearConstraint(f"{verb} {i}", row, "==", value, f"block {i} {what}")
        )
    return rows


def keep(n: int, indices: Iterable[int]) -> list[LinearConstraint]:
    """Require that these blocks stay."""
    return _unit_rows(n, indices, "keep", 0)


def drop(n: int, indices: Iterable[int]) -> list[LinearConstraint]:
    """Require that these blocks are removed."""
    return _unit_rows(n, indices, "drop", 1)


def budget(
    name: str,
    costs: ArrayLike,
    *,
    share: float | None = None,
    amount: float | None = None,
    total: float | None = None,
) -> LinearConstraint:
    """Require removed blocks whose costs sum to at least ``share`` of ``total``, or ``amount``.

    Args:
        name: quantity: ``"params"``, ``"bytes"``, ``"kv"``, ``"latency"``.
        costs: (N,) cost of each block.
        share: fraction of ``total``, in [0, 1]; give either ``share`` or ``amount``.
        amount: least sum, in the unit of ``costs``.
        total: amount that ``share`` refers to; by default the sum over the blocks.
    """
    cost = np.asarray(costs, dtype=np.float64)
    if (share is None) == (amount is None):
        raise InputError(f"budget {name!r}: give either a share or an amount")
    if share is not None:
        if not 0 <= share <= 1:
            raise InputError(
                f"budget {name!r}: share must be from 0% to 100%, got {share:.1%}"
            )
        amount = share * (float(cost.sum()) if total is None else total)
    assert amount is not None
    reason = f"at least {amount:.6g} of {name} removed"
    return LinearConstraint(f"budget {name}", cost, ">=", amount, reason)


def keep_at_least(
    kinds: Sequence[str], kind: str, minimum: int = 1
) -> LinearConstraint:
    """Require that at least ``minimum`` blocks of ``kind`` stay, because generation needs them."""
    mask = np.array([k == kind for k in kinds], dtype=np.float64)
    total = int(mask.sum())
    reason = f"at least {minimum} of {total} {kind} blocks stay"
    return LinearConstraint(
        f"keep {minimum} {kind}", mask, "<=", total - minimum, reason
    )


def together(
    n: int, groups: Iterable[Sequence[int]], what: str = "group"
) -> list[LinearConstraint]:
    """Require that the blocks of each group are removed together or not at all (whole periods)."""
    rows = []
    for group in groups:
        for a, b in itertools.pairwise(group):
            row = np.zeros(n)
            row[a] = 1.0
            row[b] = -1.0
            name = f"{what} {group[0]}-{group[-1]}: {a} with {b}"
            reason = f"blocks {a} and {b} belong to one {what}"
            rows.append(LinearConstraint(name, row, "==", 0, reason))
    return rows
