"""Streamed models against the same models in memory: equal bits, two parts at most."""

import shutil

import numpy as np
import pytest
import torch

from isingcut.energies.search import Search, Target
from isingcut.errors import ArchitectureError
from isingcut.measure.curvature import gate_curvature
from isingcut.measure.gradients import gate_gradients, gate_slopes
from isingcut.measure.losses import measure
from isingcut.measure.work import Work
from isingcut.models.compute import head
from isingcut.models.streaming.replay import StreamedReplay, open_model
from isingcut.testing.cards import fake_cards
from isingcut.testing.tiny import tiny_checkpoint
from streams import in_memory, samples, some_states, streamed, watch
from tiny import edit_tensors

pytestmark = pytest.mark.usefixtures("one_layout")

# One of each sort: tied and untied heads, experts, Mamba, shared blocks, windows, odd embeddings.
FAST = ["deepseek_v3", "gemma2", "gpt2", "llama", "mixtral", "nemotron_h", "opt", "rwkv", "zamba2"]


@pytest.mark.parametrize("family", FAST)
def test_equals_the_model_in_memory_with_two_parts_alive(family, tmp_path):
    folder = tiny_checkpoint(family, tmp_path)
    whole, parts, tokens = in_memory(folder), streamed(folder), samples()
    states = some_states(len(whole))
    expected = measure(whole, tokens, states, work=Work(24))
    seen = watch(parts)
    found = measure(parts, tokens, states, work=Work(24))
    gate = "block" if family == "rwkv" else "sublayer"
    rows = gate_gradients(whole, tokens, gate=gate, work=Work(24))
    streamed_rows = gate_gradients(parts, tokens, gate=gate, work=Work(24))
    for name in ("kl_sums", "nll_sums", "original_nll_sums"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    np.testing.assert_array_equal(streamed_rows, rows)
    assert np.abs(rows).max() > 0
    assert max(map(len, seen)) == 2


def test_the_head_s_layout_changes_gradients_by_rounding_alone(llama, monkeypatch):
    expected = gate_gradients(streamed(llama), samples(), work=Work(24))
    monkeypatch.setattr(head, "_TRANSPOSED_BYTES", 1 << 30)
    found = gate_gradients(in_memory(llama), samples(), work=Work(24))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_fine_tune_of_the_same_model_has_another_fingerprint(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "tuned")
    with edit_tensors(tmp_path / "tuned") as tensors:
        tensors["model.layers.3.mlp.up_proj.weight"] *= 1.01
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
    np.testing.assert_array_equal(gate_slopes(parts, tokens, state, 16), expected)
    # The same where no stream fits the memory.
    monkeypatch.setattr(StreamedReplay, "room", lambda self, batch: 0)
    np.testing.assert_array_equal(gate_slopes(parts, tokens, state, 16), expected)


def test_a_forward_pass_reads_what_it_needs(tmp_path):
    """Llama 4 asks for the device of the embedding's weight before it calls the embedding."""
    folder = tiny_checkpoint("llama4", tmp_path)
    ids = samples().input_ids[:1]
    whole, parts = in_memory(folder), streamed(folder)
    with torch.no_grad():
        expected = whole.model(input_ids=ids, use_cache=False).logits
        assert torch.equal(parts.model(input_ids=ids, use_cache=False).logits, expected)
        assert torch.equal(parts.record(ids).entered, whole.record(ids).entered)


JOBS = {
    "losses": lambda replay, tokens, state: measure(replay, tokens, state[None], work=Work(24)),
    "gradients": lambda replay, tokens, state: gate_gradients(replay, tokens, work=Work(24)),
    "slopes": lambda replay, tokens, state: gate_slopes(replay, tokens, state, 24),
}


@pytest.mark.parametrize("job", JOBS)
def test_a_device_holds_two_parts_and_the_hidden_states(job, tmp_path):
    size = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 8}
    folder = tiny_checkpoint("llama", tmp_path, **size, head_dim=32)
    weights = (tmp_path / "model.safetensors").stat().st_size
    with fake_cards(budget=weights // 2) as (card,):
        replay = StreamedReplay(*open_model(folder, dtype=torch.float32, device=card.device))
        card.reset_peak()
        JOBS[job](replay, samples(), np.arange(8) < 2)
        assert card.peak < 2.5 * replay.store.largest + 0.1 * weights
        # Each part was read from disk once, on the first pass.
        assert replay.store.reading().disk == 1.0


def test_a_streamed_search_finds_what_one_in_memory_finds(llama, monkeypatch):
    monkeypatch.setattr("isingcut.energies.search.search.FIRST_SHARE", 0.4)
    found = [
        Search(replay, samples(), Work(16), [Target.count(len(replay), 2)], 30.0).run()
        for replay in (in_memory(llama), streamed(llama))
    ]
    assert found[0].best(2) == found[1].best(2)
    passes = [search.evaluator.ledger.passes for search in found]
    assert passes[0] == pytest.approx(passes[1])
    assert [t["removed"] for t in found[0].trace] == [t["removed"] for t in found[1].trace]


def test_blocks_of_the_same_kind_are_timed_once(tmp_path):
    replay = streamed(tiny_checkpoint("qwen3_moe", tmp_path))
    ran = []
    for i, block in enumerate(replay.blocks):
        block.self_attn.register_forward_hook(lambda m, a, o, i=i: ran.append(i))
    seconds = replay.latency(8, repeats=1)
    assert len(set(ran)) == 2
    assert seconds[0] == seconds[4] != seconds[1] == seconds[2]
