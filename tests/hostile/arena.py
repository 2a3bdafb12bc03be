"""Rows of the hostile suite, and the folder in which each is run.

A row is one command line with faulty files or words. It must end with the expected exit code and
one line, without a traceback, within limits of time and memory. Every file must stay as it was, by
hash: nothing is replaced, and nothing is left half-made.
"""

from __future__ import annotations

import contextlib
import io
import re
import resource
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shared
from shared import leave_speed_out, parametrize, snapshot


@dataclass(frozen=True)
class Row:
    """One hostile case.

    Attributes:
        name: unique name within its table; id of the test.
        command: words after ``isingcut``; ``{model}``, ``{run}``, ``{text}``, ``{home}`` and
            ``{here}`` stand for places of the arena, which may have more files below ``{here}``.
        line: regular expression for the one line on stderr, or for all output if code is not 2.
        prepare: function that makes the files hostile, called before they are hashed.
        code: expected exit code.
        makes: patterns (of paths below the arena) of what may be made or changed.
        seconds, megabytes: limits of time, and of memory beyond what the process has already.
        stdin: text on standard input.
    """

    name: str
    command: str
    line: str = ""
    prepare: Callable[[Arena], Any] = lambda arena: None
    code: int = 2
    makes: tuple[str, ...] = ()
    seconds: float = 20
    megabytes: int = 1500
    stdin: str = ""


def rows(cases):
    """Return rows from tuples (name, command, line, preparation)."""
    return [Row(*case) for case in cases]


def parametrised(table):
    """Run a test once for each row of a table."""
    return parametrize("row", table, ids=[row.name for row in table])


def tried(table):
    """Return a test that tries each row of a table in an arena."""

    @parametrised(table)
    def test(arena, row):
        arena.try_row(row)

    return test


class TooSlowError(BaseException):
    """A row exceeded its time limit."""


@dataclass
class Arena:
    """Folder of one row, with ``model``, ``text.txt``, ``run`` (finished) and ``home``."""

    here: Path

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self.here / {"text": "text.txt"}.get(name, name)

    def try_row(self, row):
        """Run a row, check all that it expects, and return its stdout."""
        row.prepare(self)
        places = {
            n: str(getattr(self, n)) for n in ("model", "run", "text", "home", "here")
        }
        arguments = [part.format(**places) for part in shlex.split(row.command)]
        before = snapshot(self.here)
        code, out, err = call(arguments, row.seconds, row.megabytes, row.stdin)
        after = snapshot(self.here)
        told = (
            f"isingcut {' '.join(arguments)}\nexit {code}\n{out[-2000:]}\n{err[-4000:]}"
        )
        assert code == row.code, told
        assert "Traceback" not in out + err, told
        if code == 2:
            lines = [x for x in err.splitlines() if x.startswith("isingcut: ")]
            lines = [x for x in lines if not x.startswith("isingcut: warning: ")]
            assert len(lines) == 1, told
            assert re.search(row.line, lines[0]), f"expected {row.line!r} in\n{told}"
        elif row.line:
            assert re.search(row.line, out + err), f"expected {row.line!r} in\n{told}"
        allowed = [re.compile(glob_to_regex(p)) for p in row.makes]
        changed = {
            name
            for name in before.keys() | after.keys()
            if before.get(name) != after.get(name)
            and not any(p.match(name) for p in allowed)
        }
        assert not changed, f"changed or made: {sorted(changed)}\n{told}"
        return out

    def works(self, command, *makes, **more):
        """Run a row that must end well; return its stdout."""
        return self.try_row(Row(command, command, code=0, makes=makes, **more))

    def refuses(self, command, line, *more, **rest):
        """Run a row that must be refused in a line; return its stdout."""
        return self.try_row(Row(command, command, line, *more, **rest))


def make_arena(world, folder, patch):
    """Return a copy of the world as the working folder, with HOME and the cache in it."""
    here = Path(shutil.copytree(world, folder / "here", symlinks=True))
    manifest = here / "run/run.json"
    # Make the run's record name the copied folder.
    manifest.write_text(manifest.read_text().replace(str(world), str(here)))
    patch.chdir(here)
    for name, value in {"HOME": "home", "ISINGCUT_CACHE": "home/cache"}.items():
        patch.setenv(name, str(here / value))
    patch.setenv("COLUMNS", "200")
    leave_speed_out(patch.setattr)
    return Arena(here)


def glob_to_regex(pattern):
    """Return the regular expression of a pattern; ``run/*`` matches any depth below ``run``."""
    return "^" + re.escape(pattern).replace(r"\*", ".*") + "$"


def call(arguments, seconds=20, megabytes=1500, stdin=""):
    """Run the command line in this process, within limits; return exit code, stdout, stderr."""
    out = io.StringIO()
    err = io.StringIO()
    typed = sys.stdin
    sys.stdin = io.StringIO(stdin)
    try:
        with (
            bounded(seconds, megabytes),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            code = shared.call(*arguments)
    except TooSlowError:
        raise AssertionError(
            f"isingcut {' '.join(arguments)} took more than {seconds} s\n{err.getvalue()[-3000:]}"
        ) from None
    finally:
        sys.stdin = typed
    return code, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def bounded(seconds, megabytes):
    """Raise `TooSlowError` after that time, and let allocations beyond the limit fail."""

    def late(number, frame):
        raise TooSlowError

    held = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (held + megabytes * 2**20, hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, handler)
