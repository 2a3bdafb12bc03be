"""What a healing takes of its device: one set of weights for teacher and student, or a refusal."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path

import pytest
import torch

from healings import REMOVED, models, options
from isingcut.data.tokens import TokenSet
from isingcut.errors import InputError
from isingcut.healing.job import Job
from isingcut.healing.removed import removal_by_weights
from isingcut.healing.training import batches as memory
from isingcut.healing.training import student as loss
from isingcut.healing.training import train
from isingcut.models.load import load
from isingcut.models.processes import Processes
from isingcut.testing.cards import fake_cards

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import card_heal as on_card

__all__ = ["models"]

TOKENS = TokenSet.from_rows([[9 + i + k for k in range(64)] for i in range(4)])


@pytest.fixture(scope="module")
def narrow_blocks(tmp_path_factory):
    return on_card.write_models(tmp_path_factory.mktemp("card"), 8, (3, 4))


@pytest.fixture(scope="module")
def half(models, tmp_path_factory):
    """The tiny teacher and student, stored in bfloat16."""
    folder = tmp_path_factory.mktemp("half")
    for name in ("teacher", "student"):
        shutil.copytree(models / name, folder / name)
        load(models / name, dtype="bfloat16", device="cpu").model.save_pretrained(folder / name)
    return folder


def places(tensors):
    return {t.untyped_storage().data_ptr() for t in tensors}


@pytest.mark.parametrize("method", ["lora", "last:2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_not_trained_is_the_teachers(half, models, tmp_path, monkeypatch, method, dtype):
    folder = half if dtype == "bfloat16" else models
    teacher = load(folder / "teacher", dtype=dtype, device="cpu")
    before = {name: t.clone() for name, t in teacher.model.state_dict().items()}
    method = "lora:4" if method == "lora" else method
    config = options(folder, tmp_path / "out", {"max_steps": 2}, method=method)
    job = Job(teacher, REMOVED, folder / "student", TOKENS, tmp_path, config)
    run, apart, in_parts = train._run, [], loss.divergence_from_stream

    def inspected(job, student, *rest):
        frozen = [p for p in student.parameters() if not p.requires_grad]
        theirs = places(teacher.model.parameters())
        own = [p for p in frozen if p.untyped_storage().data_ptr() not in theirs]
        # Norms are computed in float32.
        assert all(p.dim() == 1 for p in own)
        assert (dtype == "bfloat16") == bool(own)
        assert len(own) < len(frozen) / 2
        assert not places(p for p in student.parameters() if p.requires_grad) & theirs
        run(job, student, *rest)

    monkeypatch.setattr(train, "_run", inspected)
    count = lambda *given, **more: apart.append(1) or in_parts(*given, **more)  # noqa: E731
    monkeypatch.setattr(loss, "divergence_from_stream", count)
    train.train(job)
    # Logits come a chunk at a time, however narrow the layers are.
    assert apart
    for name, tensor in teacher.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_lora_heals_beside_its_teacher_on_a_card_of_half_as_much_again(narrow_blocks):
    budget = int(1.5 * on_card.original_bytes(narrow_blocks))
    assert on_card.heal_on_card(narrow_blocks, budget, method="lora:1") <= budget


@pytest.fixture
def card():
    with fake_cards() as (card,):
        yield card


def job_on(card, models, folder, processes=None, training=None, **changes):
    """Before its training, with the teacher on the card."""
    config = options(models, folder / "out", training, dtype="float32", **changes)
    teacher = load(models / "teacher", dtype="float32", device=str(card.device))
    job = Job(teacher, REMOVED, models / "student", TOKENS, folder, config)
    return dataclasses.replace(job, processes=processes or job.processes)


TERMS = r"\(weights \S+, gradients \S+, moments \S+, teacher \S+, activations of one sample \S+\)"


@pytest.mark.parametrize(
    ("free", "method", "lora"),
    [(1.1e6, "full", "--method lora, "), (0.9e6, "lora", ""), (0.3e6, "last:2", "--method lora, ")],
)
def test_a_training_that_cannot_fit_is_refused(models, tmp_path, card, free, method, lora):
    job = job_on(card, models, tmp_path, method=method)
    card.budget = card.live + int(free)
    advice = f"; give {lora}a smaller --length or a device with more memory"
    with pytest.raises(InputError, match=f"{TERMS}.*{advice}"), train._student(job, 4):
        pass


def test_what_others_shard_is_counted_by_rank_and_left_where_it_is(models, tmp_path, card):
    four = Processes(0, 4)
    four.decide = lambda make: make()
    job = job_on(card, models, tmp_path, four, {"fsdp": "full_shard"}, method="full")
    card.budget = card.live + 10**5
    with train._student(job, 4) as (student, plan):
        assert {p.device.type for p in student.parameters()} == {"cpu"}
        trained = sum(p.numel() for p in student.parameters())
        terms = memory._terms(job, student, {"fsdp": "full_shard"})
    assert [terms[name] for name in ("gradients", "moments")] == [trained, 2 * trained]
    assert plan.recompute


def test_blocks_are_found_by_their_weights_with_one_model_on_the_device(models, tmp_path, card):
    student = tmp_path / "student"
    shutil.copytree(models / "student", student)
    (student / "isingcut.json").unlink()
    teacher = load(models / "teacher", dtype="float32", device=str(card.device))
    card.reset_peak()
    before = card.live
    assert removal_by_weights(student, teacher) == REMOVED
    assert card.peak == before
