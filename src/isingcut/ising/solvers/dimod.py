"""Run any dimod sampler or CQM solver, also on hardware: ``dimod:package.Class``.

Infeasible samples are repaired. A sampler is third-party code: its errors and invalid results are
converted to one clear error.
"""

import contextlib
import importlib
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from isingcut.errors import InputError, IsingcutError, MissingExtraError
from isingcut.ising.constraints import LinearConstraint
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem
from isingcut.ising.solvers.base import Solution, reduce
from isingcut.ising.states import Bools, States

__all__ = ["Dimod"]

_STEPS = 1000
"""Sum of the rounded coefficients of a row."""


@dataclass(frozen=True)
class Dimod:
    """One call of a dimod sampler; infeasible samples are repaired and counted.

    A class with ``sample_cqm`` receives the constraints as rows, any other the penalty form. It
    runs in this process, without limits on time and memory.

    Args:
        sampler: class as ``package.module.Class``; or, from Python, a class or an instance.
            A class is instantiated without arguments.
        reads: value of ``num_reads``, if the sampler has this parameter.
        seed: value of ``seed``, if the sampler has this parameter.
        penalty: factor on the default penalty weight, for samplers without ``sample_cqm``.
        options: further keyword arguments of the call.
    """

    sampler: Any = ""
    reads: int = 100
    seed: int = 0
    penalty: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def solve(self, problem: Problem, k: int) -> Solution:
        """Find up to ``k`` states, without a proof."""
        reduced = reduce(problem)
        if not reduced.n:
            return Solution(reduced.expand(np.zeros((1, 0))))
        sampler = self.sampler
        if isinstance(sampler, str):
            sampler = sampler_class(sampler)
        name = self.sampler
        if not isinstance(name, str):
            name = getattr(sampler, "__name__", type(sampler).__name__)
        small = reduced.as_problem()
        try:
            # On stdout, the sampler's output would look like a result.
            with contextlib.redirect_stdout(sys.stderr):
                info, states = self._draw(small, sampler, name)
        except (KeyboardInterrupt, IsingcutError):
            raise
        except BaseException as error:
            raise _make_error(f"the sampler {name}", error) from error
        feasible = small.feasible(states)
        repaired = [find_nearest(small, state) for state in states[~feasible]]
        info.update(samples=len(states), repaired=len(repaired))
        # Many samples may be repaired to the same state.
        kept = np.unique([*states[feasible], *repaired], axis=0).reshape(-1, small.n)
        order = np.argsort(small.hamiltonian.energies(kept), kind="stable")[: 4 * k]
        return Solution(reduced.expand(kept[order]), None, False, info)

    def _draw(
        self, small: Problem, sampler: Any, name: str
    ) -> tuple[dict[str, Any], States]:
        """Run the sampler; return its ignored arguments and penalty, and the distinct states.

        A penalty below the default lets samplers move more freely; infeasible samples are repaired.
        """
        import dimod

        made = sampler() if isinstance(sampler, type) else sampler
        constrained = hasattr(made, "sample_cqm")
        call = made.sample_cqm if constrained else made.sample
        wanted = {"num_reads": self.reads, "seed": self.seed, **self.options}
        known = {
            *(getattr(made, "parameters", None) or ()),
            *inspect.signature(call).parameters,
        }
        options = {key: value for key, value in wanted.items() if key in known}
        info: dict[str, Any] = {"ignored": sorted(wanted.keys() - options.keys())}
        if constrained:
            return info, _states(call(small.to_cqm(), **options), small.n, name)
        energy = small.hamiltonian
        # The largest change by a flip: k flips repair a count that is k off, which costs k^2.
        safe = float((np.abs(energy.h) + np.abs(energy.J).sum(1)).max()) or 1.0
        info["penalty"] = self.penalty * safe
        whole = Problem(energy, [_round_row(row) for row in small.constraints])
        bqm, _ = dimod.cqm_to_bqm(whole.to_cqm(), info["penalty"])
        return info, _states(call(bqm, **options), small.n, name)


def _round_row(row: LinearConstraint) -> LinearConstraint:
    """Return a row whose smallest coefficient is 1; an inequality, for which dimod adds whole slack
    variables, with whole coefficients that every state of the row satisfies too."""
    size = np.abs(row.coefficients)
    unit = size[size > 0].min()
    if row.sense == "==":
        return replace(row, coefficients=row.coefficients / unit, rhs=row.rhs / unit)
    spare = row.tolerance / unit
    if (size / unit != np.round(size / unit)).any():
        unit = size.sum() / _STEPS
        spare = len(size) / 2
    rhs = np.floor(row.rhs / unit + spare)
    if row.sense == ">=":
        rhs = np.ceil(row.rhs / unit - spare)
    return replace(row, coefficients=np.round(row.coefficients / unit), rhs=rhs)


def sampler_class(name: str) -> Any:
    """Import the class ``package.module.Class``, without calling it.

    Raises:
        MissingExtraError: the class is in dwave-samplers, which is not installed.
        InputError: there is no such module or class, the import fails, or it is not a sampler.
    """
    from dimod.core.sampler import Sampler

    module, _, attribute = name.rpartition(".")
    if not module or not all(part.isidentifier() for part in name.split(".")):
        raise InputError(
            f"cannot read {name!r} as a sampler; write dimod:package.Class, for example "
            "dimod:dwave.samplers.TabuSampler"
        )
    try:
        sampler = getattr(importlib.import_module(module), attribute)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        absent = isinstance(error, ModuleNotFoundError)
        if absent and module.startswith("dwave.samplers"):
            raise MissingExtraError(
                "dwave-samplers", "solvers", f"the solver {name}"
            ) from None
        raise _make_error(f"importing {module!r}", error) from error
    if not isinstance(sampler, type) or not (
        issubclass(sampler, Sampler) or callable(getattr(sampler, "sample_cqm", None))
    ):
        raise InputError(
            f"{name} is not a dimod sampler; expected a subclass of dimod.Sampler, or a class with "
            "the method sample_cqm"
        )
    return sampler


def _states(samples: Any, n: int, name: str) -> States:
    """Return the distinct states (S, n) of a sample set.

    Raises:
        InputError: its values are not binary.
    """
    columns = [samples.variables.index(i) for i in range(n)]
    states = np.asarray(samples.record.sample)[:, columns]
    values = np.unique(states)
    if not (np.isin(values, (0, 1)).all() or np.isin(values, (-1, 1)).all()):
        odd = values[~np.isin(values, (-1, 0, 1))]
        shown = odd[0] if odd.size else "-1, 0 and 1 together"
        raise InputError(
            f"the sampler {name} returned values that are not binary ({shown}); choose another "
            "--solver"
        )
    return np.unique(states > 0, axis=0)


def _make_error(what: str, error: BaseException) -> InputError:
    words = " ".join(str(error).split())[:300]
    return InputError(
        f"{what} failed: {type(error).__name__}{': ' * bool(words)}{words}"
    )


def find_nearest(problem: Problem, state: Bools) -> Bools:
    """Return the feasible state with the fewest differences from ``state``.

    Of equally near states, it is the one of the lowest energy in first order around ``state``.

    Raises:
        InfeasibleError: there is no feasible state.
    """
    energy = problem.hamiltonian
    slope = energy.h + energy.J @ state
    # All slopes together weigh less than one difference.
    small = slope / (2 * np.abs(slope).sum() + 1e-300)
    distance = Hamiltonian(small + np.where(state, -1, 1), np.zeros_like(energy.J))
    return Problem(distance, problem.constraints).a_state()
