"""Options of the choice among the measured states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval as Bounds

from isingcut.options.declaration import option
from isingcut.options.judge import JudgeOptions
from isingcut.options.patch import PatchOptions
from isingcut.options.solve import SolveOptions

LEAST_STATES = 30
"""Fewest random states to judge an energy on; with fewer, the correlation is noise."""


@dataclass(frozen=True, init=False)
class ChoiceOptions(SolveOptions, PatchOptions, JudgeOptions):
    """How one of the measured states is chosen."""

    random_states: Annotated[int, Bounds(ge=0, le=100_000)] = option(
        40,
        "Random states to measure on a quarter of the text, which show how well the energy ranks "
        "(at least 30; 0 skips this).",
        stages="rank",
    )
    choose: Literal["measured", "ground", "tasks"] = option(
        "measured",
        "How the final state is chosen: measured (lowest KL; after a patch among near candidates; "
        "if 40 % of the blocks go, also states of a search over patched states and the best state "
        "of one pass), ground (lowest energy), or tasks (the best on --tasks among a few "
        "candidates of low KL).",
        stages="rank",
    )
