"""What a run may remove: count, budgets, blocks kept and dropped, legality - as linear rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from isingcut.errors import InfeasibleError, InputError
from isingcut.ising import constraints as rows
from isingcut.ising.constraints import LinearConstraint
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem
from isingcut.options.config import RunConfig
from isingcut.options.spellings import Budget, Removal


def each_removal(config: RunConfig) -> list[RunConfig]:
    """The options of each removal: themselves, or one a number of a range such as `4..15`."""
    counts = config.remove.counts
    return [config] if len(counts) < 2 else [config.replace(remove=m) for m in counts]


def removal_rows(
    blocks: Mapping[str, Any], config: RunConfig, *, early: bool = False
) -> list[LinearConstraint]:
    """All constraints of one removal, for the blocks that `run.json` describes.

    Args:
        early: the blocks are known from the model's configuration only; budgets of what depends
            on its weights or on this machine are left to the call that knows them.

    Raises:
        InputError: an option cannot be read, or no block or every block would go.
        InfeasibleError: the constraints clash; the message names them, and the largest budgets.
    """
    if len(each_removal(config)) > 1:
        raise InputError(
            f"--remove {config.remove} is a range, which only `run` and the search take; "
            "give one number here"
        )
    kinds = [b["kind"] for b in blocks["blocks"]]
    n = len(kinds)
    if n == 1:
        raise InputError("this model has one block, which stays: none can be removed")
    if config.remove or not config.budget:
        counts = count_rows(kinds, config.remove)
    else:
        most = np.ones(n)
        counts = [LinearConstraint("some stay", most, "<=", n - 1, "not every block goes")]
    others = kept_and_dropped(n, config)
    others += [LinearConstraint(**row) for row in blocks["legality"]]
    budgets = [b for b in config.budget.parts if b.quantity.early or not early]
    bounds = [budget_row(blocks, b) for b in budgets]
    plain = Problem(Hamiltonian(np.zeros(n), np.zeros((n, n))), [*counts, *others])
    try:
        plain.with_constraints(bounds).check()
    except InfeasibleError as e:
        plain.check()
        pairs = zip(bounds, budgets, strict=True)
        each = [_largest(plain, row, b) for row, b in pairs if row.rhs > 0]
        alone = "each alone " if len(each) > 1 else ""
        raise InfeasibleError(f"{e}; the largest possible {alone}is {', '.join(each)}") from e
    return [*counts, *bounds, *others]


def kept_and_dropped(n: int, config: RunConfig) -> list[LinearConstraint]:
    """The rows of `keep` and `drop`.

    Raises:
        InputError: a block that a model of ``n`` blocks does not have.
    """
    return [*rows.keep(n, config.keep.numbers), *rows.drop(n, config.drop.numbers)]


def budget_row(blocks: Mapping[str, Any], wanted: Budget) -> LinearConstraint:
    """One `--budget`: at least this much of a quantity is removed."""
    quantity = wanted.quantity
    costs = [b[quantity.cost] for b in blocks["blocks"]]
    total = float(blocks[quantity.whole]) if quantity.whole else float(sum(costs))
    return rows.budget(wanted.name, costs, share=wanted.share, amount=wanted.amount, total=total)


def _largest(problem: Problem, row: LinearConstraint, budget: Budget) -> str:
    """The most of one budget that a state of the problem removes, as it can be typed."""
    costs = row.coefficients
    # An energy that falls with what is removed: its lowest state removes the most.
    falling = Hamiltonian(-costs, np.zeros((problem.n, problem.n)))
    most = float(costs @ Problem(falling, problem.constraints).a_state())
    if budget.share is not None:
        # Rounded down, so that what is said can be had.
        return f"{budget.name}={math.floor(1000 * most * budget.share / row.rhs) / 10:g}%"
    unit = budget.quantity.unit
    amount = math.floor(1e6 * most / budget.quantity.units[unit.lower()]) / 1e6
    return f"{budget.name}={amount:.12g}{unit}"


def count_rows(kinds: Sequence[str], remove: Removal) -> list[LinearConstraint]:
    """How many blocks go, in all or per kind."""
    n = len(kinds)
    if not remove:
        raise InputError(
            f"--remove was not given; say how many of the {n} blocks to remove, or give a --budget"
        )
    if remove.counts:
        if remove.counts[0] >= n:
            raise InputError(
                f"--remove must be from 1 to {n - 1} for this model of {n} blocks, got {remove}"
            )
        return [rows.count(n, remove.counts[0])]
    if (total := sum(remove.kinds.values())) >= n:
        raise InputError(
            f"--remove must name 1 to {n - 1} blocks in all for this model of {n} blocks, "
            f"got {total} ({remove})"
        )
    return rows.kind_counts(kinds, remove.kinds)


def make_problem(hamiltonian: Hamiltonian, blocks: dict[str, Any], config: RunConfig) -> Problem:
    """The constrained problem of one removal.

    Raises:
        InfeasibleError: the Hamiltonian is of another number of blocks, or the rows clash.
    """
    n = len(blocks["blocks"])
    if hamiltonian.n != n:
        raise InfeasibleError(
            f"the Hamiltonian is over {hamiltonian.n} blocks, the model has {n}; "
            "measure it again for this model"
        )
    return Problem(hamiltonian, removal_rows(blocks, config))
