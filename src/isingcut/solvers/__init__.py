"""Solvers: `Problem` -> low-energy feasible states. One file per solver."""
