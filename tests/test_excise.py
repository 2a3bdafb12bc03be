"""Checkpoint in, smaller checkpoint out: what is copied, renamed, rewritten and refused."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from isingcut.errors import (
    ArchitectureError,
    VerificationError,
)
from isingcut.models.cutting.checkpoint import excise, verify
from quantised import assert_bytes_follow
from tiny import edit_tensors, tiny_checkpoint, tiny_model


@pytest.fixture
def source(tmp_path):
    return tiny_checkpoint("llama", tmp_path / "source")


def read(path):
    return json.loads(path.read_text())


def test_bytes_are_untouched_and_layers_renamed(source, tmp_path):
    excise(source, [0, 3], tmp_path / "out")
    assert assert_bytes_follow(source, tmp_path / "out", [1, 2, 4, 5]) == {"F32"}
    assert read(tmp_path / "out" / "config.json")["num_hidden_layers"] == 4


def test_tokenizer_template_code_and_licence_come_along(source, tmp_path):
    (source / "modeling_x.py").write_text("x = 1\n")
    (source / "LICENSE").write_text("free")
    (source / "optimizer.pt").write_bytes(b"big")
    (source / "isingcut.json").write_text("the record of an earlier cut")
    (source / "pytorch_model.bin").write_bytes(b"big")
    (source / "README.md").write_text("old card")
    templates = source / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool.jinja").write_text("{{ x }}")
    card = "---\nlicense: mit\n---\n"
    excise(source, [1], tmp_path / "out", extra_files={"README.md": card})
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "additional_chat_templates",
        "modeling_x.py",
        "LICENSE",
        "README.md",
    }
    assert not names & {"optimizer.pt", "isingcut.json", "pytorch_model.bin"}
    assert (tmp_path / "out" / "README.md").read_text() == card
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|user|>hi</s><|assistant|>"


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ([6], "must be 0 to 5; got 6"),
        ([-1], "must be 0 to 5; got -1"),
        ([1, 1], "named twice"),
        (list(range(6)), "all 6 blocks"),
    ],
)
def test_impossible_states_are_refused(source, tmp_path, removed, message):
    with pytest.raises(ArchitectureError, match=message):
        excise(source, removed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_extra_prediction_heads_are_dropped(tmp_path):
    source = tiny_checkpoint("deepseek_v3", tmp_path / "source", num_mtp_layers=1)
    with edit_tensors(source) as tensors:
        last = {n: t for n, t in tensors.items() if n.startswith("model.layers.5.")}
        tensors.update({n.replace("layers.5.", "layers.6."): t.clone() for n, t in last.items()})
        tensors["model.layers.6.eh_proj.weight"] = torch.zeros(32, 64)
    excise(source, [0, 5], tmp_path / "out")
    config = read(tmp_path / "out" / "config.json")
    assert config["num_hidden_layers"] == 4
    assert config["first_k_dense_replace"] == 1
    assert (config.get("num_nextn_predict_layers") or config.get("num_mtp_layers") or 0) == 0
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert not any("layers.4." in n or "eh_proj" in n for n in names)
    assert verify(tiny_model("deepseek_v3"), [0, 5], tmp_path / "out").difference <= 1e-6


def test_depth_shaped_weights_are_sliced(tmp_path):
    source = tiny_checkpoint("gemma3n", tmp_path / "source")
    excise(source, [0, 7], tmp_path / "out")
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    name = next(n for n in before if n.endswith("embed_tokens_per_layer.weight"))
    assert torch.equal(after[name], before[name][:, 8:56])
    config = read(tmp_path / "out" / "config.json")
    assert config["num_kv_shared_layers"] == 2
    assert len(config["intermediate_size"]) == 6


def test_invented_tensors_are_noticed(source, tmp_path):
    out = tmp_path / "out"
    excise(source, [1], out)
    with edit_tensors(out) as tensors:
        del tensors["model.layers.2.mlp.up_proj.weight"]
    with pytest.raises(VerificationError, match=r"missing keys: model\.layers\.2\.mlp\.up_proj"):
        verify(tiny_model("llama"), [1], out)


def test_wrong_layer_numbers_break_cached_generation_and_are_noticed(source, tmp_path):
    """What peers get wrong: blocks deleted, their numbers left behind."""
    from isingcut.models.cutting.verify import check_generation, random_tokens, reload

    model = tiny_model("llama")
    excise(source, [0, 2], tmp_path / "out")
    good = reload(tmp_path / "out", dtype=model.dtype)
    tokens = random_tokens(model, 2, 12, 0)
    check_generation(good, tokens, 6, "good")
    del model.model.layers[2], model.model.layers[0]
    model.config.num_hidden_layers = 4
    model.model.layers[3].self_attn.layer_idx = 0
    with pytest.raises(VerificationError):
        check_generation(model, tokens, 6, "bad")


def test_a_cut_can_be_cut_again(source, tmp_path):
    excise(source, [1, 4], tmp_path / "once")
    excise(tmp_path / "once", [0], tmp_path / "twice")
    assert verify(tiny_model("llama"), [0, 1, 4], tmp_path / "twice").difference == 0.0
