"""Results files: all or nothing, and never somebody else's."""

import errno
import os
import shutil
import stat

import pytest
import torch
from safetensors.torch import save_file

from isingcut.errors import InputError, OutputExistsError
from isingcut.files import writing
from isingcut.files.writing import (
    MARKER,
    atomic_file,
    atomic_folder,
    clear_os_errors,
    edges_sha256,
    read_json,
    write_json,
)


def test_json_round_trip(tmp_path):
    write_json(tmp_path / "a.json", "removal", {"removed": [1], "of": 3, "more": [1.5, 2]})
    assert read_json(tmp_path / "a.json", "removal")["more"] == [1.5, 2]
    assert os.listdir(tmp_path) == ["a.json"]


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


def test_a_failed_folder_leaves_nothing(tmp_path):
    def half():
        with atomic_folder(tmp_path / "d") as temporary:
            (temporary / "x").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert not os.listdir(tmp_path)


def test_whoever_may_read_the_folder_may_read_the_weights_in_it(tmp_path):
    """safetensors leaves what it writes to its owner alone."""
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


def test_an_existing_folder_is_kept_unless_overwritten(tmp_path):
    target = tmp_path / "d"
    target.mkdir()
    (target / "mine").write_text("1")
    with pytest.raises(OutputExistsError, match="--overwrite"), atomic_folder(target):
        pass
    assert (target / "mine").read_text() == "1"
    with (
        pytest.raises(OutputExistsError, match="only files of isingcut"),
        atomic_folder(target, overwrite=True),
    ):
        pass
    (target / "mine").unlink()
    for content in ("1", "2"):
        with atomic_folder(target, overwrite=True) as temporary:
            (temporary / content).write_text(content)
        assert set(os.listdir(target)) == {content, MARKER}
    assert os.listdir(tmp_path) == ["d"]


@pytest.mark.parametrize(
    ("code", "words"), [(errno.ENOSPC, "no space left"), (errno.EROFS, "cannot write")]
)
def test_a_full_or_read_only_disk_is_one_clear_line(tmp_path, code, words):
    with pytest.raises(InputError, match=words), clear_os_errors(tmp_path):
        raise OSError(code, os.strerror(code))


@pytest.mark.parametrize(("place", "noticed"), [(0, True), (-1, True), (9, False)])
def test_a_large_file_is_known_by_its_ends(tmp_path, monkeypatch, place, noticed):
    monkeypatch.setattr(writing, "_EDGE", 4)
    content = bytearray(20)
    (tmp_path / "a").write_bytes(content)
    content[place] = 1
    (tmp_path / "b").write_bytes(content)
    assert (edges_sha256(tmp_path / "a") != edges_sha256(tmp_path / "b")) == noticed
