"""One process writes to a folder at a time, and a second one is refused before it changes anything.

Real processes in a fixed order: the first waits in the middle of its work until the second ends.
"""

import contextlib
import errno
import os
import pkgutil
import shlex
import signal
import threading
import time

import pytest
from heal_rows import heal

from isingcut.files.writing import LOCK, lock_beside, lock_place
from ranks import join, launch, lines_of, run, start, type_in
from shared import BusyError, leave_speed_out, parametrize

PUT = "isingcut.files.journal.Journal.put"
VERIFY = "isingcut.runs.cutting.verify"
STEP = "isingcut.healing.training.train.Watch.on_step_end"
MEASURE = (
    "{model} --calibration {text} --samples 3 --length 16 --rank-samples 3 --report-samples 3 "
    "--dtype float32 --energy pairwise --out {here}/new --remove"
)
RUN = f"run --random-states 30 --patch none {MEASURE}"
EXCISE = "excise {run} --patch none --blocks"
# The command that made the run.
AGAIN = (
    "run model --remove 2 --calibration text.txt --length 16 --samples 3 --rank-samples 3 "
    "--report-samples 3 --dtype float32 --random-states 30 --patch-tokens 1000 --patch-share 0 "
    "--out {run}"
)


def _works(words, where, here):
    """Run a command that stops at its first call of ``where``, and signal this with a file."""
    patch = pytest.MonkeyPatch()
    leave_speed_out(patch.setattr)
    module, name = where.rsplit(".", 1)
    owner = pkgutil.resolve_name(module)
    here_it_was = []

    def waiting(*arguments, **options):
        if not here_it_was:
            here_it_was.append(True)
            (here / "met").touch()
            (here / "go").open().close()
        return went(*arguments, **options)

    went = getattr(owner, name)
    patch.setattr(owner, name, waiting)
    type_in(*words)


@contextlib.contextmanager
def working(arena, tmp_path, command, where, size=1):
    """Yield the processes of a command, stopped at ``where``; then check how they end."""
    meeting = tmp_path / "meeting"
    said = tmp_path / "said"
    meeting.mkdir()
    os.mkfifo(meeting / "go")
    arguments = (said, _works, typed(arena, command), where, meeting)
    if size > 1:
        # The processes need the store until they end.
        ranks, _store = launch(size, *arguments)
    else:
        ranks = [start(*arguments)]
    try:
        late = time.monotonic() + 120
        while not (meeting / "met").exists():
            assert all(rank.is_alive() for rank in ranks), said.read_text()
            assert time.monotonic() < late, said.read_text()
            time.sleep(0.01)
        yield ranks
    finally:
        # Opening for reading and writing does not block.
        go = os.open(meeting / "go", os.O_RDWR)
        codes = join(ranks)
        os.close(go)
    assert codes in ([0] * size, [-signal.SIGKILL]), said.read_text()


def typed(arena, command):
    places = {n: str(getattr(arena, n)) for n in ("model", "run", "text", "here")}
    return [word.format(**places) for word in shlex.split(command)]


def left_behind(arena):
    found = [*arena.here.rglob("*.lock"), *arena.here.rglob(".*.isingcut-*")]
    return [str(path.relative_to(arena.here)) for path in found]


def busy(place):
    return rf"another isingcut \(pid \d+, host .+\) is writing to .*/{place} since \d\d\d\d-"


ORDERS = {
    "two runs of different sizes": (f"{RUN} 2", PUT, f"{RUN} 3", "new"),
    "two excises": (f"{EXCISE} 0,1", VERIFY, f"{EXCISE} 1,2", "run"),
    "a run beside an excise": (f"{EXCISE} 0,1", VERIFY, AGAIN, "run"),
    "the same heal twice": (heal(), STEP, heal(), "healed"),
}


@parametrize("name", ORDERS)
def test_a_second_writer_is_refused_and_touches_nothing(arena, tmp_path, name):
    first, where, second, place = ORDERS[name]
    with working(arena, tmp_path, first, where) as (holder,):
        arena.refuses(second, busy(place).replace(r"pid \d+", f"pid {holder.pid}"))
    assert not left_behind(arena)
    # The second command is no longer refused as busy: it keeps what exists and makes the rest.
    arena.works(second, "new*", "run*", "healed*", ".healed*")
    assert not left_behind(arena)


def test_a_killed_writer_leaves_no_lock(arena, tmp_path):
    with working(arena, tmp_path, f"energy {MEASURE} 2", PUT) as (holder,):
        os.kill(holder.pid, signal.SIGKILL)
        holder.join(60)
    assert (arena.here / "new" / LOCK).exists()
    arena.works(f"energy {MEASURE} 2", "new*")
    assert not left_behind(arena)


def test_the_processes_of_a_run_share_the_lock_of_the_first(arena, tmp_path):
    with working(arena, tmp_path, f"energy {MEASURE} 2", PUT, size=2) as (
        leader,
        _other,
    ):
        line = busy("new").replace(r"pid \d+", f"pid {leader.pid}")
        arena.refuses(f"energy {MEASURE} 3", line)
    assert not left_behind(arena)


def test_a_second_run_of_several_processes_is_refused_as_one(arena, tmp_path):
    for command, place in ((f"energy {MEASURE} 2", "new"), (heal(), "healed")):
        said = tmp_path / "said"
        with lock_place(arena.here / place, inside=place == "new"):
            run([2, 2], said, type_in, *typed(arena, command))
        (line,) = lines_of(said)
        assert f"isingcut: another isingcut (pid {os.getpid()}," in line
        said.unlink()
    assert not left_behind(arena)


def test_the_lock_of_an_output_is_its_neighbour(arena):
    import isingcut

    out = arena.here / "saved"
    errors = []

    def save():
        try:
            isingcut.open_run(arena.run).save(out, blocks=[0, 1])
        except BusyError as e:
            errors.append(str(e))

    with lock_place(out):
        assert lock_beside(out).exists()
        other = threading.Thread(target=save)
        other.start()
        other.join()
    assert len(errors) == 1
    assert "is writing to" in errors[0]
    assert not out.exists()
    save()
    assert (out / "config.json").exists()
    assert not left_behind(arena)


@parametrize("code, said", [(errno.ENOLCK, 1), (errno.EROFS, 0)])
def test_a_file_system_without_locks_is_reported_once(
    tmp_path, capsys, code, said, fails
):

    # On a read-only file system nothing can be written, so no lock is needed.
    fails("isingcut.files.writing.FileLock.acquire", OSError(code, os.strerror(code)))
    (tmp_path / ".run.json.isingcut-1.part").touch()
    for _ in range(2):
        with (
            lock_place(tmp_path, inside=True) as first,
            lock_place(tmp_path, inside=True) as again,
        ):
            assert (first, again) == (True, False)
    assert (
        capsys.readouterr().err.count("does not support locks; do not start a second")
        == said
    )
    assert [p.name for p in tmp_path.iterdir()] == [".run.json.isingcut-1.part"], (
        "it may live"
    )


def test_a_refused_start_leaves_no_folder(arena):
    arena.refuses("energy {here}/gone --out {here}/a/b/run", "there is no model at")
    assert not (arena.here / "a").exists()
