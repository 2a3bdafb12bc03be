"""Remove the right blocks from a large language model.

    import isingcut

    run = isingcut.prune("my-model", remove=8)
    run.spectrum
    run.save("smaller-model")

Names are imported on first use, so that the numerical core does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isingcut.files.provenance import __version__ as __version__
    from isingcut.ising import constraints as constraints
    from isingcut.ising.hamiltonian import Hamiltonian
    from isingcut.ising.problem import Problem
    from isingcut.ising.solvers import solve
    from isingcut.ising.spectrum import Spectrum
    from isingcut.options.config import RunConfig
    from isingcut.runs.api import PoorEnergyWarning, Run, State, open_run, prune
    from isingcut.runs.pipeline import energy, run

_HOMES = {
    "Hamiltonian": "ising.hamiltonian",
    "PoorEnergyWarning": "runs.api",
    "Problem": "ising.problem",
    "Run": "runs.api",
    "RunConfig": "options.config",
    "Spectrum": "ising.spectrum",
    "State": "runs.api",
    "__version__": "files.provenance",
    "energy": "runs.pipeline",
    "open_run": "runs.api",
    "prune": "runs.api",
    "run": "runs.pipeline",
    "solve": "ising.solvers",
}

__all__ = [
    "Hamiltonian",
    "PoorEnergyWarning",
    "Problem",
    "Run",
    "RunConfig",
    "Spectrum",
    "State",
    "energy",
    "open_run",
    "prune",
    "run",
    "solve",
]


def __getattr__(name: str) -> Any:
    if name == "constraints":
        return importlib.import_module("isingcut.ising.constraints")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"isingcut.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
