"""One cut model to heal, and what it is healed with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from isingcut.console.progress import Progress, silent
from isingcut.data.tokens import TokenSet
from isingcut.healing.judging import Judge
from isingcut.healing.recipe import Recipe
from isingcut.models.load import LoadedModel
from isingcut.models.processes import ALONE, Processes
from isingcut.models.streaming.replay import StreamedReplay
from isingcut.options.config import HealConfig


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
    recipe: Recipe | None = None

    @property
    def leads(self) -> bool:
        """This process writes and shows progress."""
        return self.processes.rank == 0
