"""What a budget of tokens or of time buys: optimiser steps, their size, and the learning rate.

A time is turned into tokens by the training itself: a few steps of the least and of the most
tokens that are computed at a time, on the clock, with all that belongs to a step. What was decided
is kept in the work folder, so that a healing that goes on later has the same schedule.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from dataclasses import dataclass
from typing import Any

from isingcut.data.tokens import TokenSet
from isingcut.healing.job import Job
from isingcut.healing.training.train import step_times, steps_of
from isingcut.healing.work_folder import kept
from isingcut.models.architectures import text_config
from isingcut.options.healing import LENGTH, HealConfig
from isingcut.options.spellings import parse_healing

EPOCHS = 4.0
"""How often a budget may read its text: more repeats than it teaches."""
# Of the time that is left: states are written, too, and no clock is exact.
_USED = 0.9
# Tokens of a sample, the fewest, and of a step.
_SHORT, _FEWEST, _MOST = 256, 512, 16384


@dataclass(frozen=True)
class Recipe:
    """What a budget bought.

    Attributes:
        steps: optimiser steps; the schedule ends with them.
        batch: sequences of a step, over all processes.
        length: tokens of a sequence, the longest.
        learning_rate: the highest.
        tokens: of all steps, about.
        seconds: that they take by the clock of the first steps; None of a budget in tokens.
        epochs: how often the text is read.
    """

    steps: int
    batch: int
    length: int
    learning_rate: float
    tokens: int
    seconds: float | None
    epochs: float


def sizes(
    config: HealConfig, tokens: float, *, width: int, longest: int = LENGTH, processes: int = 1
) -> tuple[int, int, float]:
    """Batch, length and learning rate that suit a number of tokens.

    A step grows with the root of the tokens: 512 for 20,000 (40 steps), 1,024 for 80,000, 4,096
    for 1.3 million. The rate falls with it, from 3e-4 to the paper's 2e-5, and is lower for wider
    models, as Adam's steps ask for. What the options say is taken as it is.

    Args:
        width: of the residual stream.
        longest: sequence, in tokens.
        processes: that a batch is shared by.
    """
    step = 2 ** round(math.log2(3.6 * math.sqrt(max(1.0, tokens))))
    step = min(_MOST, max(_FEWEST, step))
    length = longest if config.length else min(longest, max(_SHORT, step // 4))
    batch = config.batch or processes * math.ceil(step / (length * processes))
    scale = 10.0 if config.method == "lora" else 1.0
    rate = min(3e-4, 0.08 / math.sqrt(max(1.0, tokens))) * min(1.0, 576 / width)
    rate = config.learning_rate or min(1e-3, scale * max(2e-5, rate))
    return batch, length, float(f"{rate:.2g}")


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
    found = job.processes.decide(
        lambda: kept(file, lambda: dataclasses.asdict(_bought(job, tokens, seconds, pace)))
    )
    recipe = Recipe(**found)
    changed = config.replace(
        steps=recipe.steps, batch=recipe.batch, learning_rate=recipe.learning_rate, effort=""
    )
    text = pieces(job.tokens, recipe.length)
    return dataclasses.replace(job, config=changed, tokens=text), {"recipe": found}


def _bought(
    job: Job, tokens: float | None, seconds: float | None, pace: tuple[float, float]
) -> Recipe:
    """What the budget is spent on.

    Args:
        pace: seconds of a step, and of each of its tokens besides.
    """
    config, mask = job.config, job.tokens.mask
    width, longest = int(text_config(job.teacher.model).hidden_size), int(mask.sum(1).max())
    shape = {"width": width, "longest": longest, "processes": job.processes.size}
    each, token = pace
    most = (config.epochs or EPOCHS) * int(mask.sum())
    wanted = most if tokens is None else tokens
    # The size of a step decides how many tokens there are time for, and they decide its size.
    for _ in range(1 if seconds is None else 8):
        wanted = min(most, wanted)
        batch, length, rate = sizes(config, wanted, **shape)
        text = pieces(job.tokens, length)
        step = batch * float(text.mask.sum()) / text.samples
        if seconds is not None:
            wanted = max(0.0, seconds) / (token + each / step)
    steps = min(
        max(1, int(min(most, wanted) / step)),
        steps_of(config.replace(batch=batch, epochs=config.epochs or EPOCHS), text.samples),
    )
    return Recipe(
        steps,
        batch,
        length,
        rate,
        int(steps * step),
        None if seconds is None else steps * (each + token * step),
        steps * batch / text.samples,
    )


def _pace(job: Job) -> tuple[float, float]:
    """Seconds of a step whatever its size, and of each of its tokens, measured in all processes."""
    trial = job.work / "trial"
    text = pieces(job.tokens, _SHORT)
    times = step_times(dataclasses.replace(job, tokens=text, work=trial))
    if job.leads:
        shutil.rmtree(trial, ignore_errors=True)
    half = len(times) // 2
    # The first step of a size compiles and allocates; of the others the fastest was not disturbed.
    (n, s), (m, t) = (
        min(part[1:], key=lambda step: step[1]) for part in (times[:half], times[half:])
    )
    token = (t - s) / (m - n) if m > n and t > s else t / m
    return max(0.0, t - token * m), token


def pieces(tokens: TokenSet, length: int) -> TokenSet:
    """Samples of at most so many tokens; what a longer one begins with begins each of its pieces.

    A first token that all samples share is the tokenizer's start token, which a model wants first.
    """
    ids, counts = tokens.input_ids, tokens.mask.sum(1).tolist()
    if max(counts) <= length:
        return tokens
    shared = len(counts) > 1 and bool((ids[:, 0] == ids[0, 0]).all())
    start = [int(ids[0, 0])] if shared else []
    rows, names = [], []
    for row, count in enumerate(counts):
        body, size = ids[row, len(start) : count].tolist(), length - len(start)
        found = [start + body[at : at + size] for at in range(0, len(body), size)]
        # The rest of a sample teaches little where it is a few tokens.
        found = [piece for piece in found if 8 * len(piece) >= length] or found[:1]
        rows += found
        names += [tokens.parts[row]] * len(found) if tokens.parts else []
    return TokenSet.from_rows(rows, parts=names)
