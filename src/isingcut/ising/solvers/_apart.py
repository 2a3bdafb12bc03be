"""A sampler that is named runs in a process of its own: ended at the limit, bounded in memory.

Its class is imported there only. The problem goes there and the states come back as plain arrays
and JSON: nothing that the sampler's process writes is executed here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from isingcut.errors import InputError, MissingExtraError
from isingcut.files.inputs import load_json, regular_file
from isingcut.ising.constraints import LinearConstraint
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem
from isingcut.ising.solvers._sampling import drawn, sampler_class
from isingcut.ising.states import States

MEMORY_MB = 8000.0
GRACE_SECONDS = 1.0
"""Beyond the limit: for samplers that end at it by themselves, to hand over what they have."""
# Python, numpy and dimod are imported before the sampler's time begins.
_START_SECONDS = 120.0

PROBLEM, REQUEST, READY, STATES, ANSWER = (
    *("problem.npz", "request.json", "ready", "states.npy", "answer.json"),
)
# Its search path is this process's, as if the class were imported here; never the working folder.
_START = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from isingcut.ising.solvers._apart import serve; serve(sys.argv[1])"
)


def draw_apart(
    small: Problem,
    k: int,
    sampler: str,
    wanted: dict[str, Any],
    penalty: float,
    *,
    seconds: float | None,
    memory_mb: float,
) -> tuple[States, dict[str, Any]]:
    """`_sampling.drawn` in a process of its own.

    Args:
        sampler: ``package.module.Class``.
        seconds: after so many (and a grace of `GRACE_SECONDS`) the process is ended; None waits.
        memory_mb: most memory it may take.

    Raises:
        InputError: as `drawn`; or it took too long, or ended without an answer.
    """
    request = {"k": k, "wanted": wanted, "penalty": penalty}
    with tempfile.TemporaryDirectory(prefix="isingcut-") as place:
        folder = Path(place)
        _write_problem(small, folder)
        answer = _ask(folder, sampler, request, seconds, memory_mb)
        return _read_states(folder / STATES, sampler, k, small.n), answer


def check_apart(sampler: str, seconds: float | None) -> None:
    """Raise `InputError` where the name is no sampler that can be imported; none is made."""
    with tempfile.TemporaryDirectory(prefix="isingcut-") as place:
        _ask(Path(place), sampler, {}, seconds, MEMORY_MB)


def _ask(
    folder: Path, sampler: str, request: dict[str, Any], seconds: float | None, memory_mb: float
) -> dict[str, Any]:
    """The facts about one call; its states are in the folder."""
    limit = None if seconds is None else seconds + GRACE_SECONDS
    request = {**request, "sampler": sampler, "limit": limit, "memory_mb": memory_mb}
    try:
        content = json.dumps(request, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"options of the solver dimod:{sampler} must be numbers, texts or lists of them "
            f"({error}); give the class itself as sampler=... for others"
        ) from None
    (folder / REQUEST).write_text(content, encoding="utf-8")
    path = [p for p in sys.path if isinstance(p, str)]
    with (folder / "errors").open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, str(folder), *path],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
    try:
        _until_ready(process, folder)
        process.wait(limit)
    except subprocess.TimeoutExpired:
        raise InputError(
            f"the sampler {sampler} did not end within {seconds:g} s and was ended; give it more "
            "time (--solve-seconds), or choose another --solver"
        ) from None
    finally:
        _end(process)
    if not (folder / ANSWER).exists():
        code = process.returncode
        how = f"with exit status {code}"
        if code < 0:
            how = f"by signal {-code} ({signal.strsignal(-code)})"
        raise InputError(f"the sampler {sampler} ended its process {how} and returned nothing")
    answer = load_json(folder / ANSWER, f"the answer of {sampler}")
    if not isinstance(answer, dict):
        raise InputError(f"the sampler {sampler} wrote an answer of its own; choose another")
    if "missing" in answer:
        raise MissingExtraError("dwave-samplers", "solvers", f"the solver {sampler}")
    if "error" in answer:
        raise InputError(str(answer["error"]))
    return answer


def _until_ready(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait until the sampler's own time begins."""
    began = time.monotonic()
    # A sampler may have deleted all of it by now.
    while folder.exists() and not (folder / READY).exists():
        if process.poll() is not None and not (folder / READY).exists():
            said = (folder / "errors").read_text(encoding="utf-8", errors="replace").strip()
            last = (said.splitlines() or [f"exit status {process.returncode}"])[-1]
            raise InputError(f"a process for the sampler did not start: {last}")
        if time.monotonic() - began > _START_SECONDS:
            raise InputError(
                f"a process for the sampler did not start within {_START_SECONDS:g} s; is the "
                "machine overloaded?"
            )
        time.sleep(0.01)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it and all that it has started."""
    if sys.platform == "win32":
        process.kill()
    else:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            process.kill()
    process.wait()


def _read_states(file: Path, sampler: str, k: int, n: int) -> States:
    """The states (S, n), S at most 4 k; whatever else is in the file is an error."""
    what = f"the states of {sampler}"
    regular_file(file, what, limit=4 * k * n + 1000)
    try:
        found = np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{what} cannot be read: {' '.join(str(error).split())}") from None
    if found.dtype != np.bool_ or found.ndim != 2 or found.shape[1] != n:
        raise InputError(f"{what} are {found.dtype} {found.shape}; expected bool (S, {n})")
    return np.asarray(found)


def _write_problem(small: Problem, folder: Path) -> None:
    np.savez(
        folder / PROBLEM,
        h=small.hamiltonian.h,
        J=small.hamiltonian.J,
        rows=np.array([r.coefficients for r in small.constraints]).reshape(-1, small.n),
        rhs=np.array([r.rhs for r in small.constraints]),
        senses=np.array([r.sense for r in small.constraints], dtype="U2"),
        names=np.array([r.name for r in small.constraints], dtype="U"),
    )


def _read_problem(folder: Path) -> Problem:
    with np.load(folder / PROBLEM, allow_pickle=False) as parts:
        columns = (parts[k].tolist() for k in ("names", "rows", "senses", "rhs"))
        rows = [LinearConstraint(*row) for row in zip(*columns, strict=True)]
        return Problem(Hamiltonian(parts["h"], parts["J"]), rows)


# In the process of its own ------------------------------------------------------------


def serve(place: str) -> None:
    """Import the sampler, call it where there is a problem, write the answer, and end."""
    import dimod  # noqa: F401

    folder = Path(place)
    request = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    small = _read_problem(folder) if (folder / PROBLEM).exists() else None
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, sys.stderr.fileno())
    _bound(request["limit"], request["memory_mb"])
    (folder / READY).touch()
    answer: dict[str, Any] = {}
    try:
        found = sampler_class(request["sampler"])
        if small is not None:
            rest = (request[key] for key in ("wanted", "penalty", "sampler"))
            states, answer = drawn(small, request["k"], found, *rest)
            np.save(folder / STATES, states, allow_pickle=False)
        content = json.dumps(answer)
    except MissingExtraError:
        content = json.dumps({"missing": True})
    except BaseException as error:
        content = json.dumps({"error": str(error) or type(error).__name__})
    (folder / "answer").write_text(content, encoding="utf-8")
    os.replace(folder / "answer", folder / ANSWER)
    # Threads that a sampler has left running do not hold the process.
    os._exit(0)


def _bound(limit: float | None, memory_mb: float) -> None:
    """Let too much memory fail; end by itself where nobody is left to end this process."""
    if sys.platform == "win32":
        return
    import resource

    most = int(memory_mb * 1e6)
    # Not the address space: libraries reserve far more of it than they use.
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limit is not None:
        signal.setitimer(signal.ITIMER_REAL, limit + 5)
