"""The processes of one run: how they find each other, exchange bytes and end together.

A launcher (`torchrun`, `accelerate launch`) starts every process with the same command. Rank 0
leads: it alone parses, decides and writes; the others do what they are told (`distributed.py`).
Bytes travel through the launcher's key-value store, which blocks nobody: a process that waits
looks, sleeps a moment and looks again, so that a failure elsewhere reaches it within a second,
also in the middle of a computation. Collectives are entered only when every process has said
that it is there.
"""

from __future__ import annotations

import _thread
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from isingcut.errors import RankError

_PART = 4 << 20  # The store takes messages of up to 8 MiB.
_BEAT = 0.5
_JOIN_SECONDS = 600.0
_PARTING_SECONDS = 10.0
_FAILED_SECONDS = 3.0
SILENCE = 30.0
"""Seconds without a sign of life after which rank 0 gives a process up. A launcher on one machine
notices a killed process at once; this is for a machine that vanished."""


def expected() -> bool:
    """Whether a launcher started this process as one of several."""
    there = all(os.environ.get(key) for key in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    return there and int(os.environ.get("WORLD_SIZE", "1")) > 1


@dataclass(frozen=True)
class Failure:
    """What ended the run; every process is told.

    Attributes:
        rank: where it happened.
        host: the machine whose terminal has the report already; empty when none has.
        code: exit code of all processes.
        text: one line.
    """

    rank: int
    host: str
    code: int
    text: str


class Ended(SystemExit):
    """The launcher, or a user, ended this process by a signal."""


class Crew:
    """This process among those of the run.

    Args:
        store: a `torch.distributed` store that all processes share.
        rank: of this process; 0 leads.
        size: number of processes.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._whole_store = store
        self.rank, self.size = rank, size
        env = os.environ
        self.local_rank = int(env.get("LOCAL_RANK") or env.get("SLURM_LOCALID") or 0)
        self.node = f"{socket.gethostname()}/{env.get('GROUP_RANK', '')}"
        self.failure: Failure | None = None
        self._session = 0
        self._stop = threading.Event()
        self._watcher: threading.Thread | None = None
        self._handler: Any = None
        self._unraisable: Any = None
        self._hurried = False

    @classmethod
    def from_environment(cls) -> Crew:
        """Find the other processes by the variables that the launcher has set."""
        from torch.distributed.rendezvous import rendezvous

        store, rank, size = next(iter(rendezvous("env://")))
        return cls(store, rank, size)

    # Coming and going -------------------------------------------------------------------

    def meet(self) -> None:
        """Wait for all processes, and watch over each other from now on.

        Raises:
            RankError: some process did not come, or failed on its way.
        """
        from torch.distributed.distributed_c10d import PrefixStore

        self._session += 1
        self.failure = None
        self.store: Any = PrefixStore(f"isingcut/{self._session}", self._whole_store)
        self._stop.clear()
        self.store.set(f"beat/{self.rank}", "0")
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, self._on_signal)
            self._unraisable = sys.unraisablehook
            sys.unraisablehook = self._on_unraisable
        self._watcher = threading.Thread(target=self._watch, name="isingcut-crew", daemon=True)
        self._watcher.start()
        keys = [f"beat/{r}" for r in range(self.size)]
        came = time.monotonic()
        while not self.store.check(keys):
            self.check()
            if time.monotonic() - came > _JOIN_SECONDS:
                missing = [r for r, key in enumerate(keys) if not self.store.check([key])]
                raise RankError(
                    f"after {_JOIN_SECONDS:.0f} seconds {len(missing)} of {self.size} processes "
                    f"have not come (first rank {missing[0]}); start them with one launcher command"
                )
            time.sleep(0.02)

    def part(self) -> None:
        """Leave when all is done; rank 0 goes last, because the store may live in it."""
        self._rest()
        with contextlib.suppress(RuntimeError):
            self._see_off(_PARTING_SECONDS)
        self._restore()
        if self._hurried:
            signal.raise_signal(signal.SIGTERM)

    def fail(self, code: int, text: str, *, hurry: bool = False) -> bool:
        """Tell every process that the run has failed here, and leave.

        Args:
            hurry: do not wait for the others to leave.

        Returns:
            Whether this failure is the first, so that this process has to report it.
        """
        self._rest()
        own = Failure(self.rank, socket.gethostname(), code, text)
        with contextlib.suppress(RuntimeError):
            if self.failure is None:
                found = self.store.compare_set("failed", "", json.dumps(asdict(own)))
                self.failure = Failure(**json.loads(found))
            self._see_off(0.0 if hurry else _FAILED_SECONDS)
        self._restore()
        self.failure = self.failure or own
        return self.failure == own

    def _see_off(self, seconds: float) -> None:
        self.store.set(f"left/{self.rank}", "1")
        keys = [f"left/{r}" for r in range(self.size)]
        until = time.monotonic() + seconds
        while self.rank == 0 and not self.store.check(keys) and time.monotonic() < until:
            if self._hurried:
                return
            time.sleep(0.01)

    def _rest(self) -> None:
        self._stop.set()
        if self._watcher is not None:
            self._watcher.join(timeout=2 * _BEAT)
        if self._handler is not None:
            # Until its last word is said: a launcher ends this process soon after another's end.
            self._hurried = False
            signal.signal(signal.SIGTERM, self._on_late_signal)

    def _restore(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
            sys.unraisablehook = self._unraisable
            self._handler = None

    # Watching over each other -----------------------------------------------------------

    def check(self, *, ask: bool = False) -> None:
        """Raise what ended the run, if something did.

        Args:
            ask: now, not only what the last look has found.

        Raises:
            RankError: another process failed or vanished.
        """
        if ask and self.failure is None:
            with contextlib.suppress(RuntimeError):
                self._look()
        if self.failure is not None:
            raise self.error(self.failure)

    def error(self, found: Failure) -> RankError:
        """A failure as an error, and whether this terminal has its report already."""
        # One report per terminal: where it happened, else at rank 0, else once a machine.
        reporter = self.rank == 0 or (found.rank == 0 and self.local_rank == 0)
        reported = found.host == socket.gethostname() or not reporter
        where = f"rank {found.rank} of {self.size}" + (f" on {found.host}" if found.host else "")
        return RankError(f"{where}: {found.text}", code=found.code, reported=reported)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.check(ask=True)
        # A launcher ends the others when one process was killed. Raised, so that half-written
        # files go.
        raise Ended(128 + number)

    def _on_late_signal(self, number: int, frame: Any) -> None:
        self._hurried = True

    def _on_unraisable(self, found: Any) -> None:
        # Raised by the handler above in a place that drops it: it will be raised again.
        if not isinstance(found.exc_value, RankError | Ended):
            self._unraisable(found)

    def _look(self) -> None:
        if self.store.check(["failed"]):
            self.failure = Failure(**json.loads(self.store.get("failed")))

    def _watch(self) -> None:
        beats: list[bytes] = []
        changed = [time.monotonic()] * self.size
        own = 0
        while not self._stop.wait(_BEAT):
            try:
                own += 1
                self.store.set(f"beat/{self.rank}", str(own))
                self._look()
                if self.rank == 0 and self.failure is None:
                    self.failure = self._silent(beats, changed)
            except RuntimeError:
                # The store lives in rank 0 or in its launcher, and has gone with it.
                self.failure = Failure(0, "", 1, "cannot be reached any more")
            if self.failure is not None and not self._stop.is_set():
                self._interrupt(self.failure.code)
                return

    def _interrupt(self, code: int) -> None:
        """Let the main thread raise the failure, wherever it is."""
        until = time.monotonic() + _PARTING_SECONDS
        while time.monotonic() < until:
            # Again and again: raised in a callback of a C library, an exception is dropped.
            _thread.interrupt_main(signal.SIGTERM)
            if self._stop.wait(1.0):
                return
        # Stuck in a collective or a kernel, it hears no signal.
        os._exit(code)

    def _silent(self, beats: list[bytes], changed: list[float]) -> Failure | None:
        """A process that gave no sign of life for too long."""
        keys = [f"beat/{r}" for r in range(self.size)]
        if not self.store.check(keys):
            return None
        now, found = time.monotonic(), self.store.multi_get(keys)
        for r, beat in enumerate(found):
            if not beats or beat != beats[r]:
                changed[r] = now
        beats[:] = found
        silent = next((r for r, when in enumerate(changed) if now - when > SILENCE), None)
        if silent is None:
            return None
        failure = Failure(silent, "", 1, f"gave no sign of life for {SILENCE:.0f} s")
        self.store.compare_set("failed", "", json.dumps(asdict(failure)))
        return failure

    # Messages ---------------------------------------------------------------------------

    def send(self, key: str, data: bytes) -> None:
        """Put bytes of any length under ``key``."""
        parts = range(0, len(data), _PART)
        for i, start in enumerate(parts):
            self.store.set(f"{key}/{i}", data[start : start + _PART])
        self.store.set(key, str(len(parts)))

    def has(self, key: str) -> bool:
        """Whether something is under ``key``."""
        return bool(self.store.check([key]))

    def take(self, key: str, *, keep: bool = False) -> bytes:
        """What is under ``key``; it is deleted unless ``keep``."""
        names = [f"{key}/{i}" for i in range(int(self.store.get(key)))]
        data = b"".join(self.store.get(name) for name in names)
        if not keep:
            self.forget([key, *names])
        return data

    def wait(self, key: str) -> bytes:
        """What is under ``key``, as soon as it is there; it stays for the others.

        Raises:
            RankError: another process failed meanwhile.
        """
        pause = 0.0005
        while not self.has(key):
            self.check()
            time.sleep(pause)
            pause = min(0.05, 1.2 * pause)
        return self.take(key, keep=True)

    def pause(self) -> None:
        """Let a moment pass before looking again."""
        time.sleep(0.002)

    def count(self, key: str) -> int:
        """Add 1 to a counter that all processes share; what it was before."""
        return int(self.store.add(key, 1)) - 1

    def forget(self, keys: Sequence[str]) -> None:
        """Delete keys."""
        for key in keys:
            self.store.delete_key(key)
