"""The loss of healing: its value, its gradient, and which predictions count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from isingcut.healing.training.batches import collate
from isingcut.healing.training.loss import install, split_head
from isingcut.healing.training.student import narrow, prepare_training
from isingcut.models.architectures import find_stack
from isingcut.models.compute import divergence as kl
from isingcut.options.config import HealConfig
from isingcut.testing.tiny import tiny_model


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, generator=generator, dtype=torch.float64)


def reference(student: Tensor, teacher: Tensor) -> Tensor:
    logq = torch.log_softmax(student, -1)
    logp = torch.log_softmax(teacher, -1)
    return (logp.exp() * (logp - logq)).sum()


@pytest.fixture(params=["compiled", "torch"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both forms of the loss, over few rows at a time."""
    for name in ("_BUFFER_ELEMENTS", "_CACHED_ELEMENTS"):
        monkeypatch.setattr(kl, name, 3 * 17)
    if request.param == "torch":
        monkeypatch.setattr(kl, "_compiles", lambda logits: False)
    return str(request.param)


@pytest.mark.usefixtures("loops")
def test_divergence_and_its_gradient() -> None:
    student, teacher = normal(7, 17), normal(7, 17, seed=1)
    exact, ours = student.clone().requires_grad_(), student.float().requires_grad_()
    expected = reference(exact, teacher)
    found = kl.divergence(ours, teacher.float())
    expected.backward()
    (3 * found).backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert ours.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(ours.grad.double(), 3 * exact.grad, rtol=1e-4, atol=1e-6)


def test_half_precision_gives_the_loss_of_its_own_logits() -> None:
    student, teacher = normal(6, 4099).bfloat16(), normal(6, 4099, seed=1).bfloat16()
    ours, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    found, expected = kl.divergence(ours, teacher), reference(exact, teacher.double())
    found.backward()
    expected.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert ours.grad is not None
    assert exact.grad is not None
    # The gradient is stored in bfloat16: eight bits.
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=2**-8, atol=1e-6)


def test_chunks_of_the_vocabulary_change_nothing() -> None:
    weight = normal(17, 8).float()
    other = normal(17, 8, seed=1).float()
    stream, teacher = normal(7, 8, seed=2).float(), normal(7, 8, seed=3).float()
    results = []
    for elements in (1 << 20, 2 * 17):
        head, read = weight.clone().requires_grad_(), stream.clone().requires_grad_()
        sizes: list[int] = []

        def student_head(h: Tensor, head: Tensor = head, sizes: list[int] = sizes) -> Tensor:
            sizes.append(len(h))
            return h @ head.T

        loss = kl.divergence_from_stream(
            read,
            student_head,
            teacher,
            lambda h: h @ other.T,
            chunk_elements=elements,
            vocabulary=17,
        )
        loss.backward()  # type: ignore[no-untyped-call]
        results.append((loss.detach(), head.grad, read.grad, sizes))
    torch.testing.assert_close(results[0][:3], results[1][:3])
    # None is computed again in the backward pass.
    assert [r[3] for r in results] == [[7], [2, 2, 2, 1]]


@pytest.mark.parametrize(("family", "parts"), [("llama", True), ("gemma2", False)])
def test_the_loss_counts_real_predictions_only(family: str, parts: bool) -> None:
    teacher, student = tiny_model(family), tiny_model(family, seed=1)
    assert (split_head(student) is not None) == parts
    rows = [torch.arange(9, 9 + n) for n in (12, 5, 2)]
    forward = student.forward
    expected = 0.0
    with torch.no_grad():
        for row in rows:
            mine, theirs = student(row[None]).logits[0, :-1], teacher(row[None]).logits[0, :-1]
            expected += float(reference(mine.double(), theirs.double()))
    install(student, student, teacher)
    batch = collate([{"input_ids": row} for row in rows])
    assert int((batch["labels"] != -100).sum()) == 11 + 4 + 1
    found = student(**{k: v for k, v in batch.items() if k != "labels"})["loss"]
    student.forward = forward
    assert float(found.detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("method", "family", "changes", "ends"),
    [
        ("lora", "llama", {}, torch.bfloat16),
        ("last:1", "llama", {}, torch.float32),
        ("lora", "llama", {"tie_word_embeddings": True}, torch.bfloat16),
        # Its embedding computes with the dtype of its weight.
        ("lora", "gemma3", {"tie_word_embeddings": True}, torch.float32),
        ("last:1", "gpt2", {"tie_word_embeddings": True}, torch.bfloat16),
    ],
)
def test_frozen_weights_are_narrowed_only_where_no_value_changes(
    method: str, family: str, changes: dict[str, Any], ends: torch.dtype
) -> None:
    plain: Any = tiny_model(family, **changes)
    for parameter in plain.parameters():
        parameter.data = parameter.bfloat16().float()
    # One weight that bfloat16 cannot hold stays as it is.
    mlp = plain.get_submodule(f"{find_stack(plain).blocks[0].path}.mlp")
    odd, even = (mlp.c_proj, mlp.c_fc) if family == "gpt2" else (mlp.down_proj, mlp.up_proj)
    tied = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    odd.weight.data += 1e-6
    model = prepare_training(plain, HealConfig(method=method))
    ids = torch.arange(12)[None]

    def found() -> tuple[Tensor, list[Tensor]]:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        trained = [p for p in model.parameters() if p.requires_grad]
        return logits, list(torch.autograd.grad(logits.float().square().sum(), trained))

    before, gradients = found()
    narrow(model, torch.bfloat16)
    after, again = found()
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    torch.testing.assert_close(again, gradients, rtol=0, atol=0)
    kinds = {p.dtype for p in model.parameters() if p.requires_grad}
    assert kinds == {torch.float32}
    assert plain.get_output_embeddings().weight.dtype == ends
    weights = {id(m.weight) for m in (plain.get_output_embeddings(), plain.get_input_embeddings())}
    assert len(weights) == 2 - tied
    assert odd.weight.dtype == torch.float32
    assert even.weight.dtype == torch.bfloat16
