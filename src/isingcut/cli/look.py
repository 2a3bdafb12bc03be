"""Verbs that only look: `inspect`, `plan`, `ls`."""

from __future__ import annotations

from typing import Any

from isingcut.cli.verb import LOOK, Answer, given, verb
from isingcut.options.config import RunConfig


@verb("model", "trust_remote_code", name="inspect", group=LOOK)
def inspect_blocks(**options: Any) -> Answer:
    """Show a model's blocks, what each costs and which states are legal, without its weights.

    Example: isingcut inspect smollm2
    """
    from isingcut.cli.show import inspection_data, show_inspection
    from isingcut.models.inspect import inspect_model
    from isingcut.models.sources import resolve

    config = RunConfig(**given(options)).validate()
    trust = config.trust_remote_code
    found = inspect_model(resolve(config.model, trust_remote_code=trust), trust_remote_code=trust)
    return Answer(
        inspection_data(found), lambda: show_inspection(found), brief=str(len(found.stack))
    )


_PLAN = (
    "model", "remove", "budget", "effort", "samples", "length", "rank_samples", "report_samples",
    "states", "random_states", "patch", "patch_tokens", "heal", "heal_top", "heal_options",
    "dtype", "device", "attention", "batch_tokens", "stream", "memory_limit", "trust_remote_code",
)  # fmt: skip


@verb(*_PLAN, group=LOOK)
def plan(**options: Any) -> Answer:
    """Say what each energy would take on this machine, from a few timed blocks; runs nothing.

    Example: isingcut plan smollm2 --remove 6
    """
    from isingcut.cli.show import show_plan
    from isingcut.runs.plan import make_plan

    found = make_plan(RunConfig(**given(options)).validate())
    return Answer(found, lambda: show_plan(found), brief=found["command"])


@verb(name="ls", group=LOOK)
def list_parts() -> Answer:
    """List the energies, the solvers, the baselines and the benchmark tasks.

    Example: isingcut ls
    """
    from isingcut.baselines import registry as baselines
    from isingcut.cli.show import show_lines
    from isingcut.energies import registry as energies
    from isingcut.evaluation.local_tasks import task_names
    from isingcut.ising.solvers import registry as solvers

    parts = {r.room: r.names() for r in (energies, solvers, baselines)}
    parts["tasks"] = task_names()
    lines = [f"{room}: {', '.join(names)}" for room, names in parts.items()]
    return Answer(parts, lambda: show_lines(lines), brief="\n".join(lines))
