"""Healing: its text, training, resuming, LoRA, memory plans and budgets."""

import contextlib
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

from healings import (
    REMOVED,
    Killed,
    curve,
    healed,
    killing,
    models,
    options,
    result,
    shapes,
    stored,
    write_student,
)
from isingcut.cli import show
from isingcut.data import healing_text
from isingcut.data.healing_text import HealingText
from isingcut.data.tokens import pieces
from isingcut.files.healings import HealingFile
from isingcut.formats.transformers_private import get_checkpointing
from isingcut.healing import heal as home
from isingcut.healing import job as recipe
from isingcut.healing.heal import heal
from isingcut.healing.training import batches as memory
from isingcut.healing.training import student as parts
from isingcut.healing.training import train
from isingcut.healing.training.student import load_student
from isingcut.report.words import healing_warnings
from run_files import change
from shared import (
    ArchitectureError,
    HealConfig,
    OutputExistsError,
    RunConfig,
    StageFileError,
    load_json,
    parametrize,
    refuses,
    write_jsonl,
)
from tiny import (
    TextSampler,
    TokenSet,
    build,
    find_stack,
    gone,
    load,
    load_tiny,
    read_checkpoint,
    tiny_checkpoint,
    tiny_tokenizer,
)

__all__ = ["healed", "models"]


def test_healing_lowers_the_loss_and_leaves_a_plain_checkpoint(models, healed):
    found = result(healed)
    assert [s.step for s in found.steps] == [1, 2, 3, 4]
    assert found.steps[-1].tokens == found.tokens_seen == 4 * 4 * 31
    assert found.steps[-1].loss < found.steps[0].loss
    assert found.removed == list(REMOVED)
    sums = [found[model].kl_sums for model in ("before", "after")]
    counts = np.full(len(sums[0]), found.report_tokens // len(sums[0]))
    _, error = recipe.difference(*sums, counts)
    assert found.after.kl_change_se == pytest.approx(error)
    apart = np.hypot(found.before.nll_se, found.after.nll_se)
    assert 0 < found.after.nll_change_se < apart
    names = {*os.listdir(models / "student"), "healing.json"}
    assert set(os.listdir(healed)) == names
    assert not list(models.glob(".healed*"))
    assert len(find_stack(load_tiny(healed).model)) == 4


@parametrize("method", ["full", "lora:4"])
def test_a_killed_healing_resumes_to_the_same_curve_and_weights(
    models, healed, tmp_path, method
):
    config = options(models, tmp_path / "b", method=method)
    whole = healed if method == "full" else heal(config.replace(out=tmp_path / "a"))
    found = result(whole)
    assert found.after.kl < found.before.kl
    assert shapes(whole) == shapes(models / "student")
    assert not [p.name for p in whole.iterdir() if "adapter" in p.name]
    with pytest.raises(Killed):
        heal(config, progress=killing(3))
    assert not (tmp_path / "b").exists()
    with refuses("unfinished healing with other options", StageFileError):
        heal(config.replace(seed=7))
    heal(config)
    assert curve(tmp_path / "b") == curve(whole)
    assert stored(tmp_path / "b") == stored(whole)


def test_a_finished_healing_typed_again_keeps_its_result(models, healed, tmp_path):
    out = Path(shutil.copytree(healed, tmp_path / "healed"))
    text = Path(shutil.copy(models / "text.jsonl", tmp_path / "text.jsonl"))
    before = (out / "healing.json").stat().st_mtime_ns
    config = options(models, out)
    assert heal(config) == out
    for other in ({"seed": 7}, {"teacher": models / "student"}, {"text": text}):
        with refuses("already exists", OutputExistsError):
            heal(config.replace(**other))
    (out / "config.json").write_text("{}")
    with refuses("already exists", OutputExistsError):
        heal(config)
    assert (out / "healing.json").stat().st_mtime_ns == before


def test_a_healing_takes_ten_minutes_unless_told_otherwise():
    assert HealConfig().validate().train.seconds == 600
    for trainer in ({"max_steps": 4}, {"num_train_epochs": 2}):
        assert HealConfig(trainer=trainer).validate().train == "all"


def test_the_bar_of_a_training_that_fails_is_closed(models, tmp_path):
    shown = []

    class Bar:
        def advance(self, steps=1, note=""):
            if shown[-1].startswith("healing, "):
                raise Killed

    @contextlib.contextmanager
    def progress(description, total):
        shown.append(description)
        try:
            yield Bar()
        finally:
            shown.pop()

    # The exception is kept, with the frames that hold the bar.
    with pytest.raises(Killed) as stopped:
        heal(options(models, tmp_path / "healed"), progress=progress)
    assert stopped.traceback
    assert shown == []


def test_conversations_learn_the_same_in_any_micro_batches(models, tmp_path):
    texts = ("cold river " * (1 + i % 5) + str(i) for i in range(40))
    lines = [{"messages": [{"role": "user", "content": text}]} for text in texts]
    given = {"text": write_jsonl(tmp_path / "chat.jsonl", lines), "length": 48}
    curves = []
    for size in (1, 4):
        sizes = {"gradient_accumulation_steps": 4 // size}
        sizes["per_device_train_batch_size"] = size
        out = heal(options(models, tmp_path / str(size), sizes, **given))
        curves.append(curve(out))
    for mine, theirs in zip(*curves, strict=True):
        assert mine["tokens"] == theirs["tokens"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_activations_are_recomputed_where_one_sample_leaves_no_room(
    models, healed, tmp_path, monkeypatch, spy
):
    plans = spy(train, "plan_memory")
    settings = {"per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 3e-3}

    def planned(name, **more):
        return heal(options(models, tmp_path / name, trainer={**settings, **more}))

    planned("a")
    # No memory to spare, but enough.
    monkeypatch.setattr(
        memory, "least_left", lambda devices, limit="": 10**9 if limit else 0
    )
    out = planned("b")
    planned("c", max_steps=1, **dict.fromkeys(get_checkpointing(), False))
    assert [p.recompute for p in plans] == [False, True, False]
    assert [p.most for p in plans] == [4 * 32, 32, 32]
    for mine, theirs in zip(curve(out), curve(healed), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def saved_student(models, out, dtype="float32", scale=1.0):
    """Save the student like another tool, in a dtype, with a scaled head; return the path."""
    loaded = load(models / "student", dtype=dtype, device="cpu")
    with torch.no_grad():
        loaded.model.lm_head.weight.mul_(scale)
    loaded.model.save_pretrained(out)
    loaded.tokenizer.save_pretrained(out)
    shutil.copyfile(models / "student/isingcut.json", out / "isingcut.json")
    return str(out)


def test_training_in_half_precision(models, tmp_path):
    student = saved_student(models, tmp_path / "half", "bfloat16")
    training = {"max_steps": 2, "adam_beta2": 0.95}
    out = heal(
        options(models, tmp_path / "out", training, student=student, dtype="bfloat16")
    )
    assert {t.dtype for t in read_checkpoint(out).values()} == {"BF16"}
    found = result(out)
    assert found.after.kl < found.before.kl


ONCE = {"max_steps": 1}


@parametrize("method", ["lora", "full"])
def test_a_frozen_student_is_loaded_as_it_is_stored(models, tmp_path, spy, method):
    student = saved_student(models, tmp_path / "half", "bfloat16")
    loaded = spy(parts, "reload", lambda *given, dtype, **rest: dtype)
    given = options(models, tmp_path / "out", ONCE, student=student, dtype="bfloat16")
    heal(given.replace(method=method))
    assert loaded[0] == (torch.float32 if method == "full" else torch.bfloat16)


def test_buffers_of_a_student_stored_in_half_precision_are_exact(tmp_path):
    folder = tiny_checkpoint("gemma3", tmp_path / "gemma")
    config = HealConfig(method="lora")
    half, whole = (
        load_student(folder, config, d) for d in (torch.bfloat16, torch.float32)
    )
    exact = dict(whole.named_buffers())
    assert exact
    torch.testing.assert_close(dict(half.named_buffers()), exact, rtol=0, atol=0)


def test_processes_that_lack_host_memory_for_their_students_are_refused(
    models, monkeypatch, stub
):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    stub(parts, "allowance", SimpleNamespace(left=1000))
    with refuses(r"in 8 processes, 8e-06 GB are free; start fewer"):
        load_student(models / "student", HealConfig())


def test_a_launched_trainer_waits_for_rank_0(models, monkeypatch, stub):
    state = mock.Mock()
    monkeypatch.setattr("accelerate.PartialState", state)
    stub(home, "is_launched", True)
    stub(home.Processes, "join", None)
    home._processes(HealConfig())
    assert state.call_args.kwargs["timeout"].days > 300


def test_patch_and_distillation_together(models, tmp_path):
    out = heal(options(models, tmp_path / "out", {"max_steps": 2}, patch="linear"))
    found = result(out)
    kl = found.patch.scores.kl
    assert kl < found.before.kl
    assert len(found.steps) == 2
    alone = heal(options(models, tmp_path / "alone", patch="linear", method="none"))
    other = result(alone)
    assert other.after.kl == pytest.approx(kl, rel=1e-6)
    assert other.steps == []


def test_the_patch_is_the_default_once(models, tmp_path):
    out = heal(options(models, tmp_path / "out", patch=None, method="none"))
    found = result(out)
    assert found.options.patch == "tuned"
    assert [cut.removed for cut in found.patch.cuts] == [[2, 3]]
    # A healed model is not the exact cut that a patch is fitted for.
    with refuses("is healed already, but a patch needs the exact"):
        heal(options(models, tmp_path / "never", student=out, patch="linear"))
    again = heal(options(models, tmp_path / "again", ONCE, student=out, patch=None))
    further = result(again)
    assert (further.start, further.options.patch) == ("healed", "none")
    assert "patch" not in further


@parametrize(
    "place, mixed",
    [("", ""), ("model", "{0}"), ("remove-2", ""), ("remove-2/model", "{0}=1,{1}=1")],
)
def test_a_run_is_healed_on_its_text_but_for_what_it_reports_on(
    models, run, tmp_path, monkeypatch, place, mixed
):
    other = tmp_path / "b.txt"
    other.write_text("\n\n".join(f"{i}. words" for i in range(900, 990)))
    model = run / place.removesuffix("model") / "model"
    if "remove" in place:
        shutil.copytree(run / "model", model)
    text = str(models / "text.jsonl")
    tokenizer = tiny_tokenizer()
    used = build(
        text,
        TextSampler(tokenizer, 16, 0),
        samples=3,
        rank_samples=2,
        report_samples=3,
    )
    used.save(run / "calibration.safetensors")
    measured_on(run, text)
    heal_checkpoint = mock.Mock()
    monkeypatch.setattr(home, "heal_checkpoint", heal_checkpoint)
    given = {"student": run / place, "teacher": "", "text": mixed.format(text, other)}
    # The text has no further samples to report on.
    given["report_samples"] = 500
    heal(options(models, tmp_path / "out", **given))
    job, mine, *_ = heal_checkpoint.call_args.args
    assert (job.start, job.config.text) == (model, given["text"] or text)
    own = used.splits["report"]
    assert torch.equal(mine.report.input_ids, own.input_ids)
    reported, trained = (
        set(re.findall(r"(\d+)\.", tokenizer.decode(t.input_ids[t.mask])))
        for t in (own, mine.train)
    )
    assert not reported & trained


def measured_on(run, text):
    """Let a run's record name another text."""
    made = load_json(run / "run.json").provenance
    made["calibration"]["source"] = text
    change(run / "run.json", provenance=made)


@parametrize("source", ["self", "wiki=1,-=1", "gone.txt"])
def test_a_text_of_a_run_that_cannot_be_read_again_is_refused(run, source, refusal):
    measured_on(run, source)
    said = refusal("heal", run, "--out", run.parent / "healed")
    assert f"of the run {run}" in said
    assert "--text" in said
    typed = f" --text {source}" if source == "gone.txt" else ""
    shown = f"isingcut heal {run}/model{typed} --train 10min"
    assert shown in show.open_finished(run).verdict


def test_where_nothing_can_be_patched_healing_goes_on(models, tmp_path):
    headless = tmp_path / "headless"
    write_student(models / "teacher", headless, [0])
    given = {"training": ONCE, "student": headless}
    found = result(heal(options(models, tmp_path / "out", **given, patch=None)))
    # The text has ten words, and its tokens are letters, so the splits are alike.
    unpatched, alike = healing_warnings(HealingFile.model_validate(found))
    assert unpatched.startswith("not patched: block 0 is removed")
    assert "of the report text is in another split too" in alike
    assert (len(found.steps), found.options.patch) == (1, "none")
    for asked in ({"patch": "linear"}, {"patch": None, "method": "none"}):
        with refuses("block 0 is removed", ArchitectureError):
            heal(options(models, tmp_path / "no", **given, **asked))


def test_weights_that_are_no_cut_any_more_are_distilled_unpatched(models, tmp_path):
    student = saved_student(models, tmp_path / "trained", scale=1.01)
    out = heal(options(models, tmp_path / "out", ONCE, student=student, patch=None))
    found = result(out)
    assert "patch" not in found
    assert "logits" in found.unpatched[0].reason


def test_a_cut_by_another_tool_is_recognised_by_its_weights(models, healed, tmp_path):
    foreign = tmp_path / "foreign"
    shutil.copytree(
        models / "student", foreign, ignore=shutil.ignore_patterns("isingcut.json")
    )
    out = heal(options(models, tmp_path / "out", student=foreign))
    assert curve(out) == curve(healed)
    found = result(out)
    assert (found.removed, found.of) == ([2, 3], 6)
    again = heal(options(models, tmp_path / "again", ONCE, student=out))
    assert result(again).removed == [2, 3]


def bought(folder):
    return result(folder).recipe


def spending(models, out, train, trainer=""):
    return options(models, out, train=train, trainer=trainer, length=64)


FOUR = {"per_device_train_batch_size": 4, "save_steps": 2}


def test_small_budgets_make_many_small_steps():
    for tokens, steps, each, context in (
        (20_000, 39, 512, 256),
        (80_000, 39, 2048, 256),
        (1_300_000, 158, 8192, 1024),
        (50_000_000, 3051, 16384, 1024),
    ):
        batch, length, rate = recipe.sizes(HealConfig(), tokens, width=576)
        assert (tokens // each, batch * length, length) == (steps, each, context)
        assert 2e-5 <= rate <= 3e-4
    small, wide = (recipe.sizes(HealConfig(), 80_000, width=w)[2] for w in (576, 4096))
    assert small > wide > 2e-5
    settings = {"per_device_train_batch_size": 3, "learning_rate": 0.5}
    given = HealConfig(length=512, trainer=settings)
    assert recipe.sizes(given, 80_000, width=576, longest=512) == (3, 512, 0.5)
    # The batch is shared evenly by the processes.
    assert recipe.sizes(HealConfig(), 20_000, width=576, processes=3)[0] == 3


def test_samples_are_cut_into_pieces_that_begin_as_they_do():
    whole = TokenSet.from_rows(
        [[7, *range(10, 19)], [7, 30, 31, 32, 33]], parts=["a", "b"]
    )
    found = pieces(whole, 5)
    rows = [ids[m].tolist() for ids, m in zip(found.input_ids, found.mask, strict=True)]
    assert rows == [
        [7, 10, 11, 12, 13],
        [7, 14, 15, 16, 17],
        [7, 18],
        [7, 30, 31, 32, 33],
    ]
    assert found.parts == ("a", "a", "a", "b")
    assert pieces(whole, 10) is whole
    # Without a common first token, each predicts the next from the last one before.
    other = pieces(TokenSet.from_rows([[1, 2, 3, 4], [5, 6]]), 2)
    assert other.input_ids.tolist() == [[1, 2], [2, 3], [3, 4], [5, 6]]


def test_a_budget_in_tokens_is_spent(models, tmp_path):
    out = heal(spending(models, tmp_path / "out", "1.5k tokens", trainer=FOUR))
    found = bought(out)
    assert (found.steps, found.batch, found.length) == (5, 4, 64)
    assert found.tokens == 5 * 4 * 64
    assert found.seconds is None
    assert len(curve(out)) == 5
    assert result(out).tokens_seen == 5 * 4 * 63
    trainer = {**FOUR, "num_train_epochs": 1.0}
    once = heal(spending(models, tmp_path / "once", "1Gtokens", trainer=trainer))
    assert bought(once).epochs == pytest.approx(1, abs=0.5)


@pytest.fixture
def clock(monkeypatch):
    """The clock of healings: only a step takes time, the last cost that has begun.

    `costs` has seconds by the number of the first step, and `rates` gets the learning rates.
    """
    clock = SimpleNamespace(now=0.0, costs={}, rates=[])
    for module in (home, train, healing_text):
        seen = SimpleNamespace(monotonic=lambda: clock.now)
        monkeypatch.setattr(module, "time", seen)
    step = train.OurTrainer.training_step

    def timed(self, *given, **rest):
        begun = [first for first in clock.costs if first <= self.state.global_step]
        clock.now += clock.costs[max(begun)]
        clock.rates += [group["lr"] for group in self.optimizer.param_groups[:1]]
        return step(self, *given, **rest)

    monkeypatch.setattr(train.OurTrainer, "training_step", timed)
    return clock


@parametrize("costs, steps", [({0: 3}, 18), ({0: 0.25}, 34), ({0: 1, 10: 8}, 15)])
def test_a_time_is_kept_by_the_clock_with_its_schedule_run_down(
    models, tmp_path, stub, clock, costs, steps
):
    # 54 s of 4 x 64 tokens are 17 steps, and twice as many if the device turns out faster.
    stub(train, "measure_pace", 0.012)
    clock.costs = costs
    config = spending(models, tmp_path / "a", "1min", trainer=FOUR)
    whole = heal(config)
    assert clock.now <= 54
    assert len(curve(whole)) == len(clock.rates) == steps
    found = bought(whole)
    assert found.steps == 34
    assert clock.rates[-1] < 0.1 * max(clock.rates)
    assert "stopped" not in result(whole)
    config = config.replace(out=tmp_path / "b")
    with pytest.raises(Killed):
        heal(config, progress=killing(20))
    # Another pace would give another plan.
    stub(train, "measure_pace", 0.018)
    heal(config)
    assert bought(tmp_path / "b") == found
    assert curve(tmp_path / "b") == curve(whole)
    assert stored(tmp_path / "b") == stored(whole)


def test_a_time_pays_for_the_text(models, tmp_path, stub, clock, monkeypatch):
    stub(train, "measure_pace", 0.012)
    clock.costs = {0: 3}
    build = home.build_text
    slow = lambda *given: replace(build(*given), seconds=60.0)  # noqa: E731
    monkeypatch.setattr(home, "build_text", slow)
    out = heal(spending(models, tmp_path / "out", "2min", trainer=FOUR))
    # As many steps as in one minute with a text that takes none.
    assert len(curve(out)) == 18
    assert result(out).seconds >= 60


@parametrize("pace, each, done", [(0.006, 20, 2), (None, 100, 0)])
def test_a_time_for_fewer_than_ten_steps_changes_nothing_and_says_so(
    models, tmp_path, stub, clock, pace, each, done
):
    if pace:
        stub(train, "measure_pace", pace)
    clock.costs = {0: each}
    out = heal(spending(models, tmp_path / "out", "1min", trainer=FOUR))
    # Without a plan for ten steps, only one step was timed.
    assert clock.now == max(1, done) * each
    found = HealingFile.model_validate(result(out))
    assert found.stopped.kept == 0
    assert f"1min, was over after {done} steps" in healing_warnings(found)[-1]
    assert len(found.steps) == done
    assert stored(out) == stored(models / "student")


def test_a_time_too_short_for_a_useful_step_is_refused(models, tmp_path):
    with refuses(r"too short: the text, the evaluations.*10 steps .*give --train 1min"):
        heal(spending(models, tmp_path / "out", "0.0001min"))
    assert not (tmp_path / "out").exists()


def test_a_time_that_the_patch_would_use_up_is_refused(tmp_path):
    text = TokenSet.from_rows([[7] * 64] * 10)
    config = HealConfig(train="3min")
    teacher = SimpleNamespace(model=None)
    job = home.Job(teacher, gone([2, 3]), tmp_path, text, tmp_path, config)
    both = HealingText(text, text.select([0, 1]), 0.0)
    home._check_train(job, both, 4.0, patches=False)
    with refuses(r"take about 3 min here; give --train 4min"):
        home._check_train(job, both, 4.0, patches=True)
    with refuses(r"take about 3 min here; give --train 4min"):
        home._check_train(job, replace(both, seconds=30.0), 4.0, patches=False)


def test_a_runs_budget_is_that_of_its_healing():
    config = RunConfig(model="m", remove="2")
    assert (config.heal, config.replace(heal=True).heal) == ("", "all")
    assert RunConfig(heal=False) == RunConfig()
    assert config.replace(heal="10min").training().train == "10min"
    assert config.replace(heal=True).training().train == ""
    assert config.replace(healing={"length": torch.tensor(64)}).training().length == 64
    with refuses(r"--heal: 'soon': expected a time \(10min, 2h\), tokens"):
        config.replace(heal="soon")


@parametrize(
    "words, line",
    [
        (["--heal", "--patch", "cubic"], "unknown repair"),
        (["--patch=linear", "--heal"], "gone"),
        (["--heal", "2h"], "gone"),
        (["--heal=9"], "--heal: '9': expected a time"),
    ],
)
def test_a_switch_may_have_a_budget_behind_it(words, line, tmp_path, refusal):
    model = str(tmp_path / "gone")
    rest = ["--remove", "2", "--out", str(tmp_path / "o"), *words]
    for command in ([model, *rest], [*rest, model]):
        assert line in refusal("run", *command)
