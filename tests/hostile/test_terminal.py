"""Printing: names that look like markup, narrow and non-UTF-8 terminals, full disks."""

import contextlib
import errno
import io
import os
import re
import shutil
import subprocess
import sys

import pytest
from arena import Row, call, parametrised, tried
from damage import linked

import isingcut
import shared
from isingcut.console.printing import printable, say
from isingcut.files.writing import os_error_words
from shared import cells, parametrize

# Words of the command line ------------------------------------------------------------------

USAGE = [
    Row(*row)
    for row in cells(
        r"""
no such verb :: zorp :: No such command 'zorp'; see isingcut --help
no such option :: solve {run} --zorp :: No such option.*--zorp.*see isingcut solve --h
a value for a flag :: --debug=1 ls :: '--debug' does not take a value; see isingcut --h
nothing to work on :: solve :: Missing argument 'DIR'; see isingcut solve --help
a text for a number :: solve {run} --states x :: --states must be a whole number, got 'x'
too many :: ls a b :: unexpected extra argument.*; see isingcut ls --help
"""
    )
]


@parametrised(USAGE)
def test_wrong_words_are_one_line(arena, row):
    arena.try_row(row)
    assert "Usage:" not in call(["zorp"])[2]


@parametrize(
    "command",
    ["solve {here}", "solve {run} --zorp", "solve {run} --remove 99", "report {text}"],
)
def test_debug_shows_the_place_and_keeps_the_code(arena, command):
    words = command.format(here=arena.here, run=arena.run, text=arena.text).split()
    code, _, plain = call(words)
    assert code == 2
    debugged, _, told = call(["--debug", *words])
    assert debugged == 2
    assert told.startswith("Traceback")
    assert told.endswith(plain)


# Names --------------------------------------------------------------------------------------

NAMES = ["[bold]m[/]", ":smile:", "m\x1b[31mred\u202e"]


@parametrize("name", NAMES, ids=ascii)
def test_a_name_is_printed_as_it_is(arena, name):
    run = shutil.move(arena.run, arena.here / name)
    shown = printable(str(run))
    code, out, err = call(["solve", str(run), "--remove", "3"])
    assert code == 0, err
    assert f"wrote {shown}/remove-3/spectrum.json" in out
    code, out, _ = call(["report", str(run)])
    assert code == 0
    assert shown in out
    assert printable(out) == out
    code, _, err = call(["report", str(run / "nothing")])
    assert code == 2
    assert f"isingcut: {shown}/nothing is not an isingcut run folder" in err


def test_control_characters_are_spelled_out(capsys):
    assert (
        printable("a\x1b[2J\x9b\x7f\ud800\u2066b") == r"a\x1b[2J\x9b\x7f\ud800\u2066b"
    )
    assert printable("a\tb\n±·é漢") == "a\tb\n±·é漢"
    say("a\n  b\r\nc\rd")
    assert capsys.readouterr().err == "a b c\\rd\n"


# Terminals ----------------------------------------------------------------------------------


def printed(arguments, stream):
    """Return exit code and stderr of the command line, with ``stream`` as its stdout."""
    err = io.StringIO()
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(err):
        return shared.call(*arguments), err.getvalue()


COMMANDS = ["solve {run} --remove 2", "inspect {model}", "ls", "--help", "solve --help"]


@parametrize("encoding", ["ascii", "cp437", "0", "7", "x", "100000"])
@parametrize("command", COMMANDS)
def test_tables_come_in_any_encoding_and_width(arena, monkeypatch, command, encoding):
    if wide := encoding not in ("ascii", "cp437"):
        monkeypatch.setenv("COLUMNS", encoding)
        monkeypatch.setenv("FORCE_COLOR", "1")
        encoding = "utf-8"
    words = command.format(run=arena.run, model=arena.model).split()
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    code, err = printed(words, out)
    assert code == 0, err
    text = out.buffer.getvalue().decode(encoding)
    assert text if wide else text.strip()
    assert "\\u" not in text
    assert wide or words == ["ls"] or "|" in text


@parametrize("command", [*COMMANDS, "solve {run} --json", "ls --quiet", "--version"])
def test_a_full_disk_under_stdout_is_one_line(arena, command):
    words = command.format(run=arena.run, model=arena.model).split()
    if "--quiet" in words:
        words = ["solve", str(arena.run), "--quiet"]
    with open("/dev/full", "w") as full:
        code, err = printed(words, full)
    assert code == 2
    lines = err.splitlines()
    assert "No space left on device" in lines[-1]
    assert sum(line.startswith("isingcut: ") for line in lines) == 1
    assert "Traceback" not in err


# Typed words :: exit code :: expected line.
SHELL = r"""
solve run > /dev/full :: 2 :: cannot write to standard output: No space left
zorp > /dev/full 2> /dev/full :: 2 :: ^$
zorp 2>&- :: 2 :: ^$
solve run <&- >&- 2>&- :: 0 :: ^$
solve run 2> /dev/full :: 0 :: ^$
solve run | head -c 1; exit ${PIPESTATUS[0]} :: 0 :: ^$
solve run :: 0 :: ^$
ls :: 0 :: ^$
"""


@parametrize("typed, code, line", cells(SHELL))
def test_streams_of_the_shell(arena, typed, code, line):
    """In ASCII, without a home."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    environment.pop("HOME")
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m isingcut.cli.main {typed}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=arena.here,
        env=environment,
    )
    assert done.returncode == int(code), done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(line, done.stderr.strip()), done.stderr


# What the operating system refuses ------------------------------------------------------------

REFUSALS = """
EACCES :: Permission denied
ENOSPC :: no space left on the disk
EDQUOT :: no space left on the disk
EMFILE :: Too many open files
"""


@parametrize("name, words", cells(REFUSALS))
def test_a_disk_that_refuses_is_one_line(arena, monkeypatch, name, words):
    def refuse(*arguments, **options):
        number = getattr(errno, name)
        raise OSError(number, os.strerror(number), str(arena.run / "report.json"))

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    arena.refuses("report {run}", words)


def test_a_disk_that_refuses_a_copy_is_one_line(arena, monkeypatch):
    def refuse(source, target, **options):
        number = errno.EMFILE
        raise OSError(number, os.strerror(number), source, None, target)

    monkeypatch.setattr("shutil.copyfile", refuse)
    with pytest.raises(OSError) as caught:
        isingcut.open_run("run").save("new")
    said = os_error_words(caught.value)
    assert re.search("cannot copy .*model.* to .*: Too many open files", said)
    assert "Errno" not in said
    assert not (arena.here / "new").exists()


BOTH = "report {run} {run} --out "


PLACES = [
    Row("a run folder below a file", "report {text}/run", "not an isingcut run folder"),
    Row(
        "a comparison with a long name",
        BOTH + "{here}/" + "n" * 300,
        "File name too long",
    ),
    Row(
        "a comparison onto a loop of links",
        BOTH + "{here}/l",
        "loop|Too many levels|is not replaced|already exists|link",
        linked("l", "l"),
    ),
    Row("a NUL byte", "report 'a\0b'", "embedded null byte"),
    Row(
        "a comparison below a file",
        BOTH + "{home}/diary.txt/r.html",
        "cannot write .*(File exists|Not a directory)|is not a folder",
    ),
]


test_a_place_that_is_none_is_one_line = tried(PLACES)
