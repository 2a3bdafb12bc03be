"""The journal of a measurement: kept rows, damaged ones, and files that are none."""

import os

import numpy as np
import pytest

from isingcut.errors import InputError
from isingcut.files.journal import Journal


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


def test_a_full_disk_is_said_as_such(path, monkeypatch):
    kept = Journal(path, "a")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="no space left on the disk"):
        kept.put("large", np.ones(100))
