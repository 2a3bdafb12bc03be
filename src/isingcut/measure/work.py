"""Run a measurement in one process or several, with journals.

Each process takes every n-th unit of the remaining work and keeps its rows in its own journal. At
the end every process has all rows, and sums them in the order of the samples, so that the result is
bitwise equal to that of one process. Rows in any of the journals are not measured again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors.numpy import load, save

from isingcut.console.progress import Bar, Progress, silent
from isingcut.data.tokens import TokenSet
from isingcut.errors import ModelError
from isingcut.files.journal import Journal, Values
from isingcut.files.results import fingerprint
from isingcut.models.replay import Replay
from isingcut.options.machine import BATCH_TOKENS
from isingcut.processes import ALONE, Processes

T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """The settings of a measurement; they change results by rounding only.

    Attributes:
        batch_tokens: tokens per micro-batch.
        progress: progress display.
        journal: file for finished parts, so that a killed measurement resumes.
    """

    batch_tokens: int = BATCH_TOKENS
    progress: Progress = silent
    journal: Path | None = None


PLAIN = Work()


def identity(replay: Replay, tokens: TokenSet, **depends: Any) -> str:
    """Return the fingerprint of a measurement, for its journal.

    Args:
        depends: everything else that the numbers depend on, besides model and text; JSON-able.
    """
    content: dict[str, Any] = {"tokens": tokens.input_ids.tolist()}
    content["mask"] = tokens.mask.tolist()
    content["blocks"] = len(replay)
    if tokens.counted is not None:
        content["counted"] = tokens.counted.tolist()
    return fingerprint({**replay.identity(), **content, **depends})


class SharedJournal(Journal):
    """A journal with the same rows in every process.

    Args:
        path: file of rank 0; other ranks have files next to it. None keeps rows in memory.
        fingerprint: fingerprint of the measured model, tokens and states.
        processes: the processes; all of them must call the constructor.

    Raises:
        ModelError: another process has a different fingerprint.
        RankError: another process has failed.
        StageFileError: ``path`` is not a journal.
    """

    def __init__(
        self,
        path: Path | None,
        fingerprint: str,
        processes: Processes = ALONE,
    ) -> None:
        self._processes = processes
        rank = processes.rank
        size = processes.size
        own = path.with_name(f"{path.name}.{rank}") if path and rank else path
        super().__init__(own, fingerprint)
        self._new = dict(self._rows)
        if path is not None and not rank:
            # Journals from an earlier run with more processes.
            for left in sorted(path.parent.glob(f"{path.name}.*")):
                number = left.suffix[1:]
                if number.isdigit() and int(number) >= size:
                    self._new |= Journal(left, fingerprint)._rows
        self.gather()

    def put(self, rows: Mapping[str, Values]) -> None:
        """Store rows under their keys and sync them to disk."""
        super().put(rows)
        self._new |= {key: self._rows[key] for key in rows}

    def share(self, units: Sequence[T], bar: Bar) -> tuple[list[T], Bar]:
        """Return the units of this process, and a bar that counts them for all processes."""
        own = list(units[self._processes.rank :: self._processes.size])
        return own, _ForAll(bar, len(units) / max(1, len(own)))

    def gather(self) -> None:
        """Send the rows stored since the last call to all processes.

        Raises:
            ModelError, RankError: as for the constructor.
        """
        own = f"{self.fingerprint}\n".encode() + save(self._new)
        for data in self._processes.gather(own):
            fingerprint, _, rows = data.partition(b"\n")
            if fingerprint.decode() != self.fingerprint:
                raise ModelError(
                    "the processes have different inputs; give every machine the same model, "
                    "options, package versions and kind of device"
                )
            self._rows |= load(rows)
        self._new = {}


@dataclass
class _ForAll:
    """A progress bar on which a step of this process counts for all processes."""

    bar: Bar
    processes: float

    def advance(self, steps: float = 1, note: str = "") -> None:
        self.bar.advance(steps * self.processes, note)
