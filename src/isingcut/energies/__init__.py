"""Energies: text and a model -> `Hamiltonian`. One file per estimator."""

from isingcut.registry import Registry

registry = Registry("energies", "energy", choices=("auto",))
"""All energies by name; `registry.names()` lists them without importing any."""
