"""Streaming: reading, keeping and proving parts, and whole runs."""

import concurrent.futures
import re
import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import cards
import isingcut
from isingcut.evaluation import quality as evaluate
from isingcut.models.device import Allowance, allowance, container_room, weight_bytes
from isingcut.models.load import build_skeleton
from isingcut.models.streaming import reader
from isingcut.models.streaming.reader import Reader
from isingcut.models.streaming.store import Buffers, Store
from quantised import quantise
from shared import (
    CheckpointError,
    ModelError,
    RunConfig,
    VerificationError,
    load_json,
    module_fixture,
    parametrize,
    refuses,
    run_tiny,
)
from tiny import (
    CPU,
    Context,
    Work,
    edit_config,
    edit_tensors,
    excise,
    load,
    load_streamed,
    load_tiny,
    measure,
    samples,
    some_states,
    streamed,
    tiny_checkpoint,
    verify,
    watch,
)


class Numbers:
    """A part of eight bytes whose file may be missing."""

    size = 8
    sweeps = 0

    def __init__(self, value, gone=False):
        self.value = value
        self.gone = gone
        self.memory = None

    def fill(self, buffer):
        if self.gone:
            raise FileNotFoundError("renamed")
        buffer.fill_(self.value)

    def install(self, memory):
        self.memory = memory

    def remove(self):
        self.memory = None


def test_a_part_read_ahead_and_not_wanted_may_fail():
    """A proof may end while a part of the cut is still read, and then its folder is renamed."""
    buffers = Buffers(8, CPU)
    first = Numbers(1)
    gone = Numbers(2, gone=True)
    next_one = Numbers(3)
    buffers.take(first)
    buffers.expect(gone)
    concurrent.futures.wait([buffers._pending[2]])
    buffers.take(next_one)
    assert next_one.memory.tolist() == [3] * 8
    assert first.memory.tolist() == [1] * 8
    with pytest.raises(FileNotFoundError):
        buffers.take(gone)


def test_what_fills_a_new_buffer_waits_for_what_the_device_was_given_before(spy):
    waits = spy(cards._Stream, "wait_event", lambda _, *given: given)
    records = spy(cards._Stream, "record", lambda _, *given: given)
    with cards.fake_cards() as (card,):
        Buffers(8, card.device).take(Numbers(1))
    filling, before = waits[0]
    assert before in [event for event, stream in records if stream is not filling]


def everything(folder, dtype):
    model = build_skeleton(folder, dtype)
    reader = Reader(folder, model, dtype)
    values = {}
    for part in reader.parts.values():
        buffer = torch.zeros(part.size, dtype=torch.uint8)
        part.fill(buffer)
        values |= {
            name: part.view(buffer)[target] for name, target in part.names.items()
        }
    for name, buffer in model.named_buffers():
        values.setdefault(name, buffer)
    return values


def reads_what_is_loaded(folder, dtype):
    """Check that streaming reads the tensors that transformers loads."""
    model = load(folder, dtype=dtype, device="cpu").model
    expected = {**dict(model.named_buffers()), **model.state_dict(keep_vars=True)}
    assert_close(everything(folder, getattr(torch, dtype)), expected, rtol=0, atol=0)


@parametrize("family", ["gpt2", "deepseek_v3", "nemotron_h", "zamba2", "gemma4"])
def test_reads_the_numbers_that_transformers_loads(family, tmp_path):
    reads_what_is_loaded(tiny_checkpoint(family, tmp_path), "bfloat16")


@parametrize("layout", ["fp8", "compressed-tensors", "modelopt"])
def test_reads_float8_weights_and_others_in_pieces(layout, tmp_path, monkeypatch):
    monkeypatch.setattr("isingcut.models.streaming.reader._STAGE", 256)
    folder = tiny_checkpoint("qwen3", tmp_path)
    quantise(folder, layout)
    reads_what_is_loaded(folder, "bfloat16")


def test_reads_shards_and_old_names(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = tiny_checkpoint("gpt2", tmp_path / "one")
    shutil.copytree(folder, tmp_path / "many")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    (tmp_path / "many/model.safetensors").unlink()
    whole = everything(folder, torch.float32)
    many = everything(tmp_path / "many", torch.float32)
    assert_close(many, whole, rtol=0, atol=0)
    # GPT-2's own checkpoint names its tensors without the prefix of the base model.
    tensors = load_file(folder / "model.safetensors")
    renamed = {k.removeprefix("transformer."): v for k, v in tensors.items()}
    save_file(renamed, folder / "model.safetensors")
    assert_close(everything(folder, torch.float32), whole, rtol=0, atol=0)


def test_experts_are_read_into_their_place_and_other_conversions_are_transformers_own(
    tmp_path,
):
    for family in ("mixtral", "nemotron_h", "ernie4_5_moe"):
        folder = tiny_checkpoint(family, tmp_path / family)
        model = build_skeleton(folder, torch.float32)
        parts = Reader(folder, model, torch.float32).parts.values()
        steps = [step for part in parts for step in part.steps]
        assert any(place for s in steps for _, place in s.sources)
        assert not any(s.convert for s in steps)


def test_a_conversion_that_computes_is_run(tmp_path, stub):
    stub("isingcut.models.streaming.reader._find_slices", None)
    reads_what_is_loaded(tiny_checkpoint("mixtral", tmp_path), "float32")


def test_weights_that_can_only_be_loaded_whole_are_refused(tmp_path):
    folder = tiny_checkpoint("llama", tmp_path)
    with edit_config(folder) as config:
        config["quantization_config"] = {"quant_method": "hqq", "quant_config": {}}
    with refuses("packed by 'hqq'", ModelError):
        build_skeleton(folder, torch.float32)


def test_a_file_that_became_shorter_is_noticed_by_who_waits_for_it(tmp_path):
    replay = streamed(tiny_checkpoint("llama", tmp_path))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with refuses("ended early", CheckpointError):
        measure(replay, samples(), some_states(len(replay)))


def test_numbers_are_checked_once(llama, monkeypatch):
    seen = Counter()
    note = lambda tensors, folder: seen.update(n for n, _ in tensors)  # noqa: E731
    monkeypatch.setattr(reader, "refuse_infinite", note)
    replay = streamed(llama)
    for _ in range(2):
        measure(replay, samples(), some_states(len(replay)))
    parts = replay.store.reader.parts.values()
    steps = (step for part in parts for step in part.steps)
    assert seen == {name: 1 for step in steps for name in step.targets}


pytestmark = pytest.mark.usefixtures("one_layout")


def test_memory_allowed_and_needed(llama, monkeypatch, stub):
    stub("isingcut.models.device._used_and_free", (1000, 5000))
    assert allowance("", CPU) == Allowance(5000, 1000)
    assert allowance("50%", CPU).left == 2500
    assert allowance("3KB", CPU) == Allowance(3000, 1000)
    assert allowance("1GB", CPU).total == 10**9
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert allowance("", CPU).left == 1000
    parameters = sum(p.numel() for p in load_tiny(llama).model.parameters())
    assert weight_bytes(llama, torch.bfloat16) == 2 * parameters


def test_a_container_has_a_limit_of_its_own(tmp_path):
    assert container_room(tmp_path) > 1 << 60
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 250\n")
    assert container_room(tmp_path) == 550
    (tmp_path / "memory.max").write_text("max\n")
    assert container_room(tmp_path) > 1 << 60


def test_weights_that_do_not_fit_are_streamed(llama):
    config = RunConfig(model=llama, dtype="float32", device="cpu")
    assert not Context(config).streaming
    assert Context(config.replace(memory_limit="1KB")).streaming
    assert not Context(config.replace(memory_limit="1KB", stream="off")).streaming
    replay = Context(config.replace(memory_limit="1KB")).replay
    with refuses(r"is 0\.00 GB, but streaming this model needs"):
        measure(replay, samples(), some_states(6))
    with refuses("--stream must be one of"):
        config.replace(stream="maybe").validate()


@module_fixture
def cut(llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("cut") / "model"
    excise(llama, [1, 4], out)
    return out


def test_a_cut_is_proven_block_by_block(llama, cut):
    replay = streamed(llama)
    seen = watch(replay)
    assert verify(replay, [1, 4], cut).difference == 0.0
    assert max(map(len, seen)) <= 2
    with refuses("differs from the original", VerificationError):
        verify(replay, [1, 3], cut)


def test_a_cut_with_wrong_layer_numbers_is_noticed(llama, cut, monkeypatch):
    replay = streamed(llama)

    def wrong(*args, **kwargs):
        store = Store(*args, **kwargs)
        store.model.model.layers[2].self_attn.layer_idx = 1
        return store

    monkeypatch.setattr("isingcut.models.verify.Store", wrong)
    with refuses(r"does not generate|differs from generation", VerificationError):
        verify(replay, [1, 4], cut)


def test_a_cut_that_does_not_load_is_noticed(llama, cut, tmp_path):
    shutil.copytree(cut, tmp_path / "bad")
    with edit_tensors(tmp_path / "bad") as tensors:
        tensors["model.extra.weight"] = torch.zeros(1)
    with refuses(r"unexpected keys: model\.extra\.weight", VerificationError):
        verify(streamed(llama), [1, 4], tmp_path / "bad")
    (tmp_path / "bad/model.safetensors").unlink()
    with refuses("does not load", VerificationError):
        verify(streamed(llama), [1, 4], tmp_path / "bad")


def test_quality_of_a_streamed_pair_is_that_in_memory(llama, cut):
    pair = [load_tiny(folder).model for folder in (llama, cut)]
    expected = evaluate.quality(*pair, samples(), Work(24))
    place = {"dtype": "float32", "device": "cpu"}
    original = load_streamed(llama, **place)
    smaller = load_streamed(cut, **place, buffers=original.streamed.store.buffers)
    found = evaluate.before_and_after(original, smaller, samples(), work=Work(24))
    both = [(figures.kl, figures.kl_se) for figures in (found, expected)]
    assert both[0] == pytest.approx(both[1], rel=1e-6)
    for side, model in zip(("before", "after"), pair, strict=True):
        figures = getattr(found, side)
        for key, value in getattr(expected, side).content().items():
            assert getattr(figures, key) == pytest.approx(value, rel=1e-6)
        assert figures.parameters == sum(p.numel() for p in model.parameters())
    assert (found.before.blocks, found.after.blocks) == (6, 4)


def test_a_whole_run_loads_no_model(llama, text, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the model was loaded")

    # Import all modules with these names first, or they would keep the replacement.
    _ = isingcut.run
    monkeypatch.setattr("isingcut.models.load.load", never)
    monkeypatch.setattr("isingcut.models.sharing.load", never)
    monkeypatch.setattr("isingcut.models.verify.reload", never)
    more = {"remove": 2, "compare_energies": "fisher", "stream": "on"}
    folder = run_tiny(llama, text, tmp_path / "run", **more)
    evaluation = load_json(folder / "evaluation.json")
    chosen = load_json(folder / "candidates.json").chosen
    assert evaluation.streamed
    assert evaluation.after.blocks == 4
    assert len(chosen.removed) == 2
    report = (folder / "report.md").read_text()
    assert "not measured" in report
    assert re.search(r"\| weights \| streamed from disk for the energy", report)
    monkeypatch.setattr("isingcut.energies.fisher.Fisher.streams", False, raising=False)
    for wrong, message in (
        ({"energy": "fisher"}, "'fisher' needs all blocks"),
        (
            {"calibration": "self"},
            "would read a streamed model from disk for every token",
        ),
    ):
        with refuses(message):
            run_tiny(llama, text, tmp_path / "no", remove=2, stream="on", **wrong)
    assert not (tmp_path / "no").exists()
