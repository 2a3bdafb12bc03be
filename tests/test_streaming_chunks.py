"""Streamed measurements in any chunks, from any moment on, give the same bits."""

import gc
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from isingcut.errors import InputError
from isingcut.measure.boundaries import Boundaries
from isingcut.measure.gradients import gate_gradients
from isingcut.measure.losses import measure
from isingcut.measure.pace import Pace
from isingcut.models.compute.head import OutputHead
from isingcut.models.streaming.reader import Reader
from isingcut.models.streaming.replay import StreamedReplay
from isingcut.testing.tiny import tiny_checkpoint
from journals import count_rows, keep_rows
from streams import in_memory, samples, some_states, streamed

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
    expected = measure(whole, samples(), states, batch_tokens=24)
    found = measure(narrow, samples(), states, batch_tokens=24)
    np.testing.assert_array_equal(found.kl_sums, expected.kl_sums)
    np.testing.assert_array_equal(found.nll_sums, expected.nll_sums)


def test_too_little_memory_for_one_state_is_an_error(narrow):
    narrow.allowed = 3
    with pytest.raises(InputError, match="raise --memory-limit or lower --batch-tokens"):
        measure(narrow, samples(), some_states(len(narrow)), batch_tokens=24)


def test_hidden_states_that_do_not_fit_go_to_a_file(llama, narrow, monkeypatch, tmp_path):
    expected = gate_gradients(in_memory(llama), samples(), batch_tokens=24)
    used = []
    close = Boundaries.close
    monkeypatch.setattr(Boundaries, "close", lambda self: (used.append(self.spilled), close(self)))
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
    OutputHead(replay)  # looking at the head calls the blocks
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


def test_a_graph_that_no_gradient_was_asked_of_is_let_go(llama):
    replay = streamed(llama)
    replay.store.hold(0)
    stream = torch.ones(4, requires_grad=True)
    gone = weakref.ref(stream)
    with replay.store.lasting_graph(0):
        stream.exp()
    del stream
    gc.collect()
    assert gone() is None


def test_each_block_is_read_once_per_chunk(llama, monkeypatch):
    replay = streamed(llama)
    monkeypatch.setattr(Pace, "timed", lambda self, n: nullcontext())
    monkeypatch.setattr(Pace, "__init__", lambda self, store: setattr(self, "batches", 100))
    OutputHead(replay)  # looking at the head reads it
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
    expected = measure(in_memory(llama), samples(), states, batch_tokens=24)
    narrow.allowed = 5
    journal = tmp_path / "journal"
    measure(narrow, samples(), states, batch_tokens=24, journal=journal)
    keep_rows(journal, 3)
    narrow.allowed = 8
    found = measure(narrow, samples(), states, batch_tokens=24, journal=journal)
    np.testing.assert_array_equal(found.kl_sums, expected.kl_sums)
    np.testing.assert_array_equal(found.original_nll_sums, expected.original_nll_sums)
