"""The search for good states of every target, with a budget of measurements.

`evaluator`: losses on growing numbers of samples; `begin`: a pair energy and a beam over sizes;
`estimates`: one scale for all losses; `surrogate`: the posterior energy; `proposals`: its minima
and moves around the best states; `slopes`: gate slopes at a state; `targets`: the removals; `plan`:
the use of the budget; `search`: the loop.
"""

from isingcut.energies.search.plan import greedy_price
from isingcut.energies.search.search import Search
from isingcut.energies.search.targets import Target

__all__ = ["Search", "Target", "greedy_price"]
