"""Texts from standard input and pipes: read once."""

import contextlib
import os
import pty
import threading

import pytest
from arena import Row
from sample_texts import LINES, MEASURE, NUL, UTF8, WORDS, packed

from shared import snapshot

pytestmark = pytest.mark.usefixtures("smaller_bounds")


@contextlib.contextmanager
def standard_input(descriptor):
    """What the process reads from there, as a shell gives it."""
    kept = os.dup(0)
    os.dup2(descriptor, 0)
    try:
        yield
    finally:
        os.dup2(kept, 0)
        os.close(kept)


@contextlib.contextmanager
def pipe_of(content, *, again=False):
    """The reading end of a pipe that somebody writes ``content`` into, once or for ever."""
    reading, writing = os.pipe()

    def write():
        with contextlib.suppress(BrokenPipeError), os.fdopen(writing, "wb", buffering=0) as f:
            f.write(content)
            while again:
                f.write(content)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield reading
    finally:
        os.close(reading)
        writer.join()


STREAMED = [
    ("nothing", b"", {}, "standard input is too short: .*found 0"),
    ("a word", b"word", {}, "standard input is too short: .*found 0"),
    ("endless blanks", b" " * 65536, {"again": True}, None),
    ("an endless record", b'{"text": [' * 4096, {"again": True}, "line 1 is longer than 524288"),
    ("endless NULs", bytes(65536), {"again": True}, NUL),
    ("bytes", b"\xff\xfe\xfd\xfc", {"again": True}, UTF8.format(0xFF)),
    ("half a gzip", packed(WORDS.encode())[:60], {}, "standard input is not a complete gzip file"),
    ("a broken record", b"{oh no", {}, "standard input line 1 is not valid JSON"),
    ("a text", WORDS.encode(), {}, None),
    ("records", LINES.encode(), {}, None),
    ("a marked text", b"\xef\xbb\xbf" + WORDS.encode(), {}, None),
    ("a packed text", packed(WORDS.encode()), {}, None),
    ("packed records", packed(LINES.encode()), {}, None),
]


@pytest.mark.parametrize(("what", "content", "how", "line"), STREAMED, ids=[s[0] for s in STREAMED])
def test_standard_input(arena, what, content, how, line):
    with pipe_of(content, **how) as end, standard_input(end):
        makes = () if line else ("new*", "home*")
        arena.try_row(Row(what, MEASURE + "-", line or "", code=2 if line else 0, makes=makes))


def test_a_terminal_is_not_waited_for(arena):
    mine, its = pty.openpty()
    with standard_input(its):
        arena.try_row(Row("a terminal", MEASURE + "-", "standard input is a terminal; pipe a text"))
    os.close(mine)
    os.close(its)


def test_standard_input_may_be_a_file_but_no_device(arena):
    with (arena.here / "text.txt").open("rb") as file, standard_input(file.fileno()):
        arena.try_row(Row("a file", MEASURE + "-", code=0, makes=("new*", "home*")))
    with open("/dev/null", "rb") as file, standard_input(file.fileno()):
        command = MEASURE.replace("new", "other") + "-"
        arena.try_row(Row("none", command, "standard input is a device"))


@pytest.mark.parametrize("content", [WORDS.encode(), LINES.encode(), packed(WORDS.encode())])
def test_a_pipe_as_the_shell_makes_it_is_read_once(arena, content):
    """`<(...)`: a run that goes on has its tokens and does not need the pipe again."""
    with pipe_of(content) as end:
        command = MEASURE + f"/dev/fd/{end}"
        arena.try_row(Row("the pipe", command, code=0, makes=("new*", "home*")))
        before = snapshot(arena.here / "new")["calibration.safetensors"]
        arena.try_row(Row("again", command, code=0, makes=("new*", "home*")))
        assert snapshot(arena.here / "new")["calibration.safetensors"] == before
    arena.try_row(Row("solved", "solve new --remove 2", code=0, makes=("new*", "home*")))
    line = f"the calibration file '/dev/fd/{end}' does not exist"
    row = Row("the pipe is gone", command.replace("new", "other"), line)
    arena.try_row(row)


def test_a_pipe_cannot_be_healed_with(arena):
    with pipe_of(WORDS.encode()) as end, standard_input(end):
        command = MEASURE.replace("energy", "run --remove 2 --heal") + "-"
        arena.try_row(Row("healing", command, "- is a pipe and can be read only once; save it to"))


def test_a_named_pipe_is_waited_for(arena):
    os.mkfifo(arena.here / "a.jsonl")

    def write():
        (arena.here / "a.jsonl").write_text(LINES, encoding="utf-8")

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    arena.try_row(Row("a pipe", MEASURE + "a.jsonl", code=0, makes=("new*", "home*")))
    writer.join()
