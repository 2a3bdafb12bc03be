"""Healing: training, resuming, LoRA, and what is trained at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from healings import (
    REMOVED,
    Killed,
    curve,
    healed,
    killing,
    models,
    options,
    shapes,
    stored,
    trainer_file,
)
from isingcut.data.healing_text import build
from isingcut.errors import (
    InputError,
    StageFileError,
)
from isingcut.evaluation.quality import quality
from isingcut.files.documents.scores import HealingMemory
from isingcut.files.writing import read_json
from isingcut.healing.heal import heal
from isingcut.healing.training import batches as memory
from isingcut.healing.training import train
from isingcut.healing.training.student import last_parameters
from isingcut.models.architectures import find_stack
from isingcut.models.checkpoint.read import read_checkpoint
from isingcut.models.load import load
from isingcut.models.memory import Allowance
from isingcut.models.transformers_private import checkpointing
from isingcut.testing.tiny import tiny_model

__all__ = ["healed", "models"]


def test_healing_lowers_the_loss_and_leaves_a_plain_checkpoint(models: Path, healed: Path) -> None:
    found = read_json(healed / "healing.json", "healing")
    assert [s["step"] for s in found["steps"]] == [1, 2, 3, 4]
    assert found["steps"][-1]["tokens"] == found["tokens_seen"] == 4 * 4 * 31
    assert found["after"]["kl"] < found["before"]["kl"]
    assert found["steps"][-1]["loss"] < found["steps"][0]["loss"]
    assert found["removed"] == list(REMOVED)
    assert shapes(healed) == shapes(models / "student")
    names = {p.name for p in (models / "student").iterdir()}
    assert {p.name for p in healed.iterdir()} == {*names, "healing.json"}
    assert not list(models.glob(".healed*"))
    loaded = load(healed, dtype="float32", device="cpu")
    assert len(find_stack(loaded.model)) == 4


def test_the_first_loss_is_the_divergence_of_the_cut_model(models: Path, tmp_path: Path) -> None:
    text = build(
        str(models / "text.jsonl"),
        load(models / "teacher").tokenizer,
        samples=None,
        report_samples=4,
        length=32,
        seed=0,
    )
    # One step over all of the text, so that nothing but the healing's own sum can differ.
    rows = text.train.samples
    training = {"max_steps": 1, "per_device_train_batch_size": rows}
    training["gradient_accumulation_steps"] = 1
    (first,) = curve(heal(options(models, tmp_path / "o", training)))
    teacher, student = (load(models / n, dtype="float32") for n in ("teacher", "student"))
    expected = quality(teacher.model, student.model, text.train).kl
    assert first["tokens"] == 31 * rows
    assert first["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", ["full", "lora", "last:2"])
def test_a_killed_healing_resumes_to_the_same_curve_and_weights(
    models: Path, healed: Path, tmp_path: Path, method: str
) -> None:
    whole = healed if method == "full" else heal(options(models, tmp_path / "a", method=method))
    config = options(models, tmp_path / "b", method=method)
    with pytest.raises(Killed):
        heal(config, progress=killing(3))
    assert not (tmp_path / "b").exists()
    with pytest.raises(StageFileError, match="unfinished healing with other options"):
        heal(config.replace(seed=7))
    heal(config)
    assert curve(tmp_path / "b") == curve(whole)
    one, two = (read_checkpoint(f) for f in (whole, tmp_path / "b"))
    for name, tensor in one.items():
        pair = [t.file.read_bytes()[t.start : t.start + t.size] for t in (tensor, two[name])]
        assert pair[0] == pair[1], name


def test_the_last_blocks_and_the_head_alone_are_trained(models: Path, tmp_path: Path) -> None:
    out = heal(options(models, tmp_path / "out", method="last:1"))
    found = read_json(out / "healing.json", "healing")
    assert found["after"]["kl"] < found["before"]["kl"]
    assert shapes(out) == shapes(models / "student")
    before, after = stored(models / "student"), stored(out)
    changed = {name for name, content in before.items() if after[name] != content}
    last = {name for name in before if name.startswith("model.layers.3.")}
    assert changed == {*last, "model.norm.weight", "lm_head.weight"}
    total = sum(t.size // 4 for n, t in read_checkpoint(out).items() if n in changed)
    assert found["trained_parameters"] == total


def test_a_head_that_the_first_block_reads_is_not_trained_with_the_last() -> None:
    model = tiny_model("gemma2")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model.requires_grad_(False)
    trained = {id(p) for p in last_parameters(model, 2)}
    names = {n for n, p in model.named_parameters() if id(p) in trained}
    count = len(find_stack(model))
    blocks = (f"model.layers.{count - 2}.", f"model.layers.{count - 1}.")
    everything = {n for n, _ in model.named_parameters()}
    assert names == {n for n in everything if n.startswith(blocks)} | {"model.norm.weight"}
    assert not any(p.requires_grad for p in model.parameters())


def test_conversations_learn_the_same_in_any_micro_batches(models: Path, tmp_path: Path) -> None:
    lines = [
        {"messages": [{"role": "user", "content": "cold river " * (1 + i % 5) + str(i)}]}
        for i in range(40)
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    given = {"text": str(path), "length": 48}
    parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    found = []
    for name, batch in {"one": parts, "more": {"per_device_train_batch_size": 4}}.items():
        file = trainer_file(tmp_path / name, {"max_steps": 4, "learning_rate": 3e-3, **batch})
        found.append(curve(heal(options(models, tmp_path / name, **given, trainer=file))))
    one, more = found
    for mine, theirs in zip(one, more, strict=True):
        assert mine["tokens"] == theirs["tokens"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_activations_are_recomputed_where_one_sample_leaves_no_room(
    models: Path, healed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[HealingMemory] = []
    real = memory.plan_memory

    def noted(*given: Any, **rest: Any) -> HealingMemory:
        plans.append(real(*given, **rest))
        return plans[-1]

    monkeypatch.setattr(train, "plan_memory", noted)
    settings = {"per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 3e-3}

    def planned(name: str, **more: Any) -> Path:
        file = trainer_file(tmp_path / name, {**settings, **more})
        return heal(options(models, tmp_path / name, trainer=file))

    planned("a")
    # Nothing to spare, but enough.
    monkeypatch.setattr(memory, "allowance", lambda limit, _: Allowance(10**9 if limit else 0, 0))
    out = planned("b")
    planned("c", max_steps=1, **dict.fromkeys(checkpointing(), False))
    assert [(p.recompute, p.most) for p in plans] == [(False, 4 * 32), (True, 32), (False, 32)]
    for mine, theirs in zip(curve(out), curve(healed), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_lora_is_merged_into_a_plain_checkpoint(models: Path, tmp_path: Path) -> None:
    out = heal(options(models, tmp_path / "out", method="lora:4"))
    found = read_json(out / "healing.json", "healing")
    assert found["after"]["kl"] < found["before"]["kl"]
    assert shapes(out) == shapes(models / "student")
    assert not [p.name for p in out.iterdir() if "adapter" in p.name]
    total = sum(p.numel() for p in load(out).model.parameters())
    assert found["trained_parameters"] < total


def test_training_in_half_precision(models: Path, tmp_path: Path) -> None:
    half = load(models / "student", dtype="bfloat16", device="cpu")
    half.model.save_pretrained(tmp_path / "half")
    for name in ("isingcut.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(models / "student" / name, tmp_path / "half" / name)
    student = str(tmp_path / "half")
    out = heal(
        options(models, tmp_path / "out", {"max_steps": 2}, student=student, dtype="bfloat16")
    )
    assert {t.dtype for t in read_checkpoint(out).values()} == {"BF16"}
    found = read_json(out / "healing.json", "healing")
    assert found["after"]["kl"] < found["before"]["kl"]


def test_further_training_arguments(models: Path, tmp_path: Path) -> None:
    heal(options(models, tmp_path / "out", {"max_steps": 1, "adam_beta2": 0.95}))
    with pytest.raises(InputError, match="adam_beta9"):
        heal(options(models, tmp_path / "no", {"adam_beta9": 0.95}))
