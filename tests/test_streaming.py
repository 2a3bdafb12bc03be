"""Streamed models against the same models in memory: equal bits, two parts at most, any chunks."""

import json
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import isingcut
from isingcut.data.tokens import TokenSet
from isingcut.energies.search import Plan, Search
from isingcut.energies.search.slopes import gate_slopes
from isingcut.errors import (
    ArchitectureError,
    CheckpointError,
    InputError,
    ModelError,
    VerificationError,
)
from isingcut.evaluation import quality as evaluate
from isingcut.evaluation.streamed_scores import evaluate_streamed
from isingcut.measure.curvature import gate_curvature
from isingcut.measure.gradients import gate_gradients
from isingcut.measure.losses import measure
from isingcut.measure.streamed.boundary import Boundaries
from isingcut.measure.streamed.pace import Pace
from isingcut.measure.work import Work
from isingcut.models.architectures import find_stack, stack_modules
from isingcut.models.compute import head
from isingcut.models.cutting.checkpoint import excise
from isingcut.models.load import load
from isingcut.models.replay import Replay
from isingcut.models.streaming import proof
from isingcut.models.streaming.memory import Allowance, allowance, container_room, weight_bytes
from isingcut.models.streaming.proof import verify_streamed
from isingcut.models.streaming.reader import Reader
from isingcut.models.streaming.replay import StreamedReplay, open_model
from isingcut.models.streaming.skeleton import build_skeleton
from isingcut.options.config import RunConfig
from isingcut.runs.session import Session
from isingcut.testing.tiny import FAMILIES
from test_fp8 import quantise
from tiny import tiny_checkpoint

CPU = torch.device("cpu")
# Conformance says of these that they cannot be measured one block at a time at all.
MEASURED = set(FAMILIES) - {"gemma3n", "gemma4"}
# One of each sort: tied and untied heads, experts, Mamba, shared blocks, windows, odd embeddings.
FAST = ["deepseek_v3", "gemma2", "gpt2", "llama", "mixtral", "nemotron_h", "opt", "rwkv", "zamba2"]
EACH = [*FAST, *(pytest.param(f, marks=pytest.mark.slow) for f in sorted(MEASURED - {*FAST}))]


@pytest.fixture(autouse=True)
def one_layout(monkeypatch):
    """Both ways multiply by the head's weight as it lies: in memory a small one is turned round
    first, and some CPUs then add the vocabulary's terms in another order."""
    monkeypatch.setattr(head, "_TRANSPOSED_BYTES", 0)


def samples() -> TokenSet:
    rng = np.random.default_rng(0)
    return TokenSet.from_rows([rng.integers(8, 200, k).tolist() for k in (12, 9, 12)])


def some_states(n: int, count: int = 6) -> np.ndarray:
    return np.random.default_rng(1).random((count, n)) < 0.4


def in_memory(folder) -> Replay:
    model = load(folder, dtype="float32", device="cpu").model
    return Replay(model, stack_modules(model, find_stack(model)))


def streamed(folder) -> StreamedReplay:
    return StreamedReplay(*open_model(folder, dtype=torch.float32, device=CPU))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"))


def watch(replay: StreamedReplay) -> list[set[str]]:
    """Which parts have weights at each call of a block; also that these lie in two buffers."""
    seen: list[set[str]] = []
    outer = {"embed": replay._embedding, "head": replay.model.get_output_embeddings()}
    modules = {**{str(i): block for i, block in enumerate(replay.blocks)}, **outer}

    def look(module, args):
        real = {
            name: p.untyped_storage().data_ptr()
            for name, m in modules.items()
            for p in m.parameters()
            if not p.is_meta
        }
        seen.append(set(real))
        assert len(set(real.values())) <= 2

    for block in replay.blocks:
        block.register_forward_pre_hook(look)
    return seen


@pytest.mark.parametrize("family", EACH)
def test_equals_the_model_in_memory_with_two_parts_alive(family, tmp_path):
    folder = tiny_checkpoint(family, tmp_path)
    whole, parts, tokens = in_memory(folder), streamed(folder), samples()
    states = some_states(len(whole))
    expected = measure(whole, tokens, states, batch_tokens=24)
    seen = watch(parts)
    found = measure(parts, tokens, states, batch_tokens=24)
    gate = "block" if family == "rwkv" else "sublayer"
    rows = gate_gradients(whole, tokens, gate=gate, batch_tokens=24)
    streamed_rows = gate_gradients(parts, tokens, gate=gate, batch_tokens=24)
    # GPT-OSS adds its experts' outputs in an order that changes from call to call.
    tolerance = 1e-6 if family == "gpt_oss" else 0.0
    for name in ("kl_sums", "nll_sums", "original_nll_sums"):
        np.testing.assert_allclose(
            getattr(found, name), getattr(expected, name), rtol=tolerance, atol=tolerance
        )
    np.testing.assert_allclose(streamed_rows, rows, rtol=tolerance, atol=tolerance)
    assert np.abs(rows).max() > 0
    assert max(map(len, seen)) == 2


def test_the_head_s_layout_changes_gradients_by_rounding_alone(llama, monkeypatch):
    expected = gate_gradients(streamed(llama), samples(), batch_tokens=24)
    monkeypatch.setattr(head, "_TRANSPOSED_BYTES", 1 << 30)
    found = gate_gradients(in_memory(llama), samples(), batch_tokens=24)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def everything(folder, dtype) -> dict[str, torch.Tensor]:
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
    from isingcut.models.streaming.plan import Converted, Copied

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
    monkeypatch.setattr("isingcut.models.streaming.plan._slices", lambda *a: None)
    folder = tiny_checkpoint("mixtral", tmp_path)
    model = load(folder, dtype="float32", device="cpu").model
    found = everything(folder, torch.float32)
    for name, value in model.state_dict(keep_vars=True).items():
        assert torch.equal(found[name], value), name


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path):
    folder = tiny_checkpoint("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"lacks 1 tensors .* model\.layers\.2\.mlp\.up_proj"):
        streamed(folder)
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"has the shape \[3, 3\]"):
        streamed(folder)


def test_weights_that_can_only_be_loaded_whole_are_refused(tmp_path):
    folder = tiny_checkpoint("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="packed by 'bitsandbytes'"):
        build_skeleton(folder, torch.float32)


def test_a_file_that_became_shorter_is_noticed_by_who_waits_for_it(tmp_path):
    replay = streamed(tiny_checkpoint("llama", tmp_path))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="ended early"):
        measure(replay, samples(), some_states(len(replay)))


@pytest.fixture
def narrow(llama, monkeypatch):
    """A streamed model whose hidden states may take as many streams of a batch as is set."""
    replay = streamed(llama)
    replay.allowed = 0

    def room(self, batch):
        return self.allowed * self.stream_bytes(batch)

    monkeypatch.setattr(StreamedReplay, "room", room)
    return replay


@pytest.mark.parametrize("allowed", [4, 5, 7, 40])
def test_chunks_of_states_and_samples_do_not_change_the_losses(llama, narrow, allowed):
    narrow.allowed = allowed
    whole = in_memory(llama)
    states = some_states(len(whole), 9)
    states[4] = states[2]
    states[5] = False
    expected = measure(whole, samples(), states, batch_tokens=24)
    found = measure(narrow, samples(), states, batch_tokens=24)
    np.testing.assert_array_equal(found.kl_sums, expected.kl_sums)
    np.testing.assert_array_equal(found.nll_sums, expected.nll_sums)


def test_too_little_memory_for_one_state_is_an_error(narrow):
    narrow.allowed = 3
    with pytest.raises(InputError, match="raise --memory-limit or lower --batch-tokens"):
        measure(narrow, samples(), some_states(len(narrow)), batch_tokens=24)


def test_hidden_states_that_do_not_fit_go_to_a_file(llama, narrow, monkeypatch, tmp_path):
    used = []
    close = Boundaries.close
    monkeypatch.setattr(Boundaries, "close", lambda self: (used.append(self.spilled), close(self)))
    expected = gate_gradients(in_memory(llama), samples(), batch_tokens=24)
    narrow.allowed = 3
    found = gate_gradients(narrow, samples(), batch_tokens=24, journal=tmp_path / "journal")
    np.testing.assert_array_equal(found, expected)
    assert min(used) > 0
    assert [p.name for p in tmp_path.iterdir()] == ["journal"]


@pytest.mark.parametrize("family", ["llama", "mixtral", "nemotron_h"])
def test_graphs_are_kept_where_there_is_room(family, tmp_path, monkeypatch):
    folder = tiny_checkpoint(family, tmp_path)
    expected = gate_gradients(in_memory(folder), samples(), batch_tokens=24)
    replay = streamed(folder)
    replay.head  # noqa: B018 - looking at the head calls the blocks
    ran = []
    for block in replay.blocks:
        block.register_forward_hook(lambda m, a, o: ran.append(1))
    counts = []
    for allowed in (11, 120, 100_000):
        room = lambda self, batch, k=allowed: k * self.stream_bytes(batch)  # noqa: E731
        monkeypatch.setattr(StreamedReplay, "room", room)
        ran.clear()
        found = gate_gradients(replay, samples(), batch_tokens=24)
        np.testing.assert_array_equal(found, expected)
        counts.append(len(ran))
    none, some, every = counts
    # Recording a batch calls every block once too, without running it.
    batches = len(samples().batches(24))
    assert none - every == batches * len(replay)
    assert every < some < none


def test_each_block_is_read_once_per_chunk(llama, monkeypatch):
    replay = streamed(llama)
    monkeypatch.setattr(Pace, "timed", lambda self, n: nullcontext())
    monkeypatch.setattr(Pace, "__init__", lambda self, b: setattr(self, "batches", 100))
    replay.head  # noqa: B018 - looking at the head reads it
    read = []
    fill = Reader.fill
    monkeypatch.setattr(Reader, "fill", lambda self, p, b: (read.append(p), fill(self, p, b))[1])
    n = len(replay)
    measure(replay, samples(), some_states(n), batch_tokens=12)
    assert [p for p in read if p != "embed"] == [*range(n), "head"]
    read.clear()
    gate_gradients(replay, samples(), batch_tokens=12)
    # The last block is still there when the backward sweep begins.
    assert [p for p in read if p != "embed"] == [*range(n), "head", *reversed(range(n - 1))]


@pytest.mark.parametrize("job", ["states", "gradients"])
def test_an_interrupted_run_loses_one_chunk_and_gives_the_same_bits(llama, job, tmp_path):
    tokens = samples()
    states = some_states(6, 5)

    def work(replay, journal=None):
        if job == "gradients":
            return gate_gradients(replay, tokens, batch_tokens=12, journal=journal)
        found = measure(replay, tokens, states, batch_tokens=12, journal=journal)
        return np.stack([found.kl_sums, found.nll_sums])

    journal = tmp_path / "journal"
    expected = work(streamed(llama), journal)
    # With several threads the two ways may add up in another order.
    np.testing.assert_allclose(expected, work(in_memory(llama)), rtol=0, atol=1e-6)
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + len(tokens.batches(12))
    journal.write_bytes(b"".join(lines[:2]) + lines[2][:-10])
    replay = streamed(llama)
    ran = []
    replay.blocks[0].self_attn.register_forward_hook(lambda m, a, o: ran.append(1))
    np.testing.assert_array_equal(work(replay, journal), expected)
    lost = len(lines) - 2
    assert len(ran) == lost, "block 0 is run once for each lost micro-batch"


def test_other_chunks_go_on_from_what_a_journal_has(llama, narrow, tmp_path):
    states = some_states(6, 9)
    expected = measure(in_memory(llama), samples(), states, batch_tokens=24)
    narrow.allowed = 5
    journal = tmp_path / "journal"
    measure(narrow, samples(), states, batch_tokens=24, journal=journal)
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:4]))
    narrow.allowed = 8
    found = measure(narrow, samples(), states, batch_tokens=24, journal=journal)
    np.testing.assert_array_equal(found.kl_sums, expected.kl_sums)
    np.testing.assert_array_equal(found.original_nll_sums, expected.original_nll_sums)


def test_a_fine_tune_of_the_same_model_has_another_fingerprint(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "tuned")
    tensors = load_file(tmp_path / "tuned" / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"] *= 1.01
    save_file(tensors, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    assert streamed(llama).identity() == streamed(llama).identity()
    assert streamed(llama).identity() != streamed(tmp_path / "tuned").identity()


def test_gradients_through_several_blocks_are_refused(llama):
    replay = streamed(llama)
    with pytest.raises(ArchitectureError, match="streamed one block at a time"):
        gate_curvature(replay, samples(), "hessian")
    with torch.no_grad():
        recording = replay.record(samples().input_ids)
    with pytest.raises(ArchitectureError, match="needs the whole model in memory"):
        recording.block(3, recording.entered)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "nemotron_h"])
@pytest.mark.parametrize("removed", [(1, 2), (0, 3)])
def test_slopes_at_a_cut_model_are_those_in_memory(family, removed, tmp_path, monkeypatch):
    folder = tiny_checkpoint(family, tmp_path)
    whole, parts, tokens = in_memory(folder), streamed(folder), samples()
    state = np.zeros(len(whole), dtype=bool)
    state[list(removed)] = True
    expected = gate_slopes(whole, tokens, state, 16)
    assert np.abs(expected).max() > 1e-6
    np.testing.assert_allclose(gate_slopes(parts, tokens, state, 16), expected, atol=1e-6)
    # The same where no stream fits the memory.
    monkeypatch.setattr(StreamedReplay, "room", lambda self, batch: 0)
    np.testing.assert_allclose(gate_slopes(parts, tokens, state, 16), expected, atol=1e-6)


def test_a_streamed_search_finds_what_one_in_memory_finds(llama):
    plan = Plan(first_share=0.4)
    found = [
        Search((2,), passes=30.0, plan=plan).run(replay, samples(), Work(batch_tokens=16))
        for replay in (in_memory(llama), streamed(llama))
    ]
    assert found[0].best(2) == found[1].best(2)
    assert found[0].passes == pytest.approx(found[1].passes)
    assert [t["removed"] for t in found[0].trace] == [t["removed"] for t in found[1].trace]


def test_blocks_of_the_same_kind_are_timed_once(tmp_path):
    replay = streamed(tiny_checkpoint("qwen3_moe", tmp_path))
    ran = []
    for i, block in enumerate(replay.blocks):
        block.self_attn.register_forward_hook(lambda m, a, o, i=i: ran.append(i))
    seconds = replay.latency(8, repeats=1)
    assert len(set(ran)) == 2
    assert seconds[0] == seconds[4] != seconds[1] == seconds[2]


def test_memory_allowed_and_needed(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "isingcut.models.streaming.memory._used_and_free", lambda device: (1000, 5000)
    )
    assert allowance("", CPU) == Allowance(5000, 1000)
    assert allowance("50%", CPU).left == 2500
    assert allowance("3KB", CPU) == Allowance(3000, 1000)
    assert allowance("1GB", CPU).total == 10**9
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert allowance("", CPU).left == 1000
    with pytest.raises(InputError, match=r"8GB or a share like 50%, 'much': .* no amount"):
        allowance("much", CPU)
    parameters = sum(
        p.numel() for p in load(llama, dtype="float32", device="cpu").model.parameters()
    )
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
    config = RunConfig(model=str(llama), dtype="float32", device="cpu")
    assert not Session(config).streaming
    assert Session(config.replace(memory_limit="1KB")).streaming
    assert not Session(config.replace(memory_limit="1KB", stream="off")).streaming
    replay = Session(config.replace(memory_limit="1KB")).replay
    with pytest.raises(InputError, match=r"is 0\.00 GB; streaming this model needs"):
        measure(replay, samples(), some_states(6))
    with pytest.raises(InputError, match="--stream must be one of"):
        config.replace(stream="maybe").validate()


@pytest.fixture(scope="module")
def cut(llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("cut") / "model"
    excise(llama, [1, 4], out)
    return out


def test_a_cut_is_proven_block_by_block(llama, cut, monkeypatch):
    replay = streamed(llama)
    seen = watch(replay)
    assert verify_streamed(replay, [1, 4], cut) == 0.0
    assert max(map(len, seen)) <= 2
    with pytest.raises(VerificationError, match="does not compute what the original does"):
        verify_streamed(replay, [1, 3], cut)


def test_a_cut_with_wrong_layer_numbers_is_noticed(llama, cut, tmp_path, monkeypatch):
    replay = streamed(llama)
    build = proof.open_model

    def wrong(*args, **kwargs):
        model, store, memory = build(*args, **kwargs)
        model.model.layers[2].self_attn.layer_idx = 1
        return model, store, memory

    monkeypatch.setattr(proof, "open_model", wrong)
    with pytest.raises(VerificationError, match=r"does not generate|another token than without"):
        verify_streamed(replay, [1, 4], cut, new_tokens=6)


def test_a_cut_that_does_not_load_is_noticed(llama, cut, tmp_path):
    shutil.copytree(cut, tmp_path / "bad")
    tensors = load_file(cut / "model.safetensors")
    save_file({**tensors, "model.extra.weight": torch.zeros(1)}, tmp_path / "bad/model.safetensors")
    with pytest.raises(VerificationError, match=r"unexpected keys: model\.extra\.weight"):
        verify_streamed(streamed(llama), [1, 4], tmp_path / "bad")
    (tmp_path / "bad" / "model.safetensors").unlink()
    with pytest.raises(VerificationError, match="does not load"):
        verify_streamed(streamed(llama), [1, 4], tmp_path / "bad")


def test_quality_of_a_streamed_pair_is_that_in_memory(llama, cut):
    pair = [load(folder, dtype="float32", device="cpu").model for folder in (llama, cut)]
    expected = evaluate.quality(*pair, samples(), batch_tokens=24)
    original = streamed(llama)
    smaller = StreamedReplay(
        *open_model(cut, dtype=torch.float32, device=CPU, buffers=original.store.buffers)
    )
    found = evaluate_streamed(original, smaller, samples(), batch_tokens=24)
    for key in ("kl", "kl_se"):
        assert found[key] == pytest.approx(expected[key], rel=1e-6)
    for side, model in zip(("before", "after"), pair, strict=True):
        for key, value in expected[side].items():
            assert found[side][key] == pytest.approx(value, rel=1e-6)
        assert found[side]["parameters"] == sum(p.numel() for p in model.parameters())
    assert (found["before"]["blocks"], found["after"]["blocks"]) == (6, 4)


def test_a_whole_run_loads_no_model(llama, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("isingcut.models.load.load", never)
    monkeypatch.setattr("isingcut.models.cutting.verify.reload", never)
    words = np.random.default_rng(0).choice(list("abcdefghijkl"), (900, 6))
    text = tmp_path / "text.txt"
    text.write_text(" ".join("".join(word) for word in words))
    options = {
        "model": str(llama),
        "calibration": str(text),
        "samples": 3,
        "length": 16,
        "rank_samples": 2,
        "report_samples": 2,
        "states": 3,
        "random_states": 30,
        "dtype": "float32",
        "stream": "on",
    }
    folder = isingcut.run(remove=2, out=str(tmp_path / "run"), also="fisher", **options)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    chosen = json.loads((folder / "candidates.json").read_text())["chosen"]
    assert evaluation["streamed"]
    assert evaluation["after"]["blocks"] == 4
    assert len(chosen["removed"]) == 2
    assert "not measured" in (folder / "report.md").read_text()
    for wrong, message in (
        ({"energy": "hessian"}, "'hessian' differentiates through all blocks"),
        ({"calibration": "self"}, "reads the whole model once for every token"),
    ):
        with pytest.raises(InputError, match=message):
            isingcut.energy(out=str(tmp_path / "no"), **{**options, **wrong})
    assert not (tmp_path / "no").exists()
