"""The choice by questions."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest

import isingcut
from isingcut.evaluation import answers as likelihoods
from isingcut.evaluation import scores as scoring
from isingcut.evaluation.benchmark import choose_by_questions, draw_half
from isingcut.evaluation.questions import prepare_task
from isingcut.evaluation.scores import score_states
from isingcut.files.states import ByTasks, CandidatesFile, ChosenState
from isingcut.report.words import sentence
from isingcut.runs import benchmarking, evaluating
from isingcut.runs.checks import check_run_tasks
from shared import (
    OPTIONS,
    RunConfig,
    load_json,
    module_fixture,
    parametrize,
    refuses,
    without_speed,
    works,
    write_jsonl,
)
from test_tasks import gsm8k
from tiny import load_tiny

pytestmark = [
    pytest.mark.usefixtures("no_speed"),
    pytest.mark.filterwarnings("ignore::isingcut.PoorEnergyWarning"),
]


def choose(table):
    """Choose among candidates by a table: task -> certainties (K, n), which are the scores too."""
    keys = {}
    scores = []
    for task, rows in table.items():
        keys[task] = [f"{task}{i}" for i in range(len(rows[0]))]
        values = np.array(rows, dtype=float)
        scores.append([SimpleNamespace(values=v, certainties=v) for v in values])
    candidates = [[k] for k in range(len(scores[0]))]
    position, found = choose_by_questions(candidates, keys, scores)
    return {"chosen": position, **found.content()}


def test_half_of_the_questions_by_a_seed():
    keys = {"a": [f"a{i}" for i in range(11)], "b": ["b0", "b1", "b1"]}
    found = draw_half(keys, 0)
    assert {t: len(ks) for t, ks in found.items()} == {"a": 5, "b": 1}
    assert all(set(found[t]) < set(keys[t]) for t in keys)
    assert draw_half(keys, 0) == found
    assert draw_half(keys, 1)["a"] != found["a"]
    with refuses("c has one question"):
        draw_half({"c": ["c0", "c0"]}, 0)


def test_a_choice_against_the_loss_is_explained():
    parts = {"candidates": [None, None], "by_task": {"a": 9}, "tasks": ["a"]}

    def said(kl, lowest):
        chosen = ChosenState.model_construct(why="questions", kl=kl)
        found = CandidatesFile.model_construct(
            chosen=chosen,
            candidates=[chosen, chosen.model_copy(update={"kl": lowest})],
            by_tasks=ByTasks.model_construct(**parts),
        )
        return sentence("why_words", found)

    within = "lowest KL within a standard error of the best of 2 on 9 questions of a"
    assert said(0.9, 0.8) == within
    assert "its KL is 2.67, the lowest 0.231" in said(2.671, 0.231)


def test_the_best_of_all_candidates_is_chosen_and_compared():
    rows = (np.random.default_rng(0).random((3, 90)) < [[0.3], [0.8], [0.35]]).astype(
        float
    )
    found = choose({"t": rows[:, :50], "u": rows[:, 50:]})
    assert (found["chosen"], found["by_task"]) == (1, {"t": 50, "u": 40})
    assert found["questions"][49:51] == ["t49", "u0"]
    loser, winner, _ = found["candidates"]
    assert winner["difference"] is None
    difference = rows[0] - rows[1]
    assert loser["accuracy"] == pytest.approx(rows[0].mean())
    assert loser["difference"] == pytest.approx(difference.mean())
    assert loser["difference_se"] == pytest.approx(difference.std(ddof=1) / 90**0.5)


@parametrize("rows", [[np.arange(9) % 2] * 3, [[0.0], [1.0]]])
def test_equal_candidates_and_a_single_question_leave_the_lower_loss(rows):
    found = choose({"t": rows})
    assert found["chosen"] == 0
    assert found["candidates"][1]["difference_se"] == (0 if len(rows[0]) > 1 else None)


# runs -----------------------------------------------------------------------------------


@module_fixture
def questions(tmp_path_factory):
    """A file of 60 questions."""
    rng = np.random.default_rng(0)
    words = ["river", "bridge", "lantern", "orchard", "harbour", "mill"]
    records = [
        {
            "context": f"Number {i} stands by the {words[i % 6]},",
            "choices": [f"so it is a {w}" for w in rng.permutation(words)[:3]],
            "answer": i % 3,
        }
        for i in range(60)
    ]
    path = tmp_path_factory.mktemp("questions") / "mine.jsonl"
    write_jsonl(path, records)
    return path


def chosen_by(llama, text):
    """Return the options of a run that chooses by questions."""
    inputs = {"model": llama, "calibration": text, "remove": 2, "patch": "none"}
    return {**OPTIONS, **inputs, "choose": "tasks"}


@module_fixture
def by_questions(llama, text, questions, tmp_path_factory):
    """The options of a run that chose by questions, and its folder."""
    out = tmp_path_factory.mktemp("by_questions") / "run"
    options = {**chosen_by(llama, text), "tasks": str(questions), "out": out}
    with without_speed():
        return options, isingcut.run(**options)


def test_a_run_chooses_by_questions_and_reports_on_others(by_questions, questions):
    options, target = by_questions
    found = load_json(target / "candidates.json")
    choice = found.by_tasks
    rows = choice.candidates
    kl = {tuple(row.removed): row.kl for row in found.candidates}
    measured_kl = [kl[tuple(row.removed)] for row in rows]
    assert measured_kl == sorted(measured_kl)
    assert measured_kl[0] == min(kl.values())
    # A state of high loss may have the best answers, so it answers as well.
    removed = [row.removed for row in rows]
    assert [4, 5] in removed
    chosen = rows[removed.index(found.chosen.removed)]
    assert chosen.difference is None
    assert found.chosen.why == "questions"
    assert len(choice.questions) == 30
    assert not (target / ".questions").exists()

    # The checkpoint answers like the original with its blocks skipped.
    cut = load_tiny(target / "model")
    task = prepare_task(str(questions), None)
    (own,) = score_states(cut, task, [()], wanted=set(choice.questions).__contains__)
    assert own.values.mean() == pytest.approx(chosen.accuracy)
    assert own.certainties.mean() == pytest.approx(chosen.certainty)
    assert len(own.values) == 30

    # The final model is judged by the other half of the questions.
    judged = load_json(target / "benchmarks.json")
    assert judged.left_out == 30
    assert [(r.task, r.n) for r in judged.rows] == [("mine.jsonl", 30)]
    (others,) = score_states(
        cut, task, [()], wanted=lambda key: key not in choice.questions
    )
    assert judged.rows[0].cut == pytest.approx(others.values.mean())
    assert not set(own.questions) & set(others.questions)

    page = (target / "report.md").read_text()
    for words in ("## Choice by questions", "30 of mine.jsonl", "30 questions of mine"):
        assert words in page
    assert 'id="by-tasks"' in (target / "report.html").read_text()
    files = [target / f"{n}.json" for n in ("candidates", "benchmarks", "evaluation")]
    before = [p.stat().st_mtime_ns for p in files]
    isingcut.run(**options)
    assert [p.stat().st_mtime_ns for p in files] == before


def test_a_killed_choice_goes_on_from_what_was_scored(
    llama, text, questions, tmp_path, spy
):
    more = questions.with_name("more.jsonl")
    more.write_text(questions.read_text().replace("river", "brook"))
    out = tmp_path / "run"
    tasks = f"{questions},{more}"
    options = {**chosen_by(llama, text), "tasks": tasks, "out": out}
    scored = spy(
        benchmarking,
        "score_states",
        lambda _, model, task, *given, **rest: task.name,
        stop=2,
    )
    computed = spy(likelihoods, "_scores")
    with pytest.raises(KeyboardInterrupt):
        isingcut.prune(**options)
    before = len(computed)
    assert list((out / ".questions").glob("mine.jsonl-*.journal"))
    isingcut.prune(**options)
    assert scored == ["mine.jsonl", "mine.jsonl", "more.jsonl"]
    # Answered questions are not scored again, and the other file has as many.
    assert len(computed) == 2 * before > 0


def test_scores_on_questions_that_changed_are_not_kept(
    run, questions, tmp_path, refusal
):
    own = tmp_path / "own.jsonl"
    data = tmp_path / "data/arc_easy/test.jsonl"
    data.parent.mkdir(parents=True)
    text = questions.read_text()
    again = ["evaluate", run, "--tasks", "arc_easy"]
    for file, line in (
        (own, ["rank", run, "--choose", "tasks", "--tasks", own]),
        (data, [*again, "--data", tmp_path / "data"]),
    ):
        file.write_text(text)
        works(*line, "--overwrite")
        file.write_text(text.replace("river", "brook"))
        assert "the files changed" in refusal(*line)


def test_questions_are_answered_without_a_measurement_of_text(
    run, questions, spy, answer
):
    measured = spy(evaluating, "evaluate")
    line = ["evaluate", run, "--tasks", questions, "--overwrite", "--questions"]
    for there in (True, False):
        found = answer(*line, 4 + there)
        assert found.benchmarks.rows[0].n == 4 + there
        assert ("kl" in found) == there
        (run / "evaluation.json").unlink(missing_ok=True)
    assert not measured


def test_scores_on_other_tasks_are_kept(run, questions, answer, refusal):
    more = shutil.copyfile(questions, questions.with_name("more.jsonl"))
    line = ["evaluate", run, "--questions", 4, "--tasks"]
    (first,) = answer(*line, questions).benchmarks.rows
    both = answer(*line, more).benchmarks.rows
    assert [row.task for row in both] == ["mine.jsonl", "more.jsonl"]
    assert both[0] == first
    assert answer(*line, questions).benchmarks.rows == both
    line[3] = 5
    assert "tasks: more.jsonl: questions: was 4, now 5" in refusal(*line, more)
    again = answer(*line, more, "--overwrite").benchmarks.rows
    assert [row.n for row in again] == [4, 5]


def test_a_part_that_fails_costs_its_own_rows(
    shared, text, questions, tmp_path, monkeypatch, capsys
):
    model = tmp_path / "model"
    shutil.copytree(shared.checkpoint(max_position_embeddings=512), model)
    (model / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    more = shutil.copyfile(questions, tmp_path / "odd.jsonl")
    options = {**chosen_by(model, text), "choose": "measured", "questions": 4}
    options |= {"out": tmp_path / "run", "random_states": 0}
    # What the template or the positions tell is known before the first file.
    short = {**options, "model": shared.checkpoint(max_position_embeddings=128)}
    for given, line in (
        (options, "instructions: the model's chat template refuses"),
        (short, "instructions: it generates up to 256 tokens, but the model has 128"),
    ):
        with refuses(line):
            isingcut.run(**given, tasks="instructions")
        assert not (tmp_path / "run").exists()
    score = scoring._score_one

    def fails(engine, task, wanted):
        if task.name == "odd.jsonl":
            raise RuntimeError("no score here")
        return score(engine, task, wanted)

    monkeypatch.setattr(scoring, "_score_one", fails)
    capsys.readouterr()
    target = isingcut.run(**options, tasks=f"{questions},{more}")
    said = capsys.readouterr().err
    refused = "the model's chat template refuses these messages (TemplateError: no)"
    assert f"answers to prompts will not be measured: {refused}" in said
    found = load_json(target / "evaluation.json")
    assert found.failed == {"answers to prompts": refused}
    assert "answers" not in found
    assert found.kl > 0
    found = load_json(target / "benchmarks.json")
    assert [row.task for row in found.rows] == ["mine.jsonl"]
    page = (target / "report.md").read_text()
    for line in (
        f"answers to prompts not measured: {refused}",
        "odd.jsonl not measured: no score here",
    ):
        assert line in page


def test_unusable_tasks_are_refused(questions):
    for options in ({"choose": "tasks"}, {"questions": 5}):
        with refuses("need benchmarks; name some with --tasks"):
            RunConfig(model="m", remove="2", **options).validate()
    with refuses("a range of removals cuts none"):
        check_run_tasks(RunConfig(model="m", remove="2..3", tasks=str(questions)))


def test_a_streamed_model_gives_the_same_answers(by_questions, tmp_path):
    options, whole = by_questions
    streamed = isingcut.run(**{**options, "out": tmp_path / "run", "stream": "on"})
    for kind, key in (("candidates", "by_tasks"), ("benchmarks", "rows")):
        one, other = (
            load_json(target / f"{kind}.json")[key] for target in (streamed, whole)
        )
        assert one == other


def test_a_streamed_model_writes_no_answers(llama, text, tmp_path):
    data = tmp_path / "data"
    for name in ("test", "train"):
        write_jsonl(data / f"gsm8k/{name}.jsonl", [gsm8k(1)[1]] * 8)
    given = {**chosen_by(llama, text), "choose": "measured", "stream": "on"}
    given |= {"data": str(data), "out": tmp_path / "run", "tasks": "gsm8k"}
    with refuses("gsm8k needs the whole model, which does not fit"):
        isingcut.run(**given)
    assert not (tmp_path / "run").exists()


def test_certainties_separate_candidates_of_equal_scores():
    """Both candidates have the same right answers, but one is surer of them."""
    rng = np.random.default_rng(2)
    sure = rng.uniform(-2.0, 0.0, 50)
    more = [np.zeros(50), 0.1 * rng.random(50)]
    right = (sure > -0.7).astype(float)
    scores = [SimpleNamespace(values=right, certainties=sure + extra) for extra in more]
    position, found = choose_by_questions([[0], [1]], {"t": []}, [scores])
    assert position == 1
    first, second = found.candidates
    assert (first.accuracy, first.difference) == (second.accuracy, 0)
    assert second.certainty > first.certainty


def test_the_lowest_loss_within_a_standard_error_is_chosen():
    """With few questions the best of several candidates is mostly the luckiest one."""
    noise = np.random.default_rng(3).normal(size=40)
    noise = (noise - noise.mean()) / noise.std()

    def chosen(lead):
        # The paired difference has a standard deviation of one.
        return choose({"t": [np.zeros(40), noise + lead]})["chosen"]

    error = 1 / np.sqrt(39)
    assert chosen(0.9 * error) == 0
    assert chosen(1.1 * error) == 1


def test_a_task_of_many_nats_does_not_outvote_another():
    rng = np.random.default_rng(4)
    # One is better by letters, the other slightly by words, in units of their spreads.
    letters = 0.3 * rng.normal(size=(2, 60)) + np.array([[0.0], [0.5]])
    words = 0.3 * rng.normal(size=(2, 60)) + np.array([[0.1], [0.0]])
    assert choose({"letters": letters, "words": 30 * words})["chosen"] == 1
