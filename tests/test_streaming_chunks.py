"""Streamed measurements in any chunks, from any moment on, give the same bits."""

import weakref

import numpy as np
import pytest

from isingcut.energies.search import Search, Target
from isingcut.errors import InputError
from isingcut.measure import ledger
from isingcut.measure.gradients import Boundaries, gate_gradients
from isingcut.measure.losses import measure, measure_together
from isingcut.measure.streams import one_pass
from isingcut.measure.work import Work
from isingcut.models.compute import head
from isingcut.models.compute.head import OutputHead
from isingcut.models.streaming.reader import Reader
from isingcut.models.streaming.replay import StreamedReplay
from isingcut.testing.tiny import tiny_checkpoint
from journals import count_rows, keep_rows
from streams import in_memory, samples, some_states, streamed
from tiny import random_tokens

pytestmark = pytest.mark.usefixtures("one_layout")


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
    expected = measure(whole, samples(), states, work=Work(24))
    found = measure(narrow, samples(), states, work=Work(24))
    np.testing.assert_array_equal(found.kl_sums, expected.kl_sums)
    np.testing.assert_array_equal(found.nll_sums, expected.nll_sums)


def test_too_little_memory_for_one_state_is_an_error(narrow):
    narrow.allowed = 3
    with pytest.raises(InputError, match="raise --memory-limit or lower --batch-tokens"):
        measure(narrow, samples(), some_states(len(narrow)), work=Work(24))


def test_hidden_states_that_do_not_fit_go_to_a_file(llama, narrow, monkeypatch, tmp_path):
    expected = gate_gradients(in_memory(llama), samples(), work=Work(24))
    used = []
    close = Boundaries.close
    monkeypatch.setattr(Boundaries, "close", lambda self: (used.append(self.spilled), close(self)))
    narrow.allowed = 3
    found = gate_gradients(narrow, samples(), work=Work(24, journal=tmp_path / "journal"))
    np.testing.assert_array_equal(found, expected)
    assert min(used) > 0
    assert [p.name for p in tmp_path.iterdir()] == ["journal"]


@pytest.mark.parametrize("family", ["llama", "mixtral", "nemotron_h"])
def test_graphs_are_kept_where_there_is_room(family, tmp_path, monkeypatch):
    folder = tiny_checkpoint(family, tmp_path)
    expected = gate_gradients(in_memory(folder), samples(), work=Work(24))
    replay = streamed(folder)
    OutputHead(replay)  # looking at the head calls the blocks
    ran = []
    for block in replay.blocks:
        block.register_forward_hook(lambda m, a, o: ran.append(1))
    counts = []
    for allowed in (11, 120, 100_000):
        room = lambda self, batch, k=allowed: k * self.stream_bytes(batch)  # noqa: E731
        monkeypatch.setattr(StreamedReplay, "room", room)
        ran.clear()
        found = gate_gradients(replay, samples(), work=Work(24))
        np.testing.assert_array_equal(found, expected)
        counts.append(len(ran))
    none, some, every = counts
    # Recording a batch calls every block once too, without running it.
    batches = len(samples().batches(24))
    assert none - every == batches * len(replay)
    assert every < some < none


def test_each_block_is_read_once_per_chunk(llama, monkeypatch):
    replay = streamed(llama)
    replay.store.buffers.keep_at_most(0)
    OutputHead(replay)  # looking at the head reads it
    read = []
    fill = Reader.fill
    monkeypatch.setattr(Reader, "fill", lambda self, p, b: (read.append(p), fill(self, p, b))[1])
    n = len(replay)
    measure(replay, samples(), some_states(n), work=Work(12))
    assert [p for p in read if p != "embed"] == [*range(n), "head"]
    read.clear()
    gate_gradients(replay, samples(), work=Work(12))
    # The last block is still there when the backward sweep begins.
    assert [p for p in read if p != "embed"] == [*range(n), "head", *reversed(range(n - 1))]


def sweeps(replay, job, *arguments, **options):
    """How often a job reads the model, and what it gives."""
    before = replay.store.reading()
    found = job(replay, *arguments, **options)
    return (replay.store.reading() - before).sweeps, found


def test_one_sweep_is_enough_for_all_that_fits(llama):
    replay, tokens = streamed(llama), samples()
    OutputHead(replay)  # looking at the head reads it
    states = [some_states(len(replay), 5), some_states(len(replay), 9)[5:]]
    wanted = [(tokens, states[0]), (tokens.select([2, 0]), states[1])]
    count, found = sweeps(replay, measure_together, wanted, Work(12), "measuring")
    assert count == pytest.approx(1.0, abs=0.1)
    for result, (text, some) in zip(found, wanted, strict=True):
        expected = measure(replay, text, some, work=Work(12))
        np.testing.assert_array_equal(result.kl_sums, expected.kl_sums)
        np.testing.assert_array_equal(result.nll_sums, expected.nll_sums)
    count, found = sweeps(replay, one_pass, tokens, Work(12))
    assert count < 1
    for result, expected in zip(found, one_pass(in_memory(llama), tokens, Work(12)), strict=True):
        np.testing.assert_array_equal(result, expected)


def test_the_original_s_logits_of_one_micro_batch_exist_at_a_time(llama, monkeypatch):
    alive, most = weakref.WeakSet(), []

    class Watched(head._Fused):
        def __init__(self, *args):
            super().__init__(*args)
            alive.add(self)
            most.append(len(alive))

    monkeypatch.setattr(head, "_Fused", Watched)
    measure(streamed(llama), samples(), some_states(6), work=Work(12))
    assert most == [1, 1, 1]


def test_the_losses_of_a_round_share_a_sweep(tmp_path, monkeypatch):
    replay = streamed(tiny_checkpoint("llama", tmp_path, num_hidden_layers=8))
    tokens = random_tokens([12] * 8)
    search = Search(replay, tokens, Work(24), [Target.count(8, 4)], 12.0)
    sets, rounds = [], []
    turn, together = Search._turn, measure_together
    monkeypatch.setattr(
        ledger, "measure_together", lambda *a: (sets.append(len(a[1])), together(*a))[1]
    )

    def watched(self, goal):
        sets.clear()
        count, more = sweeps(replay, lambda _: turn(self, goal))
        rounds.append((count, list(sets)))
        return more

    monkeypatch.setattr(Search, "_turn", watched)
    search.run()
    assert len(rounds) > 2
    assert max(len(calls) for _, calls in rounds) == 1
    # New states and those that are looked at more closely, in one of them.
    assert max(calls[0] for _, calls in rounds if calls) > 1
    # The slopes at a new best state are one sweep more, there and back.
    assert max(count for count, _ in rounds) < 3.1


@pytest.mark.parametrize("job", ["states", "gradients"])
def test_an_interrupted_run_loses_one_chunk_and_gives_the_same_bits(llama, job, tmp_path):
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
    np.testing.assert_allclose(expected, work(in_memory(llama)), rtol=0, atol=1e-6)
    whole = count_rows(journal)
    assert whole == len(tokens.batches(12))
    keep_rows(journal, 1, torn=1)
    replay = streamed(llama)
    ran = []
    replay.blocks[0].self_attn.register_forward_hook(lambda m, a, o: ran.append(1))
    np.testing.assert_array_equal(work(replay, journal), expected)
    assert len(ran) == whole - 1, "block 0 is run once for each lost micro-batch"


def test_other_chunks_go_on_from_what_a_journal_has(llama, narrow, tmp_path):
    states = some_states(6, 9)
    expected = measure(in_memory(llama), samples(), states, work=Work(24))
    narrow.allowed = 5
    journal = tmp_path / "journal"
    measure(narrow, samples(), states, work=Work(24, journal=journal))
    keep_rows(journal, 3)
    narrow.allowed = 8
    found = measure(narrow, samples(), states, work=Work(24, journal=journal))
    np.testing.assert_array_equal(found.kl_sums, expected.kl_sums)
    np.testing.assert_array_equal(found.original_nll_sums, expected.original_nll_sums)
