"""One cut model to heal, and the judge of its training.

A judge stops a training that goes wrong. It uses checks: the KL to the original of each unseen
sample, with the training loss. Checks are made when states are saved, so that a resumed healing has
the earlier ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from isingcut.console.progress import Progress, silent
from isingcut.data.tokens import TokenSet
from isingcut.files.documents import HealingCheck, HealingRecipe, HealingStop
from isingcut.ising.states import Floats
from isingcut.measure.losses import standard_error
from isingcut.models.load import LoadedModel
from isingcut.models.processes import ALONE, Processes
from isingcut.models.streaming.replay import StreamedReplay
from isingcut.options.config import HealConfig

# Tokens of each sample to check.
_LENGTH = 256
_ERRORS = 2.0
"""Number of standard errors of a paired difference that counts as more than noise."""


def beginnings(tokens: TokenSet) -> TokenSet:
    """Return the first tokens of each sample, for cheap checks."""
    rows = []
    for row in tokens.rows:
        # The context before the first assistant message may be longer.
        first = next((t for t in range(1, len(row)) if row[t] >= 0), 0)
        rows.append(row[: max(_LENGTH, first + _LENGTH // 4)])
    return TokenSet.from_rows(rows, parts=tokens.parts)


def difference(
    first: npt.ArrayLike, second: npt.ArrayLike, counts: npt.NDArray[np.int64]
) -> tuple[float, float]:
    """Return second - first in nats per prediction, paired by sample, and its standard error.

    Args:
        first, second: sums over the predictions of each sample.
        counts: number of predictions of each sample.
    """
    sums: Floats = np.asarray(second, dtype=float) - np.asarray(first, dtype=float)
    return float(sums.sum() / counts.sum()), float(standard_error(sums, counts))


class Domains:
    """Stops a training that makes one source of a mixture worse.

    Worse means: at a check, by more than two standard errors, than before the training and than at
    the previous check. The weights of the previous check are kept, or the initial ones if the
    previous check was worse than the beginning too. The first check never stops the training.
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
                what = f"the weights of step {kept} are" if kept else "no step is"
                return HealingStop(
                    why=f"healing was stopped at step {now.step}, and {what} kept: {where} got "
                    f"worse, KL {kl[0]:.4f} before, {kl[1]:.4f} and then {kl[2]:.4f}",
                    kept=kept,
                )
        return None


@dataclass(frozen=True, eq=False)
class Job:
    """One cut model to heal.

    Attributes:
        teacher: the original model; without weights if it is streamed.
        removed: the blocks that the cut model lacks, ascending.
        start: the cut model's checkpoint.
        tokens: training text; never the text for reported results.
        work: folder for the state of an interrupted healing.
        config: all options.
        progress: shows progress.
        replay: the streamed blocks of the original, if it is streamed for the patch.
        processes: the processes that train together.
        judge: may stop the training by its checks; None: it runs to its end.
        recipe: the settings of the training; None: from the options.
        spent: seconds of a time budget used for loading, evaluating and patching.
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
    judge: Domains | None = None
    recipe: HealingRecipe | None = None
    spent: float = 0.0

    @property
    def leads(self) -> bool:
        """Whether this process writes and shows progress."""
        return self.processes.rank == 0
