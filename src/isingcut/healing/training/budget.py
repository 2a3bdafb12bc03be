"""A training on a budget: a time is turned into steps by the training itself, on the clock.

A few steps of the least and of the most tokens that are computed at a time are made, with all that
belongs to a step. What was decided is kept in the work folder, so that a healing that goes on later
has the same schedule.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from typing import Any

from isingcut.data.tokens import pieces
from isingcut.healing.job import Job
from isingcut.healing.recipe import SHORT, Recipe, bought
from isingcut.healing.training.batches import TimedSteps
from isingcut.healing.training.train import step_times
from isingcut.healing.work_folder import kept
from isingcut.models.architectures import text_config
from isingcut.options.spellings import parse_healing

# Of the time that is left: states are written and judged, too, and no clock is exact.
_USED = 0.85


def planned(job: Job) -> tuple[Job, dict[str, Any]]:
    """The job with its budget turned into steps, and its text into samples of their length.

    Returns:
        the job, and what `healing.json` says of the budget: nothing where there is none.
    """
    config, began = job.config, time.monotonic()
    tokens, seconds = parse_healing(config.effort)
    if tokens is None and seconds is None:
        return job, {}
    file = job.work / "recipe.json"
    pace = (0.0, 0.0)
    if seconds is not None and not job.processes.decide(file.exists):
        pace = _pace(job)
        seconds = _USED * (seconds - (time.monotonic() - began))

    def spent() -> Recipe:
        return bought(
            config,
            job.tokens,
            tokens,
            seconds,
            pace,
            width=int(text_config(job.teacher.model).hidden_size),
            processes=job.processes.size,
        )

    found = job.processes.decide(lambda: kept(file, lambda: dataclasses.asdict(spent())))
    recipe = Recipe(**found)
    changed = config.replace(
        steps=recipe.steps, batch=recipe.batch, learning_rate=recipe.learning_rate, effort=""
    )
    text = pieces(job.tokens, recipe.length)
    return dataclasses.replace(job, config=changed, tokens=text), {"recipe": found}


def _pace(job: Job) -> tuple[float, float]:
    """Seconds of a step whatever its size, and of each of its tokens, measured in all processes."""
    trial = job.work / "trial"
    text = pieces(job.tokens, SHORT)
    times = step_times(dataclasses.replace(job, tokens=text, work=trial))
    if job.leads:
        shutil.rmtree(trial, ignore_errors=True)
    # The first step of a size compiles and allocates; of the others the fastest was not disturbed.
    (n, s), (m, t) = (
        min(part[1:], key=lambda step: step[1])
        for part in (times[: TimedSteps.small], times[TimedSteps.small :])
    )
    token = (t - s) / (m - n) if m > n and t > s else t / m
    return max(0.0, t - token * m), token
