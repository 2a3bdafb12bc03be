"""Energies: text and a model -> `Hamiltonian`. One file per estimator.

A part is a frozen dataclass: its fields are its options, `measure(replay, tokens, work)` returns
the Hamiltonian, and ``default_samples`` is a class attribute. It must be deterministic, return a
symmetric J with zero diagonal, and state its unit truthfully. The class attribute ``streams`` may
say False: the blocks must be in memory.
"""

from isingcut.registry import Registry

registry = Registry("energies", "energy", choices=("auto",))
"""All energies by name; `registry.names()` lists them without importing any."""
