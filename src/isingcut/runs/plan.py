"""`isingcut plan`: what each energy would take on this machine, before anything runs.

Nothing is loaded but a few blocks, the embedding and the head (`prices.py`), nothing is written.
"""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from isingcut.options.config import RunConfig
from isingcut.runs.prices import Estimate, Prices

ENERGIES = ("empirical-fisher", "fisher", "gauss-newton", "hessian", "pairwise", "refined")
EVENING = 8.0
"""Hours that a run may take before the recommendation turns to less."""
# Share of the whole search below which it is not worth beginning.
_LEAST = 0.125


@dataclass(frozen=True)
class Plan:
    """Estimates for one model on this machine.

    Attributes:
        model: as it was called.
        blocks: N.
        remove: blocks that go, for the stages after the energy.
        device, dtype: of the run.
        weights: bytes of the model in memory.
        allowed: bytes the process may take.
        streamed: whether blocks would be read from disk one after the other.
        forward: tokens per second of the model's blocks and head.
        reading: bytes per second of weights, from disk into memory.
        energies, stages: estimates.
        recommended: an energy, and ``why``.
        command: what to type.
        probe_seconds: what this took.
    """

    model: str
    blocks: int
    remove: int
    device: str
    dtype: str
    weights: int
    allowed: int
    streamed: bool
    forward: float
    reading: float
    energies: tuple[Estimate, ...]
    stages: tuple[Estimate, ...]
    recommended: str
    why: str
    command: str
    probe_seconds: float

    def total(self, energy: str) -> float:
        """Seconds of a whole run with an energy."""
        own = next(e for e in self.energies if e.name == energy)
        return own.seconds + sum(s.seconds for s in self.stages)


def make_plan(config: RunConfig, *, clock: Callable[[], float] = time.perf_counter) -> Plan:
    """Probe a model and estimate every energy at its default samples.

    Args:
        config: `model`; `remove` or `budget` where the stages after the energy are of interest.
        clock: seconds, for the probe.

    Raises:
        IsingcutError: no such model, it cannot be measured, or an impossible removal.
    """
    began = time.perf_counter()
    prices = Prices(config, clock)
    energies = tuple(prices.energy(name) for name in ENERGIES)
    stages = prices.stages()
    seconds = {e.name: e.seconds for e in energies}
    recommended, effort, why = advise(config, seconds, sum(s.seconds for s in stages))
    return Plan(
        model=config.model,
        blocks=prices.n,
        remove=prices.remove,
        device=str(prices.store.device),
        dtype=str(prices.store.dtype).removeprefix("torch."),
        weights=prices.weights,
        allowed=prices.memory.total,
        streamed=prices.streamed,
        forward=1 / prices.parts["forward"].whole,
        reading=1 / max(1e-15, prices.timings.reading),
        energies=energies,
        stages=stages,
        recommended=recommended,
        why=why,
        command=command(config, recommended, effort),
        probe_seconds=time.perf_counter() - began,
    )


def advise(config: RunConfig, seconds: Mapping[str, float], rest: float) -> tuple[str, str, str]:
    """The energy that ranks best among those that end in an evening, its effort, and why.

    Args:
        config: what the user asked for.
        seconds: of each energy.
        rest: seconds of all other stages.
    """
    room = EVENING * 3600 - rest
    if config.removal and seconds["refined"] <= room:
        return "refined", config.effort, "it ranks best near one removal, and ends in an evening"
    if seconds["pairwise"] <= room:
        return "pairwise", "", "it is measured, answers every removal, and ends in an evening"
    if config.removal and _LEAST * seconds["refined"] <= room:
        why = "the whole search takes more than an evening; this is as much of it as fits"
        return "refined", f"{max(1, int(room / 3600))}h", why
    why = "measured energies take more than an evening here; this one is a guide only: "
    return "fisher", "", why + "look at its fidelity in the report"


def command(config: RunConfig, energy: str, effort: str = "") -> str:
    """What to type for an energy, with the options that were asked for."""
    words = ["isingcut", "run" if config.removal else "energy", config.model]
    own = {"model", "energy", "effort", "out"}
    if not config.removal:
        own |= {"states", "random_states"}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default and field.name not in own:
            flag = f"--{field.name.replace('_', '-')}"
            words += [flag] if value is True else [flag, str(value)]
    words += ["--energy", energy, *(["--effort", effort] if effort else [])]
    name = Path(config.model).name.removesuffix(".gguf") or "model"
    return shlex.join([*words, "--out", f"{name}-run"])
