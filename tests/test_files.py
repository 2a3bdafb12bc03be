"""Results files and journals: complete or absent, and never in place of foreign files."""

import os
import shutil
import stat

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from safetensors.torch import save_file

from isingcut.files.journal import Journal
from isingcut.files.ownership import edges_sha256
from isingcut.files.provenance import command_line
from isingcut.files.writing import atomic_file, atomic_folder
from shared import parametrize, refuses, write_json


def test_the_command_line_of_a_result_can_be_typed_again(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/bin/isingcut", "run", "my model"])
    assert command_line() == "isingcut run 'my model'"


def test_not_a_number_is_never_written(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", "thing", {"x": float("nan")})
    assert not os.listdir(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "a"
    target.write_text("old")

    def half():
        with atomic_file(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_whoever_may_read_the_folder_may_read_the_weights_in_it(tmp_path):
    """safetensors makes files that only their owner can read."""
    save_file({"a": torch.zeros(3)}, tmp_path / "alone.safetensors")
    before = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "d") as temporary:
            shutil.copy(tmp_path / "alone.safetensors", temporary / "model.safetensors")
            (temporary / "run.sh").touch(0o700)
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "d").iterdir()}
    assert modes["model.safetensors"] == 0o640
    assert modes["run.sh"] == 0o700


@parametrize("place, noticed", [(0, True), (-1, True), (9, False)])
def test_a_large_file_is_known_by_its_ends(tmp_path, monkeypatch, place, noticed):
    monkeypatch.setattr("isingcut.files.ownership._EDGE", 4)
    content = bytearray(20)
    (tmp_path / "a").write_bytes(content)
    content[place] = 1
    (tmp_path / "b").write_bytes(content)
    assert (edges_sha256(tmp_path / "a") != edges_sha256(tmp_path / "b")) == noticed


@pytest.fixture
def path(tmp_path):
    """A journal of three rows."""
    kept = Journal(tmp_path / "journal", "a")
    for i in range(3):
        kept.put({str(i): np.full((2, 2), i + np.pi)})
    return tmp_path / "journal"


def test_rows_come_back_with_their_bits_and_in_their_order(path):
    again = Journal(path, "a")
    assert list(again._rows) == ["0", "1", "2"]
    assert_array_equal(again.get("1"), np.full((2, 2), 1 + np.pi))
    again.put({"1": np.zeros(3)})
    assert_array_equal(Journal(path, "a").get("1"), np.zeros(3))
    assert os.listdir(path.parent) == ["journal"]


def test_another_measurement_starts_afresh(path):
    assert list(Journal(path, "b")._rows) == []
    assert list(Journal(path, "a")._rows) == []


@parametrize("lost", [1, 3, 20, 60])
def test_a_torn_end_loses_its_row_and_no_later_one(path, lost):
    os.truncate(path, path.stat().st_size - lost)
    again = Journal(path, "a")
    assert list(again._rows) == ["0", "1"]
    again.put({"3": np.zeros(3)})
    assert list(Journal(path, "a")._rows) == ["0", "1", "3"]


def test_a_changed_bit_loses_its_row(path):
    content = path.read_bytes()
    place = content.index(b'["1"')
    path.write_bytes(content[:place] + content[place:].replace(b'"1"', b'"7"', 1))
    assert list(Journal(path, "a")._rows) == ["0", "2"]


def test_a_full_disk_is_named(path, fails):
    kept = Journal(path, "a")

    fails("os.fsync", OSError(28, "No space left on device"))
    with refuses("no space left on the disk"):
        kept.put({"large": np.ones(100)})
