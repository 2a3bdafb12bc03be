"""One cut model to heal, and who looks at its training.

A judge ends a training where it goes wrong, or is behind a rival. It looks at checks: the KL to the
original of each sample held out, as the training's own loss has it. They are made where states are
saved, so that a healing which goes on from a state knows those before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from isingcut.console.progress import Progress, silent
from isingcut.data.tokens import TokenSet
from isingcut.files.documents.scores import HealingCheck, HealingRecipe, HealingStop
from isingcut.ising.states import Floats
from isingcut.measure.losses import standard_error
from isingcut.models.load import LoadedModel
from isingcut.models.processes import ALONE, Processes
from isingcut.models.streaming.replay import StreamedReplay
from isingcut.options.healing import HealConfig

# Tokens of each sample that are looked at.
_LENGTH = 256
_ERRORS = 2.0
"""Standard errors of a paired difference that are more than noise here."""


def beginnings(tokens: TokenSet) -> TokenSet:
    """The first tokens of each sample: enough to judge by, at little cost."""
    rows = []
    for row in tokens.rows:
        # What comes before the first answer of a conversation may be longer.
        first = next((t for t in range(1, len(row)) if row[t] >= 0), 0)
        rows.append(row[: max(_LENGTH, first + _LENGTH // 4)])
    return TokenSet.from_rows(rows, parts=tokens.parts)


def difference(
    first: npt.ArrayLike, second: npt.ArrayLike, counts: npt.NDArray[np.int64]
) -> tuple[float, float]:
    """second - first in nats per prediction, paired by sample, and its standard error.

    Args:
        first, second: sums over the predictions of each sample.
        counts: predictions of each sample.
    """
    sums: Floats = np.asarray(second, dtype=float) - np.asarray(first, dtype=float)
    return float(sums.sum() / counts.sum()), float(standard_error(sums, counts))


class Domains:
    """Ends a training where it makes one part of a mixture of texts worse.

    Worse is: at a check, by more than two standard errors, than before the training and than at
    the check before, whose weights are kept, or where these were worse than in the beginning, too,
    the first ones. The first check after the beginning ends nothing.
    """

    def __init__(self, report: TokenSet) -> None:
        self.tokens = beginnings(report)
        self._parts = self.tokens.rows_by_part or {"": list(range(report.samples))}

    def verdict(self, checks: Sequence[HealingCheck]) -> HealingStop | None:
        if len(checks) < 3:
            return None
        begin, before, now = checks[0], checks[-2], checks[-1]
        counts = self.tokens.predicted.sum(1).numpy()
        for name, rows in self._parts.items():
            if len(rows) < 2:
                continue
            start, last, here = (np.asarray(c.kl_sums)[rows] for c in (begin, before, now))
            worse = [difference(past, here, counts[rows]) for past in (start, last)]
            if all(mean > _ERRORS * error for mean, error in worse):
                kl = [float(sums.sum() / counts[rows].sum()) for sums in (start, last, here)]
                where = f"on {name} the model" if name else "the model"
                mean, error = difference(start, last, counts[rows])
                kept = 0 if mean > _ERRORS * error else before.step
                what = f"the weights of step {kept} are" if kept else "nothing of it is"
                return HealingStop(
                    why=f"healing was stopped at step {now.step}, and {what} kept: {where} got "
                    f"worse, KL {kl[0]:.4f} before, {kl[1]:.4f} and then {kl[2]:.4f}",
                    kept=kept,
                )
        return None


class Race:
    """Ends the training of a candidate that is behind the best one so far, at the same step.

    Args:
        tokens: text that both are judged on.
        leader: the checks of the best candidate; None for the first.
    """

    def __init__(self, tokens: TokenSet, leader: Sequence[HealingCheck] | None) -> None:
        self.tokens = beginnings(tokens)
        self._leader = {check.step: check for check in leader or ()}

    def verdict(self, checks: Sequence[HealingCheck]) -> HealingStop | None:
        now = checks[-1]
        theirs = self._leader.get(now.step)
        if theirs is None or not now.step:
            return None
        counts = self.tokens.predicted.sum(1).numpy()
        mean, error = difference(theirs.kl_sums, now.kl_sums, counts)
        if mean > _ERRORS * error:
            why = f"behind by {mean:.4f} ± {error:.4f} nats at step {now.step}"
            return HealingStop(why=why, kept=None)
        return None


Judge = Domains | Race
"""Text held out, and the decision on it: the ``verdict`` of checks from step 0 on, if any."""


@dataclass(frozen=True, eq=False)
class Job:
    """One cut model to heal.

    Attributes:
        teacher: the original model; without its weights where it is streamed.
        removed: the blocks that the cut model lacks, ascending.
        start: the cut model's checkpoint.
        tokens: text to heal with; never the text that results are reported on.
        work: folder for what an interrupted healing goes on from.
        config: all options.
        progress: where progress is shown.
        replay: the original's blocks, each read when it is run, where it is streamed to be patched.
        processes: that train together.
        judge: looks at a training on text held out; None: it runs to its end.
        recipe: of the training; None: what the options say.
    """

    teacher: LoadedModel
    removed: tuple[int, ...]
    start: Path
    tokens: TokenSet
    work: Path
    config: HealConfig
    progress: Progress = silent
    replay: StreamedReplay | None = None
    processes: Processes = ALONE
    judge: Judge | None = None
    recipe: HealingRecipe | None = None

    @property
    def leads(self) -> bool:
        """This process writes and shows progress."""
        return self.processes.rank == 0
