"""Progress: a bar on a terminal, lines in a log, shares of a bar, and the best so far."""

import contextlib

import isingcut
from isingcut.console import progress
from isingcut.data.calibration import Calibration
from isingcut.measure.losses import measure
from isingcut.measure.work import Work


def test_a_log_gets_tenths_with_the_time_left_and_the_best(capsys):
    now = [0.0]
    bar = progress.PlainBar("measuring", 20, clock=lambda: now[0])
    for k in range(20):
        now[0] += 60
        bar.advance(1, f"lowest KL so far {1 / (k + 1):.2f}" if k % 2 else "")
    bar.advance(0, "lowest KL so far 0.04")
    bar.finish()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[0] == "measuring: 10%, 18 min left, lowest KL so far 0.50"
    assert lines[-1] == "measuring: done, took 20 min, lowest KL so far 0.04"


def test_a_log_of_a_short_task_has_only_its_end(capsys):
    now = [0.0]
    bar = progress.PlainBar("measuring", 20, clock=lambda: now[0])
    for _ in range(20):
        now[0] += 0.2
        bar.advance(1)
    bar.finish()
    assert capsys.readouterr().err == "measuring: done, took 4 s\n"


def test_the_time_left_of_work_that_goes_on_is_that_of_new_steps(capsys):
    now = [0.0]
    bar = progress.PlainBar("measuring", 20, clock=lambda: now[0])
    bar.advance(10)
    for _ in range(2):
        now[0] += 60
        bar.advance(1)
    assert capsys.readouterr().err.splitlines() == [
        "measuring: 50%, 9 min left",
        "measuring: 60%, 8 min left",
    ]


def test_unknown_totals_and_durations(capsys):
    bar = progress.PlainBar("solving", 0)
    bar.advance(1, "lowest energy 1")
    assert capsys.readouterr().err == ""
    assert [progress.duration(s) for s in (0.4, 8.4, 260, 9000)] == ["0 s", "8 s", "4 min", "2.5 h"]


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress.terminal("measuring", 2) as bar:
        bar.advance(1, "lowest KL so far [0.5]")
        bar.advance(1)
    shown = capsys.readouterr()
    assert "lowest KL so far [0.5]" in shown.err
    assert "left" in shown.err
    assert shown.out == ""


def test_measuring_reports_the_best_so_far(finished):
    """The note beside the bar is the lowest mean KL of the samples seen."""
    notes = []

    class Bar:
        def advance(self, steps=1, note=""):
            notes.extend([note] if note else [])

    @contextlib.contextmanager
    def record(description, total):
        yield Bar()

    run = isingcut.open_run(finished, progress=record)
    split = Calibration.load(finished / "calibration.safetensors").splits["rank"]
    found = measure(run._session.replay, split, run.spectrum.states, Work(16, record))
    assert len(notes) == 3
    assert notes[-1] == f"lowest KL so far {found.kl.min():.4f}"


def test_what_a_killed_measurement_had_is_counted_at_once(finished, tmp_path):
    """The pace of new steps begins behind it."""
    told = []

    class Bar:
        def advance(self, steps=1, note=""):
            told.append((steps, note))

    @contextlib.contextmanager
    def record(description, total):
        told.append(total)
        yield Bar()

    run = isingcut.open_run(finished)
    split = Calibration.load(finished / "calibration.safetensors").splits["rank"]
    work = Work(16, record, tmp_path / "journal")
    for _ in range(2):
        told.clear()
        found = measure(run._session.replay, split, run.spectrum.states, work)
    assert told == [told[0], (told[0], f"lowest KL so far {found.kl.min():.4f}")]


def test_a_part_counts_its_share_of_a_bar():
    class Bar:
        def __init__(self):
            self.done, self.notes = 0.0, list[str]()

        def advance(self, steps=1, note=""):
            self.done += steps
            self.notes.append(note)

    bar = Bar()
    part = progress.Part(bar, 4)
    with part("first", 8) as inner:
        inner.advance(2)
    assert bar.done == 1
    # What is left is parted anew.
    with part("second", 2) as inner:
        inner.advance(1)
        assert bar.done == 2.5
        inner.advance(5)
    assert bar.done == 4
    part.finish("done")
    assert (bar.done, bar.notes) == (4, ["first", "second", "second", "done"])
