"""Run checks in processes of their own, each with limits, several at a time.

A check that runs out of memory, out of time or crashes the interpreter ends alone; its process
is forked, so that torch and transformers are imported once.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch


@dataclass(frozen=True)
class Died:
    """A process that ended without a result, and how."""

    reason: str


@dataclass
class _Running:
    name: str
    process: Any
    result: Connection
    ends: float


def run_apart(
    tasks: Mapping[str, Callable[[], Any]], *, workers: int, gigabytes: float, seconds: float
) -> Iterator[tuple[str, Any]]:
    """Each task's name and result, or `Died`, in the order in which they end.

    Args:
        tasks: what to call, by name; results are sent through a pipe.
        workers: how many processes run at a time.
        gigabytes: address space a task may take beyond what the process already has (on Linux).
        seconds: wall clock it may take.
    """
    context = multiprocessing.get_context("fork")
    waiting = list(tasks.items())
    running: list[_Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                name, task = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(task, theirs, gigabytes))
                with warnings.catch_warnings():
                    # The threads that others hold stay behind; a check waits for none of them.
                    warnings.simplefilter("ignore", DeprecationWarning)
                    process.start()
                theirs.close()
                running.append(_Running(name, process, ours, time.monotonic() + seconds))
            soonest = min(one.ends for one in running) - time.monotonic()
            # A pipe is ready when its result is there, and when its process has ended.
            wait([one.result for one in running], timeout=max(soonest, 0))
            for one in [*running]:
                if one.result.poll():
                    running.remove(one)
                    yield one.name, _result(one)
                elif time.monotonic() > one.ends:
                    running.remove(one)
                    _end(one)
                    yield one.name, Died(f"took longer than {seconds:.0f} s")
    finally:
        for one in running:
            _end(one)


def _end(one: _Running) -> None:
    one.process.kill()
    one.process.join()
    one.result.close()


def _result(one: _Running) -> Any:
    found: Any = None
    with contextlib.suppress(EOFError):
        found = one.result.recv()
    one.process.join()
    one.result.close()
    if found is not None:
        return found
    code = one.process.exitcode or 0
    ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return Died(f"its process {ended}")


def _child(task: Callable[[], Any], result: Connection, gigabytes: float) -> None:
    if sys.platform.startswith("linux"):
        limit = _address_space() + int(gigabytes * 1e9)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    try:
        found = task()
    except MemoryError:
        found = Died(f"needs more than {gigabytes:g} GB")
    except BaseException:
        found = Died(traceback.format_exc().strip().splitlines()[-1])
    result.send(found)
    result.close()


def _address_space() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
