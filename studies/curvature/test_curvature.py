"""The plug-in: exact curvatures against autograd on plain models, and how it is found."""

import functools

import numpy as np
import pytest
import torch
from isingcut_curvature import GaussNewton, Hessian, gate_curvature

from cards import fake_cards
from isingcut.energies import registry
from isingcut.errors import ArchitectureError
from isingcut.measure.work import Work
from isingcut.testing.tiny import tiny_model
from shared import call, flags
from sweep.gates import gated_loss
from tiny import count_rows, keep_rows, random_tokens, replay_of, tiny_replay

# The modules whose output is added to the residual stream.
ADDED = {
    "llama": ("self_attn", "mlp"),
    "gemma3": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gpt2": ("attn", "mlp"),
}
KINDS = ("hessian", "gauss-newton")
STATES = np.random.default_rng(0).integers(0, 2, (4, 6)).astype(float)


@pytest.mark.parametrize("gate", ["sublayer", "block"])
@pytest.mark.parametrize("family", sorted(ADDED))
@pytest.mark.parametrize("energy", [Hessian, GaussNewton])
def test_energies_equal_autograd_of_the_plain_model(energy, family, gate):
    replay = tiny_replay(family, torch.float64)
    tokens = random_tokens()
    replay.model.set_attn_implementation("eager")
    one = torch.ones(len(replay), dtype=torch.float64)
    added = ADDED[family] if gate == "sublayer" else ()
    loss = functools.partial(
        gated_loss, replay, tokens, added, kl=energy is GaussNewton
    )
    g = torch.autograd.functional.jacobian(loss, one).numpy()
    H = torch.autograd.functional.hessian(loss, one).numpy()
    replay.model.set_attn_implementation("sdpa")
    assert np.abs(H).max() > 1e-2
    formed = energy(gate=gate).measure(replay, tokens, Work(batch_tokens=30))
    for x in STATES:
        assert formed.energy(x) == pytest.approx(
            -g @ x + x @ H @ x / 2, rel=1e-4, abs=1e-6
        )
    assert formed.meta["energy"] == energy.kind


def test_micro_batches_do_not_change_the_curvature_and_a_journal_brings_it_back(
    tmp_path,
):
    replay = tiny_replay("llama", torch.float64)
    tokens = random_tokens()
    kept = Work(15, journal=tmp_path / "j")

    def curvature(kind="hessian", work=kept):
        return gate_curvature(replay, tokens, kind, work)[1]

    parts = curvature()
    np.testing.assert_allclose(curvature(work=Work(1000)), parts, rtol=1e-6, atol=1e-5)
    keep_rows(kept.journal, count_rows(kept.journal) - 2, torn=1)
    np.testing.assert_array_equal(curvature(), parts)
    assert np.abs(curvature("gauss-newton") - parts).max() > 1e-2


class Once(torch.autograd.Function):
    """A kernel whose backward builds no graph."""

    forward = staticmethod(lambda ctx, x: x * 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * 2


class Never(Once):
    """A kernel whose backward refuses to be differentiated."""

    @staticmethod
    def backward(ctx, grad):
        return Never.Backward.apply(grad)

    class Backward(Once):
        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("derivative of kernel_backward is not implemented")


@pytest.mark.parametrize("kernel", [Once, Never])
@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_differentiated_twice_is_refused(kernel, kind):
    replay = tiny_replay("llama")
    replay.blocks[3].mlp.register_forward_hook(lambda m, a, o: kernel.apply(o))
    with pytest.raises(ArchitectureError, match="differentiated twice"):
        gate_curvature(replay, random_tokens().select([0]), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_and_a_card_come_near(kind):
    exact = gate_curvature(tiny_replay("llama"), random_tokens(), kind)[1]
    half = gate_curvature(tiny_replay("llama", torch.bfloat16), random_tokens(), kind)[
        1
    ]
    assert np.linalg.norm(half - exact) < 0.1 * np.linalg.norm(exact)
    with fake_cards() as (card,):
        replay = replay_of(tiny_model("llama").to(card.device))
        there = gate_curvature(replay, random_tokens(), kind)[1]
    np.testing.assert_allclose(there, exact, rtol=1e-4, atol=1e-5)


def test_an_installed_plug_in_is_found_measured_and_judged(
    model, install, tmp_path, capsys
):
    assert not {*KINDS} & {*registry.names()}
    install()
    assert [registry.get(name) for name in KINDS] == [Hessian, GaussNewton]
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{i * i % 97}" for i in range(900)))
    given = {"calibration": text, "out": tmp_path / "run", "length": 16}
    given |= {"energy": "hessian", "rank_samples": 4, "report_samples": 4}
    words = ["energy", model, *flags(given)]
    assert call(*words, "--stream=on") == 2
    assert "'hessian' needs all blocks in memory" in capsys.readouterr().err
    assert call(*words) == 0
    assert (tmp_path / "run" / "hamiltonian.safetensors").is_file()
