"""Several processes take up the same model, so that its measurements are shared among them."""

from __future__ import annotations

import os
from typing import Any

from isingcut.console.printing import say
from isingcut.console.progress import silent
from isingcut.errors import InputError, ModelError
from isingcut.models.device import pick_device
from isingcut.models.memory import allowance
from isingcut.models.processes import ALONE, Processes
from isingcut.runs.folder import RunFolder
from isingcut.runs.session import Session


def take_up(session: Session, processes: Processes) -> None:
    """Let the session's measurements be shared by all processes, which compute as rank 0 does.

    Raises:
        InputError: one GPU was named for several processes, or there are too few.
        ModelError: the model is another one here than where rank 0 is.
    """
    if processes.size == 1:
        return
    session.processes = processes
    _check_gpu(session.config.device, processes)
    # Rank 0's choices: free memory is no reason for processes to do different things, nor is the
    # speed of one machine's bfloat16. Resolved first: a download or a conversion is then there for
    # the whole machine.
    chosen = processes.decide(lambda: _choices(session, processes.size))
    if processes.local_rank == 0:
        _ = session.identity
    processes.wait()
    if session.identity["sha256"] != chosen.pop("sha256"):
        raise ModelError(
            f"{session.config.model!r} is another model on this machine than on that of rank 0; "
            "give every machine the same files"
        )
    if processes.rank:
        session.config = session.config.replace(**chosen)


def part(session: Session, folder: RunFolder) -> None:
    """From here on each process works for itself."""
    session.processes = session.replay.processes = folder.processes = ALONE


def _choices(session: Session, size: int) -> dict[str, Any]:
    """What all processes have to have in common."""
    # A launcher with the wrong options starts one process without a word.
    if session.progress is not silent:
        say(f"{size} processes share the measuring")
    found = {"sha256": session.identity["sha256"], "dtype": session.dtype}
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    device = pick_device(session.config.device)
    if device.type != "cuda" and beside > 1 and not session.config.memory_limit:
        # Of the memory, each of them gets its part.
        memory = allowance("", device)
        each = memory.used + memory.left // beside
        session.config = session.config.replace(memory_limit=f"{each / 1e6:.0f}MB")
    stream = "on" if session.streaming else "off"
    return found | {"memory_limit": session.config.memory_limit, "stream": stream}


def _check_gpu(device: str, processes: Processes) -> None:
    import torch

    if device.startswith("cuda:"):
        raise InputError(
            f"--device {device} names one GPU for {processes.size} processes; "
            "give --device cuda, and each takes its own"
        )
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device in ("auto", "cuda") and 0 < gpus <= processes.local_rank:
        raise InputError(
            f"this machine has {gpus} GPUs and more processes than that; start one for each GPU "
            f"(--nproc-per-node {gpus}), or all on the CPU (--device cpu)"
        )
