"""Streamed models against models in memory: equal bits, at most two parts loaded, any chunks."""

import shutil
import weakref
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from cards import fake_cards
from isingcut.energies.search import Search, Target
from isingcut.measure import ledger, losses
from isingcut.measure.losses import measure_together
from isingcut.measure.streams import one_pass
from isingcut.models.compute import head
from isingcut.models.compute.head import OutputHead
from shared import ArchitectureError, MemoryExhaustedError, parametrize, refuses
from tiny import (
    Replay,
    StreamedReplay,
    Work,
    count_calls,
    count_rows,
    edit_tensors,
    gate_gradients,
    gate_slopes,
    in_memory,
    keep_rows,
    measure,
    random_tokens,
    samples,
    some_states,
    states_of,
    streamed,
    tiny_checkpoint,
    watch,
)

pytestmark = pytest.mark.usefixtures("one_layout")

# One of each sort: tied and untied heads, experts, Mamba, shared blocks, windows, odd embeddings.
FAST = [
    "deepseek_v3",
    "gemma2",
    "gpt2",
    "llama",
    "mixtral",
    "nemotron_h",
    "opt",
    "rwkv",
    "zamba2",
]


@parametrize("family", FAST)
def test_equals_the_model_in_memory_with_two_parts_alive(family, tmp_path):
    folder = tiny_checkpoint(family, tmp_path)
    whole = in_memory(folder)
    parts = streamed(folder)
    tokens = samples()
    states = some_states(len(whole))
    expected = measure(whole, tokens, states, work=Work(24))
    seen = watch(parts)
    found = measure(parts, tokens, states, work=Work(24))
    gate = "block" if family == "rwkv" else "sublayer"
    rows = gate_gradients(whole, tokens, gate=gate, work=Work(24))
    streamed_rows = gate_gradients(parts, tokens, gate=gate, work=Work(24))
    for name in ("kl_sums", "nll_sums", "original_nll_sums"):
        assert_array_equal(getattr(found, name), getattr(expected, name))
    assert_array_equal(streamed_rows, rows)
    assert np.abs(rows).max() > 0
    assert max(map(len, seen)) == 2


def test_a_fine_tune_of_the_same_model_has_another_fingerprint(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "tuned")
    with edit_tensors(tmp_path / "tuned") as tensors:
        tensors["model.layers.3.mlp.up_proj.weight"] *= 1.01
    assert streamed(llama).identity() == streamed(llama).identity()
    assert streamed(llama).identity() != streamed(tmp_path / "tuned").identity()


def test_gradients_through_several_blocks_are_refused(llama):
    replay = streamed(llama)
    with torch.no_grad():
        recording = replay.record(samples().input_ids)
    with refuses("needs the whole model in memory", ArchitectureError):
        recording.block(3, recording.entered)


@parametrize("family", ["llama", "gpt2", "mixtral", "nemotron_h"])
@parametrize("removed", [(1, 2), (0, 3)])
def test_slopes_at_a_cut_model_are_those_in_memory(family, removed, tmp_path):
    folder = tiny_checkpoint(family, tmp_path)
    whole = in_memory(folder)
    parts = streamed(folder)
    tokens = samples()
    (state,) = states_of(len(whole), [removed])
    expected = gate_slopes(whole, tokens, state, 16)
    assert np.abs(expected).max() > 1e-6
    assert_array_equal(gate_slopes(parts, tokens, state, 16), expected)


JOBS = {
    "losses": lambda replay, tokens, state: measure(
        replay, tokens, state[None], work=Work(24)
    ),
    "gradients": lambda replay, tokens, state: gate_gradients(
        replay, tokens, work=Work(24)
    ),
    "slopes": lambda replay, tokens, state: gate_slopes(replay, tokens, state, 24),
}


@parametrize("job", JOBS)
def test_a_device_holds_two_parts_and_the_hidden_states(job, tmp_path):
    folder = tiny_checkpoint(
        "llama",
        tmp_path,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        head_dim=32,
    )
    weights = (tmp_path / "model.safetensors").stat().st_size
    with fake_cards(budget=weights // 2) as (card,):
        replay = streamed(folder, card.device)
        card.reset_peak()
        JOBS[job](replay, samples(), np.arange(8) < 2)
        assert card.peak < 2.5 * replay.store.largest + 0.1 * weights


def test_blocks_of_the_same_kind_are_timed_once(tmp_path):
    replay = streamed(tiny_checkpoint("qwen3_moe", tmp_path))
    ran = [count_calls(block.self_attn) for block in replay.blocks]
    seconds = replay.latency(8, repeats=1)
    assert sum(map(bool, ran)) == 2
    assert seconds[0] == seconds[4] != seconds[1] == seconds[2]


@pytest.fixture
def narrow(llama, monkeypatch):
    """A streamed model whose hidden states have room for ``allowed`` streams of a batch."""
    replay = streamed(llama)
    replay.allowed = 0

    def room(self, batch):
        return self.allowed * self.stream_bytes(batch)

    monkeypatch.setattr(StreamedReplay, "room", room)
    return replay


@parametrize("allowed", [4, 5, 7, 40])
def test_chunks_of_states_and_samples_do_not_change_the_losses(llama, narrow, allowed):
    narrow.allowed = allowed
    whole = in_memory(llama)
    states = some_states(len(whole), 9)
    states[4] = states[2]
    states[5] = False
    found, expected = (
        measure(replay, samples(), states, work=Work(24)) for replay in (narrow, whole)
    )
    assert_array_equal(found.kl_sums, expected.kl_sums)


def test_too_little_memory_for_one_state_is_an_error(narrow):
    narrow.allowed = 3
    with refuses("raise --memory-limit or lower --batch-tokens"):
        measure(narrow, samples(), some_states(len(narrow)), work=Work(24))


def test_gradients_take_so_many_samples_at_a_time_as_fit(llama, narrow):
    whole = samples()
    expected = gate_gradients(in_memory(llama), whole, work=Work(24))
    narrow.allowed = len(narrow) + 6
    each = narrow.stream_bytes(whole.select([0]))
    narrow.room = lambda batch: narrow.allowed * each
    assert_allclose(gate_gradients(narrow, whole, work=Work(24)), expected, rtol=1e-5)
    narrow.allowed -= 1
    with refuses("raise --memory-limit or lower --length", MemoryExhaustedError):
        gate_gradients(narrow, whole, work=Work(24))


@parametrize("family", ["llama", "mixtral", "nemotron_h"])
def test_graphs_are_kept_where_there_is_room(family, tmp_path, monkeypatch):
    replay = in_memory(tiny_checkpoint(family, tmp_path))
    expected = gate_gradients(replay, samples(), work=Work(24))
    ran = [count_calls(block) for block in replay.blocks]
    OutputHead(replay)  # inspecting the head calls the blocks
    counts = [sum(map(len, ran))]
    for allowed in (14, 120, 100_000):
        room = lambda self, batch, k=allowed: k * self.stream_bytes(batch)  # noqa: E731
        monkeypatch.setattr(Replay, "room", room)
        assert_array_equal(gate_gradients(replay, samples(), work=Work(24)), expected)
        counts.append(sum(map(len, ran)))
    none, some, every = np.diff(counts)
    # Recording a batch calls every block once too, without running it.
    assert none - every == len(samples().batches(24)) * len(replay)
    assert every < some < none


def sweeps(replay, job, *arguments, **options):
    """Return how often a job reads the model, and its result."""
    before = replay.store.count_sweeps()
    found = job(replay, *arguments, **options)
    return replay.store.count_sweeps() - before, found


class Immediate:
    """An executor that works at once, in the calling thread."""

    def submit(self, work, *arguments):
        done = Future()
        done.set_result(work(*arguments))
        return done


def test_one_sweep_is_enough_for_all_that_fits(llama):
    replay = streamed(llama)
    tokens = samples()
    # A thread may or may not have begun a read that is cancelled: here every read is made.
    replay.store.buffers._thread = Immediate()
    OutputHead(replay)  # inspecting the head reads it
    states = [some_states(len(replay), 5), some_states(len(replay), 9)[5:]]
    wanted = [(tokens, states[0]), (tokens.select([2, 0]), states[1])]
    count, found = sweeps(replay, measure_together, wanted, Work(12), "measuring")
    assert count == pytest.approx(1.0, abs=0.1)
    for result, (text, some) in zip(found, wanted, strict=True):
        expected = measure(replay, text, some, work=Work(12))
        assert_array_equal(result.kl_sums, expected.kl_sums)
    # The backward sweep reads neither embedding nor head, nor the last block, still in memory.
    count, _ = sweeps(replay, gate_gradients, tokens, work=Work(12))
    assert count < 1.55
    count, found = sweeps(replay, one_pass, tokens, Work(12))
    assert count < 1
    for result, expected in zip(
        found, one_pass(in_memory(llama), tokens, Work(12)), strict=True
    ):
        assert_array_equal(result, expected)


def test_the_original_s_logits_of_one_micro_batch_exist_at_a_time(llama, monkeypatch):
    alive = weakref.WeakSet()
    most = []

    def watched(*given):
        made = head.Comparison(*given)
        alive.add(made)
        most.append(len(alive))
        return made

    monkeypatch.setattr(losses, "Comparison", watched)
    measure(streamed(llama), samples(), some_states(6), work=Work(12))
    assert most == [1, 1, 1]


def test_the_losses_of_a_round_share_a_sweep(tmp_path, monkeypatch, spy):
    replay = streamed(tiny_checkpoint("llama", tmp_path, num_hidden_layers=8))
    tokens = random_tokens([12] * 8)
    search = Search(replay, tokens, Work(24), [Target.count(8, 4)], 12.0)
    rounds = []
    turn = Search._turn
    sets = spy(ledger, "measure_together", lambda _, *given: len(given[1]))

    def watched(self, goal):
        sets.clear()
        count, more = sweeps(replay, lambda _: turn(self, goal))
        rounds.append((count, list(sets)))
        return more

    monkeypatch.setattr(Search, "_turn", watched)
    search.run()
    assert len(rounds) > 2
    assert max(len(calls) for _, calls in rounds) == 1
    # New states and those measured on more samples share a sweep.
    assert max(calls[0] for _, calls in rounds if calls) > 1
    # The slopes at a new best state take one more sweep, forward and backward.
    assert max(count for count, _ in rounds) < 3.1


@parametrize("job", ["states", "gradients"])
def test_an_interrupted_run_loses_one_chunk_and_gives_the_same_bits(
    llama, job, tmp_path
):
    tokens = samples()
    states = some_states(6, 5)

    def work(replay, journal=None):
        if job == "gradients":
            return gate_gradients(replay, tokens, work=Work(12, journal=journal))
        found = measure(replay, tokens, states, work=Work(12, journal=journal))
        return np.stack([found.kl_sums, found.nll_sums])

    journal = tmp_path / "journal"
    expected = work(streamed(llama), journal)
    # With several threads the two ways may add up in another order.
    assert_allclose(expected, work(in_memory(llama)), rtol=0, atol=1e-6)
    whole = count_rows(journal)
    batches = len(tokens.batches(12))
    # One row a micro-batch, or one for each of its states and the original.
    each = 1 if job == "gradients" else 1 + len(states)
    assert whole == each * batches
    keep_rows(journal, each, torn=1)
    replay = streamed(llama)
    ran = count_calls(replay.blocks[0].self_attn)
    assert_array_equal(work(replay, journal), expected)
    times = 2 if job == "gradients" else 1
    assert len(ran) == times * (batches - 1), "block 0 is run for each lost micro-batch"
