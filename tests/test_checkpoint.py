"""Checkpoint in, smaller checkpoint out: what is copied, renamed, rewritten and refused."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from isingcut.formats.safetensors_files import (
    NewTensor,
    StoredTensor,
    read_header,
    write_checkpoint,
    write_file,
)
from quantised import assert_bytes_follow
from shared import (
    ArchitectureError,
    CheckpointError,
    VerificationError,
    load_json,
    parametrize,
    refuses,
    save_json,
)
from tiny import (
    edit_tensors,
    excise,
    read_checkpoint,
    tiny_checkpoint,
    tiny_model,
    verify,
)

INDEX = "model.safetensors.index.json"


def sharded(folder):
    """Write a tiny llama in two shards with an index."""
    tiny_checkpoint("llama", folder)
    (folder / "model.safetensors").unlink()
    tiny_model("llama").save_pretrained(folder, max_shard_size="170KB")
    return folder


def change_index(folder, **changes):
    index = load_json(folder / INDEX)
    index.weight_map.update(changes)
    save_json(folder / INDEX, index)


def lengthen(folder):
    with (folder / "model-00001-of-00002.safetensors").open("ab") as f:
        f.write(b"xx")


def duplicate_tensor(folder):
    first = folder / "model-00001-of-00002.safetensors"
    second = folder / "model-00002-of-00002.safetensors"
    tensors = load_file(second)
    name, value = next(iter(load_file(first).items()))
    save_file({**tensors, name: value}, second)


HOSTILE = [
    (lengthen, "is damaged, truncated"),
    (duplicate_tensor, "but it is in model-00002-of-00002"),
    (
        lambda f: change_index(
            f, **{"model.norm.weight": "model-00001-of-00002.safetensors"}
        ),
        "but it is in model-00002",
    ),
    (
        lambda f: (f / INDEX).write_text('{"weight_map": {"a": 3}}'),
        "maps tensor 'a' to 3",
    ),
]


@parametrize("spoil, message", HOSTILE, ids=[line for _, line in HOSTILE])
def test_hostile_checkpoints_are_refused(spoil, message, tmp_path):
    source = sharded(tmp_path / "source")
    spoil(source)
    with refuses(message, CheckpointError) as caught:
        excise(source, [1], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [source]


def test_links_of_a_hub_cache_are_followed(tmp_path):
    snapshot = sharded(tmp_path / "models--x--y/snapshots/abc")
    blobs = tmp_path / "models--x--y/blobs"
    blobs.mkdir()
    for path in list(snapshot.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(Path("../../blobs") / path.name)
    (blobs / "t").write_text("{{ x }}")
    (snapshot / "additional_chat_templates").mkdir()
    (snapshot / "additional_chat_templates/t.jinja").symlink_to("../../../blobs/t")
    excise(snapshot, [1], tmp_path / "out")
    assert (tmp_path / "out/additional_chat_templates/t.jinja").read_text() == "{{ x }}"
    assert len(read_checkpoint(tmp_path / "out")) == len(read_checkpoint(snapshot)) - 9
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    source = sharded(tmp_path / "source")
    fill = mock.Mock(side_effect=[None, None, OSError(28, "No space left on device")])
    monkeypatch.setattr(StoredTensor, "read_into", fill)
    with refuses("no space left on the disk"):
        excise(source, [1, 3], tmp_path / "out", max_shard_bytes=30_000)
    assert list(tmp_path.iterdir()) == [source]


def test_a_shard_that_shrinks_meanwhile_is_noticed(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    new = NewTensor("t", StoredTensor("t", path, "U8", (10,), 2, 10))
    with refuses("ended early", CheckpointError):
        write_file(tmp_path / "y", [new])


def rewrite(folder, tensors, slices=None):
    """Store tensors, write them or slices of them anew, and load the result."""
    save_file(tensors, folder / "in.safetensors")
    stored = read_header(folder / "in.safetensors")
    out = folder / "out"
    out.mkdir()
    new = [NewTensor(t.name, t, *(slices or {}).get(t.name, ())) for t in stored]
    write_checkpoint(out, new, 10**9)
    return load_file(out / "model.safetensors")


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
    loaded = rewrite(tmp_path, tensors)
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype
        assert loaded[name].shape == value.shape
        assert torch.equal(loaded[name].double(), value.double())


@parametrize("chunk", [32 * 2**20, 50, 10])
def test_slices_along_either_axis(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("isingcut.formats.safetensors_files._CHUNK", chunk)
    value = torch.arange(7 * 12, dtype=torch.int16).reshape(7, 12)
    slices = {"x": (1, 4, (0, 2)), "y": (0, 4, (1, 3))}
    loaded = rewrite(tmp_path, {"x": value, "y": value.T.contiguous()}, slices)
    assert torch.equal(loaded["x"], value.reshape(7, 4, 3)[:, [0, 2]].reshape(7, 6))
    assert torch.equal(loaded["y"], value.T.reshape(4, 3, 7)[[1, 3]].reshape(6, 7))


def test_shards_keep_to_their_size(tmp_path):
    excise(sharded(tmp_path / "source"), [2], tmp_path / "out", max_shard_bytes=20_000)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    for shard in shards:
        tensors = read_header(shard)
        assert len(tensors) == 1 or sum(t.size for t in tensors) <= 20_000


@pytest.fixture
def source(tmp_path):
    return tiny_checkpoint("llama", tmp_path / "source")


@parametrize("chunk", [32 * 2**20, 700])
def test_bytes_are_untouched_and_layers_renamed(source, tmp_path, monkeypatch, chunk):
    # Most tensors are larger than a buffer of 700 bytes.
    monkeypatch.setattr("isingcut.formats.safetensors_files._CHUNK", chunk)
    excise(source, [0, 3], tmp_path / "out")
    assert assert_bytes_follow(source, tmp_path / "out", [1, 2, 4, 5]) == {"F32"}
    assert load_json(tmp_path / "out/config.json").num_hidden_layers == 4


def test_tokenizer_template_code_and_licence_come_along(source, tmp_path):
    templates = source / "additional_chat_templates"
    templates.mkdir()
    kept = {"modeling_x.py", "LICENSE", "additional_chat_templates/tool.jinja"}
    # Also the record of an earlier cut, and its card.
    left = {"optimizer.pt", "pytorch_model.bin", "isingcut.json", "README.md"}
    for name in kept | left:
        (source / name).write_text("{{ x }}")
    excise(source, [1], tmp_path / "out")
    out = tmp_path / "out"
    names = {p.relative_to(out).as_posix() for p in out.rglob("*")}
    own = {"config.json", "generation_config.json", "chat_template.jinja"}
    assert names >= kept | own | {"tokenizer.json", "tokenizer_config.json"}
    assert not names & left
    tokenizer = AutoTokenizer.from_pretrained(out)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|user|>hi</s><|assistant|>"
    (templates / "mine.jinja").symlink_to(out / "LICENSE")
    with refuses("outside the checkpoint", CheckpointError):
        excise(source, [1], tmp_path / "again")


@parametrize(
    "removed, message",
    [
        ([6], "must be 0 to 5; got 6"),
        ([-1], "must be 0 to 5; got -1"),
        (range(6), "all 6 blocks"),
    ],
)
def test_impossible_states_are_refused(source, tmp_path, removed, message):
    with refuses(message, ArchitectureError):
        excise(source, removed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_depth_shaped_weights_are_sliced(tmp_path):
    source = tiny_checkpoint("gemma3n", tmp_path / "source")
    excise(source, [0, 7], tmp_path / "out")
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "out/model.safetensors")
    name = next(n for n in before if n.endswith("embed_tokens_per_layer.weight"))
    assert torch.equal(after[name], before[name][:, 8:56])
    config = load_json(tmp_path / "out/config.json")
    assert config.num_kv_shared_layers == 2
    assert len(config.intermediate_size) == 6


def test_invented_tensors_are_noticed(source, tmp_path):
    out = tmp_path / "out"
    excise(source, [1], out)
    with edit_tensors(out) as tensors:
        del tensors["model.layers.2.mlp.up_proj.weight"]
    with refuses(r"missing keys: model\.layers\.2\.mlp\.up_proj", VerificationError):
        verify(tiny_model("llama"), [1], out)


def test_a_cut_can_be_cut_again(source, tmp_path):
    excise(source, [1, 4], tmp_path / "once")
    excise(tmp_path / "once", [0], tmp_path / "twice")
    assert verify(tiny_model("llama"), [0, 1, 4], tmp_path / "twice").difference == 0.0
