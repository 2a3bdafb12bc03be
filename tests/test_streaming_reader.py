"""Weights read block by block are those that transformers loads, whatever the file holds."""

import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file

from isingcut.errors import CheckpointError, ModelError
from isingcut.measure.losses import measure
from isingcut.models.architectures.blocks import find_stack
from isingcut.models.load import build_skeleton, load
from isingcut.models.streaming import reader
from isingcut.models.streaming.reader import Reader
from isingcut.testing.tiny import tiny_checkpoint
from quantised import quantise
from streams import samples, some_states, streamed
from tiny import edit_config


def everything(folder, dtype):
    model = build_skeleton(folder, dtype)
    reader = Reader(folder, model, [b.path for b in find_stack(model).blocks], dtype)
    values = {}
    for part, plan in reader.plans.items():
        values |= reader.fill(part, torch.zeros(plan.size, dtype=torch.uint8))
    for name, buffer in model.named_buffers():
        values.setdefault(name, buffer)
    return values


@pytest.mark.parametrize("family", ["gpt2", "deepseek_v3", "nemotron_h", "zamba2", "gemma4"])
def test_reads_the_numbers_that_transformers_loads(family, tmp_path):
    folder = tiny_checkpoint(family, tmp_path)
    model = load(folder, dtype="bfloat16", device="cpu").model
    expected = {**dict(model.named_buffers()), **model.state_dict(keep_vars=True)}
    found = everything(folder, torch.bfloat16)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("layout", ["fp8", "compressed-tensors", "modelopt"])
@pytest.mark.parametrize("stage", [256, 1 << 20])
def test_reads_float8_weights_in_pieces(layout, stage, tmp_path, monkeypatch):
    monkeypatch.setattr("isingcut.models.streaming.reader._STAGE", stage)
    folder = tiny_checkpoint("qwen3", tmp_path)
    quantise(folder, layout)
    model = load(folder, dtype="bfloat16", device="cpu").model
    found = everything(folder, torch.bfloat16)
    for name, value in model.state_dict(keep_vars=True).items():
        assert torch.equal(found[name], value), name


def test_reads_shards_and_old_names(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = tiny_checkpoint("gpt2", tmp_path / "one")
    shutil.copytree(folder, tmp_path / "many")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    (tmp_path / "many" / "model.safetensors").unlink()
    whole = everything(folder, torch.float32)
    for name, value in everything(tmp_path / "many", torch.float32).items():
        assert torch.equal(value, whole[name]), name
    # GPT-2's own checkpoint names its tensors without the prefix of the base model.
    tensors = load_file(folder / "model.safetensors")
    renamed = {k.removeprefix("transformer."): v for k, v in tensors.items()}
    save_file(renamed, folder / "model.safetensors")
    for name, value in everything(folder, torch.float32).items():
        assert torch.equal(value, whole[name]), name


def test_experts_are_read_into_their_place_and_other_conversions_are_transformers_own(tmp_path):
    from isingcut.models.streaming.reader import Converted, Copied

    for family in ("mixtral", "nemotron_h", "ernie4_5_moe"):
        folder = tiny_checkpoint(family, tmp_path / family)
        model = build_skeleton(folder, torch.float32)
        paths = [b.path for b in find_stack(model).blocks]
        steps = [
            s for p in Reader(folder, model, paths, torch.float32).plans.values() for s in p.steps
        ]
        assert any(isinstance(s, Copied) and s.item is not None for s in steps)
        assert not any(isinstance(s, Converted) for s in steps)


def test_a_conversion_that_computes_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr("isingcut.models.streaming.reader._slices", lambda *a: None)
    folder = tiny_checkpoint("mixtral", tmp_path)
    model = load(folder, dtype="float32", device="cpu").model
    found = everything(folder, torch.float32)
    for name, value in model.state_dict(keep_vars=True).items():
        assert torch.equal(found[name], value), name


def test_weights_that_can_only_be_loaded_whole_are_refused(tmp_path):
    folder = tiny_checkpoint("llama", tmp_path)
    with edit_config(folder) as config:
        config["quantization_config"] = {"quant_method": "hqq", "quant_config": {}}
    with pytest.raises(ModelError, match="packed by 'hqq'"):
        build_skeleton(folder, torch.float32)


def test_a_file_that_became_shorter_is_noticed_by_who_waits_for_it(tmp_path):
    replay = streamed(tiny_checkpoint("llama", tmp_path))
    replay.store.buffers.keep_at_most(0)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="ended early"):
        measure(replay, samples(), some_states(len(replay)))


def test_numbers_are_checked_once(llama, monkeypatch):
    seen = Counter()
    monkeypatch.setattr(
        reader, "refuse_infinite", lambda tensors, folder: seen.update(n for n, _ in tensors)
    )
    replay = streamed(llama)
    replay.store.buffers.keep_at_most(0)
    for _ in range(2):
        measure(replay, samples(), some_states(len(replay)))
    plans = replay.store.reader.plans.values()
    assert seen == {name: 1 for plan in plans for name in plan.targets}


def test_a_model_whose_parts_all_stay_is_read_once(tmp_path):
    folder = tiny_checkpoint("llama", tmp_path)
    replay, tokens = streamed(folder), samples()
    states = some_states(len(replay))
    expected = measure(replay, tokens, states).kl_sums
    before = replay.store.reading()
    (folder / "model.safetensors").unlink()
    assert (measure(replay, tokens, states).kl_sums == expected).all()
    more = replay.store.reading() - before
    assert (more.disk, more.memory) == (0.0, pytest.approx(1.0, abs=0.1))
