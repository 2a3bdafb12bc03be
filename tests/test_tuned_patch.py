"""The tuned patch: what it wins on held-out samples, and what it keeps."""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import cards
from cards import fake_cards
from isingcut.healing.job import Job
from isingcut.healing.patch.files import apply_patches
from isingcut.healing.repairs import tuned as tuning
from isingcut.healing.repairs.base import Repaired
from isingcut.healing.repairs.linear import fit_patches
from isingcut.healing.repairs.tuned import split_samples, tune
from isingcut.models.device import Allowance
from isingcut.models.replay import Recording
from shared import ArchitectureError, FitError, HealConfig, parametrize, refuses
from test_patch import tokens
from tiny import (
    Work,
    gone,
    plain_means,
    replay_of,
    skip_blocks,
    stack_modules,
    tiny_model,
)

REMOVED = (2, 3)


def tuned(model, text, removed=REMOVED, at_a_time=96, **changes):
    replay = replay_of(model)
    linear = Repaired([], None)
    texts = split_samples(text)
    with contextlib.suppress(ArchitectureError):  # No map helps some random models.
        linear = replace(fit_patches(replay, texts[0], removed, Work(96)), **changes)
    teacher = SimpleNamespace(replay=replay)
    job = Job(teacher, gone(removed), None, text, None, HealConfig(batch_tokens=96))
    found, record = tune(job, texts, linear, at_a_time=at_a_time)
    return SimpleNamespace(patches=found, record=record)


def divergence(model, text, found, removed=REMOVED):
    """Return KL(original || patched) from plain forward passes over the held-out samples."""

    def patched(**inputs):
        replay = replay_of(model)
        with skip_blocks(model, removed), apply_patches(replay, found.patches):
            return model(**inputs)

    kl, _ = plain_means(model, patched, text.select(range(7, text.samples, 8)))
    return kl


@parametrize("family", ["llama", "gpt2", "gemma3", "mamba2"])
def test_the_loss_on_samples_held_out_falls_and_is_that_of_the_patched_model(
    monkeypatch, family
):
    # Every sample eight times, so that what is learnt also applies to the validation samples.
    model = tiny_model(family)
    text = tokens(16).select(torch.arange(16).repeat_interleave(8))
    monkeypatch.setattr(tuning, "STEP_TOKENS", 64)
    monkeypatch.setattr(tuning, "RATE", 0.002)
    found = tuned(model, text)
    kl = found.record.held_out_kl
    assert min(kl) < kl[0]
    assert divergence(model, text, found) == pytest.approx(min(kl), rel=1e-3)
    assert {p.block for p in found.patches} == {1, 4}


@parametrize("removed", [REMOVED, (0, 3), (4, 5)])
def test_the_original_runs_once_for_the_fit_and_the_tuning(removed, spy):
    model = tiny_model("llama")
    # Of unequal lengths, and in other micro-batches than those of the fit.
    text = tokens(16)
    ran = spy(Recording, "block", lambda found, recording, i, stream: i)
    once = tuned(model, text, removed)
    runs = len(ran)
    again = tuned(model, text, removed, original=None)
    assert (len(ran) - runs == runs) == (0 in removed)
    assert once.record.held_out_kl == pytest.approx(again.record.held_out_kl, rel=1e-4)
    for one, other in zip(once.patches, again.patches, strict=True):
        torch.testing.assert_close(
            one.parameters, other.parameters, rtol=1e-3, atol=1e-5
        )


def test_gradients_of_the_micro_batches_of_a_step_are_added(monkeypatch):
    monkeypatch.setattr(tuning, "STEP_TOKENS", 96)
    model = tiny_model("llama")
    text = tokens(16).select(torch.arange(16).repeat_interleave(4))
    whole = tuned(model, text)
    parts = tuned(model, text, at_a_time=24)
    assert whole.record.steps == parts.record.steps > 4
    assert whole.record.held_out_kl == pytest.approx(parts.record.held_out_kl, rel=1e-3)


def test_what_wins_nothing_on_samples_held_out_is_not_kept(monkeypatch):
    monkeypatch.setattr(tuning, "RATE", 30.0)
    model = tiny_model("llama")
    text = tokens(16)
    found = tuned(model, text)
    kl = found.record.held_out_kl
    assert min(kl[1:]) > kl[0]
    assert [(p.block, p.path) for p in found.patches] == [(1, "mlp.down_proj")]
    assert divergence(model, text, found) == pytest.approx(kl[0], rel=1e-3)


def test_the_original_stays_as_it_was():
    model = tiny_model("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    tuned(model, tokens(16))
    torch.testing.assert_close(dict(model.named_parameters()), before, rtol=0, atol=0)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_cuts_at_the_first_and_the_last_block_have_one_neighbour():
    model = tiny_model("llama")
    text = tokens(16)
    removed = (0, 3, 5)
    found = tuned(model, text, removed)
    assert {layer.block for layer in found.record.layers} == {1, 2, 4}
    kl = found.record.held_out_kl
    assert divergence(model, text, found, removed) == pytest.approx(min(kl), rel=1e-3)


def test_where_memory_is_short_the_layers_that_write_are_tuned_alone(stub):
    room = type("Room", (), {"left": 0})()
    stub(tuning, "allowance", room)
    with refuses("GB of host memory", FitError):
        tuned(tiny_model("llama"), tokens(16))
    model = tiny_model("llama")
    blocks = stack_modules(model)
    write = {"self_attn.o_proj", "mlp.down_proj"}
    sizes = [
        blocks[i].get_submodule(path).weight.numel()
        for i in (1, 4)
        for path in (*write, "self_attn.q_proj")
    ]
    room.left = tuning.BYTES * sum(sizes)
    paths = {layer.layer for layer in tuned(model, tokens(16)).record.layers}
    assert write <= paths
    assert not {"mlp.up_proj", "mlp.gate_proj"} & paths


def limit(monkeypatch, stub, left):
    """Limit the memory of a card for tuning, without what a micro-batch takes."""
    room = {"cpu": 1e9, "lazy": left}
    stub(tuning, "bytes_of_backward", 1)
    monkeypatch.setattr(
        tuning, "allowance", lambda limit, device: Allowance(room[device.type], 0)
    )


def test_a_card_without_room_for_all_layers_tunes_those_that_write_first(
    monkeypatch, stub
):
    text = tokens(16)
    with fake_cards() as (card,):
        model = tiny_model("llama").to(card.device)
        whole = tuned(model, text).record
        gradient = model.model.layers[1].mlp.down_proj.weight.nbytes
        limit(monkeypatch, stub, gradient + 40_000)
        found = tuned(model, text).record
    layers = {(one.block, one.layer) for one in found.layers}
    assert whole.of == 0
    assert found.of == len(whole.layers) == 14
    assert len(layers) < 14
    wide = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    assert {(block, path) for block in (1, 4) for path in wide} <= layers
    assert found.held_out_kl[1] < found.held_out_kl[0]


@parametrize("spare, copies", [(1e9, 0), (96, 2)])
def test_a_step_moves_gradients_and_weights_once_or_not(
    monkeypatch, stub, spy, spare, copies
):
    moved = spy(
        cards,
        "_run",
        lambda out, func, args, _: sum(
            x.nbytes
            for x in args[:2]
            if func.overloadpacket in cards._COPIES and x.device != out.device
        ),
    )
    monkeypatch.setattr(tuning, "STEP_TOKENS", 64)
    monkeypatch.setattr(tuning, "_measure_kl", lambda *_: -sum(moved))
    with fake_cards() as (card,):
        model = tiny_model("llama").to(card.device, torch.bfloat16)
        sizes = [
            p.nbytes
            for i in (1, 4)
            for p in model.model.layers[i].parameters()
            if p.ndim == 2
        ]
        limit(monkeypatch, stub, sum(sizes) + max(sizes) + spare)
        record = tuned(model, tokens(16)).record
    begin, end = record.held_out_kl
    assert record.of == 0
    assert begin - end == copies * record.steps * sum(sizes)


def test_three_samples_are_too_few():
    with refuses("at least 4 samples", FitError):
        tuned(tiny_model("llama"), tokens(3))


def test_weights_of_wider_models_move_less(monkeypatch, spy):
    rates = spy(torch.optim, "AdamW", lambda found, groups, lr, **rest: lr)
    for narrower in (1, 4):
        model = tiny_model("llama")
        monkeypatch.setattr(tuning, "WIDTH", model.config.hidden_size // narrower)
        tuned(model, tokens(16))
    assert rates == [tuning.RATE, tuning.RATE / 4]
