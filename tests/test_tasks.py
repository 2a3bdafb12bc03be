"""Benchmarks: our task files against the harness's own, and the paired comparison."""

import functools
import importlib
import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from isingcut.evaluation import answers, questions
from isingcut.evaluation.benchmark import benchmark, compare_scores, mcnemar, row
from isingcut.evaluation.questions import prepare_task
from isingcut.evaluation.scores import Scores, score_states
from shared import module_fixture, parametrize, refuses, write_jsonl
from tiny import load_tiny

NOUNS = ["river", "bridge", "lantern", "orchard", "harbour", "mill", 'it\'s "odd"']


def choice(i, count):
    return [
        " ".join(NOUNS[(i + j + k) % 7] for k in range(1 + (i * j) % 3))
        for j in range(count)
    ]


def asked(context, choices, answer):
    """Return a question in our form."""
    return {"context": context, "choices": choices, "answer": answer}


def arc(i):
    text = f"Which of these is number {i}?"
    answer = i % 4
    theirs = {
        "question": text,
        "choices": {"text": choice(i, 4), "label": ["A", "B", "C", "D"]},
        "answerKey": "ABCD"[answer],
    }
    return theirs, asked(text, choice(i, 4), answer)


def openbook(i):
    theirs, ours = arc(i)
    return {**theirs, "question_stem": theirs["question"]}, ours


def piqa(i):
    one, two = choice(i, 2)
    theirs = {"goal": f"Cross the river {i}.", "sol1": one, "sol2": two, "label": i % 2}
    return theirs, asked(theirs["goal"], [one, two], i % 2)


def hellaswag(i):
    endings = [f"{c} [step] and  goes." for c in choice(i, 4)]
    theirs = {
        "ctx_a": f"A man walks to mill {i}.",
        "ctx_b": "he",
        "activity_label": "Milling",
        "endings": endings,
        "label": str(i % 4),
    }
    # Our file holds the result of the harness's own preprocessing.
    process = importlib.import_module("lm_eval.tasks.hellaswag.utils")
    import datasets

    made = process.process_docs(datasets.Dataset.from_list([theirs]))[0]
    return theirs, asked(made["query"], made["choices"], made["gold"])


def winogrande(i):
    one, two = choice(i, 2)
    text = f"The {one} fell on the {two} because _ was old_er {i}."
    theirs = {
        "sentence": text,
        "option1": one,
        "option2": two,
        "answer": str(1 + i % 2),
    }
    return theirs, asked(text, [one, two], i % 2)


def boolq(i):
    theirs = {
        "passage": f"The mill is {i}.",
        "question": f"is the mill {i}",
        "label": i % 2,
    }
    context = f"{theirs['passage']}\nQuestion: {theirs['question']}?\nAnswer:"
    return theirs, asked(context, ["no", "yes"], i % 2)


def lambada(i):
    record = {
        "text": f"They came to the {NOUNS[i % 6]} and  crossed the {NOUNS[(i + 1) % 6]}"
    }
    return record, record


def mmlu(i):
    theirs = {"question": f" What is {i}? ", "choices": choice(i, 4), "answer": i % 4}
    ours = asked(theirs["question"], theirs["choices"], i % 4)
    return theirs, {**ours, "subject": "anatomy"}


def gsm8k(i):
    solution = f"{i} + 1 = <<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"
    theirs = {"question": f"What is {i} plus 1?", "answer": solution}
    return theirs, {
        "context": theirs["question"],
        "solution": solution,
        "answer": str(i + 1),
    }


# Our task -> the harness's file, a maker of records, the split it reads, the number of examples.
TASKS = {
    "arc_easy": ("arc/arc_easy.yaml", arc, "test", 0),
    "arc_challenge": ("arc/arc_challenge.yaml", arc, "test", 0),
    "openbookqa": ("openbookqa/openbookqa.yaml", openbook, "test", 0),
    "piqa": ("piqa/piqa.yaml", piqa, "validation", 0),
    "hellaswag": ("hellaswag/hellaswag.yaml", hellaswag, "validation", 0),
    "winogrande": ("winogrande/default.yaml", winogrande, "validation", 0),
    "boolq": ("super_glue/boolq/default.yaml", boolq, "validation", 0),
    "lambada": ("lambada/lambada_openai.yaml", lambada, "test", 0),
    "mmlu": ("mmlu/default/mmlu_anatomy.yaml", mmlu, "test", 5),
    "mmlu_0shot": ("mmlu/default/mmlu_anatomy.yaml", mmlu, "test", 0),
    "gsm8k": ("gsm8k/gsm8k.yaml", gsm8k, "test", 5),
}
OURS = {"piqa": "val", "hellaswag": "val", "boolq": "val", "winogrande": "dev"}


@module_fixture
def models(shared):
    return {
        name: load_tiny(shared.checkpoint(seed=i, max_position_embeddings=2048))
        for i, name in enumerate(("original", "cut"))
    }


@parametrize("name", sorted(TASKS))
def test_our_task_is_the_harness_s_own(name, models, tmp_path):
    """Same questions through both: same requests, same scores by question, same error bars."""
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks._yaml_loader import load_yaml

    file, make, split, shots = TASKS[name]
    pairs = [make(i) for i in range(1 if name == "gsm8k" else 6)]
    examples = [make(i) for i in range(20, 26)]
    subject = name.removesuffix("_0shot")
    test = write_jsonl(tmp_path / "theirs.jsonl", [theirs for theirs, _ in pairs])
    write_jsonl(
        tmp_path / subject / f"{OURS.get(name, 'test')}.jsonl",
        [ours for _, ours in pairs],
    )
    shown = {"mmlu": "dev", "gsm8k": "train"}.get(subject, "unused")
    write_jsonl(tmp_path / subject / f"{shown}.jsonl", [ours for _, ours in examples])
    files = {split: test}
    for other in ("train", "dev"):
        files[other] = write_jsonl(
            tmp_path / f"{other}.jsonl", [theirs for theirs, _ in examples]
        )

    config = load_yaml(Path(lm_eval.tasks.__file__).parent / file, resolve_func=True)
    unused = ["validation_split"] if split == "test" else []
    for key in ("tag", "task_alias", "dataset_name", "training_split", *unused):
        config.pop(key, None)
    config |= {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(tmp_path / "cache")},
        "num_fewshot": shots,
    }
    official = ConfigurableTask(config=config)
    prepared = prepare_task(name, tmp_path, None)
    (ours,) = prepared.make().values()
    for task in (official, ours):
        task.set_fewshot_seed(seed=1234)
        task.build_all_requests(limit=None, rank=0, world_size=1)

    def requests(task):
        return [(r.doc_id, r.idx, r.request_type, r.args) for r in task.instances]

    assert requests(ours) == requests(official)
    assert len(ours.instances) >= len(pairs)

    model = models["original"]
    official.set_fewshot_seed(seed=1234)
    engine = HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=8)
    found = evaluate(
        lm=engine,
        task_dict={"tasks": {"official": official}, "groups": {}, "group_map": {}},
        bootstrap_iters=0,
    )
    (mine,) = score_states(model, prepared, [()])
    metric, _, which = mine.metric.partition(",")
    which = which or "none"
    theirs = [s for s in found["samples"]["official"] if s["filter"] == which]
    assert mine.values.tolist() == [float(s[metric]) for s in theirs]
    if name == "gsm8k":
        assert mine.answers == [s["filtered_resps"][0] for s in theirs]
    elif name == "lambada":
        assert mine.answers == [s["filtered_resps"][0][1] for s in theirs]
    else:
        # The picked choice is right where the score is 1.
        right = [
            a == own["answer"] for a, (_, own) in zip(mine.answers, pairs, strict=True)
        ]
        assert right == mine.values.tolist()
        assert [len(c) for c in mine.choices] == [len(o["choices"]) for _, o in pairs]
    results = found["results"]["official"]
    assert mine.values.mean() == results[f"{metric},{which}"]
    assert mine.shots == shots


def test_error_bars_are_the_harness_s():
    from lm_eval.api.metrics import mean_stderr

    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, 2, 50).astype(float) for _ in range(2))
    found = compare_scores(first, second)
    assert found.original_se == pytest.approx(mean_stderr(list(first)))
    assert found.cut_se == pytest.approx(mean_stderr(list(second)))


def test_mcnemar_by_enumeration():
    for lost, won, extreme in (
        (0, 5, 2),
        (4, 3, 2**7),
        (1, 9, 22),
        (6, 6, 2**12),
        (0, 0, 1),
    ):
        assert mcnemar(lost, won) == pytest.approx(extreme / 2 ** (lost + won))


def test_paired_comparison_of_right_and_wrong():
    first = np.array([1.0] * 40 + [0.0] * 60)
    second = first.copy()
    second[:12] = 0
    found = compare_scores(first, second)
    assert found.test == "mcnemar"
    assert found.p_value == pytest.approx(2 / 2**12)
    assert found.more_than_noise
    assert found.difference_low < -0.12 < found.difference_high < 0
    same = compare_scores(first, first)
    assert (same.p_value, same.difference_low, same.difference_high) == (1.0, 0.0, 0.0)
    assert not same.more_than_noise


def test_paired_bootstrap_of_graded_scores():
    rng = np.random.default_rng(1)
    first = rng.normal(size=200)
    noise = rng.normal(size=200) * 0.1
    found = compare_scores(first, first + 0.05 + noise)
    assert found.test == "bootstrap"
    assert found.more_than_noise
    assert found.difference_low < 0.05 < found.difference_high
    # The bootstrap interval of a mean is close to the normal one.
    error = noise.std(ddof=1) / math.sqrt(200)
    assert found.difference_high - found.difference_low == pytest.approx(
        2 * 1.96 * error, rel=0.1
    )
    assert not compare_scores(first, first + noise - noise.mean()).more_than_noise


@parametrize("n", [1, 2, 5])
def test_a_few_graded_scores_are_no_proof(n):
    found = compare_scores(np.zeros(n), np.linspace(0.4, 0.5, n))
    assert (found.test, found.p_value) == ("bootstrap", 2.0 ** (1 - n))
    assert not found.more_than_noise


# Flips --------------------------------------------------------------------------------


def answered(values, answers, choices=()):
    """Return the scores of a model with these answers."""
    n = len(values)
    likely = [np.log(own) - 3.0 for own in choices] or [np.zeros(0)] * n
    values = np.array(values, dtype=float)
    return Scores("t", "acc", values, values, answers, likely, [*map(str, range(n))], 0)


def ends(percent):
    return percent.percent, percent.low, percent.high


def test_equal_accuracy_hides_flips():
    first = [1, 1, 1, 1, 0, 0, 0, 0]
    second = [0, 0, 1, 1, 1, 1, 0, 0]
    picked = [0] * 8
    # Another wrong choice for question 6 is a change, but no flip.
    others = [1, 1, 0, 0, 1, 1, 2, 0]
    sure = [[0.7, 0.1, 0.1, 0.1]] * 8
    unsure = [[0.25] * 4] * 8
    found = row(answered(first, picked, sure), answered(second, others, unsure))
    assert (found.difference, found.p_value) == (0, 1)
    flips = found.flips
    # Wilson's intervals of 2 and 5 of 8.
    assert ends(flips.right_to_wrong) == pytest.approx((25, 7.148, 59.072), abs=1e-3)
    assert flips.right_to_wrong == flips.wrong_to_right
    assert ends(flips.changed) == pytest.approx((62.5, 30.574, 86.316), abs=1e-3)
    assert flips.kept.percent == 100
    # Whatever is added to log-likelihoods.
    assert flips.choice_kl == pytest.approx(0.7 * np.log(2.8) + 0.3 * np.log(0.4))


def test_the_score_kept_is_that_above_chance():
    first = [1, 1, 1, 0] * 50
    second = [1, 1, 0, 0] * 50
    choices = [[0.5, 0.5]] * 100 + [[0.25] * 4] * 100
    one, two = (answered(v, [*v], choices) for v in (first, second))
    # Chance is 3/8: (1/2 - 3/8) / (3/4 - 3/8) = 1/3.
    assert row(one, two).flips.kept.percent == pytest.approx(100 / 3)
    assert ends(row(one, one).flips.kept) == (100, 100, 100)
    # Texts have no chance of being right: 1/2 / 3/4. By the delta method the error is
    # sqrt((1/4) (2/3)^2 + (1/2) (1/3)^2) / (3/4) / sqrt(200) = 3.849 %.
    one, two = (answered(v, [*v]) for v in (first, second))
    flips = row(one, two).flips
    assert flips.choice_kl is None
    assert (flips.right_to_wrong.percent, flips.wrong_to_right.percent) == (25, 0)
    kept, low, high = ends(flips.kept)
    assert kept == pytest.approx(200 / 3)
    assert (low, high) == pytest.approx((kept - 7.54, kept + 7.54), abs=0.8)


def test_a_score_near_chance_bounds_nothing():
    # One of three, by chance.
    chance = answered([1, 0, 0], [0, 0, 0], [[1 / 3] * 3] * 3)
    assert row(chance, chance).flips.kept is None
    # Resamples without the right answer, 36 %, have no ratio.
    rare = answered([1] + [0] * 39, ["1"] * 40)
    assert ends(row(rare, rare).flips.kept) == (100, None, None)
    # Where they are fewer than one in forty, the ratio has both ends.
    less = answered([1] * 5 + [0] * 35, ["1"] * 40)
    assert ends(row(less, less).flips.kept) == (100, 100, 100)


def test_scores_that_are_not_right_or_wrong_have_no_flips():
    graded = answered([0.2, 0.7], ["a", "b"])
    assert row(graded, graded).flips is None


def test_rows_resume(models, tmp_path, spy):
    write_jsonl(tmp_path / "arc_easy/test.jsonl", [arc(i)[1] for i in range(8)])
    tasks = [prepare_task("arc_easy", tmp_path, 5)]
    kept = tmp_path / "kept"
    (first,), _ = benchmark(models, tasks, kept=kept)
    assert (first.n, first.shots, first.metric) == (5, 0, "acc")
    flips = first.flips
    net = flips.wrong_to_right.percent - flips.right_to_wrong.percent
    assert net == pytest.approx(100 * first.difference)
    assert flips.choice_kl > 0
    assert len(list(kept.glob("*.journal"))) == 2
    asked_again = spy(answers, "_scores")
    assert benchmark(models, tasks, kept=kept) == ([first], {})
    assert not asked_again


def test_fewer_questions_are_spread_over_the_file(tmp_path):
    records = [arc(i)[1] for i in range(20)]
    write_jsonl(tmp_path / "arc_easy/test.jsonl", records)

    def chosen(most):
        (configuration,) = prepare_task("arc_easy", tmp_path, most).configurations
        return list(configuration["custom_dataset"]()["test"]["context"])

    texts = [r["context"] for r in records]
    assert chosen(None) == chosen(30) == texts
    assert chosen(3) == [texts[0], texts[10], texts[19]]


def test_the_last_word_is_scored_whatever_space_follows(tmp_path):
    write_jsonl(tmp_path / "lambada/test.jsonl", [{"text": "They crossed the mill \n"}])
    (task,) = prepare_task("lambada", tmp_path).make().values()
    (question,) = task.eval_docs
    assert task.doc_to_text(question) == "They crossed the"
    assert task.doc_to_target(question) == " mill"


def test_a_context_of_digits_is_a_text(tmp_path):
    records = [asked(context, ["one", "two"], 0) for context in ("12", "0")]
    file = write_jsonl(tmp_path / "numbers.jsonl", records)
    (made,) = prepare_task(file, None).make().values()
    for question in made.eval_docs:
        context = made.fewshot_context(question, 0)
        found = made.construct_requests(question, context, metadata=("numbers", 0, 1))
        prompts = [(question["context"], f" {c}") for c in ("one", "two")]
        assert [each.args for each in found] == prompts


def test_the_harness_lists_its_tasks_once(monkeypatch):
    made = []

    class Manager:
        task_index = ("theirs",)

        def __init__(self):
            made.append(self)

        def load(self, names):
            return {"tasks": dict.fromkeys(names)}

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Manager)
    manager = functools.cache(questions._manager.__wrapped__)
    monkeypatch.setattr(questions, "_manager", manager)
    assert questions.split_names("theirs, theirs") == ["theirs"]
    questions.check_tasks(["theirs"], None, None)
    assert list(prepare_task("theirs", None).make()) == ["theirs"]
    with refuses("has no task 'zorp'"):
        questions.check_tasks(["zorp"], None, None)
    assert len(made) == 1


def test_mmlu_shows_examples_of_its_own_subject(tmp_path):
    both = [
        {**mmlu(i)[1], "subject": s} for i, s in zip(range(4), itertools.cycle("ab"))
    ]
    shown = [{**mmlu(10 + i)[1], "subject": s} for i in range(5) for s in "ab"]
    write_jsonl(tmp_path / "mmlu/test.jsonl", both)
    write_jsonl(tmp_path / "mmlu/dev.jsonl", shown)
    task = prepare_task("mmlu", tmp_path)
    assert [c["task"] for c in task.configurations] == ["mmlu_a", "mmlu_b"]
    for c, subject in zip(task.configurations, "ab", strict=True):
        data = c["custom_dataset"]()
        assert (
            set(data["fewshot"]["subject"]) == set(data["test"]["subject"]) == {subject}
        )
        assert c["description"].endswith(f"about {subject}.\n\n")
    write_jsonl(tmp_path / "mmlu/dev.jsonl", shown[:7])
    with refuses("4 examples about a; mmlu needs 5"):
        prepare_task("mmlu", tmp_path)


def test_a_metric_that_is_not_finite_is_refused(models, tmp_path, stub):
    write_jsonl(tmp_path / "arc_easy/test.jsonl", [arc(0)[1]])
    sample = {"filter": "none", "acc": float("nan"), "doc_id": 0}
    stub("lm_eval.evaluator.evaluate", {"samples": {"arc_easy": [sample]}})
    with refuses("question of arc_easy has no finite acc"):
        score_states(models["original"], prepare_task("arc_easy", tmp_path), [()])


def test_prompts_longer_than_the_positions_are_counted(shared, tmp_path, capsys):
    short = load_tiny(shared.checkpoint(max_position_embeddings=64))
    records = [asked("river " * words, ["one", "two"], 0) for words in (1, 2, 90)]

    def said(count, states):
        file = write_jsonl(tmp_path / "own.jsonl", records[:count])
        score_states(short, prepare_task(file, None), states)
        return capsys.readouterr().err

    line = "isingcut: warning: 2 of 6 prompts of own.jsonl are longer than the 64 positions"
    assert line in (found := said(3, [(), (1,)]))
    assert found.count("longer than") == 1
    assert "longer than" not in said(2, [()])
