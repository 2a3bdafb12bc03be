"""Nemotron-H from end to end: 52 blocks, FP8, removals counted per kind, through `run`."""

import json

import pytest
import torch

import isingcut
from isingcut.models.load import load_dequantised
from quantised import assert_bytes_follow
from test_fp8 import PATTERN, nemotron

OPTIONS = {
    "energy": "empirical-fisher",
    "samples": 8,
    "length": 16,
    "rank_samples": 2,
    "report_samples": 2,
    "states": 3,
    "random_states": 30,
    "patch": "none",
    "dtype": "float32",
}


@pytest.mark.slow
@pytest.mark.usefixtures("no_speed")
def test_counts_per_kind_leave_a_52_block_fp8_model(tmp_path):
    source = nemotron(tmp_path / "source")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Line {i}: the quick brown fox, {i * i}." for i in range(400)))
    isingcut.run(
        model=str(source),
        remove="attention=2,moe=3",
        out=str(tmp_path / "run"),
        calibration=str(text),
        **OPTIONS,
    )
    (out,) = (p.parent for p in (tmp_path / "run").rglob("hf_quant_config.json"))
    removed = json.loads((out / "isingcut.json").read_text())["removed"]
    assert sorted(PATTERN[i] for i in removed) == ["*"] * 2 + ["E"] * 3
    kept = [i for i in range(52) if i not in removed]
    config = json.loads((out / "config.json").read_text())
    assert config["hybrid_override_pattern"] == "".join(PATTERN[i] for i in kept)
    assert_bytes_follow(source, out, kept)
    model, _ = load_dequantised(out, torch.float32)
    tokens = torch.arange(10, 20)[None]
    mask = torch.ones_like(tokens)
    grown = model.generate(tokens, attention_mask=mask, max_new_tokens=4, min_new_tokens=4)
    assert grown.shape == (1, 14)
