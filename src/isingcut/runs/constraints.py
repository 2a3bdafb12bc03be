"""The constraints of a removal: linear rows over the blocks of a model.

Counts, budgets, keep and drop lists and legality are rows. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from isingcut.errors import InfeasibleError, InputError
from isingcut.files.runs import BlockList, LegalityRow
from isingcut.ising import constraints as rows
from isingcut.ising.constraints import LinearConstraint
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem
from isingcut.ising.states import Floats
from isingcut.options.parsed import Budget, Removal
from isingcut.options.search import SearchOptions

if TYPE_CHECKING:
    from isingcut.formats.architectures.blocks import BlockStack


TIMED_TOKENS = 128
"""Most tokens of the sequence that blocks are timed on, without a context in the budget."""


def removal_rows(
    blocks: BlockList, config: SearchOptions, *, early: bool = False
) -> list[LinearConstraint]:
    """Make all constraints of one removal, for the blocks in `run.json`.

    Args:
        early: the blocks are known from the model's configuration only; skip budgets that depend
            on its weights or on this machine.

    Raises:
        InputError: an unreadable option, or no block or every block would be removed.
        InfeasibleError: the constraints conflict; the message has them and the nearest possible
            number of blocks or the largest budgets.
    """
    if config.remove.is_range:
        raise InputError(
            f"--remove {config.remove} is a range, which only `run` and the search accept; "
            "give one number here (in Python: Run.at)"
        )
    kinds = [b.kind for b in blocks.blocks]
    n = len(kinds)
    if n == 1:
        raise InputError(
            "this model has a single block, which must stay; use a deeper model"
        )
    if config.remove or not config.budget:
        counts = count_rows(kinds, config.remove)
    else:
        counts = [
            LinearConstraint(
                "some stay", np.ones(n), "<=", n - 1, "not every block goes"
            )
        ]
    others = kept_and_dropped(n, config)
    others += [LinearConstraint(**dict(row)) for row in blocks.legality]
    budgets = [b for b in config.budget.parts if b.quantity.early or not early]
    bounds = [budget_row(blocks, b) for b in budgets]
    blank = Hamiltonian(np.zeros(n), np.zeros((n, n)))
    plain = Problem(blank, [*counts, *others])
    if bounds and config.budget.packed and all(row.rhs <= 0 for row in bounds):
        raise InputError(
            f"the whole model meets --budget {config.budget}; no block has to be removed"
        )
    try:
        Problem(blank, [*counts, *others, *bounds]).check()
    except InfeasibleError as e:
        if not plain.has_states():
            near = sorted(range(1, n), key=lambda m: abs(m - int(counts[0].rhs)))
            legal = (
                m
                for m in near
                if Problem(blank, [rows.count(n, m), *others]).has_states()
            )
            possible = next(legal, None) if config.remove.counts else None
            hint = (
                f"; the nearest possible number of blocks is {possible}"
                if possible
                else ""
            )
            raise InfeasibleError(f"{e}{hint}") from e
        pairs = zip(bounds, budgets, strict=True)
        each = [_furthest(blocks, plain, b) for row, b in pairs if row.rhs > 0]
        alone = "each alone " if len(each) > 1 else ""
        most = "nearest" if config.budget.packed else "largest"
        zeros = (
            "; removed sublayers stay as zeros here: give --units blocks, or a budget of kv"
            if any(blocks.halves)
            else ""
        )
        raise InfeasibleError(
            f"{e}; the {most} possible {alone}is {', '.join(each)}{zeros}"
        ) from e
    return [*counts, *bounds, *others]


def kept_and_dropped(n: int, config: SearchOptions) -> list[LinearConstraint]:
    """Make the rows of `keep` and `must_remove`.

    Raises:
        InputError: a block that a model of ``n`` blocks does not have.
    """
    kept = rows.keep(n, config.keep.numbers)
    return [*kept, *rows.drop(n, config.must_remove.numbers)]


def budget_row(blocks: BlockList, budget: Budget) -> LinearConstraint:
    """Make the row of one `--budget`: at least this much of a quantity is removed.

    For a packed model, this is the excess over the limit; 0 or less if the whole model meets it.
    """
    quantity = budget.quantity
    costs, before, now = _costs(blocks, budget)
    if quantity.packed:
        most = budget.amount or (1 - (budget.share or 0.0)) * before
        reason = f"{budget.name} of at most {most:.6g} bytes"
        name = f"budget {budget.name}"
        return LinearConstraint(name, costs, ">=", now - most, reason)
    share = budget.share
    if budget.name == "speed":
        assert share is not None
        # Of the time: twice the speed is half of the time.
        row = rows.budget("speed", costs, share=share / (1 + share), total=before)
        return dataclasses.replace(row, reason=f"speed at least {share:.6g} higher")
    row = rows.budget(
        budget.name, costs, share=share, amount=budget.amount, total=before
    )
    unit = quantity.unit
    amount = f"{row.rhs / quantity.units[unit.lower()]:.6g}{unit}"
    return dataclasses.replace(
        row, reason=f"{budget.name} of at least {amount} removed"
    )


def _costs(blocks: BlockList, budget: Budget) -> tuple[Floats, float, float]:
    """Return the costs of the blocks, and of the whole model before and after any packing.

    They are those of what is written: a sublayer that goes alone stays as zeros, which the
    checkpoint holds and transformers computes; only its keys and values can be left out.
    """
    quantity = budget.quantity
    if not quantity.packed:
        timed = {"latency": blocks.timed_tokens, "speed": blocks.decoded_tokens}
        if timed.get(budget.name, budget.context) != budget.context:
            raise InputError(
                f"the blocks of this run were not timed for this context of {budget.name}; give "
                "--budget to a new run"
            )
        costs = np.array([getattr(b, quantity.cost) for b in blocks.blocks], float)
        total = float(getattr(blocks, quantity.whole, costs.sum()))
        stay = blocks.halves if budget.name != "kv" else False
        return np.where(stay, 0, costs), total, total
    packed = blocks.packed
    if packed is None:
        raise InputError(
            f"--budget {budget.name} chooses a type by measurement, which only `isingcut run` "
            "does; give --remove M, or a budget of params, bytes, kv, latency or speed"
        )
    cache = np.zeros(len(blocks.blocks))
    if budget.context:
        # Keys and values in float16, llama.cpp's default.
        for i, b in enumerate(blocks.blocks):
            tokens = min(budget.context, b.window or budget.context)
            beyond = b.kv_bytes_past_window * (budget.context - tokens)
            grown = b.kv_bytes_per_token * tokens + beyond
            cache[i] = 2 * b.parameters / b.bytes * grown + b.state_bytes
    own = np.array(getattr(packed, quantity.cost))
    now = float((own + cache).sum()) + getattr(packed, quantity.whole)
    # What the file keeps as zeros keeps its cache.
    costs = np.where(own > 0, own + cache, 0)
    return costs, packed.read_before + float(cache.sum()), now


def _furthest(blocks: BlockList, problem: Problem, budget: Budget) -> str:
    """Return the strictest feasible value of one budget, as text for `--budget`."""
    costs, before, now = _costs(blocks, budget)
    # The energy decreases with the removed amount, so its lowest state removes the most.
    falling = Hamiltonian(-costs, np.zeros((problem.n, problem.n)))
    most = float(costs @ Problem(falling, problem.constraints).a_state())
    unit = budget.quantity.unit
    at = f"@{budget.context}" if budget.context else ""
    # Rounded so that the printed value is feasible.
    if budget.share is not None:
        share = (before - now + most) / before
        if budget.name == "speed":
            share = share / (1 - share)
        return f"{budget.name}={math.floor(1000 * share) / 10:g}%{at}"
    scale = budget.quantity.units[unit.lower()]
    amount = math.floor(1e6 * most / scale) / 1e6
    if budget.quantity.packed:
        amount = math.ceil(1e3 * (now - most) / scale) / 1e3
    return f"{budget.name}={amount:.12g}{unit}{at}"


def count_rows(kinds: Sequence[str], remove: Removal) -> list[LinearConstraint]:
    """Make the rows for the number of removed blocks, in all or per kind."""
    n = len(kinds)
    if not remove:
        raise InputError(
            f"--remove is missing; give how many of the {n} blocks to remove, or a --budget"
        )
    total = remove.counts[0] if remove.counts else sum(remove.kinds.values())
    if total >= n:
        raise InputError(
            f"--remove must be from 1 to {n - 1} for this model of {n} blocks, got {total}"
        )
    return (
        [rows.count(n, total)]
        if remove.counts
        else rows.kind_counts(kinds, remove.kinds)
    )


def describe_blocks(
    stack: BlockStack,
    legal: Iterable[LinearConstraint],
    parameters: int,
    size: int,
    seconds: Sequence[float] = (),
    timed_tokens: int = 0,
) -> BlockList:
    """Describe blocks and legality rows for `run.json`, so that solving needs no model.

    Args:
        parameters: parameters of the whole model; ``size`` its bytes, 0 if unknown.
        seconds: time of each block, if measured.
        timed_tokens: context of the latency budget, the length of the sequence; 0 without one.
    """
    times: Sequence[float | None] = seconds or [None] * len(stack)
    return BlockList(
        path=stack.path,
        blocks=[
            block.model_copy(update={"latency_seconds": time})
            for block, time in zip(stack.blocks, times, strict=True)
        ],
        total_parameters=parameters,
        total_bytes=size,
        timed_tokens=timed_tokens,
        legality=[
            LegalityRow(**{**vars(row), "coefficients": row.coefficients.tolist()})
            for row in legal
        ],
    )
