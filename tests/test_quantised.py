"""Quantised checkpoints: bytes copied, scales with them, lists renumbered; measured or refused."""

import json
import re

import pytest
import torch

from isingcut.errors import ArchitectureError
from isingcut.models.cutting.checkpoint import excise, verify
from isingcut.models.inspect import inspect_model
from isingcut.models.load import as_transformers_does, load
from odd_models import composite_checkpoint
from quantised import assert_bytes_follow, bitsandbytes, fp8_in_tiles, int4, mxfp4
from tiny import edit_tensors, replay_of, tiny_checkpoint


def quantisation(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_fp8_in_tiles_with_experts_apart(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    plain = composite_checkpoint("qwen3_5_moe", source)
    fp8_in_tiles(source)
    with edit_tensors(source) as tensors:
        tensors["mtp.layers.0.mlp.up_proj.weight"] = torch.zeros(4, 4)
    model, found = as_transformers_does(source, torch.float32)
    assert not found["missing_keys"]
    wanted = dict(plain.named_parameters())
    for name, value in model.named_parameters():
        # Three bits of mantissa: half a step is 1/16 of a number.
        torch.testing.assert_close(value.data, wanted[name].data, rtol=1 / 15, atol=2e-2)
    assert len(replay_of(model)) == 6
    excise(source, [0, 2], out)
    assert "F8_E4M3" in assert_bytes_follow(source, out, [1, 3, 4, 5])
    before, after = (quantisation(f)["modules_to_not_convert"] for f in (source, out))
    assert after[:2] == before[:2] == ["lm_head", "model.visual.blocks.1.mlp"]
    assert after[2:] == [
        re.sub(r"layers\.\d+\.", f"layers.{new}.", name)
        for new, old in enumerate([1, 3, 4, 5])
        for name in before
        if f"layers.{old}." in name
    ]
    assert verify(model, [0, 2], out).difference == 0.0


def test_int4_packs_are_cut_as_bytes(tmp_path):
    source, out = tiny_checkpoint("llama", tmp_path / "source"), tmp_path / "out"
    int4(source)
    assert inspect_model(source).quantisation == "compressed-tensors"
    excise(source, [1, 4], out)
    kept = [0, 2, 3, 5]
    assert {"I32", "I64", "BF16"} <= assert_bytes_follow(source, out, kept)
    assert quantisation(out)["ignore"] == [
        "lm_head",
        *(f"model.layers.{i}.self_attn.q_proj" for i in range(4)),
    ]


def test_mxfp4_is_measured_as_transformers_unpacks_it(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    # Its packs are of 32 numbers.
    tiny_checkpoint("gpt_oss", source, intermediate_size=64)
    values = mxfp4(source)
    model, found = as_transformers_does(source, torch.float32)
    assert not found["missing_keys"]
    parameters = dict(model.named_parameters())
    for name, value in values.items():
        torch.testing.assert_close(parameters[name].data, value, rtol=0, atol=0)
    assert len(replay_of(model)) == 6
    excise(source, [0, 3], out)
    assert "U8" in assert_bytes_follow(source, out, [1, 2, 4, 5])
    assert verify(model, [0, 3], out).difference == 0.0


def test_bitsandbytes_is_refused_with_the_way_out(tmp_path):
    source = tiny_checkpoint("llama", tmp_path / "source")
    bitsandbytes(source)
    wanted = "cut the checkpoint it was made from and quantise the result"
    assert wanted in inspect_model(source).refusal
    with pytest.raises(ArchitectureError, match=wanted):
        excise(source, [0], tmp_path / "out")
    with pytest.raises(ArchitectureError, match=wanted):
        load(source)
