"""A run killed at any moment ends with the same bytes."""

import contextlib
import os
import signal

import numpy as np

from isingcut.files.journal import Journal
from isingcut.files.ownership import MARKER
from isingcut.files.writing import (
    atomic_file,
    atomic_folder,
    is_leftover,
    lock_beside,
    lock_place,
    temporary_prefix,
)
from ranks import start
from shared import (
    load_json,
    module_fixture,
    parametrize,
    run_tiny,
    snapshot,
    without_speed,
    write_words,
)
from tiny import tiny_checkpoint

CHANGES = {
    "remove": 2,
    "compare_energies": "fisher",
    "attention": "sdpa",
    "batch_tokens": 32,
}


@module_fixture
def place(tmp_path_factory):
    """A folder with a tiny model, a text, and the run of a process that was not killed."""
    folder = tmp_path_factory.mktemp("resume")
    tiny_checkpoint("llama", folder / "model", num_hidden_layers=4)
    write_words(folder / "text.txt")
    whole = start(folder / "said", _run, folder, folder / "run", 10_000)
    whole.join(240)
    assert whole.exitcode == 0, (folder / "said").read_text()
    return folder


def _run(place, out, moment):
    """Do the whole job, in a process that is killed before its operation number ``moment``."""
    _die_at(moment)
    with without_speed() as patch:
        patch.setattr("isingcut.energies.fisher.Fisher.default_samples", 4)
        run_tiny(place / "model", place / "text.txt", out, **CHANGES)


def _die_at(moment):
    """Kill this process before operation number ``moment`` of those with lasting effects."""
    count = 0

    def watched(operation):
        def run(what, *arguments, **options):
            nonlocal count
            count += 1
            if count == moment:
                if isinstance(what, Journal) and what._path is not None and what._rows:
                    # The journal's end is cut off, as after a power failure.
                    os.truncate(what._path, os.path.getsize(what._path) - 7)
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(what, *arguments, **options)

        return run

    os.fsync, os.replace = watched(os.fsync), watched(os.replace)
    Journal.put = watched(Journal.put)
    unlink = os.unlink

    def forget(path, **options):
        # Other deleted files are temporary ones whose content has its final name already.
        remove = watched(unlink) if "journal" in str(path) else unlink
        remove(path, **options)

    os.unlink = forget


def _lasting(run):
    """Return the content of all files of a run that hold no times, by name."""
    lasting = snapshot(run)
    timed = "report.md report.html report.json evaluation.json run.json"
    for name in timed.split():
        del lasting[name]
    spectrum = load_json(run / "spectrum.json")
    return {**lasting, "spectrum.json": {**spectrum, "seconds": 0}}


def test_a_run_killed_at_many_moments_ends_with_the_same_bytes(place, tmp_path):
    out = tmp_path / "run"
    said = tmp_path / "said"
    rng = np.random.default_rng(11)
    killed = 0
    while True:
        # Five kills at random operations; the last process is not killed.
        moment = int(rng.integers(1, 25)) if killed < 5 else 10_000
        process = start(said, _run, place, out, moment)
        process.join(240)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, said.read_text()
        killed += 1
    assert killed >= 5
    assert _lasting(out) == _lasting(place / "run")
    assert set(os.listdir(out)) == set(os.listdir(place / "run")), (
        "nothing is left behind"
    )


def _leave_temporaries(folder):
    """Die with a file, a new folder and an old folder half replaced."""
    with atomic_folder(folder / "model") as old:
        (old / "old").touch()
    with contextlib.ExitStack() as stack:
        stack.enter_context(atomic_file(folder / "run.json"))
        new = stack.enter_context(atomic_folder(folder / "model", overwrite=True))
        (new / "weights").touch()
        replace = os.replace

        def die(source, target):
            replace(source, target)
            os.kill(os.getpid(), signal.SIGKILL)

        os.replace = die
        stack.close()


@parametrize("inside", [True, False])
def test_who_has_the_lock_clears_what_killed_processes_left(tmp_path, inside):
    process = start(tmp_path.with_suffix(".said"), _leave_temporaries, tmp_path)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    (tmp_path / ".model.part").mkdir()
    other = tmp_path / ".other.isingcut-1.part"
    other.touch()
    lock_beside(tmp_path / "other").touch()
    with lock_place(tmp_path if inside else tmp_path / "model", inside=inside):
        left = {p.name for p in tmp_path.iterdir() if p.suffix != ".lock"}
    # Kept: a foreign file, and one of an output with a lock of its own.
    kept = {"model", ".model.part", other.name}
    assert kept <= left <= kept | {p.name for p in tmp_path.glob(".run.json.*")}
    assert inside == (left == kept), "beside an output only its own"
    assert set(os.listdir(tmp_path / "model")) == {"old", MARKER}, (
        "the old folder came back"
    )
    assert is_leftover(other)
    assert temporary_prefix(other) == ".other.isingcut-"
    assert not is_leftover(tmp_path / ".model.part")
