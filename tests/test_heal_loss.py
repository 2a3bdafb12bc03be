"""The loss of healing, and the memory that a healing takes on its device."""

import dataclasses
import itertools
import shutil

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import card as on_card
from cards import fake_cards
from healings import REMOVED, models, options
from isingcut.healing.heal import heal
from isingcut.healing.job import Job
from isingcut.healing.removed import removal_by_weights
from isingcut.healing.training import batches as memory
from isingcut.healing.training import student as loss
from isingcut.healing.training import train
from isingcut.healing.training.batches import Steps, divisions
from isingcut.healing.training.student import prepare_training, set_dtypes
from isingcut.models.compute import divergence as kl
from isingcut.processes import Processes
from shared import HealConfig, module_fixture, parametrize, refuses
from tiny import TokenSet, find_stack, gone, load, tiny_model


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, generator=generator, dtype=torch.float64)


def reference(student, teacher):
    logq = torch.log_softmax(student, -1)
    logp = torch.log_softmax(teacher, -1)
    return (logp.exp() * (logp - logq)).sum()


@parametrize("compiled", [True, False])
@parametrize(
    "dtype, words, rtol",
    # The gradient is stored in the logits' dtype, then scaled: rounded twice to bfloat16's 8 bits.
    [(torch.float32, 17, 1e-4), (torch.bfloat16, 4099, 2**-7)],
)
def test_divergence_and_its_gradient(monkeypatch, stub, compiled, dtype, words, rtol):
    """Each implementation of the loss takes few rows at a time."""
    for name in ("_BUFFER_ELEMENTS", "_CACHED_ELEMENTS"):
        monkeypatch.setattr(kl, name, 3 * 17)
    if not compiled:
        stub(kl, "can_compile", False)
    student, teacher = (normal(7, words, seed=seed).to(dtype) for seed in (0, 1))
    ours = student.clone().requires_grad_()
    exact = student.double().requires_grad_()
    found = kl.divergence(ours, teacher)
    expected = reference(exact, teacher.double())
    (3 * found).backward()
    (3 * expected).backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert_close(ours.grad.double(), exact.grad, rtol=rtol, atol=1e-6)


def test_chunks_of_the_vocabulary_change_nothing(monkeypatch):
    weight, other = (normal(17, 8, seed=seed).float() for seed in (0, 1))
    stream, teacher = (normal(7, 8, seed=seed).float() for seed in (2, 3))
    results = []
    for elements, expected in ((1 << 20, [7]), (2 * 17, [2, 2, 2, 1])):
        monkeypatch.setattr(kl, "CHUNK_ELEMENTS", elements)
        head = weight.clone().requires_grad_()
        read = stream.clone().requires_grad_()
        sizes = []
        loss = kl.divergence_from_stream(
            read,
            lambda h, head=head, sizes=sizes: sizes.append(len(h)) or h @ head.T,
            teacher,
            lambda h: h @ other.T,
            17,
        )
        loss.backward()
        results.append((loss.detach(), head.grad, read.grad))
        # No chunk is computed again in the backward pass.
        assert sizes == expected
    assert_close(*results)


@parametrize(
    "family, tied, ends",
    [
        ("llama", False, torch.bfloat16),
        ("llama", True, torch.bfloat16),
        # Gemma 3's embedding computes with the dtype of its weight.
        ("gemma3", True, torch.float32),
    ],
)
def test_frozen_weights_are_narrowed_only_where_no_value_changes(family, tied, ends):
    plain = tiny_model(family, tie_word_embeddings=tied)
    for parameter in plain.parameters():
        parameter.data = parameter.bfloat16().float()
    # A weight with values that bfloat16 cannot hold is not narrowed.
    mlp = plain.get_submodule(f"{find_stack(plain).blocks[0].path}.mlp")
    mlp.down_proj.weight.data += 1e-6
    model = prepare_training(plain, HealConfig(method="lora"))
    ids = torch.arange(12)[None]

    def found():
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        trained = [p for p in model.parameters() if p.requires_grad]
        return logits, list(torch.autograd.grad(logits.float().square().sum(), trained))

    before, gradients = found()
    set_dtypes(model, torch.bfloat16)
    after, again = found()
    assert_close(after, before, rtol=0, atol=0)
    assert_close(again, gradients, rtol=0, atol=0)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    head = plain.get_output_embeddings().weight
    assert head.dtype == ends
    assert (head is plain.get_input_embeddings().weight) == tied
    assert mlp.down_proj.weight.dtype == torch.float32
    assert mlp.up_proj.weight.dtype == torch.bfloat16


LENGTHS = [int(n) for n in np.random.default_rng(0).integers(20, 400, 64)]


def order(rank=0, size=1):
    return Steps(LENGTHS, 8, 16, rank, size, 3, 1024)


def padded(rows):
    return len(rows) * max(LENGTHS[i] for i in rows)


def test_parts_have_the_least_padding():
    lengths = [9, 8, 7, 3, 2, 1]

    def padded_to(edges):
        return sum(lengths[a] * (b - a) for a, b in itertools.pairwise(edges))

    for count, (cost, found) in enumerate(divisions(lengths, 6, 99), 1):
        ways = itertools.combinations(range(1, 6), count - 1)
        least = min(padded_to([0, *way, 6]) for way in ways)
        assert padded_to([*(p.start for p in found), 6]) == least
        assert cost == pytest.approx(least, rel=1e-3)
        assert [i for p in found for i in range(p.start, p.stop)] == list(range(6))


def test_parts_that_are_too_large_are_none():
    costs = [cost for cost, _ in divisions([5] * 8, 4, 15)]
    assert np.isinf(costs[:2]).all()
    assert np.isfinite(costs[2:]).all()
    # A sample that is too long by itself becomes a part of its own.
    *_, (cost, found) = divisions([40, 5, 5], 2, 15)
    assert found == [slice(0, 1), slice(1, 3)]
    assert np.isfinite(cost)


def test_every_sample_is_read_once_an_epoch_with_little_padding():
    found = order()
    micro = list(found)
    assert len(micro) == len(found) == 16 * found.micro_batches
    read = [i for rows in micro for i in rows]
    assert sorted(read[:64]) == sorted(read[64:]) == list(range(64))
    assert max(padded(rows) for rows in micro) <= 1024
    real = sum(LENGTHS[i] for i in read)
    assert sum(map(padded, micro)) < 1.15 * real
    assert [sorted(rows) for rows in order()] == [sorted(rows) for rows in micro]


def test_processes_share_each_step_of_one():
    def steps(found):
        rows = list(found)
        n = found.micro_batches
        return [list(itertools.chain(*rows[a : a + n])) for a in range(0, len(rows), n)]

    alone = steps(order())
    ranks = [order(rank, 2) for rank in (0, 1)]
    assert ranks[0].micro_batches == ranks[1].micro_batches
    for whole, *halves in zip(alone, *map(steps, ranks), strict=True):
        assert sorted(itertools.chain(*halves)) == sorted(whole)
        assert len(halves[0]) == len(halves[1])


def test_samples_of_one_length_are_shared_out_evenly():
    found = Steps([32] * 10, 8, 2, 0, 1, 0, 3 * 32)
    assert [len(rows) for rows in found] == [2, 3, 3] * 2


__all__ = ["models"]

TOKENS = TokenSet.from_rows([[9 + i + k for k in range(64)] for i in range(4)])


@module_fixture
def half(models, tmp_path_factory):
    """The tiny teacher and student, stored in bfloat16."""
    folder = tmp_path_factory.mktemp("half")
    for name in ("teacher", "student"):
        shutil.copytree(models / name, folder / name)
        load(models / name, dtype="bfloat16", device="cpu").model.save_pretrained(
            folder / name
        )
    return folder


def places(tensors):
    return {t.untyped_storage().data_ptr() for t in tensors}


@parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_not_trained_is_the_teachers(
    half, models, tmp_path, monkeypatch, spy, dtype
):
    folder = half if dtype == "bfloat16" else models
    teacher = load(folder / "teacher", dtype=dtype, device="cpu")
    before = {name: t.clone() for name, t in teacher.model.state_dict().items()}
    config = options(folder, tmp_path / "out", {"max_steps": 2}, method="lora:4")
    job = Job(teacher, gone(REMOVED), folder / "student", TOKENS, tmp_path, config)
    run = train._run
    apart = spy(loss, "divergence_from_stream")

    def inspected(watch, student, *rest):
        frozen = [p for p in student.parameters() if not p.requires_grad]
        theirs = places(teacher.model.parameters())
        own = [p for p in frozen if p.untyped_storage().data_ptr() not in theirs]
        # Norms are computed in float32.
        assert all(p.dim() == 1 for p in own)
        assert (dtype == "bfloat16") == bool(own)
        assert len(own) < len(frozen) / 2
        assert not places(p for p in student.parameters() if p.requires_grad) & theirs
        run(watch, student, *rest)

    monkeypatch.setattr(train, "_run", inspected)
    train.train(job)
    # Logits are computed in chunks, however narrow the layers are.
    assert apart
    assert_close(teacher.model.state_dict(), before, rtol=0, atol=0)


def test_lora_and_its_teacher_fit_a_card_of_half_as_much_again(tmp_path):
    narrow = on_card.write_models(tmp_path, 8, (3, 4))
    budget = int(1.5 * on_card.weights(narrow / "original"))
    assert on_card.heal_on_card(narrow, budget, method="lora:1") <= budget


def test_lora_on_several_cards_learns_the_weights_of_one(models, tmp_path):
    found = set()
    with fake_cards(4) as cards:
        for count in (1, 4):
            devices = ",".join(str(card.device) for card in cards[:count])
            given = {"method": "lora:4", "device": devices}
            out = heal(
                options(models, tmp_path / str(count), {"max_steps": 2}, **given)
            )
            assert all(card.peak > 0 for card in cards[:count])
            found.add((out / "model.safetensors").read_bytes())
    assert len(found) == 1


@pytest.fixture
def card():
    with fake_cards() as (card,):
        yield card


def job_on(card, models, folder, processes=None, training=None, **changes):
    """Return the job of a healing before its training, with the teacher on the card."""
    config = options(models, folder / "out", training, dtype="float32", **changes)
    teacher = load(models / "teacher", dtype="float32", device=str(card.device))
    job = Job(teacher, gone(REMOVED), models / "student", TOKENS, folder, config)
    return dataclasses.replace(job, processes=processes or job.processes)


TERMS = r"\(weights \S+, gradients \S+, moments \S+, teacher \S+, activations of one sample \S+\)"


@parametrize(
    "free, method, lora",
    [
        (1.1e6, "full", "--method lora, "),
        (0.9e6, "lora", ""),
    ],
)
def test_a_training_that_cannot_fit_is_refused(
    models, tmp_path, card, free, method, lora
):
    job = job_on(card, models, tmp_path, method=method)
    card.budget = card.live + int(free)
    advice = f"; use {lora}a smaller --length or a device with more memory"
    with refuses(f"{TERMS}.*{advice}"), train._student(job, 4):
        pass


def test_what_others_shard_is_counted_by_rank_and_left_where_it_is(
    models, tmp_path, card, monkeypatch
):
    four = Processes(0, 4)
    monkeypatch.setattr(Processes, "decide", lambda self, make: make())
    sharded = {"fsdp": "full_shard"}
    job = job_on(card, models, tmp_path, four, sharded, method="full")
    card.budget = card.live + 10**5
    with train._student(job, 4) as (student, plan):
        assert {p.device.type for p in student.parameters()} == {"cpu"}
        trained = student.num_parameters()
        terms = memory._terms(job, student, sharded)
    assert (terms["gradients"], terms["moments"]) == (trained, 2 * trained)
    assert plan.recompute


def test_blocks_are_found_by_their_weights_with_one_model_on_the_device(
    models, tmp_path, card
):
    student = tmp_path / "student"
    shutil.copytree(models / "student", student)
    (student / "isingcut.json").unlink()
    teacher = load(models / "teacher", dtype="float32", device=str(card.device))
    card.reset_peak()
    before = card.live
    assert removal_by_weights(student, teacher) == REMOVED
    assert card.peak == before
