"""Measured losses against removing the blocks for real; the pair energy made of them."""

import re
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from isingcut.energies.pairwise import Pairwise
from isingcut.errors import ModelError
from isingcut.ising.states import states_of
from isingcut.measure.gradients import gate_gradients
from isingcut.measure.losses import measure, standard_error
from isingcut.measure.work import Work
from isingcut.models.replay import Replay
from journals import count_rows, keep_rows
from tiny import random_tokens, tiny_replay, without


def really_removed(replay, tokens, removed):
    """Mean KL and NLL per token of a deep copy of the model that lost the blocks."""
    cut = without(replay.model, removed)
    kl = nll = 0.0
    count = 0
    for s in range(tokens.samples):
        ids = tokens.input_ids[s : s + 1, : int(tokens.mask[s].sum())]
        with torch.no_grad():
            p = replay.model(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
            q = cut(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        nll += float(F.nll_loss(q, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return kl / count, nll / count


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_measured_losses_are_those_of_really_removed_blocks(family):
    replay, tokens = tiny_replay(family), random_tokens()
    removals = [[0], [len(replay) - 1], [0, 2], [1, 2, 3]]
    found = measure(replay, tokens, states_of(len(replay), [tuple(r) for r in removals]))
    for s, removed in enumerate(removals):
        kl, nll = really_removed(replay, tokens, removed)
        assert found.kl[s] == pytest.approx(kl, rel=1e-4, abs=1e-6)
        assert found.nll[s] == pytest.approx(nll, rel=1e-5)


def test_pairwise_is_exact_up_to_two_blocks():
    replay, tokens = tiny_replay("llama"), random_tokens()
    n = len(replay)
    energy = Pairwise().measure(replay, tokens, Work(batch_tokens=30))
    for removed in [*[(i,) for i in range(n)], *combinations(range(n), 2)]:
        kl, _ = really_removed(replay, tokens, list(removed))
        value = energy.energies(states_of(n, [removed]))[0]
        assert value == pytest.approx(kl, rel=1e-4, abs=1e-6)
    assert energy.unit == "nats/token"
    assert energy.h_error is not None
    assert (energy.h_error > 0).all()


def test_sharing_prefixes_changes_the_work_and_not_the_result():
    replay, tokens = tiny_replay("qwen3"), random_tokens()
    n = len(replay)
    states = states_of(n, list(combinations(range(n), 2)))
    shared = measure(replay, tokens, states)
    apart = [measure(replay, tokens, state[None]).kl_sums[0] for state in states]
    np.testing.assert_allclose(shared.kl_sums, apart, rtol=1e-6, atol=1e-9)
    assert shared.blocks_run < shared.blocks_unshared == n + (~states).sum()


def test_each_node_of_the_prefix_tree_is_run_once():
    replay, tokens = tiny_replay("llama"), random_tokens()
    n = len(replay)
    ran = []
    handles = [
        b.self_attn.register_forward_hook(lambda m, a, o, i=i: ran.append(i))
        for i, b in enumerate(replay.blocks)
    ]
    rng = np.random.default_rng(5)
    states = rng.random((9, n)) < 0.4
    found = measure(replay, tokens, states, work=Work(10_000))
    for handle in handles:
        handle.remove()
    prefixes = {
        (i, tuple(state[:i]))
        for state in [np.zeros(n, dtype=bool), *states]
        for i in range(n)
        if not state[i]
    }
    assert len(ran) == found.blocks_run == len(prefixes)


def test_micro_batches_and_padding_do_not_change_the_losses():
    replay, tokens = tiny_replay("llama"), random_tokens()
    states = states_of(len(replay), [(1,), (0, 3)])
    whole = measure(replay, tokens, states, work=Work(10_000))
    small = measure(replay, tokens, states, work=Work(1))
    np.testing.assert_allclose(whole.kl_sums, small.kl_sums, rtol=1e-4, atol=1e-7)
    assert whole.counts.tolist() == [13, 8, 13, 10]


def test_an_interrupted_measurement_goes_on_with_the_same_bits(tmp_path):
    replay, tokens = tiny_replay("llama"), random_tokens()
    states = states_of(len(replay), [(1,), (0, 3)])
    journal = tmp_path / "j"
    first = measure(replay, tokens, states, work=Work(15, journal=journal))
    whole = count_rows(journal)
    keep_rows(journal, 1, torn=1)
    ran = []
    handle = replay.blocks[0].self_attn.register_forward_hook(lambda m, a, o: ran.append(1))
    again = measure(replay, tokens, states, work=Work(15, journal=journal))
    handle.remove()
    np.testing.assert_array_equal(first.kl_sums, again.kl_sums)
    # Block 0 is run once a micro-batch: by the original, shared by the state (1,).
    assert len(ran) == whole - 1, "only lost micro-batches are computed again"


def test_a_journal_of_other_states_is_not_used(tmp_path):
    replay, tokens = tiny_replay("llama"), random_tokens()
    journal = tmp_path / "j"
    measure(replay, tokens, states_of(len(replay), [(1,)]), work=Work(journal=journal))
    other = measure(replay, tokens, states_of(len(replay), [(2,)]), work=Work(journal=journal))
    fresh = measure(replay, tokens, states_of(len(replay), [(2,)]))
    np.testing.assert_array_equal(other.kl_sums, fresh.kl_sums)


def test_a_loss_that_is_not_finite_names_state_block_and_text():
    replay = tiny_replay("llama")
    # Only block 0 keeps block 1 from overflowing.
    replay.blocks[0].forward = lambda x, **rest: torch.ones_like(x)
    replay.blocks[1].forward = lambda x, **rest: torch.where(x == 1, x, torch.inf)
    tokens = random_tokens()
    measure(replay, tokens, states_of(len(replay), [(1,), (2,)]))
    with pytest.raises(ModelError, match=r"^the output of block 1 .* without blocks 0, 4 is NaN"):
        measure(replay, tokens, states_of(len(replay), [(1,), (0, 4)]))
    replay = tiny_replay("llama")
    replay.blocks[3].forward = lambda x, **rest: torch.full_like(x, torch.nan)
    # Of some of a model's blocks, as a plan runs them, too.
    with pytest.raises(ModelError, match=r"^the output of block 3 "):
        measure(Replay(replay.model, replay.blocks[2:4]), tokens, [])
    replay = tiny_replay("llama")
    replay.model.lm_head.weight *= 1e38
    begins = re.escape(str(tokens.input_ids[0].tolist())[:9])
    with pytest.raises(ModelError, match=rf"^a loss or gradient of .* that begins {begins}"):
        gate_gradients(replay, tokens)


def test_standard_error_of_equal_samples_is_that_of_the_mean():
    rng = np.random.default_rng(0)
    sums = rng.standard_normal((3, 50))
    counts = np.full(50, 7)
    expected = (sums / 7).std(1, ddof=1) / np.sqrt(50)
    np.testing.assert_allclose(standard_error(sums, counts), expected)


def test_a_journal_of_another_fine_tune_is_not_used(tmp_path):
    replay, tokens = tiny_replay("llama"), random_tokens()
    states = states_of(len(replay), [(1,)])
    journal = tmp_path / "j"
    before = measure(replay, tokens, states, work=Work(journal=journal))
    with torch.no_grad():
        replay.blocks[3].mlp.down_proj.weight.mul_(3)
    after = measure(replay, tokens, states, work=Work(journal=journal))
    np.testing.assert_array_equal(after.kl_sums, measure(replay, tokens, states).kl_sums)
    assert (after.kl_sums != before.kl_sums).all()
