"""Healing: the loss, its text, training, resuming, LoRA, and what is refused."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from isingcut.data.healing_text import build
from isingcut.errors import (
    CalibrationError,
    InputError,
    ModelError,
    OutputExistsError,
    StageFileError,
)
from isingcut.files import read_json
from isingcut.healing.heal import heal
from isingcut.healing.training import kl as kl
from isingcut.healing.training.head import separable
from isingcut.healing.training.rounds import Objective, install
from isingcut.healing.training.train import collate
from isingcut.models.architectures import find_stack
from isingcut.models.checkpoint.read import read_checkpoint
from isingcut.models.cutting.checkpoint import excise
from isingcut.models.load import load
from isingcut.options.declaration import options_from
from isingcut.options.healing import HealConfig
from isingcut.progress import Bar
from isingcut.testing.tiny import tiny_checkpoint, tiny_model, tiny_tokenizer

WORDS = ["cold", "river", "ran", "below", "stone", "bridge", "while", "old", "farmers", "spoke"]
REMOVED = (2, 3)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, generator=generator, dtype=torch.float64)


def reference(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    logq = torch.log_softmax(student / temperature, -1)
    logp = torch.log_softmax(teacher / temperature, -1)
    return (logp.exp() * (logp - logq)).sum()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_and_its_gradient(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kl, "_BUFFER_ELEMENTS", 3 * 17)
    student, teacher = normal(7, 17), normal(7, 17, seed=1)
    exact, ours = student.clone().requires_grad_(), student.float().requires_grad_()
    expected = reference(exact, teacher, temperature)
    found = kl.divergence(ours, teacher.float(), temperature)
    expected.backward()
    (3 * found).backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert ours.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(ours.grad.double(), 3 * exact.grad, rtol=1e-4, atol=1e-6)


def lumped(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """KL where all but the teacher's k likeliest tokens are one outcome."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    top = p.topk(k, -1).indices
    both = [
        torch.cat([d.gather(1, top), 1 - d.gather(1, top).sum(1, keepdim=True)], 1) for d in (p, q)
    ]
    return (both[0] * (both[0].log() - both[1].log())).sum()


@pytest.mark.parametrize("k", [1, 5, 16])
def test_divergence_from_the_kept_answers(k: int) -> None:
    student, teacher = normal(6, 17), normal(6, 17, seed=1)
    exact, ours = student.clone().requires_grad_(), student.float().requires_grad_()
    kept = kl.top_k(teacher.float(), k)
    torch.testing.assert_close(
        kept.logp.exp().sum(-1) + kept.tail, torch.ones(6), rtol=1e-5, atol=1e-6
    )
    found, expected = kl.divergence(ours, kept), lumped(exact, teacher, k)
    found.backward()
    expected.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert ours.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-3, atol=1e-5)


def test_all_answers_kept_is_the_whole_divergence() -> None:
    student, teacher = normal(6, 17).float(), normal(6, 17, seed=1).float()
    whole = float(kl.divergence(student, teacher))
    assert float(kl.divergence(student, kl.top_k(teacher, 17))) == pytest.approx(whole, rel=1e-5)


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
        results.append((loss.detach(), head.grad, read.grad, max(sizes)))
    torch.testing.assert_close(results[0][:3], results[1][:3])
    assert [r[3] for r in results] == [7, 2]


@pytest.mark.parametrize(("family", "parts"), [("llama", True), ("gemma2", False)])
def test_the_loss_counts_real_predictions_only(family: str, parts: bool) -> None:
    teacher, student = tiny_model(family), tiny_model(family, seed=1)
    assert (separable(student) is not None) == parts
    rows = [torch.arange(9, 9 + n) for n in (12, 5, 2)]
    forward = student.forward
    expected = 0.0
    with torch.no_grad():
        for row in rows:
            mine, theirs = student(row[None]).logits[0, :-1], teacher(row[None]).logits[0, :-1]
            expected += float(reference(mine.double(), theirs.double()))
    install(student, student, Objective(teacher))
    batch = collate([{"input_ids": row} for row in rows])
    assert int((batch["labels"] != -100).sum()) == 11 + 4 + 1
    found = student(**{k: v for k, v in batch.items() if k != "labels"})["loss"]
    student.forward = forward
    assert float(found.detach()) == pytest.approx(expected, rel=1e-4)


def test_hidden_states_are_matched_behind_the_cuts() -> None:
    teacher, student = tiny_model("llama"), tiny_model("llama")
    ids = torch.arange(9, 21)[None]
    mask = torch.ones_like(ids)
    # The same model: the distance between blocks 1 and 3 of one and the same stream.
    with torch.no_grad():
        states = teacher(ids, output_hidden_states=True).hidden_states
    ratio = (states[2] - states[4]).square().sum(-1) / states[4].square().sum(-1)
    install(student, student, Objective(teacher, 1.0, [(1, 3)], 0.5))
    found = student(input_ids=ids, attention_mask=mask)["loss"]
    assert float(found.detach()) == pytest.approx(0.5 * float(ratio.sum()) * 11 / 12, rel=1e-4)


# the text ---------------------------------------------------------------------------------


def write_text(path: Path, documents: int = 60, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    lines = [
        json.dumps({"text": " ".join(rng.choice(WORDS, 12)) + f" {i}."}) for i in range(documents)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_no_document_is_trained_on_and_reported(tmp_path: Path) -> None:
    from isingcut.data.calibration import build as calibrate

    source, tokenizer = str(write_text(tmp_path / "text.jsonl", 80)), tiny_tokenizer()
    used = calibrate(
        source, tokenizer, samples=4, rank_samples=2, report_samples=2, length=32, seed=3
    )
    found = build(source, tokenizer, samples=None, report_samples=3, length=48, seed=3, used=used)

    def numbers(rows: Tensor) -> set[str]:
        text = " ".join(tokenizer.decode(row) for row in rows)
        return {w for w in text.replace(".", " ").split() if w.isdigit()}

    train, report = numbers(found.train.input_ids), numbers(found.report.input_ids)
    taken = set().union(*(numbers(s.input_ids) for s in used.splits.values()))
    # Numbers cut in two at a sample's end could meet by chance; whole ones are nearly all.
    assert len(report) >= 2
    assert len(train) > 20
    assert not {n for n in train if len(n) == 2} & {n for n in report | taken if len(n) == 2}
    assert found.train.input_ids.shape[1] == 48
    with pytest.raises(CalibrationError, match="too short"):
        build(source, tokenizer, samples=900, report_samples=2, length=48, seed=3)


def test_conversations_of_a_calibration_are_left_out(tmp_path: Path) -> None:
    from isingcut.data.calibration import build as calibrate

    path = tmp_path / "chat.jsonl"
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"{w} {i}?"},
                {"role": "assistant", "content": f"{i} times {w}"},
            ]
        }
        for i, w in enumerate(WORDS * 2)
    ]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    tokenizer = tiny_tokenizer()
    used = calibrate(
        str(path), tokenizer, samples=3, rank_samples=2, report_samples=2, length=64, seed=0
    )
    found = build(
        str(path), tokenizer, samples=None, report_samples=2, length=64, seed=0, used=used
    )
    rows = [tuple(r) for t in (found.train, found.report) for r in t.input_ids.tolist()]
    assert len(rows) == len(set(rows)) == len(lines) - 7


# training ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`teacher`, `student` (blocks 2 and 3 cut out) and `text.jsonl`."""
    folder = tmp_path_factory.mktemp("heal")
    teacher = tiny_checkpoint("llama", folder / "teacher")
    record = json.dumps({"removed": REMOVED, "of": 6})
    excise(teacher, REMOVED, folder / "student", extra_files={"isingcut.json": record})
    write_text(folder / "text.jsonl", 80)
    return folder


def options(models: Path, out: Path, **changes: Any) -> HealConfig:
    base = {
        "student": str(models / "student"),
        "teacher": str(models / "teacher"),
        "text": str(models / "text.jsonl"),
        "out": str(out),
        "length": 32,
        "report_samples": 4,
        "batch": 4,
        "micro_batch": 2,
        "steps": 4,
        "save_steps": 2,
        "learning_rate": 3e-3,
        "dtype": "float32",
        "device": "cpu",
    }
    return options_from(HealConfig, {**base, **changes}, "test")


def curve(folder: Path) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = read_json(folder / "healing.json", "healing")["steps"]
    return steps


@pytest.fixture(scope="module")
def healed(models: Path) -> Path:
    return heal(options(models, models / "healed"))


def shapes(folder: Path) -> dict[str, Any]:
    return {n: (t.shape, t.dtype) for n, t in read_checkpoint(folder).items()}


def test_healing_lowers_the_loss_and_leaves_a_plain_checkpoint(models: Path, healed: Path) -> None:
    found = read_json(healed / "healing.json", "healing")
    assert [s["step"] for s in found["steps"]] == [1, 2, 3, 4]
    assert found["steps"][-1]["tokens"] == found["tokens_seen"] == 4 * 4 * 31
    assert found["after"]["kl"] < found["before"]["kl"]
    assert found["steps"][-1]["loss"] < found["steps"][0]["loss"]
    assert found["removed"] == list(REMOVED)
    assert shapes(healed) == shapes(models / "student")
    assert {p.name for p in healed.iterdir()} == {
        p.name for p in (models / "student").iterdir()
    } | {"healing.json"} | ({"generation_config.json"} & {p.name for p in healed.iterdir()})
    assert not list(models.glob(".healed*"))
    loaded = load(healed, dtype="float32", device="cpu")
    assert len(find_stack(loaded.model)) == 4


def test_the_first_loss_is_the_divergence_of_the_cut_model(models: Path, tmp_path: Path) -> None:
    out = heal(options(models, tmp_path / "out", steps=1, batch=60, micro_batch=60))
    text = build(
        str(models / "text.jsonl"),
        load(models / "teacher").tokenizer,
        samples=None,
        report_samples=4,
        length=32,
        seed=0,
    )
    from isingcut.evaluation.quality import quality

    teacher, student = (load(models / n, dtype="float32") for n in ("teacher", "student"))
    (first,) = curve(out)
    rows = text.train.samples
    expected = quality(teacher.model, student.model, text.train)["kl"]
    assert first["tokens"] == 31 * min(rows, 60)
    if rows <= 60:
        assert first["loss"] == pytest.approx(expected, rel=1e-4)


class Killed(Exception):
    pass


def killing(after: int) -> Callable[..., Any]:
    """A progress that raises when the training has made so many steps."""

    @contextlib.contextmanager
    def progress(description: str, total: float) -> Iterator[Bar]:
        class _Bar:
            done = 0.0

            def advance(self, steps: float = 1, note: str = "") -> None:
                self.done += steps
                if description.startswith("healing") and self.done >= after:
                    raise Killed

        yield _Bar()

    return progress


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_killed_healing_resumes_to_the_same_curve_and_weights(
    models: Path, healed: Path, tmp_path: Path, method: str
) -> None:
    whole = healed if method == "full" else heal(options(models, tmp_path / "a", method=method))
    config = options(models, tmp_path / "b", method=method)
    with pytest.raises(Killed):
        heal(config, progress=killing(3))
    assert not (tmp_path / "b").exists()
    with pytest.raises(StageFileError, match="unfinished healing with other options"):
        heal(config.replace(steps=7))
    heal(config)
    assert curve(tmp_path / "b") == curve(whole)
    one, two = (read_checkpoint(f) for f in (whole, tmp_path / "b"))
    for name, tensor in one.items():
        pair = [t.file.read_bytes()[t.start : t.start + t.size] for t in (tensor, two[name])]
        assert pair[0] == pair[1], name


@pytest.mark.slow
def test_two_processes_train_as_one_does(models: Path, healed: Path, tmp_path: Path) -> None:
    """Same global batch, half of it in each of two gloo processes."""
    config = options(models, tmp_path / "out", micro_batch=1)
    told = {k: v for k, v in vars(config).items() if v not in (None, False, "")}
    told.pop("student")
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in told.items() if k != "top_steps"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "isingcut.cli.main", "--debug", "heal", config.student, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = read_json(tmp_path / "out" / "healing.json", "healing")
    assert found["processes"] == 2
    for mine, theirs in zip(found["steps"], curve(healed), strict=True):
        assert mine["tokens"] == theirs["tokens"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    one, two = (load(f, dtype="float32").model.state_dict() for f in (healed, tmp_path / "out"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)


_TWO_MINDS = """
import os, sys, torch
from isingcut.models import load as models
from isingcut.options.healing import HealConfig
from isingcut.healing.heal import heal

rank, load = os.environ["RANK"], models.load
models._bfloat16_is_faster = lambda: rank == "0"
torch.cpu.get_capabilities = lambda: {"avx512_bf16": True}

def noted(folder, **options):
    loaded = load(folder, **options)
    if str(folder).endswith("teacher"):
        open(f"{sys.argv[1]}.{rank}", "w").write(str(loaded.dtype))
    return loaded

models.load = noted
heal(HealConfig(**eval(sys.argv[2])))
"""


def test_processes_heal_in_the_dtype_that_the_main_one_picks(models: Path, tmp_path: Path) -> None:
    (tmp_path / "two_minds.py").write_text(_TWO_MINDS, encoding="utf-8")
    config = options(models, tmp_path / "out", micro_batch=1, steps=1, dtype="auto")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(tmp_path / "two_minds.py"), str(tmp_path / "dtype"), repr(vars(config))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    picked = {(tmp_path / f"dtype.{rank}").read_text() for rank in (0, 1)}
    assert picked == {"torch.bfloat16"}


def test_lora_is_merged_into_a_plain_checkpoint(models: Path, tmp_path: Path) -> None:
    out = heal(options(models, tmp_path / "out", method="lora", lora_rank=4))
    found = read_json(out / "healing.json", "healing")
    assert found["after"]["kl"] < found["before"]["kl"]
    assert shapes(out) == shapes(models / "student")
    assert not [p.name for p in out.iterdir() if "adapter" in p.name]
    total = sum(p.numel() for p in load(out).model.parameters())
    assert found["trained_parameters"] < total


def test_kept_answers_teach_as_the_teacher_does(models: Path, healed: Path, tmp_path: Path) -> None:
    out = heal(options(models, tmp_path / "all", top_k=262))
    for mine, theirs in zip(curve(out), curve(healed), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    few = heal(options(models, tmp_path / "few", top_k=8))
    found = read_json(few / "healing.json", "healing")
    assert found["after"]["kl"] < found["before"]["kl"]


def test_a_streamed_teacher_gives_the_same_answers(models: Path, tmp_path: Path) -> None:
    config = options(models, tmp_path / "memory", top_k=8, steps=2)
    whole = read_json(heal(config) / "healing.json", "healing")
    config = config.replace(out=str(tmp_path / "disk"), stream_teacher=True)
    found = read_json(heal(config) / "healing.json", "healing")
    for mine, theirs in zip(found["steps"], whole["steps"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    for side in ("before", "after"):
        assert found[side]["kl"] == pytest.approx(whole[side]["kl"], rel=1e-4)
    with pytest.raises(InputError, match="needs --top-k"):
        config.replace(top_k=0).validate()


def test_gradient_checkpointing_changes_nothing(models: Path, healed: Path, tmp_path: Path) -> None:
    out = heal(options(models, tmp_path / "out", gradient_checkpointing=True))
    for mine, theirs in zip(curve(out), curve(healed), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_patch_and_distillation_together(models: Path, tmp_path: Path) -> None:
    out = heal(options(models, tmp_path / "out", patch="linear", steps=2))
    found = read_json(out / "healing.json", "healing")
    assert found["patch"]["scores"]["kl"] < found["before"]["kl"]
    assert len(found["steps"]) == 2
    alone = heal(options(models, tmp_path / "alone", patch="linear", method="none"))
    other = read_json(alone / "healing.json", "healing")
    assert other["after"]["kl"] == pytest.approx(found["patch"]["scores"]["kl"], rel=1e-6)
    assert other["steps"] == []


def test_training_in_half_precision(models: Path, tmp_path: Path) -> None:
    half = load(models / "student", dtype="bfloat16", device="cpu")
    half.model.save_pretrained(tmp_path / "half")
    for name in ("isingcut.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(models / "student" / name, tmp_path / "half" / name)
    student = str(tmp_path / "half")
    out = heal(options(models, tmp_path / "out", student=student, dtype="bfloat16", steps=2))
    assert {t.dtype for t in read_checkpoint(out).values()} == {"BF16"}
    found = read_json(out / "healing.json", "healing")
    assert found["after"]["kl"] < found["before"]["kl"]


def test_further_training_arguments(models: Path, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("adam_beta2: 0.95\n", encoding="utf-8")
    (tmp_path / "bad.yaml").write_text("adam_beta9: 0.95\n", encoding="utf-8")
    heal(options(models, tmp_path / "out", steps=1, trainer=str(tmp_path / "t.yaml")))
    with pytest.raises(InputError, match="adam_beta9"):
        heal(options(models, tmp_path / "no", steps=1, trainer=str(tmp_path / "bad.yaml")))


def test_a_cut_by_another_tool_is_recognised_by_its_weights(
    models: Path, healed: Path, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign"
    shutil.copytree(models / "student", foreign, ignore=shutil.ignore_patterns("isingcut.json"))
    with pytest.raises(InputError, match="leave --stream-teacher out"):
        heal(options(models, tmp_path / "s", student=str(foreign), stream_teacher=True, top_k=4))
    out = heal(options(models, tmp_path / "out", student=str(foreign)))
    assert curve(out) == curve(healed)
    found = read_json(out / "healing.json", "healing")
    assert (found["removed"], found["of"]) == ([2, 3], 6)
    again = heal(options(models, tmp_path / "again", student=str(out), steps=1))
    assert read_json(again / "healing.json", "healing")["removed"] == [2, 3]


def test_other_weights_are_not_taken_for_a_cut(models: Path, tmp_path: Path) -> None:
    merged = load(models / "student", dtype="float32", device="cpu")
    with torch.no_grad():
        next(iter(merged.model.get_submodule("model.layers.2").parameters())).mul_(1.5)
    merged.model.save_pretrained(tmp_path / "merged")
    merged.tokenizer.save_pretrained(tmp_path / "merged")
    with pytest.raises(InputError, match="its block 2 is no block of teacher behind its block 1"):
        heal(options(models, tmp_path / "a", student=str(tmp_path / "merged")))
    (tmp_path / "merged" / "isingcut.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="no readable record of a cut"):
        heal(options(models, tmp_path / "b", student=str(tmp_path / "merged")))
    with pytest.raises(InputError, match="is no checkpoint"):
        heal(options(models, tmp_path / "c", student=str(tmp_path)))


def test_what_is_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="multiple of --micro-batch"):
        heal(options(models, tmp_path / "a", batch=3))
    with pytest.raises(InputError, match="lacks no block of teacher"):
        heal(options(models, tmp_path / "b", student=str(models / "teacher")))
    with pytest.raises(InputError, match="a model of 6 blocks, but the teacher"):
        heal(options(models, tmp_path / "c", teacher=str(models / "student")))
    with pytest.raises(InputError, match="student, which this command reads"):
        heal(options(models, models / "student"))
    with pytest.raises(OutputExistsError):
        heal(options(models, tmp_path))
    further = tmp_path / "t.yaml"
    further.write_text("weight_decay: 1e+35\n", encoding="utf-8")
    blown = {"learning_rate": 10.0, "warmup_steps": 0, "trainer": str(further)}
    with pytest.raises(ModelError, match="lower --learning-rate"):
        heal(options(models, tmp_path / "d", **blown))
    for bad in (
        {"method": "qlora"},
        {"steps": 0},
        {"method": "none"},
        {"top_k": 4, "temperature": 2.0},
    ):
        with pytest.raises(InputError):
            options(models, tmp_path / "e", **bad).validate()
