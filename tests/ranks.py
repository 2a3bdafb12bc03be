"""Start the processes of a run like a launcher, but as cheap forks of a process with torch."""

import faulthandler
import gc
import multiprocessing
import os
import sys

import sites

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "scipy.stats",
        "torch",
        "torch.distributed.run",
        "transformers",
        "transformers.models.llama.modeling_llama",
        "isingcut.cli.main",
        "isingcut.runs.pipeline",
        "isingcut.measure.gradients",
        "isingcut.energies.pairwise",
        "isingcut.ising.solvers.auto",
        "isingcut.evaluation.quality",
        "isingcut.formats.cutting.checkpoint",
        "isingcut.models.verify",
        "isingcut.report.write",
        "isingcut.healing.heal",
        "isingcut.healing.training.distill",
        "ranks",
    ]
)

# This is the server's last import: garbage collections in its forks skip all imported objects.
gc.freeze()


def start(said, function, *arguments):
    """Start a process that runs ``function``; its output goes into the file ``said``."""
    process = _context.Process(target=_say_into, args=(said, function, *arguments))
    process.start()
    return process


def launch(size, said, function, *arguments):
    """Start the processes of a run; return them and their launcher's store, needed meanwhile."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    given = (size, store.port, function, arguments)
    return [start(said, _as_rank, r, *given) for r in range(size)], store


def run(codes, said, function, *arguments):
    """Run the processes of one run to their end and check their exit codes."""
    ranks, _store = launch(len(codes), said, function, *arguments)
    found = join(ranks)
    assert found == codes, f"exit codes {found}\n{said.read_text()}"


def lines_of(said):
    """Return the lines that isingcut printed into a file."""
    lines = said.read_text().splitlines()
    return [line for line in lines if line.startswith("isingcut: ")]


def join(ranks):
    """Wait for processes and return their exit codes."""
    for rank in ranks:
        rank.join(120)
    return [rank.exitcode for rank in ranks]


def _as_rank(rank, size, port, function, arguments):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True", LOCAL_WORLD_SIZE=str(size),
    )  # fmt: skip
    function(*arguments)


def _say_into(said, function, *arguments):
    file = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.enable()
    with sites.record():
        function(*arguments)


def type_in(*arguments):
    """Run the command line in this process, then exit."""
    from isingcut.cli import main as cli

    sys.argv = ["isingcut", *map(str, arguments)]
    cli.main()
    raise SystemExit(0)
