"""Gate gradients against autograd, one sample at a time, and the energies made of them."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

from isingcut.energies.empirical_fisher import EmpiricalFisher, energy_errors, energy_terms
from isingcut.measure.gates import gated_block
from isingcut.measure.gradients import gate_gradients, gate_rows
from isingcut.measure.work import Work
from isingcut.models.replay import Recording
from journals import count_rows, keep_rows
from tiny import random_tokens, tiny_replay

# For each family the modules whose output is added to the residual stream, by their names:
# what the tests check the structural gates against.
ADDED = {
    "llama": ("self_attn", "mlp"),
    "qwen3": ("self_attn", "mlp"),
    "gemma3": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gpt2": ("attn", "mlp"),
}


def one_at_a_time(replay, tokens, family):
    """Plain autograd: hooks by module name, batch 1, no padding."""
    rows = []
    for s in range(tokens.samples):
        ids = tokens.input_ids[s : s + 1, : int(tokens.mask[s].sum())]
        alpha = torch.ones(len(replay), requires_grad=True)

        def hook(module, args, output, *, gate):
            if isinstance(output, tuple):
                return (output[0] * gate, *output[1:])
            return output * gate

        handles = [
            getattr(block, name).register_forward_hook(functools.partial(hook, gate=alpha[i]))
            for i, block in enumerate(replay.blocks)
            for name in ADDED[family]
        ]
        logits = replay.model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
        (gradient,) = torch.autograd.grad(loss, alpha)
        rows.append(gradient.double().numpy())
        for handle in handles:
            handle.remove()
    return np.array(rows)


@pytest.mark.parametrize("family", sorted(ADDED))
def test_sublayer_gate_gradients_equal_autograd_row_by_row(family):
    replay, tokens = tiny_replay(family), random_tokens()
    expected = one_at_a_time(replay, tokens, family)
    got = gate_gradients(replay, tokens, work=Work(30))
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_no_stream_between_blocks_stays_in_memory_where_graphs_are_kept(monkeypatch):
    # In bfloat16, because a norm keeps its float32 copy of the stream; a float32 one keeps itself.
    replay = tiny_replay("llama", torch.bfloat16)
    streams, alive, run = [], [], Recording.block

    def block(self, i, hidden):
        out = run(self, i, hidden)
        streams.append(StorageWeakRef(out.untyped_storage()))
        return out

    def toward(recording, batch, stream, original):
        alive.append(sum(not stream.expired() for stream in streams))
        return torch.ones_like(stream)

    monkeypatch.setattr(Recording, "block", block)
    (rows,) = gate_rows(replay, [random_tokens()], "sublayer", toward)
    assert (len(streams), alive) == (len(replay), [1])
    assert rows.abs().min() > 0


def test_block_gate_gradients_equal_finite_differences():
    replay, tokens = tiny_replay("llama"), random_tokens()
    got = gate_gradients(replay, tokens, gate="block")
    step = 1e-2
    ids = tokens.input_ids[:1]

    def loss(i, value):
        with torch.no_grad():
            recording = replay.record(ids)
            stream = recording.entered
            for b in range(len(replay)):
                alpha = torch.tensor([value if b == i else 1.0])
                stream = gated_block(recording, b, stream, alpha, "block", ones=False)
            logits = recording.logits(stream[0], 0)
            return float(F.cross_entropy(logits[:-1].double(), ids[0, 1:]))

    for i in range(len(replay)):
        numeric = (loss(i, 1 + step) - loss(i, 1 - step)) / (2 * step)
        assert got[0, i] == pytest.approx(numeric, rel=2e-2, abs=1e-4)


@pytest.mark.parametrize("gate", ["sublayer", "block"])
@pytest.mark.parametrize("family", sorted(ADDED))
def test_a_closed_gate_is_the_removal(family, gate):
    replay = tiny_replay(family)
    ids = random_tokens().input_ids[:2]
    with torch.no_grad():
        recording = replay.record(ids)
        for i in range(len(replay)):
            closed = gated_block(recording, i, recording.entered, torch.zeros(2), gate, ones=False)
            torch.testing.assert_close(closed, recording.entered)


def test_no_parameter_gradient_is_allocated():
    replay = tiny_replay("llama")
    gate_gradients(replay, random_tokens())
    assert all(p.grad is None for p in replay.model.parameters())


def test_the_paper_energy_is_the_quadratic_form_of_the_gradient_matrix():
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((20, 5))
    fisher = rows.T @ rows / 20
    for linear in (False, True):
        h, J = energy_terms(rows, linear=linear)
        for bits in range(32):
            x = np.array([bits >> i & 1 for i in range(5)], dtype=float)
            expected = x @ fisher @ x
            if linear:
                expected = expected / 2 - rows.mean(0) @ x
            assert h @ x + x @ J @ x / 2 == pytest.approx(expected)


def test_empirical_fisher_is_made_of_these_rows():
    replay, tokens = tiny_replay("qwen3"), random_tokens()
    rows = gate_gradients(replay, tokens)
    found = EmpiricalFisher().measure(replay, tokens, Work())
    x = np.ones((1, len(replay)))
    assert found.energies(x)[0] == pytest.approx(np.mean(rows.sum(1) ** 2))
    assert found.unit == "arbitrary"
    assert EmpiricalFisher(linear=True).measure(replay, tokens, Work()).unit == "nats/token"


def test_rows_come_back_from_the_journal(tmp_path):
    replay, tokens = tiny_replay("llama"), random_tokens()
    journal = tmp_path / "rows.journal"
    first = gate_gradients(replay, tokens, work=Work(30, journal=journal))
    # Drop the last finished micro-batch and tear the one before: both are computed again.
    keep_rows(journal, count_rows(journal) - 2, torn=1)
    again = gate_gradients(replay, tokens, work=Work(30, journal=journal))
    np.testing.assert_array_equal(first, again)


linear_or_not = pytest.mark.parametrize("linear", [False, True])


def gradients(m, seed=3):
    """Rows (m, 5) with means, correlations and a heavy tail."""
    rng = np.random.default_rng(seed)
    return rng.standard_t(5, (m, 5)) @ rng.standard_normal((5, 5)) + 0.3


@linear_or_not
@pytest.mark.parametrize("m", [2, 3, 25])
def test_errors_are_those_of_the_jackknife(linear, m):
    rows = gradients(m)
    left_out = [energy_terms(np.delete(rows, s, 0), linear=linear) for s in range(m)]
    got = energy_errors(rows, linear=linear)
    for error, values in zip(got, map(np.array, zip(*left_out, strict=True)), strict=True):
        spread = ((values - values.mean(0)) ** 2).sum(0)
        np.testing.assert_allclose(error, np.sqrt((m - 1) / m * spread), rtol=1e-9, atol=1e-12)


def test_samples_that_agree_have_no_error():
    rows = np.repeat(gradients(1), 7, axis=0)
    for linear in (False, True):
        h_error, J_error = energy_errors(rows, linear=linear)
        np.testing.assert_allclose(h_error, 0, atol=1e-12)
        np.testing.assert_allclose(J_error, 0, atol=1e-6)
        assert not np.diag(J_error).any()


@linear_or_not
def test_the_energy_carries_its_errors(linear):
    replay, tokens = tiny_replay(), random_tokens()
    found = EmpiricalFisher(linear=linear).measure(replay, tokens, Work())
    h_error, J_error = energy_errors(gate_gradients(replay, tokens), linear=linear)
    np.testing.assert_allclose(found.h_error, h_error, rtol=1e-6)
    np.testing.assert_allclose(found.J_error, J_error, rtol=1e-6)
    assert (found.h_error > 0).all()
    one = EmpiricalFisher(linear=linear).measure(replay, tokens.select([0]), Work())
    assert one.h_error is None
    assert one.J_error is None
