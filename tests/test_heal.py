"""Healing: training, resuming, LoRA, and what is refused."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from isingcut.cli.show_scores import healing_warnings
from isingcut.console.progress import Bar
from isingcut.data.healing_text import build
from isingcut.data.tokens import TokenSet
from isingcut.errors import (
    ArchitectureError,
    InputError,
    ModelError,
    OutputExistsError,
    StageFileError,
)
from isingcut.evaluation.quality import quality
from isingcut.files.writing import read_json
from isingcut.healing.heal import heal
from isingcut.healing.job import Job
from isingcut.healing.training import room, train
from isingcut.healing.training.student import last_parameters
from isingcut.models.architectures import find_stack
from isingcut.models.checkpoint.read import read_checkpoint
from isingcut.models.cutting.checkpoint import excise
from isingcut.models.load import load
from isingcut.models.processes import Processes
from isingcut.models.streaming.memory import Allowance
from isingcut.options.declaration import options_from
from isingcut.options.healing import HealConfig
from isingcut.testing.tiny import tiny_checkpoint, tiny_model
from ranks import join, launch, say_into, type_in
from test_heal_text import write_text

REMOVED = (2, 3)


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
        "patch": "none",
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
    (first,) = curve(heal(options(models, tmp_path / "o", steps=1, batch=rows, micro_batch=rows)))
    teacher, student = (load(models / n, dtype="float32") for n in ("teacher", "student"))
    expected = quality(teacher.model, student.model, text.train)["kl"]
    assert first["tokens"] == 31 * rows
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
        heal(config.replace(steps=7))
    heal(config)
    assert curve(tmp_path / "b") == curve(whole)
    one, two = (read_checkpoint(f) for f in (whole, tmp_path / "b"))
    for name, tensor in one.items():
        pair = [t.file.read_bytes()[t.start : t.start + t.size] for t in (tensor, two[name])]
        assert pair[0] == pair[1], name


def stored(folder: Path) -> dict[str, bytes]:
    found = read_checkpoint(folder).items()
    return {n: t.file.read_bytes()[t.start : t.start + t.size] for n, t in found}


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
    one, more = (
        curve(heal(options(models, tmp_path / f"m{micro}", micro_batch=micro, **given)))
        for micro in (1, None)
    )
    for mine, theirs in zip(one, more, strict=True):
        assert mine["tokens"] == theirs["tokens"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_activations_are_recomputed_where_one_sample_leaves_no_room(
    models: Path, healed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways: list[room.Way] = []
    real = room.way_of
    monkeypatch.setattr(train, "way_of", lambda *given: (ways.append(real(*given)), ways[-1])[1])
    heal(options(models, tmp_path / "a", micro_batch=None))
    monkeypatch.setattr(room, "allowance", lambda limit, device: Allowance(0, 0))
    out = heal(options(models, tmp_path / "b", micro_batch=None))
    heal(options(models, tmp_path / "c", micro_batch=None, gradient_checkpointing=False, steps=1))
    assert [(w.recompute, w.most) for w in ways] == [(False, 4 * 32), (True, 32), (False, 32)]
    for mine, theirs in zip(curve(out), curve(healed), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_a_batch_is_shared_by_all_processes_alike(models: Path, tmp_path: Path) -> None:
    teacher = load(models / "teacher", dtype="float32", device="cpu")
    tokens = TokenSet.from_rows([[1, 2, 3]] * 4)
    config = options(models, tmp_path / "out", batch=3)
    two = Processes(0, 2)
    job = Job(teacher, REMOVED, models / "student", tokens, tmp_path, config, processes=two)
    with pytest.raises(InputError, match="a multiple of the number of processes, here 2"):
        train.train(job, tmp_path / "out")


def _types(said: Path, *arguments: object) -> None:
    """The command line, in one of the processes of a launcher."""
    say_into(said)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    type_in(*arguments)


def test_two_processes_train_as_one_does(models: Path, healed: Path, tmp_path: Path) -> None:
    """Same global batch, half of it in each of two gloo processes."""
    config = options(models, tmp_path / "out", micro_batch=1)
    told = {k: v for k, v in vars(config).items() if v not in (None, False, "")}
    told.pop("student")
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in told.items() if k != "top_steps"]
    said = tmp_path / "said"
    ranks, _store = launch(2, _types, said, "--debug", "heal", config.student, *flags)
    assert join(ranks) == [0, 0], said.read_text()
    found = read_json(tmp_path / "out" / "healing.json", "healing")
    assert found["processes"] == 2
    for mine, theirs in zip(found["steps"], curve(healed), strict=True):
        assert mine["tokens"] == theirs["tokens"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    one, two = (load(f, dtype="float32").model.state_dict() for f in (healed, tmp_path / "out"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)


def _two_minds(config: HealConfig, dtypes: Path, said: Path) -> None:
    """Heal, where only rank 0's trial finds bfloat16 faster; which dtype the teacher has."""
    from isingcut.healing import heal as home
    from isingcut.models import device

    say_into(said)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    rank = os.environ["RANK"]
    device._bfloat16_is_faster = lambda: rank == "0"  # type: ignore[assignment]
    torch.cpu.get_capabilities = lambda: {"avx512_bf16": True}

    def noted(folder: Path, **options: Any) -> Any:
        loaded = load(folder, **options)
        if str(folder).endswith("teacher"):
            dtypes.with_suffix(f".{rank}").write_text(str(loaded.dtype))
        return loaded

    home.load = noted  # type: ignore[assignment]
    home.heal(config)


def test_processes_heal_in_the_dtype_that_the_main_one_picks(models: Path, tmp_path: Path) -> None:
    config = options(models, tmp_path / "out", micro_batch=1, steps=1, dtype="auto")
    said = tmp_path / "said"
    ranks, _store = launch(2, _two_minds, config, tmp_path / "dtype", said)
    assert join(ranks) == [0, 0], said.read_text()
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
    # The patch reads it from disk as well.
    both = [config.replace(patch="linear", method="none", out=str(tmp_path / "patched"))]
    both.append(both[0].replace(stream_teacher=False, top_k=0, out=str(tmp_path / "in-memory")))
    one, other = (read_json(heal(c) / "healing.json", "healing") for c in both)
    assert one["after"]["kl"] == pytest.approx(other["after"]["kl"], rel=1e-3)
    assert one["after"]["kl"] < one["before"]["kl"]


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


def test_the_patch_is_the_default_once(models: Path, tmp_path: Path) -> None:
    default: dict[str, Any] = {"patch": None, "method": "none"}
    out = heal(options(models, tmp_path / "out", **default))
    found = read_json(out / "healing.json", "healing")
    assert found["options"]["patch"] == "tuned"
    assert [cut["removed"] for cut in found["patch"]["cuts"]] == [[2, 3]]
    # What is healed already is not the exact cut, which a patch is fitted for.
    with pytest.raises(InputError, match="is healed already, and a patch is fitted to the exact"):
        heal(options(models, tmp_path / "never", student=str(out), patch="linear"))
    again = heal(options(models, tmp_path / "again", student=str(out), steps=1, patch=None))
    further = read_json(again / "healing.json", "healing")
    assert (further["start"], further["options"]["patch"]) == ("healed", "none")
    assert "patch" not in further


def test_where_nothing_can_be_patched_healing_goes_on(models: Path, tmp_path: Path) -> None:
    headless = tmp_path / "headless"
    record = json.dumps({"removed": [0], "of": 6})
    excise(models / "teacher", [0], headless, extra_files={"isingcut.json": record})
    given: dict[str, Any] = {"student": str(headless), "steps": 1}
    out = heal(options(models, tmp_path / "out", **given, patch=None))
    found = read_json(out / "healing.json", "healing")
    (warning,) = healing_warnings(found)
    assert warning.startswith("not patched: block 0 is removed")
    assert (len(found["steps"]), found["options"]["patch"]) == (1, "none")
    for asked in ({"patch": "linear"}, {"patch": None, "method": "none"}):
        with pytest.raises(ArchitectureError, match="block 0 is removed"):
            heal(options(models, tmp_path / "no", **given, **asked))


def test_weights_that_are_no_cut_any_more_are_distilled_unpatched(
    models: Path, tmp_path: Path
) -> None:
    student = tmp_path / "trained"
    trained = load(models / "student", dtype="float32", device="cpu")
    with torch.no_grad():
        trained.model.lm_head.weight.mul_(1.01)
    trained.model.save_pretrained(student)
    for name in ("isingcut.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(models / "student" / name, student / name)
    out = heal(options(models, tmp_path / "out", student=str(student), steps=1, patch=None))
    found = read_json(out / "healing.json", "healing")
    assert "patch" not in found
    assert "logits" in found["unpatched"][0]["reason"]


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
    with pytest.raises(InputError, match="last:5: the cut model has 4 blocks"):
        heal(options(models, tmp_path / "a", method="last:5"))
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
        {"method": "last:0"},
        {"steps": 0},
        {"method": "none"},
        {"top_k": 4, "temperature": 2.0},
    ):
        with pytest.raises(InputError):
            options(models, tmp_path / "e", **bad).validate()
