"""What a run may remove: count, budgets, blocks kept and dropped, legality - as linear rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from isingcut import constraints as rows
from isingcut.config import RunConfig
from isingcut.constraints import LinearConstraint
from isingcut.errors import InfeasibleError, InputError
from isingcut.hamiltonian import Hamiltonian
from isingcut.problem import Problem

BUDGETS = {
    "params": ("parameters", "total_parameters"),
    "bytes": ("bytes", "total_bytes"),
    "kv": ("kv_bytes_per_token", None),
    "latency": ("latency_seconds", None),
}
"""Quantity: the cost of a block that it counts, and the whole that a share refers to.

Shares of parameters and bytes are of the whole model, embeddings included; shares of the
KV cache and of latency are of the blocks' sum.
"""


def each_removal(config: RunConfig) -> list[RunConfig]:
    """The options of each removal: themselves, or one a number of a range such as ``4..15``.

    Raises:
        InputError: a range that is empty or cannot be read.
    """
    if ".." not in config.remove:
        return [config]
    match = re.fullmatch(r"(\d+)\.\.(\d+)", config.remove.replace(" ", ""))
    if match is None or not 1 <= int(match[1]) < int(match[2]):
        raise InputError(
            f"--remove {config.remove}: expected a range such as 4..15, the smaller number first"
        )
    numbers = range(int(match[1]), int(match[2]) + 1)
    return [config.replace(remove=str(m)) for m in numbers]


def removal_rows(blocks: dict[str, Any], config: RunConfig) -> list[LinearConstraint]:
    """All constraints of one removal, for the blocks that `run.json` describes.

    Raises:
        InputError: an option cannot be read, or no block or every block would go.
        InfeasibleError: the constraints clash; the message names them.
    """
    if len(each_removal(config)) > 1:
        raise InputError(
            f"--remove {config.remove} is a range, which only `run` and the search take; "
            "give one number here"
        )
    kinds = [b["kind"] for b in blocks["blocks"]]
    n = len(kinds)
    result: list[LinearConstraint] = []
    if config.remove or not config.budget:
        result += count_rows(kinds, config.remove)
    else:
        most = np.ones(n)
        result.append(LinearConstraint("some stay", most, "<=", n - 1, "not every block goes"))
    for part in config.budget.split(",") if config.budget else ():
        result.append(budget_row(blocks, part))
    if config.keep:
        result += rows.keep(n, rows.parse_indices(config.keep))
    if config.drop:
        result += rows.drop(n, rows.parse_indices(config.drop))
    result += [LinearConstraint(**row) for row in blocks["legality"]]
    Problem(Hamiltonian(np.zeros(n), np.zeros((n, n))), result).check()
    return result


def budget_row(blocks: dict[str, Any], text: str) -> LinearConstraint:
    """One ``--budget``: at least this much of a quantity is removed."""
    wanted = rows.parse_budget(text)
    if wanted.quantity not in BUDGETS:
        raise InputError(
            f"--budget {text}: unknown quantity {wanted.quantity!r}; known: {', '.join(BUDGETS)}"
        )
    key, whole = BUDGETS[wanted.quantity]
    costs = [b[key] for b in blocks["blocks"]]
    total = float(blocks[whole]) if whole else float(sum(costs))
    return rows.budget(
        wanted.quantity, costs, share=wanted.share, amount=wanted.amount, total=total
    )


def count_rows(kinds: Sequence[str], remove: str) -> list[LinearConstraint]:
    """How many blocks go, in all or per kind."""
    n = len(kinds)
    whole = remove.strip()
    if not whole:
        raise InputError(
            f"--remove was not given; say how many of the {n} blocks to remove, or give a --budget"
        )
    if re.fullmatch(r"[+-]?\d+", whole):
        if not 1 <= int(whole) < n:
            raise InputError(
                f"--remove must be from 1 to {n - 1} for this model of {n} blocks, got {whole}"
            )
        return [rows.count(n, int(whole))]
    wanted = rows.parse_counts(whole)
    assert isinstance(wanted, dict)
    if not 1 <= sum(wanted.values()) < n:
        raise InputError(
            f"--remove must name 1 to {n - 1} blocks in all for this model of {n} blocks, "
            f"got {sum(wanted.values())} ({whole})"
        )
    return rows.kind_counts(kinds, wanted)


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
