"""The product's core search: a budget of measurements in, the best states of every target out.

`evaluator` losses on growing samples; `begin` a pair energy and a beam over sizes; `estimates` one
scale for them; `surrogate` the posterior energy; `proposals` its minima and moves around the best;
`slopes` of the gates at a state; `targets` what is looked for; `plan` how the budget is used;
`search` the loop.
"""

from isingcut.energies.search.plan import greedy_price
from isingcut.energies.search.search import Search
from isingcut.energies.search.targets import Target

__all__ = ["Search", "Target", "greedy_price"]
