"""Damaged journals: lost rows are measured again, and files that are not journals are kept."""

import base64
import json
import os
import zlib
from unittest.mock import Mock

import numpy as np
import pytest
from arena import Row

from shared import load_json, parametrize
from tiny import count_rows


def put(key, shape, data):
    """Return a line in the format of the journal, with a correct checksum."""
    text = json.dumps([key, shape, base64.b64encode(data).decode()]).encode()
    return b"%08x " % zlib.crc32(text) + text


ONES = np.ones(6).tobytes()
DEEP = b"[" * 100_000
LINES = {
    "rubbish": bytes(range(11, 256)) * 64,
    "no base64": b"%08x " % zlib.crc32(b'["0:1",[1],"%"]') + b'["0:1",[1],"%"]',
    "not in pairs": b"%08x {}" % zlib.crc32(b"{}"),
    "deep": b"%08x " % zlib.crc32(DEEP) + DEEP,
    "nothing for a key": put(None, [2, 3], ONES),
    "a shape in words": put("0:1", {"a": 1}, ONES),
    "a key of others": put("slopes", [6], ONES),
    "a batch beyond": put("77:1", [2, 3], ONES),
    "states beyond": put("0:99", [2, 3], ONES),
    "a huge shape": put("0:1", [10**30], ONES),
    "no number": put("0:1", [2, 3], np.full((2, 3), np.nan).tobytes()),
}


@parametrize("line", LINES.values(), ids=LINES)
def test_what_a_damaged_journal_lost_is_measured_again(interrupted, line):
    arena, before = interrupted
    journal = arena.run / "candidates.journal"
    head, first, *rows = journal.read_bytes().split(b"\n")
    journal.write_bytes(b"\n".join([head, first[:-9], line, *rows]))
    arena.works("rank {run}", "run/run.json", "run/candidates.*")
    assert load_json(arena.run / "candidates.json") == before


left_behind = {}


@pytest.fixture
def interrupted(arena, monkeypatch):
    """A run whose ranking was interrupted with a full journal, and its earlier ranking."""
    before = load_json(arena.run / "candidates.json")
    (arena.run / "candidates.json").unlink()
    names = ("run.json", "candidates.journal")
    if not left_behind:
        stop = Mock(side_effect=KeyboardInterrupt)
        with monkeypatch.context() as patch:
            patch.setattr("isingcut.evaluation.candidates._correlate", stop)
            makes = tuple(f"run/{name}" for name in names)
            arena.try_row(Row("rank", "rank {run}", code=130, makes=makes))
        left_behind.update({name: (arena.run / name).read_bytes() for name in names})
        assert count_rows(arena.run / "candidates.journal")
    for name, content in left_behind.items():
        (arena.run / name).write_bytes(content)
    return arena, before


PLACES = {
    "a user's own file": (lambda f: f.write_text("mine"), "not a journal"),
    "the earlier form": (
        lambda f: f.write_text('{"format": "isingcut-journal", "fingerprint": "a"}\n'),
        "of this version of isingcut; finish with the version that wrote it, or move the file away",
    ),
    "a folder": (lambda f: f.mkdir(), "is a folder; expected a regular file"),
    "a pipe": (os.mkfifo, "is a pipe; expected a regular file"),
    "a dangling link": (lambda f: f.symlink_to("nowhere"), "is a broken link"),
}


@parametrize("make, line", PLACES.values(), ids=PLACES)
def test_what_is_no_journal_stays(interrupted, make, line):
    arena, _ = interrupted
    journal = arena.run / "candidates.journal"
    journal.unlink()
    make(journal)
    arena.refuses("rank {run}", line, makes=("run/run.json",))
