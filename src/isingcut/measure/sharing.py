"""Share the parts of one measurement out among processes, and bring their rows together.

Parts are claimed one after the other by whoever is free. Finished rows, not sums, come to rank
0, which writes them to its journal as they come and takes the sums in the order of the samples,
exactly as one process does: the result has the same bits for any number of processes, and a run
may go on with another number of them. At the end a collective over all processes (gloo on CPUs,
nccl on GPUs) proves that every row was computed once and arrived unchanged.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from isingcut.errors import ModelError, RankError
from isingcut.journal import Journal
from isingcut.measure.crew import Crew

Row = npt.NDArray[np.float64]

current: Task | None = None
"""The measurement that several processes carry out now; None in a process alone."""


class TaskDone(Exception):
    """Raised in a process other than rank 0 when its share is done: the rest is for rank 0."""


def processes() -> int:
    """How many processes share the measurement that runs now."""
    return 1 if current is None else current.crew.size


def share(
    kept: Journal,
    parts: Sequence[str],
    came: Callable[[str], object] = lambda part: None,
    *,
    at_once: int | None = 1,
) -> Iterator[list[str]]:
    """The parts of a measurement that this process has to compute and put into the journal.

    When it ends, the rows of all parts are in rank 0's journal, whoever computed them; the
    other processes end here. To be called once in a function that is marked `together`.

    Args:
        kept: the journal of the measurement.
        parts: names of what is still to be done, the longest first; those of rank 0 count.
        came: called with each part that another process has finished.
        at_once: parts to compute together; None for an even share of all.

    Yields:
        Lists of parts, one after the other for as long as there is work.
    """
    size = at_once or max(1, -(-len(parts) // processes()))
    lists = [list(parts[a : a + size]) for a in range(0, len(parts), size)]
    if current is None:
        yield from lists
    elif current.crew.rank == 0:
        yield from current.lead(kept, lists, came)
    else:
        yield from current.follow(kept)
        raise TaskDone


class Task:
    """One measurement, shared out.

    Args:
        name: starts the keys of its messages.
        device: where this process computes.
    """

    def __init__(self, crew: Crew, name: str, device: Any) -> None:
        self.crew, self._name, self._device = crew, name, device

    def lead(
        self, kept: Journal, lists: list[list[str]], came: Callable[[str], object]
    ) -> Iterator[list[str]]:
        """Share out, take part, and wait until every row is in the journal."""
        crew, name = self.crew, self._name
        begun = {"fingerprint": kept.fingerprint, "lists": lists}
        crew.send(f"{name}/begun", json.dumps(begun).encode())
        own, total = [0, 0], [0, 0]
        read, unfinished = [0] * crew.size, len(lists)

        def collect() -> None:
            nonlocal unfinished
            crew.check()
            for rank in range(1, crew.size):
                while crew.has(key := f"{name}/{rank}/{read[rank]}"):
                    read[rank] += 1
                    row_key, row = _unpacked(crew.take(key))
                    if row is not None:
                        kept.put(row_key, row)
                        _count(total, row_key, row)
                        continue
                    unfinished -= 1
                    for part in lists[int(row_key)]:
                        came(part)

        def mine(key: str, row: Row) -> None:
            _count(own, key, row)
            _count(total, key, row)

        while (i := crew.count(f"{name}/claimed")) < len(lists):
            with kept.told(mine):
                yield lists[i]
            unfinished -= 1
            collect()
        while unfinished:
            collect()
            crew.pause()
        crew.send(f"{name}/complete", b"1")
        if self._sum(own) != total:
            raise RankError(
                "measurements were lost or changed on their way between the processes; "
                "type the same command again"
            )
        crew.forget([f"{name}/begun", f"{name}/begun/0", f"{name}/claimed"])
        crew.forget([f"{name}/complete", f"{name}/complete/0"])

    def follow(self, kept: Journal) -> Iterator[list[str]]:
        """Take a share, and send its rows to rank 0."""
        crew, name = self.crew, self._name
        begun = json.loads(crew.wait(f"{name}/begun"))
        if begun["fingerprint"] != kept.fingerprint:
            raise ModelError(
                "the model or the options differ from those of rank 0; give every machine the "
                "same files, package versions and kind of device"
            )
        own, sent = [0, 0], 0

        def send(key: str, row: Row | None) -> None:
            nonlocal sent
            crew.check()
            crew.send(f"{name}/{crew.rank}/{sent}", _packed(key, row))
            sent += 1
            if row is not None:
                _count(own, key, row)

        while (i := crew.count(f"{name}/claimed")) < len(begun["lists"]):
            with kept.told(send):
                yield begun["lists"][i]
            send(str(i), None)
        crew.wait(f"{name}/complete")
        self._sum(own)

    def _sum(self, own: list[int]) -> list[int]:
        """Sum of a few integers over all processes.

        Raises:
            RankError: a process is not there any more.
        """
        import torch
        import torch.distributed as dist

        total = torch.tensor(own, dtype=torch.int64, device=self._device)
        try:
            dist.all_reduce(total)
        except RuntimeError as e:
            self.crew.check(ask=True)
            # The reason in its own words: a process was killed, or something else is wrong.
            why = " ".join(str(e).split())[:200]
            raise RankError(
                f"the processes cannot reach each other any more ({type(e).__name__}: {why}); "
                "what is finished is kept, the same command goes on",
                reported=self.crew.rank > 0,
            ) from e
        return [int(v) for v in total]


def _count(sums: list[int], key: str, row: Row) -> None:
    sums[0] += 1
    sums[1] += zlib.crc32(row.tobytes(), zlib.crc32(key.encode()))


def _packed(key: str, row: Row | None) -> bytes:
    """A row for the way; without one, the number of a list that is finished."""
    head = {"key": key, "shape": None if row is None else list(row.shape)}
    return json.dumps(head).encode() + b"\n" + (b"" if row is None else row.tobytes())


def _unpacked(data: bytes) -> tuple[str, Row | None]:
    head, _, body = data.partition(b"\n")
    found = json.loads(head)
    if found["shape"] is None:
        return found["key"], None
    return found["key"], np.frombuffer(body, dtype=np.float64).reshape(found["shape"])
