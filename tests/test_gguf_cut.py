"""GGUF files: blocks renumbered, metadata trimmed, packed bytes as they were."""

import gguf
import numpy as np
import pytest

from gguf_files import write_gguf
from isingcut.errors import ArchitectureError, CheckpointError
from isingcut.models.cutting.gguf import cut_gguf


def make(path, architecture="llama", blocks=4, **extra):
    """A tiny GGUF file with one packed (Q8_0) and one plain tensor per block."""
    generator, kind = np.random.default_rng(0), gguf.GGMLQuantizationType.Q8_0
    numbers = generator.standard_normal((blocks + 1, 8, 64)).astype(np.float32)
    held = {"token_embd.weight": numbers[-1]}
    for i in range(blocks):
        held[f"blk.{i}.ffn_up.weight"] = (gguf.quantize(numbers[i], kind), kind)
        held[f"blk.{i}.attn_norm.weight"] = numbers[i, 0]
    heads = {"attention.head_count_kv": [1 + i for i in range(blocks)]}
    metadata = {"block_count": blocks, "context_length": 128, **heads, "flag": True, **extra}
    tokens = [b"a", b"b", b"c", b"d"]
    more = {"architecture": architecture, "more": lambda writer: writer.add_token_list(tokens)}
    return write_gguf(path, metadata, held, **more)


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
    with pytest.raises(ArchitectureError, match="may derive the kind of a 'cohere2'"):
        cut_gguf(make(tmp_path / "b.gguf", "cohere2"), [0], out)
    with pytest.raises(ArchitectureError, match="extra prediction heads"):
        cut_gguf(make(tmp_path / "c.gguf", nextn_predict_layers=1), [0], out)
    with pytest.raises(ArchitectureError, match="must be 0 to 3"):
        cut_gguf(make(tmp_path / "d.gguf"), [4], out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("architecture", "extra", "expected"),
    [
        # Blocks 5 and 11 are the full ones of 12; without 1 and 7 they are blocks 4 and 9.
        ("gemma3", {"attention.sliding_window": 8}, [True] * 4 + [False] + [True] * 4 + [False]),
        ("gemma3", {}, None),
        (
            "gemma3",
            {"attention.sliding_window": 8, "attention.sliding_window_pattern": 4},
            [True, True, False] + [True] * 6 + [False],
        ),
        # Blocks 0, 2, ... have windows.
        ("gemma2", {}, [True, True, False, True, False, True, True, False, True, False]),
        (
            "gemma2",
            {"attention.sliding_window_pattern": [True] * 2 + [False] * 10},
            [True] + [False] * 9,
        ),
    ],
)
def test_blocks_keep_their_windows(tmp_path, architecture, extra, expected):
    source = make(tmp_path / "in.gguf", architecture, 12, **extra)
    cut_gguf(source, [1, 7], tmp_path / "out.gguf")
    after = gguf.GGUFReader(tmp_path / "out.gguf")
    field = after.get_field(f"{architecture}.attention.sliding_window_pattern")
    assert (field and field.contents()) == expected


def test_windows_that_are_neither_period_nor_list_are_refused(tmp_path):
    key = {"attention.sliding_window_pattern": [True] * 11}
    source = make(tmp_path / "in.gguf", "gemma2", 12, **key)
    with pytest.raises(CheckpointError, match="a period or one entry for each of 12 blocks"):
        cut_gguf(source, [1], tmp_path / "out.gguf")


@pytest.mark.parametrize(("architecture", "blocks"), [("deepseek2", 27), ("gemma3", 63)])
def test_a_depth_that_llama_cpp_knows_a_model_by_is_refused(tmp_path, architecture, blocks):
    source = make(tmp_path / "in.gguf", architecture, blocks)
    with pytest.raises(ArchitectureError, match=r"computes a '\w+' of (26|62) blocks differently"):
        cut_gguf(source, [0], tmp_path / "out.gguf")
