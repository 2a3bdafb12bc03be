"""The processes of one run, started by `torchrun` or `accelerate launch`.

    torchrun --nproc-per-node 4 -m isingcut run MODEL --remove 6 --out DIR

All run the same program on the same model, and each measures its share. Only rank 0 makes decisions
that may vary (by a timing, or files in the run folder), writes the run folder and prints. Processes
exchange bytes by one collective over gloo, on CPUs and GPUs alike, because the data is small and in
host memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from isingcut.errors import RankError, one_line

T = TypeVar("T")

ANY_TIME = timedelta(days=3650)
"""The wait for a live process has no limit, because rank 0 may work alone for days."""


def is_launched() -> bool:
    """Whether a launcher started this process as one of several."""
    there = all(os.environ.get(key) for key in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    return there and int(os.environ.get("WORLD_SIZE", "1")) > 1


def launched_rank() -> int:
    """Return the rank of this process; 0 without a launcher."""
    return int(os.environ["RANK"]) if is_launched() else 0


def local_rank() -> int:
    """Return the number of this process on its machine, as its launcher or Slurm says; else 0.

    It also keeps independent tasks of one `srun` on GPUs of their own.
    """
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


@dataclass(frozen=True, eq=False)
class Processes:
    """Processes that load the same model and measure it together.

    Args:
        rank: rank of this process; 0 leads.
        size: number of processes.
        group: group of `torch.distributed`; None for its default.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @classmethod
    def join(cls) -> Processes:
        """Join all processes of the launcher; without one, return this process alone."""
        if not is_launched():
            return ALONE
        import torch.distributed as dist

        group = None
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=ANY_TIME)
        elif dist.get_backend() != "gloo":
            group = dist.new_group(backend="gloo", timeout=ANY_TIME)
        return cls(dist.get_rank(), dist.get_world_size(), group)

    def gather(self, data: bytes = b"") -> list[bytes]:
        """Gather the data of all processes, in rank order; every process must call this.

        Raises:
            RankError: another process has failed or ended.
        """
        if self.size == 1:
            return [data]
        import torch

        # Not by `all_gather_object`, which pickles.
        lengths = [
            int(n)
            for n in self._gather_tensors(torch.tensor([len(data)], device="cpu"))
        ]
        own = torch.zeros(max(1, *lengths), dtype=torch.uint8, device="cpu")
        if data:
            own[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        parts = self._gather_tensors(own)
        return [p[:n].numpy().tobytes() for p, n in zip(parts, lengths, strict=True)]

    def _gather_tensors(self, own: Any) -> list[Any]:
        import torch
        import torch.distributed as dist

        parts = [torch.empty_like(own) for _ in range(self.size)]
        with convert_contact_errors():
            dist.all_gather(parts, own, group=self.group)
        return parts

    def decide(self, make: Callable[[], T]) -> T:
        """Return the JSON-serialisable value that rank 0 computes, in every process."""
        if self.size == 1:
            return make()
        own = b"" if self.rank else json.dumps(make()).encode()
        value: T = json.loads(self.gather(own)[0])
        return value

    def wait(self) -> None:
        """Wait for all processes."""
        self.gather()


ALONE = Processes()
"""`Processes` of a single process."""


# Messages of processes that end ------------------------------------------------------


def post_failure(code: int, text: str) -> None:
    """Store why this process ends, and its exit code, for the other processes."""
    word = {
        "code": code,
        "rank": launched_rank(),
        "host": socket.gethostname(),
        "text": text,
    }
    with contextlib.suppress(RuntimeError):
        _board().compare_set(_key(), "", json.dumps(word))


def read_failure() -> RankError | None:
    """Return the message of another process that ended, if any."""
    word: dict[str, Any] = {}
    with contextlib.suppress(RuntimeError):
        if is_launched() and (board := _board()).check([_key()]):
            word = json.loads(board.get(_key()))
    if not word:
        return None
    where = f"rank {word['rank']} of {os.environ['WORLD_SIZE']}"
    if word["host"] != socket.gethostname():
        where += f" on {word['host']}"
    return RankError(f"{where}: {word['text']}", code=word["code"])


@contextlib.contextmanager
def convert_contact_errors() -> Iterator[None]:
    """Convert the error of a collective, of any library, that lost a process into a `RankError`."""
    try:
        yield
    except RuntimeError as e:
        if not (type(e).__name__.startswith("Dist") or "/gloo/" in str(e)):
            raise
        raise read_failure() or RankError(
            f"the {os.environ['WORLD_SIZE']} processes lost contact ({one_line(e)}); finished work "
            "is kept, run the same command again to resume"
        ) from e


def _board() -> Any:
    """Return the launcher's key-value store."""
    import torch.distributed

    distributed: Any = torch.distributed
    return distributed.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=5),
    )


def _key() -> str:
    return f"isingcut/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
