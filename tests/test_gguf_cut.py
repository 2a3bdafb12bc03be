"""GGUF files: blocks renumbered, metadata trimmed, packed bytes as they were."""

from pathlib import Path

import numpy as np
import pytest

from isingcut.errors import ArchitectureError, CheckpointError, OutputExistsError
from isingcut.models.cutting.gguf import cut_gguf

gguf = pytest.importorskip("gguf")


def make(path: Path, architecture: str = "llama", blocks: int = 4, **extra) -> Path:
    """A tiny GGUF file with one packed (Q8_0) and one plain tensor per block."""
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(blocks)
    writer.add_context_length(128)
    writer.add_head_count_kv([1 + i for i in range(blocks)])
    writer.add_token_list([b"a", b"b", b"c", b"d"])
    writer.add_bool("llama.flag", True)
    for key, value in extra.items():
        name = f"{architecture}.{key}"
        (writer.add_array if isinstance(value, list) else writer.add_uint32)(name, value)
    plain = generator.standard_normal((8, 64)).astype(np.float32)
    writer.add_tensor("token_embd.weight", plain)
    for i in range(blocks):
        values = generator.standard_normal((8, 64)).astype(np.float32)
        packed = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(
            f"blk.{i}.ffn_up.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0
        )
        writer.add_tensor(f"blk.{i}.attn_norm.weight", values[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_blocks_are_renumbered_and_bytes_kept(tmp_path):
    source = make(tmp_path / "in.gguf", leading_dense_block_count=2)
    cut_gguf(source, [0, 2], tmp_path / "out.gguf")
    before, after = gguf.GGUFReader(source), gguf.GGUFReader(tmp_path / "out.gguf")
    old = {t.name: t for t in before.tensors}
    assert {t.name for t in after.tensors} == {
        "token_embd.weight",
        "blk.0.ffn_up.weight",
        "blk.0.attn_norm.weight",
        "blk.1.ffn_up.weight",
        "blk.1.attn_norm.weight",
    }
    for tensor in after.tensors:
        name = tensor.name.replace("blk.1.", "blk.3.").replace("blk.0.", "blk.1.")
        assert tensor.tensor_type == old[name].tensor_type
        assert list(tensor.shape) == list(old[name].shape)
        assert tensor.data.tobytes() == old[name].data.tobytes()
    assert after.get_field("llama.block_count").contents() == 2
    assert after.get_field("llama.attention.head_count_kv").contents() == [2, 4]
    assert after.get_field("llama.leading_dense_block_count").contents() == 1
    for key in ("llama.context_length", "tokenizer.ggml.tokens", "llama.flag"):
        assert after.get_field(key).contents() == before.get_field(key).contents()


def test_what_is_unknown_or_numbered_is_refused(tmp_path):
    out = tmp_path / "out.gguf"
    with pytest.raises(ArchitectureError, match=r"llama\.mystery' looks per-layer"):
        cut_gguf(make(tmp_path / "a.gguf", mystery=[1, 2, 3, 4]), [0], out)
    with pytest.raises(ArchitectureError, match="may derive what a block of 'gemma3'"):
        cut_gguf(make(tmp_path / "b.gguf", "gemma3"), [0], out)
    with pytest.raises(ArchitectureError, match="extra prediction heads"):
        cut_gguf(make(tmp_path / "c.gguf", nextn_predict_layers=1), [0], out)
    with pytest.raises(ArchitectureError, match="must be 0 to 3"):
        cut_gguf(make(tmp_path / "d.gguf"), [4], out)
    assert not out.exists()


def test_damaged_files_are_refused(tmp_path):
    out = tmp_path / "out.gguf"
    with pytest.raises(CheckpointError, match="not there"):
        cut_gguf(tmp_path / "none.gguf", [0], out)
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGML" + bytes(100))
    with pytest.raises(CheckpointError, match="damaged or no GGUF file"):
        cut_gguf(bad, [0], out)
    whole = make(tmp_path / "whole.gguf").read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged or no GGUF file"):
        cut_gguf(bad, [0], out)
    with pytest.raises(OutputExistsError):
        cut_gguf(make(tmp_path / "a.gguf"), [0], bad)
    assert not out.exists()
