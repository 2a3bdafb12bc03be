"""Which energy to take for a model, given what each would take, and what to type for it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from isingcut.options.config import RunConfig

EVENING = 8.0
"""Hours that a run may take before the recommendation turns to less."""
_LEAST = 0.125
"""Share of the whole search below which it is not worth beginning."""
_ASKED = (
    "remove",
    "budget",
    "samples",
    "length",
    "rank_samples",
    "report_samples",
    "states",
    "random_states",
    "dtype",
    "device",
    "attention",
    "batch_tokens",
    "stream",
    "memory_limit",
    "trust_remote_code",
)
_OF_RUN = ("states", "random_states")


@dataclass(frozen=True)
class Advice:
    """A recommendation.

    Attributes:
        energy: its name.
        why: in words.
        command: what to type.
    """

    energy: str
    why: str
    command: str


def advise(config: RunConfig, seconds: Mapping[str, float], rest: float) -> Advice:
    """The energy that ranks best among those that end in an evening.

    Args:
        config: what the user asked for.
        seconds: of each energy.
        rest: seconds of all other stages.
    """
    room = EVENING * 3600 - rest
    effort = config.effort
    if config.removal and seconds["refined"] <= room:
        energy, why = "refined", "it ranks best near one removal, and ends in an evening"
    elif seconds["pairwise"] <= room:
        energy, why = "pairwise", "it is measured, answers every removal, and ends in an evening"
    elif config.removal and _LEAST * seconds["refined"] <= room:
        energy, effort = "refined", f"{max(1, int(room / 3600))}h"
        why = "the whole search takes more than an evening; this is as much of it as fits"
    else:
        energy = "fisher"
        why = (
            "measured energies take more than an evening here; this one is a guide only: look at "
            "its fidelity in the report"
        )
    return Advice(energy, why, command(config, energy, effort))


def command(config: RunConfig, energy: str, effort: str = "") -> str:
    """What to type for an energy, with the options that were asked for."""
    default = RunConfig()
    words = ["isingcut", "run" if config.removal else "energy", config.model]
    for name in _ASKED:
        value = getattr(config, name)
        if value == getattr(default, name) or (name in _OF_RUN and not config.removal):
            continue
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [flag, str(value)]
    words += ["--energy", energy]
    if energy == "refined" and effort:
        words += ["--effort", effort]
    name = Path(config.model).name.removesuffix(".gguf") or "model"
    return shlex.join([*words, "--out", f"{name}-run"])
