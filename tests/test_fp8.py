"""FP8 checkpoints: three layouts read as plain numbers; a 52-block Nemotron-H cut as it is."""

import dataclasses
import json

import pytest
import torch

from isingcut.data.tokens import TokenSet
from isingcut.errors import CheckpointError
from isingcut.healing.job import Job
from isingcut.healing.patch.checkpoint import patch_checkpoint
from isingcut.models.architectures.blocks import find_stack
from isingcut.models.cutting.checkpoint import excise, verify
from isingcut.models.fp8 import dequantise, dequantised, fp8_layout
from isingcut.models.load import load, load_dequantised
from isingcut.models.safetensors_files import read_checkpoint
from isingcut.models.streaming.replay import load_streamed
from isingcut.options.config import HealConfig
from quantised import assert_bytes_follow, quantise
from tiny import edit_config, edit_tensors, tiny_checkpoint, tiny_model

# The block pattern of NVIDIA-Nemotron-3-Nano-30B-A3B: 23 Mamba-2, 23 MoE, 6 attention blocks.
PATTERN = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
KINDS = {"M": "mamba", "E": "moe", "*": "attention"}


@pytest.mark.parametrize("layout", ["fp8", "compressed-tensors", "modelopt"])
def test_every_layout_is_read_and_cut(layout, tmp_path):
    source = tiny_checkpoint("qwen3", tmp_path / "source")
    quantise(source, layout)
    config = json.loads((source / "config.json").read_text())
    assert fp8_layout(source, config) == layout
    model, _ = load_dequantised(source, torch.float32)
    plain = dict(tiny_model("qwen3").named_parameters())
    for name, value in model.named_parameters():
        # FP8 keeps 3 bits of mantissa, so half a step is 1/16 of a number.
        torch.testing.assert_close(value.data, plain[name].data, rtol=1 / 15, atol=1e-3)
    excise(source, [0, 3], tmp_path / "out")
    assert verify(model, [0, 3], tmp_path / "out").difference == 0.0


@pytest.mark.parametrize(
    ("layout", "shards", "patch"),
    [("fp8", 0, "tuned"), ("compressed-tensors", 20_000, "linear"), ("modelopt", 1, "linear")],
)
def test_a_patched_layer_is_plain_and_listed_and_the_others_keep_their_bytes(
    layout, shards, patch, tmp_path
):
    source = tiny_checkpoint("qwen3", tmp_path / "source")
    quantise(source, layout)
    excise(source, [2], tmp_path / "cut", **({"max_shard_bytes": shards} if shards else {}))
    teacher = load(source, dtype="float32", device="cpu")
    generator = torch.Generator().manual_seed(0)
    text = TokenSet.from_rows(torch.randint(8, 262, (48, 24), generator=generator).tolist())
    config = HealConfig(patch=patch, patch_tokens=4096)
    job = Job(teacher, (2,), tmp_path / "cut", text, tmp_path / "work", config)
    record = patch_checkpoint(job, tmp_path / "patched")
    assert record.proof.difference == 0.0
    assert record.cuts[0].content()["stored"] == "bfloat16, not quantised"
    if patch == "tuned":
        # The others would grow, so that they are not tuned.
        layers = {(t.block, t.layer) for t in record.tuning.layers}
        assert layers <= {(1, "mlp.down_proj")}
        assert record.tuning.steps
    module = "model.layers.1.mlp.down_proj"
    before, after = (read_checkpoint(tmp_path / n) for n in ("cut", "patched"))
    assert before[f"{module}.weight"].dtype == "F8_E4M3"
    assert after[f"{module}.weight"].dtype == "BF16"
    own = {name for name in before if name.startswith(module)}
    assert {name for name in after if name.startswith(module)} == {f"{module}.weight"}
    assert before.keys() - own == after.keys() - own
    for name in after.keys() - own:
        assert (after[name].dtype, after[name].data()) == (
            before[name].dtype,
            before[name].data(),
        )
    if shards:
        index = json.loads((tmp_path / "patched" / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {n: t.file.name for n, t in sorted(after.items())}
        assert index["metadata"]["total_size"] == sum(t.size for t in after.values())
    file, part, name = {
        "fp8": ("config.json", "quantization_config", "modules_to_not_convert"),
        "compressed-tensors": ("config.json", "quantization_config", "ignore"),
        "modelopt": ("hf_quant_config.json", "quantization", "exclude_modules"),
    }[layout]
    told = [json.loads((tmp_path / n / file).read_text())[part][name] for n in ("cut", "patched")]
    assert told[1] == [*told[0], module]
    again, _ = load_dequantised(tmp_path / "patched", torch.float32)
    weight = again.get_submodule(module).weight
    assert torch.equal(weight, weight.bfloat16().float())
    assert not torch.equal(weight, teacher.model.get_submodule(module).weight)
    if shards == 20_000 and patch == "linear":
        teacher, replay = load_streamed(source, dtype="float32", device="cpu")
        job = dataclasses.replace(job, teacher=teacher, replay=replay)
        assert patch_checkpoint(job, tmp_path / "streamed") == record
        for name, tensor in read_checkpoint(tmp_path / "streamed").items():
            assert tensor.data() == after[name].data()


def test_a_float8_tensor_without_its_scale_is_refused(tmp_path):
    source = tiny_checkpoint("llama", tmp_path / "source")
    quantise(source, "modelopt")
    with edit_tensors(source) as tensors:
        del tensors["model.layers.2.mlp.up_proj.weight_scale"]
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.up_proj\.weight' has no scale"):
        dict(dequantised(source, {}, torch.float32))


def test_dequantise_spreads_every_kind_of_scale():
    weight = torch.arange(-12.0, 12.0).reshape(4, 6).to(torch.float8_e4m3fn)
    exact = weight.float()
    torch.testing.assert_close(dequantise(weight, torch.tensor([0.5])), exact * 0.5)
    rows = torch.tensor([1.0, 2.0, 3.0, 4.0])
    torch.testing.assert_close(dequantise(weight, rows), exact * rows[:, None])
    torch.testing.assert_close(dequantise(weight, rows[:, None]), exact * rows[:, None])
    tiles = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    spread = tiles.repeat_interleave(3, 0)[:4].repeat_interleave(4, 1)[:, :6]
    torch.testing.assert_close(dequantise(weight, tiles, (3, 4)), exact * spread)
    with pytest.raises(CheckpointError, match="not one tile per 3 numbers"):
        dequantise(weight, torch.ones(3, 2), (3, 4))
    with pytest.raises(CheckpointError, match="does not fit"):
        dequantise(weight, torch.ones(5))


def nemotron(folder):
    """A tiny 52-block Nemotron-H in ModelOpt FP8, configured as the real checkpoint is."""
    kinds = [KINDS[letter] for letter in PATTERN]
    tiny_checkpoint("nemotron_h", folder, layers_block_type=kinds)
    with edit_config(folder) as config:
        del config["layers_block_type"]
        config["hybrid_override_pattern"] = PATTERN
        config["num_hidden_layers"] = len(PATTERN)
    quantise(folder, "modelopt", skip=("conv1d",))
    return folder


def test_nemotron_h_of_52_blocks_in_fp8(tmp_path):
    source = nemotron(tmp_path / "source")
    model, _ = load_dequantised(source, torch.float32)
    stack = find_stack(model)
    assert [stack.kinds.count(k) for k in ("mamba2", "moe", "attention")] == [23, 23, 6]
    for removed in ([5, 42], [1, 20, 51], [0, 5, 12, 51]):
        out = tmp_path / f"without-{removed[0]}-{len(removed)}"
        excise(source, removed, out, max_shard_bytes=400_000)
        kept = [i for i in range(52) if i not in removed]
        config = json.loads((out / "config.json").read_text())
        assert config["hybrid_override_pattern"] == "".join(PATTERN[i] for i in kept)
        assert config["num_hidden_layers"] == len(kept)
        assert "F8_E4M3" in assert_bytes_follow(source, out, kept)
        excluded = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
        names = [n for n in excluded["exclude_modules"] if n != "lm_head"]
        expected = []
        if 5 in kept:
            expected.append(f"backbone.layers.{kept.index(5)}.mixer*")
        if 12 in kept:
            expected.append(f"backbone.layers.{kept.index(12)}.*")
        assert names == expected
        assert verify(model, removed, out, length=12, new_tokens=6).difference <= 1e-6
