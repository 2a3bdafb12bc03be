"""The search for good states of every target, with a budget of measurements.

`evaluator`: losses on growing numbers of samples, extrapolated to all; `surrogate`: the posterior
energy; `proposals`: the targets, and states to measure for them; `search`: the loop and its budget.
"""

from isingcut.energies.search.proposals import Target
from isingcut.energies.search.search import Search, default_passes, greedy_price

__all__ = ["Search", "Target", "default_passes", "greedy_price"]
