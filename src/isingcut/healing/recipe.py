"""How long a model is trained: optimiser steps, their size, and the learning rate.

A budget of tokens or of time decides them where the `--trainer` file leaves them open.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from isingcut.data.tokens import TokenSet, pieces
from isingcut.healing.trainer_file import trainer_settings
from isingcut.options.config import LENGTH, HealConfig

EPOCHS = 4.0
"""How often a budget may read its text: more repeats than it teaches."""
SHORT = 256
"""Tokens of a sample, the fewest."""
# Sequences of a step where nothing says another number.
_BATCH = 16
# Tokens of the largest step, and about as many steps as few tokens are divided into.
_MOST, _STEPS = 16384, 40
# Tokens of a step that bears the highest rate.
_CALM = 2048


@dataclass(frozen=True)
class Recipe:
    """What a training does.

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


def usual_recipe(config: HealConfig, text: TokenSet, processes: int = 1) -> Recipe:
    """Of a training without a budget: the paper's, 2e-5 and one epoch; LoRA's rate is 2e-4."""
    settings = trainer_settings(config)
    batch = _batch(settings, processes) or processes * math.ceil(_BATCH / processes)
    steps = settings.get("max_steps") or _steps(text, batch, settings.get("num_train_epochs", 1.0))
    rate = settings.get("learning_rate") or (2e-4 if config.lora_rank else 2e-5)
    samples = steps * batch
    tokens = int(samples * int(text.mask.sum()) / text.samples)
    length = int(text.mask.sum(1).max())
    return Recipe(steps, batch, length, float(rate), tokens, None, samples / text.samples)


def sizes(
    config: HealConfig, tokens: float, *, width: int, longest: int = LENGTH, processes: int = 1
) -> tuple[int, int, float]:
    """Batch, length and learning rate that suit a number of tokens.

    A step grows with the root of the tokens, 2,048 for 80,000 and 8,192 for 1.3 million, and there
    are some 40 or more. The rate falls as the tokens grow, from 3e-4 to the paper's 2e-5, and is
    lower for wider models, as Adam's steps ask for, and for small steps. What the options say is
    taken as it is.

    Args:
        width: of the residual stream.
        longest: sequence, in tokens.
        processes: that a batch is shared by.
    """
    settings, tokens = trainer_settings(config), max(1.0, tokens)
    step = 2 ** round(math.log2(min(7.2 * math.sqrt(tokens), tokens / _STEPS)))
    step = min(_MOST, max(SHORT, step))
    length = longest if config.length else min(longest, max(SHORT, step // 8))
    batch = _batch(settings, processes) or processes * math.ceil(step / (length * processes))
    scale = 10.0 if config.lora_rank else 1.0
    rate = min(3e-4, 0.086 / math.sqrt(tokens)) * min(1.0, 576 / width)
    # Gradients of few tokens are noise for the most part.
    rate *= math.sqrt(min(1.0, batch * length / _CALM))
    rate = float(f"{min(1e-3, scale * max(2e-5, rate)):.2g}")
    return batch, length, float(settings.get("learning_rate", rate))


def bought_recipe(
    config: HealConfig,
    text: TokenSet,
    tokens: float | None,
    seconds: float | None,
    pace: tuple[float, float],
    *,
    width: int,
    processes: int = 1,
) -> Recipe:
    """What a budget is spent on.

    Args:
        text: that is trained on.
        tokens, seconds: one of them.
        pace: seconds of a step, and of each of its tokens besides.
        width, processes: as for `sizes`.
    """
    mask = text.mask
    longest = int(mask.sum(1).max())
    each, token = pace
    epochs = trainer_settings(config).get("num_train_epochs", EPOCHS)
    most = epochs * int(mask.sum())
    wanted = most if tokens is None else tokens
    # The size of a step decides how many tokens there are time for, and they decide its size.
    for _ in range(1 if seconds is None else 8):
        wanted = min(most, wanted)
        batch, length, rate = sizes(
            config, wanted, width=width, longest=longest, processes=processes
        )
        cut = pieces(text, length)
        step = batch * float(cut.mask.sum()) / cut.samples
        if seconds is not None:
            wanted = max(0.0, seconds) / (token + each / step)
    steps = min(max(1, int(min(most, wanted) / step)), _steps(cut, batch, epochs))
    return Recipe(
        steps,
        batch,
        length,
        rate,
        int(steps * step),
        None if seconds is None else steps * (each + token * step),
        steps * batch / cut.samples,
    )


def _batch(settings: Mapping[str, Any], processes: int) -> int | None:
    """Sequences of a step as TrainingArguments count them; None where they say nothing."""
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    if not any(name in settings for name in names):
        return None
    each, parts = (int(settings.get(n, d)) for n, d in zip(names, (8, 1), strict=True))
    return processes * each * parts


def _steps(text: TokenSet, batch: int, epochs: float) -> int:
    return max(1, math.ceil(math.ceil(text.samples / batch) * epochs))
