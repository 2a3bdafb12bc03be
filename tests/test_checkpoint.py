"""Safetensors read by their headers: what is damaged is refused with one clear line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from isingcut.errors import CheckpointError, InputError
from isingcut.models.cutting.checkpoint import excise
from isingcut.models.safetensors_files import (
    NewTensor,
    copy_bytes,
    read_checkpoint,
    read_header,
    write_checkpoint,
)
from tiny import edit_config, tiny_checkpoint

INDEX = "model.safetensors.index.json"


def sharded(folder):
    """A tiny llama in two shards with an index."""
    tiny_checkpoint("llama", folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[:30], names[30:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def change_index(folder, **changes):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"].update(changes)
    (folder / INDEX).write_text(json.dumps(index))


def truncate(folder):
    shard = folder / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 100)


def lengthen(folder):
    with (folder / "model-00001-of-00002.safetensors").open("ab") as f:
        f.write(b"xx")


def duplicate_tensor(folder):
    first = folder / "model-00001-of-00002.safetensors"
    second = folder / "model-00002-of-00002.safetensors"
    tensors = load_file(second)
    name, value = next(iter(load_file(first).items()))
    save_file({**tensors, name: value}, second)


def wrong_shard(folder):
    change_index(folder, **{"model.norm.weight": "model-00001-of-00002.safetensors"})


def index_names_a_number(folder):
    (folder / INDEX).write_text('{"weight_map": {"a": 3}}')


def more_blocks_in_the_config(folder):
    set_config(folder, num_hidden_layers=8)


def fewer_blocks_in_the_config(folder):
    set_config(folder, num_hidden_layers=5)


def set_config(folder, **changes):
    with edit_config(folder) as config:
        config.update(changes)


HOSTILE = [
    (truncate, "is truncated"),
    (lengthen, "longer than its header says"),
    (duplicate_tensor, "is in two shards"),
    (wrong_shard, "but it is in model-00002"),
    (index_names_a_number, "maps tensor 'a' to 3"),
    (more_blocks_in_the_config, "says 8 blocks but the tensors .* have 6; block 6 is missing"),
    (fewer_blocks_in_the_config, "says 5 blocks but the tensors .* have 6"),
]


@pytest.mark.parametrize(("spoil", "message"), HOSTILE, ids=[h[0].__name__ for h in HOSTILE])
def test_hostile_checkpoints_are_refused(spoil, message, tmp_path):
    source = sharded(tmp_path / "source")
    spoil(source)
    home = tmp_path / "home"
    home.mkdir()
    with pytest.raises(CheckpointError, match=message) as caught:
        excise(source, [1], home / "out")
    assert "\n" not in str(caught.value)
    assert list(home.iterdir()) == []


def test_links_of_a_hub_cache_are_followed(tmp_path):
    snapshot = sharded(tmp_path / "models--x--y" / "snapshots" / "abc")
    blobs = tmp_path / "models--x--y" / "blobs"
    blobs.mkdir()
    for path in list(snapshot.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(Path("../../blobs") / path.name)
    excise(snapshot, [1], tmp_path / "out")
    assert len(read_checkpoint(tmp_path / "out")) == len(read_checkpoint(snapshot)) - 9
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    source = sharded(tmp_path / "source")
    home = tmp_path / "home"
    home.mkdir()
    calls = []

    def fill(target, file, start, size):
        calls.append(size)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("isingcut.models.safetensors_files.copy_bytes", fill)
    with pytest.raises(InputError, match="no space left on the disk"):
        excise(source, [1, 3], home / "out", max_shard_bytes=30_000)
    assert list(home.iterdir()) == []


def test_a_disk_too_small_is_known_beforehand(tmp_path, monkeypatch):
    source = sharded(tmp_path / "source")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"are needed, but 0\.00 GB are free"):
        excise(source, [1], tmp_path / "home" / "out")
    assert not (tmp_path / "home").exists()


def test_a_killed_cut_leaves_nothing_that_looks_finished(tmp_path):
    source = sharded(tmp_path / "source")
    code = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "import isingcut.models.cutting.checkpoint as e\n"
        "e._copy_companions = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "e.excise(Path(sys.argv[1]), [1], Path(sys.argv[2]))"
    )
    home = tmp_path / "home"
    words = [sys.executable, "-c", code, str(source), str(home / "out")]
    assert subprocess.run(words, check=False).returncode == -9
    (left,) = home.iterdir()
    assert left.name.startswith(".")
    assert not (left / "config.json").exists()
    excise(source, [1], home / "out")
    assert (home / "out" / "config.json").exists()


def test_a_shard_that_shrinks_meanwhile_is_noticed(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    with (tmp_path / "y").open("wb") as f, pytest.raises(CheckpointError, match="ended early"):
        copy_bytes(f.fileno(), path, 2, 10)


def test_mixed_dtypes_stay_aligned_and_loadable(tmp_path):
    tensors = {
        "a": torch.arange(3, dtype=torch.uint8),
        "b": torch.arange(5, dtype=torch.float64),
        "c": torch.randn(3).to(torch.bfloat16),
        "d": torch.tensor(True),
        "e": torch.empty(0, 4),
        "f": torch.randn(2, 3).to(torch.float8_e4m3fn),
        "g": torch.tensor(7, dtype=torch.int64),
    }
    save_file(tensors, tmp_path / "in.safetensors")
    stored = read_header(tmp_path / "in.safetensors")
    out = tmp_path / "out"
    out.mkdir()
    write_checkpoint(out, [NewTensor(t.name, t) for t in stored], 10**9, {"format": "pt"})
    loaded = load_file(out / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype
        assert loaded[name].shape == value.shape
        assert torch.equal(loaded[name].double(), value.double())


@pytest.mark.parametrize("chunk", [32 * 2**20, 50, 10])
def test_slices_along_either_axis(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("isingcut.models.safetensors_files._CHUNK", chunk)
    value = torch.arange(7 * 12, dtype=torch.int16).reshape(7, 12)
    save_file({"x": value, "y": value.T.contiguous()}, tmp_path / "in.safetensors")
    x, y = sorted(read_header(tmp_path / "in.safetensors"), key=lambda t: t.name)
    new = [NewTensor("x", x, 1, 4, (0, 2)), NewTensor("y", y, 0, 4, (1, 3))]
    out = tmp_path / "out"
    out.mkdir()
    write_checkpoint(out, new, 10**9, {})
    loaded = load_file(out / "model.safetensors")
    assert torch.equal(loaded["x"], value.reshape(7, 4, 3)[:, [0, 2]].reshape(7, 6))
    assert torch.equal(loaded["y"], value.T.reshape(4, 3, 7)[[1, 3]].reshape(6, 7))


def test_shards_keep_to_their_size(tmp_path):
    source = sharded(tmp_path / "source")
    excise(source, [2], tmp_path / "out", max_shard_bytes=20_000)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    for shard in shards:
        tensors = read_header(shard)
        assert len(tensors) == 1 or sum(t.size for t in tensors) <= 20_000
