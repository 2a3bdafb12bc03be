"""The product's core search: a budget of measurements in, the best states of every target out.

`evaluator` losses on growing samples, and one scale for them; `surrogate` the posterior energy;
`proposals` the targets, and states to measure for them; `search` the loop and its budget.
"""

from isingcut.energies.search.proposals import Target
from isingcut.energies.search.search import Search, greedy_price

__all__ = ["Search", "Target", "greedy_price"]
