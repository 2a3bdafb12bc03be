"""What a healer is: a way to make a cut checkpoint better with the help of the original."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from isingcut.console.progress import Progress, silent
from isingcut.data.tokens import TokenSet
from isingcut.healing.judging import Judge
from isingcut.models.load import LoadedModel
from isingcut.models.processes import ALONE, Processes
from isingcut.models.streaming.replay import StreamedReplay
from isingcut.options.healing import HealConfig


@dataclass(frozen=True, eq=False)
class Job:
    """One cut model to heal.

    Attributes:
        teacher: the original model; without its weights where it is streamed.
        removed: the blocks that the cut model lacks, ascending.
        start: the cut model's checkpoint.
        tokens: text to heal with; never the text that results are reported on.
        work: folder for what an interrupted healer goes on from.
        config: all options.
        progress: where progress is shown.
        replay: the original's blocks, each read when it is run, where it is streamed.
        processes: that train together.
        judge: looks at a training on text held out; None: it runs to its end.
        identity: of the training; it goes on from states of that identity alone.
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
    identity: str = ""

    @property
    def leads(self) -> bool:
        """This process writes and shows progress."""
        return self.processes.rank == 0


class Healer(Protocol):
    """A part is a class without arguments to its constructor that must be given."""

    def heal(self, job: Job, out: Path) -> dict[str, Any]:
        """Write a better checkpoint of the same shape to the folder ``out``, which is not there.

        The checkpoint is plain: same architecture, no parameter more, the start's dtype. In a
        distributed run every process calls this, and the one of rank 0 writes.

        Returns:
            what was done, JSON-able, as `healing.json` keeps it.
        """
        ...
