"""The journal of a measurement: kept rows, damaged ones, and files that are none."""

import os

import numpy as np
import pytest

from isingcut.errors import InputError, StageFileError
from isingcut.files.journal import Journal
from journals import count_rows, keep_rows


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
    assert os.listdir(path.parent) == ["journal"]


def test_another_measurement_starts_afresh(path):
    assert Journal(path, "b").keys() == []
    assert Journal(path, "a").keys() == []


@pytest.mark.parametrize("lost", [1, 3, 20, 60])
def test_a_torn_end_loses_its_row_and_no_later_one(path, lost):
    os.truncate(path, path.stat().st_size - lost)
    again = Journal(path, "a")
    assert again.keys() == ["0", "1"]
    again.put("3", np.zeros(3))
    assert Journal(path, "a").keys() == ["0", "1", "3"]


def test_a_changed_bit_loses_its_row(path):
    content = path.read_bytes()
    place = content.index(b'["1"')
    path.write_bytes(content[:place] + content[place:].replace(b'"1"', b'"7"', 1))
    assert Journal(path, "a").keys() == ["0", "2"]


def _linked(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


EARLIER = "is of an earlier version of isingcut; finish with that version, or delete it, and what"
FILES = {
    "empty": (lambda p: os.truncate(p, 0), "is not a journal of isingcut; move it away or delete"),
    "a user's own": (lambda p: p.write_text("mine"), "is not a journal of isingcut"),
    "a link": (_linked, "is not a journal of isingcut"),
    "the first form": (
        lambda p: p.write_text('{"format": "isingcut-journal", "fingerprint": "a"}\n'), EARLIER,
    ),
    "a database": (lambda p: p.write_bytes(b"SQLite format 3\0" + bytes(80)), EARLIER),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), FILES.values(), ids=FILES)
def test_what_is_no_journal_is_refused_in_one_line_and_stays(path, change, words):
    change(path)
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    with pytest.raises(StageFileError, match=words) as refused:
        Journal(path, "a")
    assert "\n" not in str(refused.value)
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before


def test_a_full_disk_is_said_as_such(path, monkeypatch):
    kept = Journal(path, "a")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="no space left on the disk"):
        kept.put("large", np.ones(100))


def test_the_helper_leaves_the_first_rows(path):
    keep_rows(path, 1, torn=1)
    assert count_rows(path) == 2
    assert Journal(path, "a").keys() == ["0"]
