"""Start the processes of a run as a launcher does, cheaply: forks of one process that has torch."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "torch",
        "torch.distributed.run",
        "transformers",
        "transformers.models.llama.modeling_llama",
        "isingcut.cli.main",
        "isingcut.runs.stages",
        "isingcut.measure.gradients",
        "isingcut.measure.curvature",
        "isingcut.energies.pairwise",
        "isingcut.ising.solvers.auto",
        "isingcut.evaluation.quality",
        "isingcut.models.cutting.checkpoint",
        "isingcut.models.cutting.verify",
        "isingcut.report.write",
        "isingcut.healing.heal",
        "isingcut.healing.training.train",
        "ranks",
    ]
)


def start(function: Callable[..., None], *arguments: object):
    """One process, running ``function``."""
    process = _context.Process(target=function, args=arguments)
    process.start()
    return process


def launch(size: int, function: Callable[..., None], *arguments: object):
    """The processes of one run, and the store of their launcher, to be kept while they run."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    return [start(_as_rank, r, size, store.port, function, arguments) for r in range(size)], store


def join(ranks) -> list[int]:
    """The exit codes of processes, when all have ended."""
    for rank in ranks:
        rank.join(120)
    return [rank.exitcode for rank in ranks]


def _as_rank(
    rank: int, size: int, port: int, function: Callable[..., None], arguments: tuple[object, ...]
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True", LOCAL_WORLD_SIZE=str(size),
    )  # fmt: skip
    function(*arguments)


def say_into(path: Path) -> None:
    """What this process says goes into a file."""
    file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


def type_in(*arguments: object) -> None:
    """The command line in this process, which it ends."""
    from isingcut.cli import main as cli

    sys.argv = ["isingcut", *map(str, arguments)]
    cli.main()
    raise SystemExit(0)
