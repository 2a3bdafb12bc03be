"""Progress: a bar on a terminal, lines in a log, shares of a bar, and the best so far."""

import contextlib
import hashlib
import inspect
import itertools
import sys

import pytest

import isingcut
from isingcut.console import progress
from isingcut.console.printing import printable
from isingcut.files import ownership
from isingcut.healing.heal import heal
from shared import Bars, parametrize, run_tiny
from tiny import Calibration, Work, measure


@pytest.fixture
def log(capsys):
    """Function that makes steps on a bar of twenty, with seconds between; returns its lines."""

    def lines(steps, seconds, notes=lambda k: "", begun=0):
        now = [0.0]
        bar = progress.PlainBar("measuring", 20, clock=lambda: now[0])
        if begun:
            bar.advance(begun)
        for k in range(steps):
            now[0] += seconds
            bar.advance(1, notes(k))
        if begun + steps == 20:
            bar.advance(0, notes(24))
            bar.finish()
        return capsys.readouterr().err.splitlines()

    return lines


def test_a_log_gets_tenths_with_the_time_left_and_the_best(log):
    lines = log(
        20,
        60,
        lambda k: (
            "" if k % 2 == 0 and k < 20 else f"lowest KL so far {1 / (k + 1):.2f}"
        ),
    )
    assert len(lines) == 10
    assert lines[0] == "measuring: 10%, 18 min left, lowest KL so far 0.50"
    assert lines[-1] == "measuring: done, took 20 min, lowest KL so far 0.04"


def test_a_log_of_a_short_task_has_only_its_end(log):
    assert log(20, 0.2) == ["measuring: done, took 4 s"]


def test_the_time_left_of_work_that_goes_on_is_that_of_new_steps(log):
    wanted = ["measuring: 50%, 9 min left", "measuring: 60%, 8 min left"]
    assert log(2, 60, begun=10) == wanted


def test_unknown_totals_and_durations(capsys):
    progress.PlainBar("solving", 0).advance(1, "lowest energy 1")
    assert capsys.readouterr().err == ""
    now = itertools.count(0, 60)
    more = progress.PlainBar("writing", 2, clock=lambda: next(now))
    for _ in range(2):
        more.advance(3)
    assert capsys.readouterr().err.endswith("writing: 90%, 0 s left\n")
    assert [progress.duration(s) for s in (0.4, 8.4, 260, 9000)] == [
        "0 s",
        "8 s",
        "4 min",
        "2.5 h",
    ]


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    name = "[bold]m[/] :smile: m\x1b[31mred\u202e"
    with progress.terminal(name, 2) as bar:
        bar.advance(1, "lowest KL so far [0.5]")
        bar.advance(1)
    shown = capsys.readouterr()
    assert "lowest KL so far [0.5]" in shown.err
    assert printable(name) in shown.err
    assert shown.out == ""


class Bar:
    """A bar that keeps its position and its notes."""

    def __init__(self):
        self.done = 0.0
        self.notes = []

    def advance(self, steps=1, note=""):
        self.done += steps
        self.notes.append(note)


def test_steps_of_a_killed_measurement_are_counted_at_once(finished, tmp_path):
    """So the pace of new steps leaves them out."""
    bars = []

    @contextlib.contextmanager
    def record(description, total):
        bars.append((Bar(), total))
        yield bars[-1][0]

    run = isingcut.open_run(finished)
    split = Calibration.load(finished / "calibration.safetensors").splits["rank"]
    work = Work(16, record, tmp_path / "journal")
    for _ in range(2):
        measure(run._runner.context.replay, split, run.spectrum.states, work)
    (first, total), (again, _) = bars
    assert first.done == pytest.approx(total)
    assert (again.done, len(again.notes)) == (total, 1)


def test_a_large_file_is_hashed_with_a_bar(tmp_path, monkeypatch):
    (file := tmp_path / "model.gguf").write_bytes(bytes(40))
    bars = Bars()
    digest = hashlib.sha256(bytes(40)).hexdigest()
    assert ownership.file_sha256(file, bars) == digest
    assert not bars.done
    monkeypatch.setattr(ownership, "_LARGE", 30)
    monkeypatch.setattr(ownership, "_PART", 16)
    assert ownership.file_sha256(file, bars) == digest
    assert bars.done == bars.totals == {"hashing model.gguf": 40}


def test_solving_and_proving_show_progress(run, tmp_path):
    bars = Bars()
    opened = isingcut.open_run(run, remove=1, progress=bars)
    _ = opened.ranking
    assert "solving for 1" in bars.totals
    opened.save(tmp_path / "out", blocks=[1])
    assert (
        bars.done["verifying the checkpoint"]
        == bars.totals["verifying the checkpoint"]
        == 3
    )
    read = bars.totals["reading the text of the patch"]
    assert bars.done["reading the text of the patch"] == read > 0


@parametrize("shown", [True, False])
def test_python_shows_progress_where_a_terminal_is(finished, shown, stub):
    stub(sys.stderr, "isatty", shown)
    wanted = progress.terminal if shown else progress.slow_work
    assert isingcut.open_run(finished)._runner.context.progress is wanted
    assert progress.as_progress(None) is wanted
    assert progress.as_progress(shown) is (wanted if shown else progress.silent)
    for call in (isingcut.prune, isingcut.run, isingcut.energy, heal):
        assert inspect.signature(call).parameters["progress"].default is None


def test_without_a_terminal_a_script_sees_what_takes_seconds(capsys, monkeypatch):
    def said():
        with progress.slow_work("ranking", 2) as bar:
            bar.advance(2)
        return capsys.readouterr().err

    assert said() == ""
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0)
    assert "ranking: done, took 0 s" in said()


def test_a_resumed_run_first_says_what_it_keeps(llama, text, run, capsys):
    given = {"remove": 2, "compare_energies": "empirical-fisher", "progress": Bars()}
    run_tiny(llama, text, run, **given)
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith(f"resuming {run}, kept: calibration.safetensors, hamil")
    assert first.endswith(", evaluation.json")


def test_a_part_counts_its_share_of_a_bar():
    bar = Bar()
    part = progress.Part(bar, 4)
    with part("first", 8) as inner:
        inner.advance(2)
    assert bar.done == 1
    # The rest is divided anew.
    with part("second", 2) as inner:
        inner.advance(1)
        assert bar.done == 2.5
        inner.advance(5)
    assert bar.done == 4
    part.finish("done")
    assert (bar.done, bar.notes) == (4, ["first", "second", "second", "done"])
