"""What a damaged journal lost is measured again, and what is no journal stays."""

import base64
import json
import os
import zlib

import numpy as np
import pytest
from arena import Row


def of_no_shape(key, shape, data):
    """A line as the journal writes it, with a right checksum."""
    crc = zlib.crc32(data, zlib.crc32(f"{key}:{shape}".encode()))
    line = {"key": key, "shape": shape, "crc": crc, "data": base64.b64encode(data).decode()}
    return json.dumps(line).encode() + b"\n"


NAN, ONES = np.full((2, 2, 3), np.nan).tobytes(), np.ones(12).tobytes()
LINES = {
    "truncated": lambda c: c[: len(c) - 7],
    "no rows": lambda c: c.splitlines(keepends=True)[0],
    "empty": lambda c: b"",
    "binary": lambda c: c + bytes(range(256)),
    "deep": lambda c: c + b"[" * 100000 + b"\n",
    "a list": lambda c: c + b"[1]\n",
    "a text": lambda c: c + b'"x"\n',
    "null": lambda c: c + b"null\n",
    "no data": lambda c: c + b'{"key": "0:0-1", "shape": [1], "crc": 0}\n',
    "a key of others": lambda c: c + of_no_shape("slopes", [12], ONES),
    "a batch beyond": lambda c: c + of_no_shape("77:0-1", [2, 2, 3], ONES),
    "states beyond": lambda c: c + of_no_shape("0:0-99", [2, 2, 3], ONES),
    "another shape": lambda c: c + of_no_shape("0:0-3", [12], ONES),
    "a shape that wraps": lambda c: c + of_no_shape("0:0-3", [-1, 3], ONES),
    "a huge shape": lambda c: c + of_no_shape("0:0-3", [10**30], ONES),
    "no number": lambda c: c + of_no_shape("0:0-1", [2, 2, 3], NAN),
    "another measurement": lambda c: c.replace(b'"fingerprint": "', b'"fingerprint": "0', 1),
}


@pytest.mark.parametrize("change", LINES.values(), ids=LINES)
def test_what_a_damaged_journal_lost_is_measured_again(interrupted, change):
    arena, before = interrupted
    journal = arena.run / "candidates.journal"
    journal.write_bytes(change(journal.read_bytes()))
    makes = ("run/run.json", "run/candidates.json", "run/candidates.journal")
    arena.try_row(Row("rank", "rank {run}", code=0, makes=makes))
    after = json.loads((arena.run / "candidates.json").read_text(encoding="utf-8"))
    assert after == before


left_behind = {}


@pytest.fixture
def interrupted(arena, monkeypatch):
    """A run whose ranking was interrupted with its journal full, and the ranking it had."""
    before = json.loads((arena.run / "candidates.json").read_text(encoding="utf-8"))
    (arena.run / "candidates.json").unlink()
    names = ("run.json", "candidates.journal")
    if not left_behind:

        def stop(*arguments):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("isingcut.evaluation.candidates.to_dict", stop)
            makes = tuple(f"run/{name}" for name in names)
            arena.try_row(Row("rank", "rank {run}", code=130, makes=makes))
        left_behind.update({name: (arena.run / name).read_bytes() for name in names})
        assert len(left_behind["candidates.journal"].splitlines()) > 1
    for name, content in left_behind.items():
        (arena.run / name).write_bytes(content)
    return arena, before


PLACES = {
    "a user's own file": (lambda f: f.write_text("mine", encoding="utf-8"), "not a journal"),
    "a folder": (lambda f: f.mkdir(), "is a folder; expected a plain file"),
    "a pipe": (os.mkfifo, "is a pipe; expected a plain file"),
    "a dangling link": (lambda f: f.symlink_to("nowhere"), "is a link to nothing"),
}


@pytest.mark.parametrize(("make", "line"), PLACES.values(), ids=PLACES)
def test_what_is_no_journal_stays(interrupted, make, line):
    arena, _ = interrupted
    journal = arena.run / "candidates.journal"
    journal.unlink()
    make(journal)
    arena.try_row(Row("rank", "rank {run}", line, makes=("run/run.json",)))
