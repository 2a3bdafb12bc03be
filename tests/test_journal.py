"""The journal of a measurement: kept rows, damaged ones, and files that are none."""

import contextlib
import gc
import os
import sqlite3

import numpy as np
import pytest

from isingcut.errors import InputError, StageFileError
from isingcut.files.journal import Journal, discard
from journals import count_rows, database, keep_rows


@pytest.fixture
def path(tmp_path):
    """A journal of three rows."""
    kept = Journal(tmp_path / "journal", "a")
    for i in range(3):
        kept.put(str(i), np.full((2, 2), i + np.pi))
    return tmp_path / "journal"


def test_rows_come_back_with_their_bits_and_in_their_order(path):
    again = Journal(path, "a")
    assert again.keys() == ["0", "1", "2"]
    np.testing.assert_array_equal(again.get("1"), np.full((2, 2), 1 + np.pi))
    again.put("1", np.zeros(3))
    np.testing.assert_array_equal(Journal(path, "a").get("1"), np.zeros(3))
    assert Journal(path, "a", lambda key, row: row.shape == (3,)).keys() == ["1"]


def test_another_measurement_starts_afresh(path):
    assert Journal(path, "b").keys() == []
    assert Journal(path, "a").keys() == []


def test_a_closed_journal_is_one_file_and_a_discarded_one_none(path):
    gc.collect()
    assert os.listdir(path.parent) == ["journal"]
    discard(path)
    assert not os.listdir(path.parent)


def test_a_new_journal_is_one_file_whenever_it_is_killed(tmp_path, monkeypatch):
    connect, seen = sqlite3.connect, set()

    def watched(path, **options):
        database = connect(path, **options)
        if path.suffix == ".part":
            database.set_progress_handler(lambda: seen.update(os.listdir(tmp_path)), 1)
        return database

    monkeypatch.setattr("sqlite3.connect", watched)
    Journal(tmp_path / "journal", "a")
    assert [name.endswith(".part") for name in seen] == [True]


def test_a_log_that_lost_its_journal_is_not_taken_for_the_next_ones(path):
    kept = Journal(path, "a")
    kept.put("3", np.ones(2))
    assert path.with_name("journal-wal").stat().st_size
    path.unlink()
    assert Journal(path, "a").keys() == []


CHANGES = {
    "torn": "UPDATE row SET data = substr(data, 1, 20) WHERE key = '2'",
    "bit": "UPDATE row SET crc = crc + 1 WHERE key = '2'",
    "key": "UPDATE row SET key = '7' WHERE key = '2'",
    "shape": "UPDATE row SET shape = '[4]' WHERE key = '2'",
    "deep": f"UPDATE row SET shape = '{'[' * 100_000}' WHERE key = '2'",
    "text": "UPDATE row SET data = 'text', crc = 'x' WHERE key = '2'",
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_damaged_row_is_left_out_and_the_others_stay(path, change):
    with database(path) as found:
        found.execute(change)
    again = Journal(path, "a")
    assert again.keys() == ["0", "1"]
    again.put("2", np.zeros(3))
    assert Journal(path, "a").keys() == ["0", "1", "2"]


def test_the_end_of_the_log_may_be_torn(path):
    """As after a power cut, while a row was synced."""
    kept = Journal(path, "a")
    kept.put("3", np.ones(2))
    log = path.with_name("journal-wal").read_bytes()
    for name, content in (("journal", path.read_bytes()), ("journal-wal", log[:-7])):
        (path.parent / f"cut-{name}").write_bytes(content)
    again = Journal(path.parent / "cut-journal", "a")
    assert "3" not in again.keys()  # noqa: SIM118
    again.put("3", np.ones(2))
    assert Journal(path.parent / "cut-journal", "a").get("3") is not None


def _page(path):
    content = bytearray(path.read_bytes())
    content[200:4000] = b"\xff" * 3800
    path.write_bytes(content)


def _view(path):
    with database(path) as found:
        found.execute("ALTER TABLE row RENAME TO other")
        found.execute("CREATE VIEW row AS SELECT * FROM other")


def _trigger(path):
    with database(path) as found:
        found.execute("CREATE TRIGGER t AFTER INSERT ON row BEGIN DELETE FROM row; END")


def _other_database(path):
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as found, found:
        found.execute("CREATE TABLE bookmarks (name TEXT)")


def _linked(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


FILES = {
    "damaged": (_page, "is damaged .*; delete it, and what it held is measured"),
    "cut short": (lambda p: os.truncate(p, 5000), "is damaged"),
    "a view": (_view, "is damaged .its tables are not a journal's"),
    "a trigger": (_trigger, "is damaged .its tables are not a journal's"),
    "empty": (lambda p: os.truncate(p, 0), "is not a journal of isingcut; move it away or delete"),
    "a user's own": (lambda p: p.write_text("mine"), "is not a journal of isingcut"),
    "another database": (_other_database, "is not a journal of isingcut"),
    "a link": (_linked, "is not a journal of isingcut"),
    "a rollback": (lambda p: p.with_name("journal-journal").touch(), "journal-journal is none of"),
    "the first form": (
        lambda p: p.write_text('{"format": "isingcut-journal", "fingerprint": "a"}\n'),
        "is of an earlier version of isingcut; finish with that version, or delete it, and what",
    ),
}


@pytest.mark.parametrize(("change", "words"), FILES.values(), ids=FILES)
def test_what_is_no_whole_journal_is_refused_in_one_line_and_stays(path, change, words):
    gc.collect()
    change(path)
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    with pytest.raises(StageFileError, match=words) as refused:
        Journal(path, "a")
    assert "\n" not in str(refused.value)
    del refused
    gc.collect()
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before


def test_a_full_disk_is_said_as_such(path):
    kept = Journal(path, "a")
    pages = kept._database.execute("PRAGMA page_count").fetchone()[0]
    kept._database.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(InputError, match="no space left on the disk"):
        kept.put("large", np.ones(100_000))
    assert Journal(path, "a").keys() == ["0", "1", "2"]


def test_the_helper_leaves_the_first_rows(path):
    keep_rows(path, 1, torn=1)
    assert count_rows(path) == 2
    assert Journal(path, "a").keys() == ["0"]
