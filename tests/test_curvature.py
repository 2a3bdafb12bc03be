"""Curvature energies against autograd.functional on plain models, in float64."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from isingcut.data.tokens import TokenSet
from isingcut.energies import registry
from isingcut.energies.fisher import Fisher
from isingcut.energies.gauss_newton import GaussNewton
from isingcut.energies.hessian import Hessian
from isingcut.errors import ArchitectureError, InputError
from isingcut.measure.curvature import gate_curvature
from isingcut.measure.gradients import gate_gradients
from isingcut.measure.work import Work
from journals import count_rows, keep_rows
from tiny import random_tokens, tiny_replay

# For each family the modules whose output is added to the residual stream.
ADDED = {
    "llama": ("self_attn", "mlp"),
    "gemma3": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gpt2": ("attn", "mlp"),
}
CURVED = ["fisher", "gauss-newton", "hessian"]


def plain_loss(replay, tokens, family, gate, loss, alpha):
    """Mean token loss with gates on modules found by name, one sample at a time, unpadded."""
    total, count = 0.0, 0
    for s in range(tokens.samples):
        ids = tokens.input_ids[s : s + 1, : int(tokens.mask[s].sum())]
        with torch.no_grad():
            original = replay.model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)

        def sublayer(module, args, output, *, i):
            if isinstance(output, tuple):
                return (output[0] * alpha[i], *output[1:])
            return output * alpha[i]

        def block(module, args, output, *, i):
            out = output[0] if isinstance(output, tuple) else output
            out = args[0] + alpha[i] * (out - args[0])
            return (out, *output[1:]) if isinstance(output, tuple) else out

        handles = []
        for i, b in enumerate(replay.blocks):
            if gate == "block":
                handles.append(b.register_forward_hook(functools.partial(block, i=i)))
            else:
                handles += [
                    getattr(b, name).register_forward_hook(functools.partial(sublayer, i=i))
                    for name in ADDED[family]
                ]
        logits = replay.model(input_ids=ids, use_cache=False).logits[0, :-1]
        for handle in handles:
            handle.remove()
        logp = logits.log_softmax(-1)
        if loss == "nll":
            total = total + F.nll_loss(logp, ids[0, 1:], reduction="sum")
        else:
            total = total + (original.exp() * (original - logp)).sum()
        count += ids.shape[1] - 1
    return total / count


def independent(replay, tokens, family, gate, loss):
    """Gradient and Hessian by autograd.functional, with attention in its eager form."""
    replay.model.set_attn_implementation("eager")
    one = torch.ones(len(replay), dtype=torch.float64)
    function = functools.partial(plain_loss, replay, tokens, family, gate, loss)
    g = torch.autograd.functional.jacobian(function, one)
    H = torch.autograd.functional.hessian(function, one)
    replay.model.set_attn_implementation("sdpa")
    return g.numpy(), H.numpy()


def form(energy, x):
    return float(energy.energies(np.asarray(x, dtype=bool)[None])[0])


def expected_form(g, H, x):
    x = np.asarray(x, dtype=float)
    return -g @ x + x @ H @ x / 2


STATES = [[1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1], [1, 1, 0, 0, 1, 0], [0, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("gate", ["sublayer", "block"])
@pytest.mark.parametrize("family", sorted(ADDED))
def test_hessian_equals_autograd_of_the_plain_model(family, gate):
    replay, tokens = tiny_replay(family, torch.float64), random_tokens()
    g, H = independent(replay, tokens, family, gate, "nll")
    found = gate_curvature(replay, tokens, "hessian", gate=gate, work=Work(30))
    total = found.counts.sum()
    np.testing.assert_allclose(found.gradient_sums.sum(0) / total, g, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found.curvature_sums.sum(0) / total, H, rtol=1e-5, atol=1e-6)
    assert np.abs(H).max() > 1e-2
    energy = Hessian(gate=gate).measure(replay, tokens, Work())
    for x in STATES:
        assert form(energy, x) == pytest.approx(expected_form(g, H, x), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("gate", ["sublayer", "block"])
@pytest.mark.parametrize("family", sorted(ADDED))
def test_gauss_newton_equals_the_hessian_of_the_kl(family, gate):
    replay, tokens = tiny_replay(family, torch.float64), random_tokens()
    g, H = independent(replay, tokens, family, gate, "kl")
    np.testing.assert_allclose(g, 0, atol=1e-12)
    energy = GaussNewton(gate=gate).measure(replay, tokens, Work(batch_tokens=30))
    for x in STATES:
        assert form(energy, x) == pytest.approx(expected_form(0 * g, H, x), rel=1e-4, abs=1e-6)


def test_fisher_is_gauss_newton_on_average_over_the_drawn_labels():
    replay = tiny_replay("llama")
    rows = random_tokens().input_ids[0, :10].tolist()
    exact = GaussNewton().measure(replay, TokenSet.from_rows([rows]), Work())
    drawn = Fisher().measure(replay, TokenSet.from_rows([rows] * 2000), Work(batch_tokens=4000))
    for value, error, target in [
        (drawn.h, drawn.h_error, exact.h),
        (drawn.J, drawn.J_error, exact.J),
    ]:
        off = np.abs(value - target)[error > 0] / error[error > 0]
        # 21 distinct entries: a deviation of 5 standard errors does not come by chance.
        assert off.max() < 5
    assert np.abs(drawn.h - exact.h).max() < 0.2 * exact.h.max()
    assert (drawn.h_error > 0).all()


def test_drawn_labels_depend_on_the_seed_and_the_sample_and_not_on_the_batches():
    replay, tokens = tiny_replay("llama"), random_tokens()
    whole = gate_gradients(replay, tokens, label_seed=3)
    apart = gate_gradients(replay, tokens, label_seed=3, work=Work(1))
    np.testing.assert_allclose(whole, apart, rtol=1e-4, atol=1e-5)
    assert np.abs(whole - gate_gradients(replay, tokens, label_seed=4)).max() > 1e-2
    assert np.abs(whole - gate_gradients(replay, tokens)).max() > 1e-2


@pytest.mark.parametrize("name", CURVED)
def test_curvature_energies_are_symmetric_in_nats_and_deterministic(name):
    replay, tokens = tiny_replay("llama"), random_tokens()
    part = registry.get(name)()
    first = part.measure(replay, tokens, Work(batch_tokens=30))
    again = part.measure(replay, tokens, Work(batch_tokens=30))
    np.testing.assert_array_equal(first.J, again.J)
    np.testing.assert_array_equal(first.h, again.h)
    np.testing.assert_array_equal(first.J, first.J.T)
    assert not np.diag(first.J).any()
    assert first.unit == "nats/token"
    assert first.meta["energy"] == name
    assert (first.h_error > 0).all()
    np.testing.assert_array_equal(first.J_error, first.J_error.T)
    single = part.measure(replay, tokens.select([1]), Work())
    assert single.h_error is None


@pytest.mark.parametrize("name", ["fisher", "gauss-newton"])
def test_curvatures_of_the_kl_are_nowhere_negative(name):
    replay = tiny_replay("gpt2")
    energy = registry.get(name)().measure(replay, random_tokens(), Work())
    matrix = energy.J + 2 * np.diag(energy.h)
    assert np.linalg.eigvalsh(matrix).min() > -1e-5 * np.abs(matrix).max()


def test_micro_batches_do_not_change_the_curvature_and_a_journal_brings_it_back(tmp_path):
    replay, tokens = tiny_replay("llama", torch.float64), random_tokens()
    whole = gate_curvature(replay, tokens, "hessian", work=Work(1000))
    journal = tmp_path / "j"
    parts = gate_curvature(replay, tokens, "hessian", work=Work(15, journal=journal))
    np.testing.assert_allclose(whole.curvature_sums, parts.curvature_sums, rtol=1e-6, atol=1e-5)
    keep_rows(journal, count_rows(journal) - 2, torn=1)
    again = gate_curvature(replay, tokens, "hessian", work=Work(15, journal=journal))
    np.testing.assert_array_equal(again.curvature_sums, parts.curvature_sums)
    other = gate_curvature(replay, tokens, "gauss-newton", work=Work(15, journal=journal))
    assert np.abs(other.curvature_sums - parts.curvature_sums).max() > 1e-2


def test_the_choice_of_attention_ends_with_the_call():
    replay = tiny_replay("llama")
    before = torch.backends.cuda.flash_sdp_enabled()
    gate_curvature(replay, random_tokens().select([0]), "hessian")
    assert torch.backends.cuda.flash_sdp_enabled() == before
    assert all(p.grad is None for p in replay.model.parameters())


class Once(torch.autograd.Function):
    """A kernel whose backward builds no graph."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * 2


class Never(torch.autograd.Function):
    """A kernel whose backward refuses to be differentiated."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return Never.Backward.apply(grad)

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, grad):
            return grad * 2

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("derivative of kernel_backward is not implemented")


@pytest.mark.parametrize("kernel", [Once, Never])
@pytest.mark.parametrize("kind", ["hessian", "gauss-newton"])
def test_what_cannot_be_differentiated_twice_is_refused(kernel, kind):
    replay = tiny_replay("llama")
    handle = replay.blocks[3].mlp.register_forward_hook(lambda m, a, o: kernel.apply(o))
    with pytest.raises(ArchitectureError, match="differentiated twice"):
        gate_curvature(replay, random_tokens().select([0]), kind)
    handle.remove()


@pytest.mark.parametrize("kind", ["hessian", "gauss-newton"])
def test_half_precision_comes_near(kind):
    exact = gate_curvature(tiny_replay("llama"), random_tokens(), kind).curvature_sums
    half = gate_curvature(
        tiny_replay("llama", torch.bfloat16), random_tokens(), kind
    ).curvature_sums
    assert np.linalg.norm(half - exact) < 0.1 * np.linalg.norm(exact)


def test_an_unknown_kind_is_refused():
    with pytest.raises(InputError, match="gauss-newton"):
        gate_curvature(tiny_replay("llama"), random_tokens(), "newton")
