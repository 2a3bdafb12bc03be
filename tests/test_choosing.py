"""The choice by questions."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

import isingcut
from isingcut.errors import InputError
from isingcut.evaluation import benchmark as choosing
from isingcut.evaluation.benchmark import choose_by_questions, contenders, draw_half, looks
from isingcut.evaluation.questions import prepare_task
from isingcut.evaluation.scores import score_states
from isingcut.files.results import read_json
from isingcut.files.states import ByTasks, CandidatesFile, ChosenState
from isingcut.models.load import load
from isingcut.options.config import RunConfig
from isingcut.report.words import sentence
from isingcut.runs import benchmarking
from isingcut.runs.checks import check_run_tasks
from shared import OPTIONS, call, leave_speed_out, write_jsonl

pytestmark = [
    pytest.mark.usefixtures("no_speed"),
    pytest.mark.filterwarnings("ignore::isingcut.PoorEnergyWarning"),
]


def choose(*given):
    """Return the content of `choose_by_questions` with the chosen position."""
    position, found = choose_by_questions(*given)
    return {"chosen": position, **found.content()}


def answers(table):
    """Return an `ask` that reads a table: removed blocks -> key -> score."""

    def ask(left, task, keys):
        rows = [[table[tuple(removed)][key] for key in keys] for removed in left]
        return [SimpleNamespace(values=row, certainties=row) for row in np.array(rows)]

    return ask


def drawn(rng, keys, *rates):
    return {
        (i,): dict(zip(keys, (rng.random(len(keys)) < rate).astype(float), strict=True))
        for i, rate in enumerate(rates)
    }


def test_looks_grow_and_end_with_all():
    assert looks(30) == [30]
    assert looks(120) == [50, 75, 112, 120]
    assert looks(169) == [50, 75, 112, 169]
    assert len(looks(10_000)) < 16


def test_half_of_the_questions_by_a_seed():
    keys = {"a": [f"a{i}" for i in range(11)], "b": ["b0", "b1", "b1"]}
    found = draw_half(keys, 0)
    assert {t: len(ks) for t, ks in found.items()} == {"a": 5, "b": 1}
    assert all(set(found[t]) < set(keys[t]) for t in keys)
    assert draw_half(keys, 0) == found
    assert draw_half(keys, 1)["a"] != found["a"]
    with pytest.raises(InputError, match="c has one question"):
        draw_half({"c": ["c0", "c0"]}, 0)


def test_contenders_are_no_near_copies_while_there_are_others():
    blocks = [[3, 4], [3, 5], [8, 9], [4, 5], [2, 4], [0, 1], [6, 7]]
    rows = [SimpleNamespace(removed=b, kl=float(k)) for k, b in enumerate(blocks)]
    # 3 5, 4 5 and 2 4 share a block with one of lower loss.
    assert contenders(rows) == [0, 1, 2, 5, 6]
    assert contenders(rows[:5]) == [0, 1, 2, 3, 4]
    worst = SimpleNamespace(removed=[10, 11], kl=99.0)
    assert contenders([*rows, worst], [11, 10])[-1] == 7
    assert contenders([*rows, worst]) == [0, 2, 5, 6, 7]
    assert contenders(rows, [3, 4]) == contenders(rows)


def test_a_choice_against_the_loss_is_explained():
    parts = {"candidates": [None, None], "by_task": {"a": 9}, "tasks": ["a"]}

    def said(ahead, kl, lowest):
        chosen = ChosenState.model_construct(why="questions", kl=kl)
        found = CandidatesFile.model_construct(
            chosen=chosen,
            candidates=[chosen, chosen.model_copy(update={"kl": lowest})],
            by_tasks=ByTasks.model_construct(**parts, ahead=ahead),
        )
        return sentence("why_words", found)

    assert said(True, 0.0, 0.0) == "ahead of 2 on 9 questions of a"
    within = "lowest KL within a standard error of the best of 2 on 9 questions of a"
    assert said(False, 0.9, 0.8) == within
    assert "its KL is 2.67, the lowest 0.231" in said(True, 2.671, 0.231)


def test_a_clear_leader_ends_the_questions_early():
    keys = [f"q{i}" for i in range(1000)]
    table = drawn(np.random.default_rng(0), keys, 0.3, 0.8, 0.35)
    found = choose([[0], [1], [2]], {"t": keys}, answers(table))
    assert found["chosen"] == 1
    assert found["ahead"]
    assert len(found["questions"]) == found["by_task"]["t"] < 200
    assert found["questions"] == keys[: len(found["questions"])]
    loser, winner, _ = found["candidates"]
    assert loser["dropped"]
    assert not winner["dropped"]
    assert winner["difference"] is None
    seen = keys[: loser["questions"]]
    difference = np.array([table[(0,)][k] - table[(1,)][k] for k in seen])
    assert loser["difference"] == pytest.approx(difference.mean())
    assert loser["difference_se"] == pytest.approx(difference.std(ddof=1) / len(seen) ** 0.5)


def test_equal_candidates_answer_all_questions_and_the_lower_loss_is_chosen():
    keys = [f"q{i}" for i in range(90)]
    table = {(i,): {k: float(int(k[1:]) % 2) for k in keys} for i in range(3)}
    found = choose([[0], [1], [2]], {"t": keys}, answers(table))
    assert found["chosen"] == 0
    assert not found["ahead"]
    assert len(found["questions"]) == 90


def test_tasks_take_turns_until_the_shortest_is_through():
    keys = {"long": [f"l{i}" for i in range(100)], "short": [f"s{i}" for i in range(10)]}
    both = keys["long"] + keys["short"]
    table = {(i,): dict.fromkeys(both, 1.0) for i in range(2)}
    found = choose([[0], [1]], keys, answers(table))
    assert found["by_task"] == {"long": 100, "short": 10}
    assert found["questions"][:4] == ["l0", "s0", "l1", "s1"]


def test_a_single_candidate_needs_no_questions():
    found = choose([[3]], {"t": ["a", "b"]}, answers({}))
    assert (found["chosen"], found["questions"], found["looks"]) == (0, [], 0)


@pytest.mark.parametrize("kind", ["right or wrong", "probabilities"])
def test_equal_candidates_are_rarely_dropped_however_many_looks(kind):
    """Of four equally good candidates any is dropped in at most one of twenty choices."""
    rng, keys = np.random.default_rng(1), [f"q{i}" for i in range(200)]
    dropped = 0
    for _ in range(20):
        table = drawn(rng, keys, *[0.5] * 4)
        if kind == "probabilities":
            # Very skewed: sure and mostly right, or sure and wrong.
            values = rng.beta(0.3, 0.2, (4, len(keys)))
            table = {(i,): dict(zip(keys, values[i].tolist(), strict=True)) for i in range(4)}
        found = choose([[i] for i in range(4)], {"t": keys}, answers(table))
        dropped += any(row["dropped"] for row in found["candidates"])
    assert dropped <= 20 * choosing.ALPHA


# runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
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
    inputs = {"model": str(llama), "calibration": str(text), "remove": 2, "patch": "none"}
    return {**OPTIONS, **inputs, "choose": "tasks"}


@pytest.fixture(scope="module")
def by_questions(llama, text, questions, tmp_path_factory):
    """The options of a run that chose by questions, and its folder."""
    out = tmp_path_factory.mktemp("by_questions") / "run"
    options = {**chosen_by(llama, text), "tasks": str(questions), "out": str(out)}
    with pytest.MonkeyPatch.context() as patch:
        leave_speed_out(patch.setattr)
        return options, isingcut.run(**options)


def test_a_run_chooses_by_questions_and_reports_on_others(by_questions, llama, questions):
    options, target = by_questions
    found = read_json(target / "candidates.json", "candidates")
    choice, rows = found["by_tasks"], found["by_tasks"]["candidates"]
    kl = {tuple(row["removed"]): row["kl"] for row in found["candidates"]}
    measured_kl = [kl[tuple(row["removed"])] for row in rows]
    assert measured_kl == sorted(measured_kl)
    assert measured_kl[0] == min(kl.values())
    # A state of high loss may have the best answers, so it answers as well.
    size = load(llama, dtype="float32", device="cpu").model.config.num_hidden_layers
    assert [size - 2, size - 1] in [row["removed"] for row in rows]
    chosen = rows[[r["removed"] for r in rows].index(found["chosen"]["removed"])]
    assert chosen["difference"] is None
    assert not chosen["dropped"]
    assert found["chosen"]["why"] == "questions"
    assert len(choice["questions"]) == 30
    assert not (target / ".questions").exists()

    # The checkpoint answers like the original with its blocks skipped.
    cut = load(target / "model", dtype="float32", device="cpu")
    task = prepare_task(str(questions), None)
    (own,) = score_states(cut, task, [()], wanted=set(choice["questions"]).__contains__)
    assert own.values.mean() == pytest.approx(chosen["accuracy"])
    assert own.certainties.mean() == pytest.approx(chosen["certainty"])
    assert len(own.values) == 30

    # The final model is judged by the other half of the questions.
    judged = read_json(target / "benchmarks.json", "benchmarks")
    assert judged["left_out"] == 30
    assert [(r["task"], r["n"]) for r in judged["rows"]] == [("mine.jsonl", 30)]
    (others,) = score_states(cut, task, [()], wanted=lambda key: key not in choice["questions"])
    assert judged["rows"][0]["cut"] == pytest.approx(others.values.mean())
    assert not set(own.questions) & set(others.questions)

    page = (target / "report.md").read_text(encoding="utf-8")
    assert "## Choice by questions" in page
    assert "30 of mine.jsonl" in page
    assert "30 questions of mine.jsonl" in page
    assert 'id="by-tasks"' in (target / "report.html").read_text(encoding="utf-8")
    files = [target / name for name in ("candidates.json", "benchmarks.json", "evaluation.json")]
    before = {p: p.stat().st_mtime_ns for p in files}
    isingcut.run(**options)
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_killed_choice_goes_on_from_what_was_scored(
    llama, text, questions, tmp_path, monkeypatch
):
    from isingcut.evaluation import answers as likelihoods

    more = questions.with_name("more.jsonl")
    lines = questions.read_text(encoding="utf-8").splitlines()
    more.write_text("\n".join(lines[:20]).replace("river", "brook"), encoding="utf-8")
    out, tasks = tmp_path / "run", f"{questions},{more}"
    options = {**chosen_by(llama, text), "tasks": tasks, "out": str(out)}
    whole, compute, calls, computed = benchmarking.score_states, likelihoods._scores, [], []

    def counted(model, task, *given, **rest):
        calls.append(task.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        with monkeypatch.context() as patch:
            if len(calls) == 3:
                # Answered questions are not scored again.
                patch.setattr("isingcut.evaluation.answers._scores", None)
            return whole(model, task, *given, **rest)

    def noted(*given):
        computed.append(calls[-1])
        return compute(*given)

    monkeypatch.setattr(benchmarking, "score_states", counted)
    monkeypatch.setattr(likelihoods, "_scores", noted)
    with pytest.raises(KeyboardInterrupt):
        isingcut.prune(**options)
    before = computed.count("mine.jsonl")
    assert list((out / ".questions").glob("mine.jsonl-*.journal"))
    isingcut.prune(**options)
    assert calls == ["mine.jsonl", "more.jsonl"] * 2
    assert computed.count("mine.jsonl") == before > 0


def test_scores_on_questions_that_changed_are_not_kept(finished, questions, tmp_path, capsys):
    run, own = shutil.copytree(finished, tmp_path / "run"), tmp_path / "own.jsonl"
    data = tmp_path / "data" / "arc_easy" / "test.jsonl"
    data.parent.mkdir(parents=True)
    text = questions.read_text(encoding="utf-8")
    again = ["evaluate", run, "--skip-speed", "--tasks", "arc_easy", "--data", tmp_path / "data"]
    for file, line in ((own, ["rank", run, "--choose", "tasks", "--tasks", own]), (data, again)):
        file.write_text(text, encoding="utf-8")
        assert call(*line, "--overwrite") == 0
        file.write_text(text.replace("river", "brook"), encoding="utf-8")
        assert call(*line) == 2
        assert "was made with other options (files: " in capsys.readouterr().err


def test_questions_are_answered_without_a_measurement_of_text(
    finished, questions, tmp_path, monkeypatch, capsys
):
    def measured(*given):
        raise AssertionError("text was measured")

    monkeypatch.setattr("isingcut.runs.evaluating.evaluate", measured)
    run = shutil.copytree(finished, tmp_path / "run")
    for there in (True, False):
        line = ["evaluate", run, "--tasks", questions, "--questions", 4 + there, "--overwrite"]
        assert call(*line, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert found["benchmarks"]["rows"][0]["n"] == 4 + there
        assert ("kl" in found) == there
        (run / "evaluation.json").unlink(missing_ok=True)


def test_unusable_tasks_are_refused(questions):
    for options in ({"choose": "tasks"}, {"questions": 5}):
        with pytest.raises(InputError, match="need benchmarks; name some with --tasks"):
            RunConfig(model="m", remove="2", **options).validate()
    with pytest.raises(InputError, match="a range of removals cuts none"):
        check_run_tasks(RunConfig(model="m", remove="2..3", tasks=str(questions)))


def test_a_streamed_model_gives_the_same_answers(by_questions, tmp_path):
    options, whole = by_questions
    streamed = isingcut.run(**{**options, "out": str(tmp_path / "run"), "stream": "on"})
    for kind, key in (("candidates", "by_tasks"), ("benchmarks", "rows")):
        one, other = (read_json(target / f"{kind}.json", kind)[key] for target in (streamed, whole))
        assert one == other


def test_a_streamed_model_writes_no_answers(llama, text, tmp_path):
    data = tmp_path / "data"
    (data / "wikitext2").mkdir(parents=True)
    (data / "wikitext2" / "test_raw.jsonl").write_text('{"text": "a b"}\n', encoding="utf-8")
    (data / "gsm8k").mkdir()
    record = json.dumps({"context": "What is 1 plus 1?", "solution": "It is 2.", "answer": "2"})
    for name in ("test", "train"):
        (data / "gsm8k" / f"{name}.jsonl").write_text(f"{record}\n" * 8, encoding="utf-8")
    more = {"choose": "measured", "stream": "on", "data": str(data), "out": str(tmp_path / "run")}
    for name in ("gsm8k", "wikitext2"):
        with pytest.raises(InputError, match=f"{name} needs the whole model, which does not fit"):
            isingcut.run(**{**chosen_by(llama, text), **more, "tasks": name})
        assert not (tmp_path / "run").exists()


def test_certainties_separate_candidates_of_equal_scores():
    """Both candidates have the same right answers, but one is surer of them."""
    rng, keys = np.random.default_rng(2), [f"q{i}" for i in range(400)]
    sure = rng.uniform(-2.0, 0.0, len(keys))

    def ask(left, task, names):
        at = [keys.index(name) for name in names]
        more = {(0,): 0.0, (1,): 0.1}
        return [
            SimpleNamespace(
                values=(sure[at] > -0.7).astype(float),
                certainties=sure[at] + more[tuple(r)] * rng.random(len(at)),
            )
            for r in left
        ]

    found = choose([[0], [1]], {"t": keys}, ask)
    assert (found["chosen"], found["ahead"]) == (1, True)
    assert len(found["questions"]) == 50
    first, second = found["candidates"]
    assert first["accuracy"] == second["accuracy"]
    assert first["difference"] == 0
    assert second["certainty"] > first["certainty"]


def test_the_lowest_loss_within_a_standard_error_is_chosen():
    """With few questions the best of several candidates is mostly the luckiest one."""
    rng, keys = np.random.default_rng(3), [f"q{i}" for i in range(40)]
    noise = rng.normal(size=40)
    noise = (noise - noise.mean()) / noise.std()

    def chosen(lead):
        # The paired difference has a standard deviation of one.
        table = {(i,): dict(zip(keys, i * (noise + lead), strict=True)) for i in range(2)}
        return choose([[0], [1]], {"t": keys}, answers(table))["chosen"]

    error = 1 / np.sqrt(39)
    assert chosen(0.9 * error) == 0
    assert chosen(1.1 * error) == 1


def test_a_task_of_many_nats_does_not_outvote_another():
    rng, n = np.random.default_rng(4), 60
    keys = {t: [f"{t}{i}" for i in range(n)] for t in ("letters", "words")}
    scale = {"letters": 1.0, "words": 30.0}
    # One is better by letters, the other slightly by words, in units of their spreads.
    lead = {(0,): {"letters": 0.0, "words": 0.1}, (1,): {"letters": 0.5, "words": 0.0}}
    table = {
        removed: {
            key: scale[t] * float(0.3 * rng.normal() + better[t])
            for t, names in keys.items()
            for key in names
        }
        for removed, better in lead.items()
    }
    assert choose([[0], [1]], keys, answers(table))["chosen"] == 1


def test_a_candidate_dropped_before_a_task_is_compared_on_the_others():
    rng = np.random.default_rng(5)
    # More tasks than the first look has questions.
    keys = {f"t{i}": [f"t{i}q{j}" for j in range(3)] for i in range(choosing.FIRST + 10)}
    table = {
        (i,): {k: float(rng.random() < rate) for names in keys.values() for k in names}
        for i, rate in enumerate((0.95, 0.05))
    }
    table[(2,)] = dict(table[(0,)])
    found = choose([[0], [1], [2]], keys, answers(table))
    _, dropped, _ = found["candidates"]
    assert (dropped["dropped"], dropped["questions"]) == (True, choosing.FIRST)
    assert dropped["difference"] < -0.5
    assert dropped["p_value"] < 0.01
    assert found["chosen"] == 0
