"""KL and NLL summed over pieces of the vocabulary against float64 softmax of whole rows."""

import numpy as np
import pytest
import torch

from isingcut.models.compute import head as head_module
from isingcut.models.compute.divergence import RowSums
from isingcut.models.compute.head import OutputHead, comparison, entering
from tiny import random_tokens, tiny_replay

ROWS, WORDS = 7, 5003


def logits(dtype, size=8.0):
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(ROWS, WORDS, generator=generator) * size
    moved = base + torch.randn(ROWS, WORDS, generator=generator) * 0.3
    return base.to(dtype), moved.to(dtype)


def labels():
    return torch.randint(0, WORDS, (ROWS,), generator=torch.Generator().manual_seed(4))


def in_pieces(q, reference, columns, method):
    own = RowSums(labels())
    getattr(own, method)(reference, 0, None)
    sums = RowSums(labels(), own.log_z)
    for a in range(0, WORDS, columns):
        piece = slice(a, a + columns)
        getattr(sums, method)(q[:, piece], a, reference[:, piece])
    return sums


@pytest.mark.parametrize("method", ["_add_compiled", "_add"])
@pytest.mark.parametrize("columns", [97, 700, WORDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pieces_of_any_width_give_the_softmax_of_whole_rows(dtype, columns, method):
    reference, q = logits(dtype)
    sums = in_pieces(q, reference, columns, method)
    p, other = reference.double().log_softmax(-1), q.double().log_softmax(-1)
    kl = (p.exp() * (p - other)).sum(-1)
    nll = -other.gather(1, labels()[:, None])[:, 0]
    np.testing.assert_allclose(sums.kl, kl.numpy(), atol=2e-6)
    np.testing.assert_allclose(sums.nll, nll.numpy(), rtol=1e-6)


@pytest.mark.parametrize("method", ["_add_compiled", "_add"])
def test_equal_logits_have_no_divergence_however_large(method):
    reference, _ = logits(torch.float32, size=300.0)
    sums = in_pieces(reference + 7.0, reference, 1000, method)
    assert np.abs(sums.kl).max() < 1e-5


@pytest.mark.parametrize("method", ["_add_compiled", "_add"])
def test_masked_words_have_no_weight_and_nan_is_not_lost(method):
    reference, q = logits(torch.float32)
    masked = [x.clone() for x in (reference, q)]
    for x in masked:
        x[:, 10:20] = -torch.inf
    shown = [torch.cat([x[:, :10], x[:, 20:]], 1) for x in (reference, q)]
    p, other = (x.double().log_softmax(-1) for x in shown)
    sums = in_pieces(masked[1], masked[0], 1000, method)
    np.testing.assert_allclose(sums.kl, (p.exp() * (p - other)).sum(-1).numpy(), atol=2e-6)
    q[2, 3000] = torch.nan
    lost = in_pieces(q, reference, 1000, method).kl
    assert np.isnan(lost[2])
    assert np.isfinite(np.delete(lost, 2)).all()


def test_rows_do_not_depend_on_the_number_of_threads(monkeypatch):
    reference, q = logits(torch.bfloat16)
    monkeypatch.setattr("isingcut.models.compute.divergence._WORTH_A_THREAD", 1000)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(in_pieces(q, reference, 2000, "_add_compiled").kl)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize(
    ("family", "plain"), [("llama", True), ("gpt2", True), ("gemma2", False), ("cohere2", False)]
)
def test_the_map_is_run_in_pieces_only_where_the_logits_are_its_output(family, plain, monkeypatch):
    monkeypatch.setattr(head_module, "piece_elements", lambda device: 700)
    replay = tiny_replay(family)
    batch = random_tokens((14, 9))
    head = OutputHead(replay)
    assert head.plain is plain
    with torch.inference_mode():
        recording = replay.record(batch.input_ids)
        other = recording.block(1, recording.entered)
        original = comparison(head, recording, recording.entered, batch)
        kl, nll = original.compare(other)
        for s in range(batch.samples):
            rows = batch.predicted[s]
            p, q = (
                recording.logits(x[s], s)[:-1][rows].double().log_softmax(-1)
                for x in (recording.entered, other)
            )
            label = batch.input_ids[s, 1:][rows][:, None]
            assert kl[s] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4, abs=1e-6)
            assert nll[s] == pytest.approx(-float(q.gather(1, label).sum()), rel=1e-6)
            assert original.nll[s] == pytest.approx(-float(p.gather(1, label).sum()), rel=1e-6)


def test_a_mask_written_into_the_logits_counts_as_more_than_the_layer():
    layer, hidden = torch.nn.Linear(4, 6), torch.ones(1, 3, 4)

    def masked():
        logits = layer(hidden)
        logits[..., :2] = torch.finfo(logits.dtype).min
        return logits

    assert entering(layer, lambda: layer(hidden)) is hidden
    assert entering(layer, masked) is None
