"""Gate gradients against autograd on plain models, and the energies made of them."""

import functools

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from isingcut.energies.empirical_fisher import EmpiricalFisher, form_energy
from isingcut.energies.fisher import Fisher
from isingcut.measure.gradients import gate_rows
from isingcut.models.replay import Recording
from shared import ArchitectureError, parametrize, refuses
from sweep.gates import gated_loss
from tiny import Hamiltonian, TokenSet, Work, gate_gradients, random_tokens, tiny_replay

# For each family, the names of the modules whose output is added to the residual stream: the
# reference for the structural gates.
ADDED = {
    "llama": ("self_attn", "mlp"),
    "qwen3": ("self_attn", "mlp"),
    "gemma3": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gpt2": ("attn", "mlp"),
}


@parametrize("family", sorted(ADDED))
def test_sublayer_gate_gradients_equal_autograd_row_by_row(family):
    replay = tiny_replay(family)
    tokens = random_tokens()
    expected = [
        torch.autograd.functional.jacobian(
            functools.partial(gated_loss, replay, tokens.select([s]), ADDED[family]),
            torch.ones(len(replay)),
        ).numpy()
        for s in range(tokens.samples)
    ]
    got = gate_gradients(replay, tokens, work=Work(30))
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_a_scaled_stream_has_no_sublayer_gate():
    """A gate at 0 would leave the scaled stream, and a removal leaves the stream."""
    replay = tiny_replay("gemma4", num_kv_shared_layers=0)
    with refuses("only some additions", ArchitectureError):
        gate_gradients(replay, random_tokens())


def test_no_stream_between_blocks_stays_in_memory_where_graphs_are_kept(spy):
    # In bfloat16 a norm keeps its own float32 copy; in float32 it would keep the stream itself.
    replay = tiny_replay("llama", torch.bfloat16)
    alive = []
    streams = spy(
        Recording, "block", lambda out, *_: StorageWeakRef(out.untyped_storage())
    )

    def toward(recording, batch, stream, original):
        alive.append(sum(not stream.expired() for stream in streams))
        return torch.ones_like(stream)

    (rows,) = gate_rows(replay, [random_tokens()], "sublayer", toward)
    assert (len(streams), alive) == (len(replay), [1])
    assert rows.abs().min() > 0


def gradients(m):
    """Return rows (m, 5) with means, correlations and a heavy tail."""
    rng = np.random.default_rng(3)
    return rng.standard_t(5, (m, 5)) @ rng.standard_normal((5, 5)) + 0.3


@parametrize("m", [2, 3, 25])
def test_errors_are_those_of_the_jackknife(m):
    rows = gradients(m)
    left_out = [form_energy(np.delete(rows, s, 0), {}) for s in range(m)]
    got = form_energy(rows, {})
    for error, name in ((got.h_error, "h"), (got.J_error, "J")):
        values = np.array([getattr(energy, name) for energy in left_out])
        expected = np.sqrt(m - 1) * values.std(0)
        np.testing.assert_allclose(error, expected, rtol=1e-9, atol=1e-12)


def test_the_energy_carries_its_errors():
    replay = tiny_replay()
    tokens = random_tokens()
    found = EmpiricalFisher().measure(replay, tokens, Work())
    assert (found.h_error > 0).all()
    assert found.unit == "arbitrary"
    one = EmpiricalFisher().measure(replay, tokens.select([0]), Work())
    assert one.h_error is None
    assert one.J_error is None


def test_fisher_is_the_curvature_of_the_kl_on_average_over_the_drawn_labels():
    replay = tiny_replay("llama")
    rows = random_tokens().input_ids[0, :10].tolist()
    replay.model.set_attn_implementation("eager")
    text = TokenSet.from_rows([rows])
    kl = functools.partial(gated_loss, replay, text, ADDED["llama"], kl=True)
    H = torch.autograd.functional.hessian(kl, torch.ones(len(replay))).numpy()
    exact = Hamiltonian.from_quadratic(H / 2)
    drawn = Fisher().measure(
        replay, TokenSet.from_rows([rows] * 2000), Work(batch_tokens=4000)
    )
    for value, error, target in [
        (drawn.h, drawn.h_error, exact.h),
        (drawn.J, drawn.J_error, exact.J),
    ]:
        off = np.abs(value - target)[error > 0] / error[error > 0]
        # 21 distinct entries: a deviation of 5 standard errors is not due to chance.
        assert off.max() < 5
    assert np.abs(drawn.h - exact.h).max() < 0.2 * exact.h.max()
    assert (drawn.h_error > 0).all()
    assert (drawn.unit, drawn.meta["energy"]) == ("nats/token", "fisher")


def test_drawn_labels_depend_on_the_seed_and_the_sample_and_not_on_the_batches():
    replay = tiny_replay("llama")
    tokens = random_tokens()
    whole = gate_gradients(replay, tokens, label_seed=3)
    apart = gate_gradients(replay, tokens, label_seed=3, work=Work(1))
    np.testing.assert_allclose(whole, apart, rtol=1e-4, atol=1e-5)
    assert np.abs(whole - gate_gradients(replay, tokens, label_seed=4)).max() > 1e-2
    assert np.abs(whole - gate_gradients(replay, tokens)).max() > 1e-2
