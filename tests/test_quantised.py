"""Quantised checkpoints: bytes copied, scales with them, lists renumbered; measured or refused."""

import re

import torch
from torch.testing import assert_close

from isingcut.formats.cutting.checkpoint import list_plain
from isingcut.formats.fp8 import dequantise, dequantise_checkpoint, fp8_layout
from isingcut.healing.job import Job
from isingcut.healing.repairs.base import patch_checkpoint
from isingcut.models.load import load_plain
from odd_models import composite_checkpoint, prove_cut
from quantised import assert_bytes_follow, fp8_in_tiles, int4, mxfp4, quantise
from shared import (
    ArchitectureError,
    CheckpointError,
    HealConfig,
    load_json,
    parametrize,
    refuses,
    save_json,
)
from tiny import (
    edit_config,
    edit_tensors,
    excise,
    find_stack,
    gone,
    inspect_model,
    load,
    load_tiny,
    random_tokens,
    read_checkpoint,
    replay_of,
    tiny_checkpoint,
    tiny_model,
    verify,
)

# The block pattern of NVIDIA-Nemotron-3-Nano-30B-A3B: 23 Mamba-2, 23 MoE, 6 attention blocks.
PATTERN = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
KINDS = {"M": "mamba", "E": "moe", "*": "attention"}


def test_fp8_weights_of_a_model_with_its_own_code_are_read(tmp_path):
    source = tiny_checkpoint("qwen3", tmp_path / "source")
    quantise(source, "fp8")
    with edit_config(source) as config:
        classes = {
            "AutoConfig": "own.OwnConfig",
            "AutoModelForCausalLM": "own.OwnModel",
        }
        config.update(model_type="own", architectures=["OwnModel"], auto_map=classes)
    (source / "own.py").write_text(
        "from transformers import Qwen3Config, Qwen3ForCausalLM\n"
        "class OwnConfig(Qwen3Config):\n    model_type = 'own'\n"
        "class OwnModel(Qwen3ForCausalLM):\n    config_class = OwnConfig\n"
    )
    model, found = load_plain(source, torch.float32, trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    assert not found["missing_keys"] | found["unexpected_keys"]


@parametrize(
    "layout, shards, patch",
    [
        ("fp8", 10**9, "tuned"),
        ("compressed-tensors", 20_000, "linear"),
        ("modelopt", 1, "linear"),
    ],
)
def test_a_patched_layer_is_plain_and_listed_and_the_others_keep_their_bytes(
    layout, shards, patch, tmp_path
):
    source = tiny_checkpoint("qwen3", tmp_path / "source")
    quantise(source, layout)
    assert fp8_layout(source, load_json(source / "config.json")) == layout
    cut = tmp_path / "cut"
    patched = tmp_path / "patched"
    excise(source, [2], cut, max_shard_bytes=shards)
    teacher = load_tiny(source)
    assert_weights_close(teacher.model, tiny_model("qwen3"), 1e-3)
    config = HealConfig(patch=patch, patch_tokens=4096)
    job = Job(
        teacher, gone([2]), cut, random_tokens([24] * 48), tmp_path / "work", config
    )
    record = patch_checkpoint(job, patched)
    assert record.proof.difference == 0.0
    assert record.cuts[0].content()["stored"] == "bfloat16, not quantised"
    if patch == "tuned":
        # Other layers would take more bytes, so they are not tuned.
        layers = {(t.block, t.layer) for t in record.tuning.layers}
        assert layers <= {(1, "mlp.down_proj")}
        assert record.tuning.steps
    module = "model.layers.1.mlp.down_proj"
    before, after = map(read_checkpoint, (cut, patched))
    assert before[f"{module}.weight"].dtype == "F8_E4M3"
    assert after[f"{module}.weight"].dtype == "BF16"
    assert [n for n in after if n.startswith(module)] == [f"{module}.weight"]
    for name in before.keys() | after.keys():
        if not name.startswith(module):
            assert before[name].data() == after[name].data()
    # Neither the shards of the cut nor their index are left.
    assert [path.name for path in patched.glob("model*")] == ["model.safetensors"]
    file, part, name = {
        "fp8": ("config.json", "quantization_config", "modules_to_not_convert"),
        "compressed-tensors": ("config.json", "quantization_config", "ignore"),
        "modelopt": ("hf_quant_config.json", "quantization", "exclude_modules"),
    }[layout]
    told = [load_json(folder / file)[part][name] for folder in (cut, patched)]
    assert told[1] == [*told[0], module]
    again, _ = load_plain(patched, torch.float32)
    weight = again.get_submodule(module).weight
    assert torch.equal(weight, weight.bfloat16().float())
    assert not torch.equal(weight, teacher.model.get_submodule(module).weight)


@parametrize(
    "given, told",
    [(None, ["lm_head", "new"]), ([], ["new"]), (["old"], ["old", "new"])],
)
def test_the_head_is_listed_as_plain_only_where_there_was_no_list(
    given, told, tmp_path
):
    settings = {"quant_method": "fp8", "modules_to_not_convert": given}
    save_json(tmp_path / "config.json", {"quantization_config": settings})
    list_plain(tmp_path, ["new"])
    assert quantisation(tmp_path)["modules_to_not_convert"] == told


def test_a_float8_tensor_without_its_scale_is_refused(tmp_path):
    source = tiny_checkpoint("llama", tmp_path / "source")
    quantise(source, "modelopt")
    with edit_tensors(source) as tensors:
        del tensors["model.layers.2.mlp.up_proj.weight_scale"]
    with refuses(r"layers\.2\.mlp\.up_proj\.weight' has no scale", CheckpointError):
        dict(dequantise_checkpoint(source, {}, torch.float32))


def test_dequantise_spreads_every_kind_of_scale():
    weight = torch.arange(-12.0, 12.0).reshape(4, 6).to(torch.float8_e4m3fn)
    exact = weight.float()
    rows = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert_close(dequantise(weight, rows[:, None]), exact * rows[:, None])
    tiles = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    spread = tiles.repeat_interleave(3, 0)[:4].repeat_interleave(4, 1)[:, :6]
    assert_close(dequantise(weight, tiles, (3, 4)), exact * spread)
    with refuses("not one tile per 3 numbers", CheckpointError):
        dequantise(weight, torch.ones(3, 2), (3, 4))
    with refuses("does not fit", CheckpointError):
        dequantise(weight, torch.ones(5))


def nemotron(folder):
    """Write a tiny 52-block Nemotron-H in ModelOpt FP8, configured like the real checkpoint."""
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
    model, _ = load_plain(source, torch.float32)
    stack = find_stack(model)
    assert [stack.kinds.count(k) for k in ("mamba2", "moe", "attention")] == [23, 23, 6]
    for removed in ([1, 20, 51], [0, 5, 12, 51]):
        out = tmp_path / f"without-{removed[0]}-{len(removed)}"
        excise(source, removed, out, max_shard_bytes=400_000)
        kept = [i for i in range(52) if i not in removed]
        config = load_json(out / "config.json")
        assert config.hybrid_override_pattern == "".join(PATTERN[i] for i in kept)
        assert config.num_hidden_layers == len(kept)
        assert "F8_E4M3" in assert_bytes_follow(source, out, kept)
        excluded = load_json(out / "hf_quant_config.json").quantization
        names = [n for n in excluded.exclude_modules if n != "lm_head"]
        expected = []
        if 5 in kept:
            expected.append(f"backbone.layers.{kept.index(5)}.mixer*")
        if 12 in kept:
            expected.append(f"backbone.layers.{kept.index(12)}.*")
        assert names == expected
        assert verify(model, removed, out).difference <= 1e-6


# Other layouts than FP8 ----------------------------------------------------------------


def assert_weights_close(model, plain, atol):
    """Check that weights are the original's, up to the rounding of FP8."""
    wanted = dict(plain.named_parameters())
    for name, value in model.named_parameters():
        # Three bits of mantissa: half a step is 1/16 of a number.
        assert_close(value.data, wanted[name].data, rtol=1 / 15, atol=atol)


def quantisation(folder):
    return load_json(folder / "config.json").quantization_config


def test_fp8_in_tiles_with_experts_apart(tmp_path):
    source = tmp_path / "source"
    out = tmp_path / "out"
    plain = composite_checkpoint("qwen3_5_moe", source)
    fp8_in_tiles(source)
    with edit_tensors(source) as tensors:
        tensors["mtp.layers.0.mlp.up_proj.weight"] = torch.zeros(4, 4)
    model, found = load_plain(source, torch.float32)
    assert not found["missing_keys"]
    assert_weights_close(model, plain, 2e-2)
    assert len(replay_of(model)) == 6
    assert prove_cut(model, [0, 2], tmp_path).difference == 0.0
    assert "F8_E4M3" in assert_bytes_follow(source, out, [1, 3, 4, 5])
    before, after = (quantisation(f)["modules_to_not_convert"] for f in (source, out))
    assert after[:2] == before[:2] == ["lm_head", "model.visual.blocks.1.mlp"]
    assert after[2:] == [
        re.sub(r"layers\.\d+\.", f"layers.{new}.", name)
        for new, old in enumerate([1, 3, 4, 5])
        for name in before
        if f"layers.{old}." in name
    ]


def test_fp8_with_experts_in_one_tensor(tmp_path):
    source = tmp_path / "source"
    plain = composite_checkpoint("qwen3_vl_moe", source)
    experts = [
        n for n, p in plain.named_parameters() if ".experts." in n and p.ndim == 3
    ]
    with edit_tensors(source) as tensors:
        for name in experts:
            scale = tensors[name].abs().amax((1, 2), keepdim=True) / 448
            tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale
            tensors[f"{name}_activation_scale"] = torch.ones(())
    with edit_config(source) as config:
        config["quantization_config"] = {"quant_method": "fp8"}
    model, found = load_plain(source, torch.float32)
    assert found["unexpected_keys"] == set()
    assert_weights_close(model, plain, 1e-3)
    assert prove_cut(model, [3, 5], tmp_path).difference == 0.0


def test_int4_packs_are_cut_as_bytes(tmp_path):
    source = tiny_checkpoint("llama", tmp_path / "source")
    out = tmp_path / "out"
    int4(source)
    assert inspect_model(source).quantisation == "compressed-tensors"
    excise(source, [1, 4], out)
    assert {"I32", "I64", "BF16"} <= assert_bytes_follow(source, out, [0, 2, 3, 5])
    assert quantisation(out)["ignore"] == [
        "lm_head",
        *(f"model.layers.{i}.self_attn.q_proj" for i in range(4)),
    ]


def test_mxfp4_is_measured_as_transformers_unpacks_it(tmp_path):
    source = tmp_path / "source"
    # MXFP4 packs 32 numbers at a time.
    tiny_checkpoint("gpt_oss", source, intermediate_size=64)
    values = mxfp4(source)
    model, found = load_plain(source, torch.float32)
    assert not found["missing_keys"]
    parameters = dict(model.named_parameters())
    for name, value in values.items():
        assert_close(parameters[name].data, value, rtol=0, atol=0)
    assert len(replay_of(model)) == 6
    assert prove_cut(model, [0, 3], tmp_path).difference == 0.0
    assert "U8" in assert_bytes_follow(source, tmp_path / "out", [1, 2, 4, 5])


def test_bitsandbytes_is_refused_with_the_way_out(tmp_path):
    source = tiny_checkpoint("llama", tmp_path / "source")
    with edit_config(source) as config:
        config["quantization_config"] = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
        }
    wanted = "cut the checkpoint it was made from and quantise the result"
    assert wanted in inspect_model(source).refusal
    with refuses(wanted, ArchitectureError):
        excise(source, [0], tmp_path / "out")
    with refuses(wanted, ArchitectureError):
        load(source)
