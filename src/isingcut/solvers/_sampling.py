"""States from dimod samplers: the problem is handed over, infeasible samples are repaired."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isingcut.errors import InputError, MissingExtraError
from isingcut.problem import Problem
from isingcut.solvers._reduced import reduce
from isingcut.solvers.base import Solution


def sampler_class(name: str) -> Any:
    """The class at ``package.module.Class``.

    Raises:
        MissingExtraError: it is one of dwave-samplers' and that is not installed.
        InputError: there is no such module or class, or it is no sampler.
    """
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ValueError:
        raise InputError(
            f"cannot read {name!r} as a sampler; write dimod:package.Class, for example "
            "dimod:dwave.samplers.TabuSampler"
        ) from None
    except ModuleNotFoundError as error:
        if module.startswith("dwave.samplers"):
            raise MissingExtraError("dwave-samplers", "solvers", f"the solver {name}") from None
        raise InputError(f"cannot import {module!r} for the solver dimod:{name}: {error}") from None
    except AttributeError:
        raise InputError(f"{module!r} has no {attribute!r}; check the solver's name") from None
    if not (hasattr(found, "sample") or hasattr(found, "sample_cqm")):
        raise InputError(f"{name} is no dimod sampler: it has neither sample nor sample_cqm")
    return found


def sample(
    problem: Problem, k: int, name: str, wanted: dict[str, Any], penalty: float = 1.0
) -> Solution:
    """States of one call of a sampler: a CQM solver gets the rows, any other the penalty form.

    Args:
        problem: what to solve.
        k: how many states to return at most.
        name: of the sampler class.
        wanted: keyword arguments; those the sampler does not know are left out and listed in
            ``info["ignored"]``.
        penalty: weight of the penalty form as a share of the one no swap can outbid. Less
            lets samplers move more freely; what comes out infeasible is repaired.
    """
    reduced = reduce(problem)
    sampler = sampler_class(name)()
    constrained = hasattr(sampler, "sample_cqm")
    call = sampler.sample_cqm if constrained else sampler.sample
    known = set(getattr(sampler, "parameters", None) or ()) | set(
        inspect.signature(call).parameters
    )
    options = {key: value for key, value in wanted.items() if key in known}
    info: dict[str, Any] = {"ignored": sorted(wanted.keys() - options.keys())}
    if not reduced.n:
        return Solution(reduced.expand(np.zeros((1, 0))), None, False, info)
    small = reduced.as_problem()
    if constrained:
        samples = call(small.to_cqm(), **options)
    else:
        _, safe = small.to_bqm()
        bqm, info["penalty"] = small.to_bqm(penalty * safe)
        samples = call(bqm, **options)
    place = {label: i for i, label in enumerate(samples.variables)}
    columns = [place[i] for i in range(reduced.n)]
    states = np.unique(np.asarray(samples.record.sample)[:, columns] > 0, axis=0)
    feasible = small.feasible(states)
    repaired = [repair(small, state) for state in states[~feasible]]
    mended = [state for state in repaired if state is not None]
    info.update(
        samples=int(states.shape[0]),
        repaired=len(mended),
        dropped=len(repaired) - len(mended),
    )
    kept = np.concatenate([states[feasible], np.array(mended).reshape(-1, reduced.n) > 0])
    order = np.argsort(small.hamiltonian.energies(kept), kind="stable")[: 4 * k]
    return Solution(reduced.expand(kept[order]), None, False, info)


def repair(problem: Problem, state: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
    """A feasible state near ``state``: flips, then swaps, that lessen the violation most.

    Ties go to the lower energy. None where no such move is left before all rows hold.
    """
    rows = problem.constraints
    matrix = np.array([row.coefficients for row in rows])
    size = np.abs(matrix).max(axis=1)
    low, high = (np.array([row.interval() for row in rows]) / size[:, None]).T
    matrix = matrix / size[:, None]
    x = state.astype(np.int8)
    n = problem.n
    flips = np.eye(n, dtype=np.int8)
    pairs = np.triu_indices(n, 1)
    swaps = flips[pairs[0]] + flips[pairs[1]]

    def violation(states: NDArray[np.int8]) -> NDArray[np.float64]:
        value = states @ matrix.T
        total: NDArray[np.float64] = (np.maximum(low - value, 0) + np.maximum(value - high, 0)).sum(
            axis=1
        )
        return total

    left = float(violation(x[None])[0])
    while left > 0:
        for moves in (flips, swaps):
            near = x[None] ^ moves
            remaining = violation(near)
            if remaining.min() < left - 1e-12:
                break
        else:
            return None
        best = np.flatnonzero(remaining <= remaining.min() + 1e-12)
        x = near[best[int(np.argmin(problem.hamiltonian.energies(near[best])))]]
        left = float(remaining.min())
    result: NDArray[np.bool_] = x > 0
    return result if bool(problem.feasible(result[None])[0]) else None
