"""Measured losses against models without the blocks; sums over pieces of the vocabulary."""

import re
from itertools import combinations

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from isingcut.energies.pairwise import Pairwise
from isingcut.files.journal import Journal
from isingcut.measure.streams import check_finite
from isingcut.models.compute import head as head_module
from isingcut.models.compute.divergence import RowSums
from isingcut.models.compute.head import OutputHead, find_head_input
from shared import ModelError, parametrize, refuses
from tiny import (
    Work,
    gate_gradients,
    measure,
    plain_means,
    plain_sums,
    random_tokens,
    states_of,
    tiny_replay,
    without,
)


@parametrize(
    "family, plain",
    [
        ("llama", True),
        ("gemma3", True),
        ("gpt2", True),
        ("gemma2", False),
        ("cohere2", False),
    ],
)
def test_measured_losses_are_those_of_really_removed_blocks(family, plain, stub):
    """The output layer runs in pieces, where the logits are its output."""
    stub(head_module, "piece_elements", 700)
    replay = tiny_replay(family)
    assert OutputHead(replay).plain is plain
    tokens = random_tokens()
    removals = [[0], [len(replay) - 1], [0, 2], [1, 2, 3]]
    found = measure(replay, tokens, states_of(len(replay), removals))
    for s, removed in enumerate(removals):
        kl, nll = plain_means(replay.model, without(replay.model, removed), tokens)
        assert found.kl[s] == pytest.approx(kl, rel=1e-4, abs=1e-6)
        assert found.nll[s] == pytest.approx(nll, rel=1e-5)
    assert_allclose(
        found.original_nll_sums,
        plain_sums(replay.model, replay.model, tokens)[0],
        rtol=1e-5,
    )


def test_pairwise_is_exact_up_to_two_blocks():
    replay = tiny_replay("llama")
    tokens = random_tokens()
    n = len(replay)
    energy = Pairwise().measure(replay, tokens, Work(batch_tokens=30))
    for removed in [*[(i,) for i in range(n)], *combinations(range(n), 2)]:
        kl, _ = plain_means(replay.model, without(replay.model, removed), tokens)
        value = energy.energies(states_of(n, [removed]))[0]
        assert value == pytest.approx(kl, rel=1e-4, abs=1e-6)
    assert energy.unit == "nats/token"
    assert energy.h_error is not None
    assert (energy.h_error > 0).all()


def test_router_logits_in_the_outputs_change_nothing():
    # Many fine-tunes of Mixtral have this field in their config.json.
    tokens = random_tokens()

    def numbers(wanted):
        replay = tiny_replay("mixtral", output_router_logits=wanted)
        losses = measure(replay, tokens, states_of(len(replay), [(1,), (0, 3)]))
        return losses.kl_sums.tolist(), gate_gradients(replay, tokens).tolist()

    assert numbers(False) == numbers(True)


def test_a_loss_that_is_not_finite_names_state_block_and_text():
    replay = tiny_replay("llama")
    # Only block 0 keeps block 1 from overflowing.
    replay.blocks[0].forward = lambda x, **rest: torch.ones_like(x)
    replay.blocks[1].forward = lambda x, **rest: torch.where(x == 1, x, torch.inf)
    tokens = random_tokens()
    measure(replay, tokens, states_of(len(replay), [(1,), (2,)]))
    with refuses(r"^the output of block 1 .* without blocks 0, 4 is NaN", ModelError):
        measure(replay, tokens, states_of(len(replay), [(1,), (0, 4)]))
    replay = tiny_replay("llama")
    replay.blocks[3].forward = lambda x, **rest: torch.full_like(x, torch.nan)
    with refuses(r"^the output of block 3 ", ModelError):
        measure(replay, tokens, [])
    replay = tiny_replay("llama")
    replay.model.lm_head.weight *= 1e38
    begins = re.escape(str(tokens.input_ids[0].tolist())[:9])
    with refuses(rf"^a loss or gradient of .* that begins {begins}", ModelError):
        gate_gradients(replay, tokens)


def test_the_text_of_a_number_that_is_not_finite_is_named():
    replay = tiny_replay("llama")
    tokens = random_tokens()
    states = states_of(len(replay), [(1,), (2,)])
    of_states = np.zeros((2, 2, 4))
    of_states[0, 1, 2] = np.nan
    for found, row in ((np.array([[0.0], [np.nan], [0.0], [0.0]]), 1), (of_states, 2)):
        begins = re.escape(str(tokens.input_ids[row].tolist())[:9])
        with refuses(f"that begins {begins}", ModelError):
            check_finite(replay, tokens, found, states if row == 2 else None)


@parametrize("changed", ["states", "weights", "attention"])
@parametrize("job", ["losses", "gradients"])
def test_a_journal_of_another_measurement_is_not_used(job, changed, tmp_path, spy):
    replay = tiny_replay("llama")
    tokens = random_tokens()
    states = [(1,)]
    computed = spy(Journal, "put")

    def work(journal=tmp_path / "journal"):
        computed.clear()
        given = Work(journal=journal)
        if job == "losses":
            removed = states_of(len(replay), states)
            return measure(replay, tokens, removed, given).kl_sums
        return gate_gradients(replay, tokens.select([0, states[0][0]]), given)

    before = work()
    assert computed
    assert_array_equal(work(), before)
    assert not computed, "what the same measurement has measured is there"
    if changed == "states":
        states[0] = (2,)
    elif changed == "weights":
        with torch.no_grad():
            replay.blocks[3].mlp.down_proj.weight.mul_(3)
    else:
        replay.attention = "eager"
    after = work()
    assert computed
    assert_array_equal(after, work(None))
    assert np.allclose(after, before, rtol=1e-4, atol=1e-6) == (changed == "attention")


ROWS = 7
WORDS = 5003


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
    assert own.kl.isnan().all(), "there is no reference"
    sums = RowSums(labels(), own.log_z)
    for a in range(0, WORDS, columns):
        piece = slice(a, a + columns)
        getattr(sums, method)(q[:, piece], a, reference[:, piece])
    return sums


@parametrize("method", ["_add_compiled", "_add"])
@parametrize("columns", [97, 700, WORDS])
@parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_of_any_width_give_the_softmax_of_whole_rows(dtype, columns, method):
    reference, q = logits(dtype)
    sums = in_pieces(q, reference, columns, method)
    p = reference.double().log_softmax(-1)
    other = q.double().log_softmax(-1)
    kl = (p.exp() * (p - other)).sum(-1)
    nll = -other.gather(1, labels()[:, None])[:, 0]
    assert_allclose(sums.kl, kl.numpy(), atol=2e-6)
    assert_allclose(sums.nll, nll.numpy(), rtol=1e-6)


@parametrize("method", ["_add_compiled", "_add"])
def test_logits_of_unequal_vocabularies_are_refused(method):
    reference, q = logits(torch.float32)
    with pytest.raises(RuntimeError, match="must match"):
        in_pieces(q, reference[:, :-1], WORDS, method)


@parametrize("method", ["_add_compiled", "_add"])
def test_equal_logits_have_no_divergence_however_large(method):
    reference, _ = logits(torch.float32, size=300.0)
    assert in_pieces(reference + 7.0, reference, 1000, method).kl.abs().max() < 1e-5


@parametrize("method", ["_add_compiled", "_add"])
def test_masked_words_have_no_weight_and_nan_is_not_lost(method):
    reference, q = logits(torch.float32)
    masked = [x.clone() for x in (reference, q)]
    # All of the first piece, and a part of the second.
    for x in masked:
        x[:, :1500] = -torch.inf
    shown = [x[:, 1500:] for x in (reference, q)]
    p, other = (x.double().log_softmax(-1) for x in shown)
    sums = in_pieces(masked[1], masked[0], 1000, method)
    assert_allclose(sums.kl, (p.exp() * (p - other)).sum(-1).numpy(), atol=2e-6)
    q[2, 3000] = torch.nan
    lost = in_pieces(q, reference, 1000, method).kl
    assert lost.isfinite().logical_not().nonzero().tolist() == [[2]]


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
    assert_array_equal(*found)


def test_a_mask_written_into_the_logits_counts_as_more_than_the_layer():
    layer = torch.nn.Linear(4, 6)
    hidden = torch.ones(1, 3, 4)

    def masked():
        logits = layer(hidden)
        logits[..., :2] = torch.finfo(logits.dtype).min
        return logits

    assert find_head_input(layer, lambda: layer(hidden)) is hidden
    assert find_head_input(layer, masked) is None
