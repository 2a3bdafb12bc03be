"""`isingcut plan`: what each energy would take on this machine, before anything runs.

Nothing is loaded but a few blocks, the embedding and the head (`probe.py`), nothing is written.
"""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from isingcut.options.config import RunConfig
from isingcut.runs.prices import Prices

ENERGIES = ("empirical-fisher", "fisher", "gauss-newton", "hessian", "pairwise", "refined")
EVENING = 8.0
"""Hours that a run may take before the recommendation turns to less."""
# Share of the whole search below which it is not worth beginning.
_LEAST = 0.125


def make_plan(
    config: RunConfig, *, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Probe a model and estimate every energy at its default samples.

    Args:
        config: `model`; `remove` or `budget` where the stages after the energy are of interest.
        clock: seconds, for the probe.

    Returns:
        what `plan --json` prints: ``weights`` and ``allowed`` in bytes of memory, ``forward`` in
        tokens per second, ``reading`` in bytes per second, ``energies`` and ``stages`` as
        `Estimate`, ``healing``, what its budget buys, or None, and ``seconds`` of the whole run
        that ``command`` starts.

    Raises:
        IsingcutError: no such model, it cannot be measured, or an impossible removal.
    """
    began = time.perf_counter()
    prices = Prices(config, clock)
    energies, stages = [prices.energy(name) for name in ENERGIES], prices.stages()
    seconds, rest = {e.name: e.seconds for e in energies}, sum(s.seconds for s in stages)
    recommended, effort, why = advise(config, seconds, rest)
    return {
        "model": config.model,
        "blocks": prices.n,
        "remove": prices.remove,
        "device": str(prices.store.device),
        "dtype": str(prices.store.dtype).removeprefix("torch."),
        "weights": prices.weights,
        "allowed": prices.memory.total,
        "streamed": prices.streamed,
        "forward": 1 / (prices.timings.blocks + prices.timings.once),
        "reading": 1 / max(1e-15, prices.timings.reading),
        "energies": [vars(e) for e in energies],
        "stages": [vars(s) for s in stages],
        "healing": prices.healing(),
        "recommended": recommended,
        "seconds": seconds[recommended] + rest,
        "why": why,
        "command": command(config, recommended, effort),
        "probe_seconds": time.perf_counter() - began,
    }


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
