"""Answers of many states at once: against the harness, against single models, after a kill."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from isingcut.console.progress import terminal
from isingcut.evaluation import answers
from isingcut.evaluation.answers import MICRO_BATCHES, answer_scores, generate_texts
from isingcut.evaluation.harness import Harness
from isingcut.evaluation.questions import prepare_task
from isingcut.evaluation.scores import (
    certainties,
    read_choices,
    score_states,
    temper_margins,
)
from isingcut.models import replay as replays
from shared import ModelError, module_fixture, parametrize, refuses, write_jsonl
from test_tasks import gsm8k
from tiny import Work, excise, load_tiny, skip_blocks, states_of

WORDS = ("stone", "rain", "old town", "a mat", "the cat sat")
REMOVED = [(), (1,), (1, 3), (0, 4), (1, 3)]


@module_fixture
def model(shared):
    return load_tiny(shared.checkpoint(seed=3, max_position_embeddings=512))


def some_rows():
    rng = np.random.default_rng(0)
    rows = []
    for before, after in [(30, 2), (30, 1), (9, 4), (22, 6), (25, 1), (1, 3)]:
        context = rng.integers(0, 40, before).tolist()
        # Some end with token 0, which is also the padding.
        first, second = rng.integers(0, 40, (2, after)).tolist()
        answers = [first, [*second, 0], [7] * after, [0, 0, 0]]
        rows += [((*context, *answer), len(answer)) for answer in answers]
    return rows


def test_likelihoods_are_the_harness_s(model):
    rows = some_rows()
    # Longer than the model's context: both cut it on the left.
    rows.append((tuple(np.random.default_rng(1).integers(0, 40, 700).tolist()), 3))
    requests = [
        (("", str(i)), list(ids[:-k]), list(ids[-k:]))
        for i, (ids, k) in enumerate(rows)
    ]
    plain = HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=4)

    def answer(rows):
        found = answer_scores(
            model.replay, rows, states_of(len(model.replay), [()]), Work(128)
        )
        return list(zip(*(of_state[0].tolist() for of_state in found), strict=True))

    ours = Harness(model, answer, lambda prompts, write: [])
    expected = plain._loglikelihood_tokens(requests, disable_tqdm=True)
    found = ours._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [best for _, best in found] == [best for _, best in expected]
    np.testing.assert_allclose(
        [v for v, _ in found], [v for v, _ in expected], rtol=1e-5
    )


def test_answers_of_all_states_at_once_are_those_of_each_checkpoint(
    model, tmp_path, monkeypatch, spy
):
    path = tmp_path / "mine.jsonl"
    questions = [
        {
            "context": f"{WORDS[k % 5]} {k}?",
            "choices": [*WORDS[k % 3 : k % 3 + 3]],
            "answer": k % 3,
        }
        for k in range(20)
    ]
    # Letters are one token each, so one pass is enough for all answers of a question.
    questions += [
        {"context": f"{k} is", "choices": ["a", "b", "c"], "answer": k % 3}
        for k in range(10)
    ]
    write_jsonl(path, questions)
    task = prepare_task(str(path), None)
    ran = spy(replays.Recording, "block", lambda _, recording, i, x: x.shape[0])
    found = score_states(model, task, REMOVED, Work(256))
    # Equal states run once: 20 questions of 3 answers, and 10 by letters of one pass each.
    assert sum(ran) == (6 + 4 + 2 + 4) * 70
    monkeypatch.undo()
    for scores, blocks in zip(found, REMOVED, strict=True):
        one = model
        if blocks:
            cut = tmp_path / "-".join(map(str, blocks))
            if not cut.exists():
                excise(model.folder, blocks, cut)
            one = load_tiny(cut)
        (alone,) = score_states(one, task, [()])
        assert scores.values.tolist() == alone.values.tolist()
        assert (scores.metric, scores.questions) == (alone.metric, alone.questions)
    assert len({tuple(s.values) for s in found}) > 1


def test_an_answer_without_a_finite_likelihood_names_its_text(model, monkeypatch):
    # Two answers of one pass come first, so that rows and samples differ.
    rows = [((9, 10, 11), 1), ((9, 10, 12), 1), ((40, 41, 42), 1)]
    read = answers.read_answers

    def damaged(*given):
        found = read(*given)
        found[0, -1] = np.nan
        return found

    monkeypatch.setattr(answers, "read_answers", damaged)
    shown = re.escape(repr(model.tokenizer.decode([40, 41])))
    with refuses(f"that begins {shown}", ModelError):
        answer_scores(model.replay, rows, states_of(len(model.replay), [()]), Work(64))


def test_a_killed_measurement_goes_on(model, tmp_path, spy):
    rows = some_rows()
    states = states_of(len(model.replay), REMOVED)
    whole = answer_scores(model.replay, rows, states, Work(64))
    work = Work(64, journal=tmp_path / "answers.journal")
    batches = spy(replays.Replay, "record", lambda _, replay, ids: len(ids), stop=4)
    with pytest.raises(KeyboardInterrupt):
        answer_scores(model.replay, rows, states, work)
    again = answer_scores(model.replay, rows, states, work)
    # Batches that were finished before the kill ran once.
    assert sum(batches) == len({ids[:-1] for ids, _ in rows})
    for found, expected in zip(again, whole, strict=True):
        assert np.array_equal(found, expected)


FILES = {"arc_easy": "test", "hellaswag": "val", "winogrande": "dev", "lambada": "test"}


@parametrize("name", FILES)
def test_the_certainty_of_a_right_answer(name, model, tmp_path):
    records = [
        {
            "context": f"the {word} sat on _ mat",
            "choices": [f"stone {word}", "a", "old rain", "stone"],
            "answer": i,
            "text": f"the {word} sat on a mat",
        }
        for i, word in enumerate(("cat", "rain", "old stone"))
    ]
    if name == "winogrande":
        for record in records:
            record |= {"choices": record["choices"][:2], "answer": record["answer"] % 2}
    write_jsonl(tmp_path / name / f"{FILES[name]}.jsonl", records)
    found = score_states(model, prepare_task(name, tmp_path), [()])[0].certainties

    def likely(context, answer):
        ids = model.tokenizer(context + answer, return_tensors="pt").input_ids
        start = len(model.tokenizer(context).input_ids)
        with torch.no_grad():
            logp = model.model(input_ids=ids).logits[0].double().log_softmax(-1)
        return float(logp[start - 1 : -1].gather(1, ids[0, start:, None]).sum())

    if name == "lambada":
        direct = [likely(r["text"].removesuffix(" mat"), " mat") for r in records]
        assert found == pytest.approx(direct, rel=1e-4)
        return
    tables = []
    for record in records:
        choices = record["choices"]
        asked = record["context"]
        if name == "winogrande":
            values = [likely(asked.split(" _")[0] + f" {c}", " mat") for c in choices]
        else:
            asked = asked if name == "hellaswag" else f"Question: {asked}\nAnswer:"
            values = [likely(asked, f" {c}") for c in choices]
        if name == "hellaswag":
            lengths = np.array([len(c) for c in choices])
            values = values / lengths * lengths.mean()
        tables.append((np.array(values), record["answer"]))

    def at(t):
        return [float(v[a] / t - np.logaddexp.reduce(v / t)) for v, a in tables]

    # No other temperature makes the right answers likelier.
    best = max((at(float(t)) for t in np.exp(np.linspace(-2, 4, 61))), key=np.mean)
    assert found == pytest.approx(best, rel=1e-3)


def test_being_too_sure_costs_nothing():
    rng = np.random.default_rng(0)
    margins = [rng.normal(-0.5, 1.5, 3) for _ in range(200)]
    plain, sharp = (np.mean(temper_margins([k * m for m in margins])) for k in (1, 8))
    assert sharp == pytest.approx(plain, abs=2e-3)
    # A high temperature turns answers without information into a guess among four.
    nothing = temper_margins([rng.normal(0.0, 3.0, 3) for _ in range(2000)])
    assert np.mean(nothing) == pytest.approx(-np.log(4), abs=0.05)


def test_where_a_task_does_not_say_what_is_right_the_score_counts():
    choice = {"OUTPUT_TYPE": "multiple_choice"}

    def task(gold):
        told = {"doc_to_choice": lambda question: ["a", "b"], "multiple_input": 0}
        told["doc_to_target"] = lambda question: gold
        return SimpleNamespace(**choice, **told)

    answers = {"doc": {}, "filtered_resps": [(-1.0, False), (-3.0, False)]}
    coded = SimpleNamespace(**choice)
    rolling = SimpleNamespace(OUTPUT_TYPE="loglikelihood_rolling")
    asked = [(t, answers) for t in (task(7), task("c"), task(-100), coded)]
    asked.append((rolling, {"doc": {}, "filtered_resps": [-5.0]}))
    scores = np.array([1.0, 0.0, 1.0, 0.0, 0.5])
    choices = [read_choices(*each, by_length=True) for each in asked]
    assert certainties(asked, scores, choices).tolist() == scores.tolist()
    # The choices have a letter each; the last two tasks tell of none.
    assert [own.tolist() for own, _ in choices] == [[-1.0, -3.0]] * 3 + [[], []]
    # An index, a text, and several: the margin of the wrong one is 2 nats or none.
    told = [(task(gold), answers) for gold in (0, "a", [0, 1])]
    choices = [read_choices(*each, by_length=False) for each in told]
    first, second, both = certainties(told, np.zeros(3), choices)
    assert first == second < 0
    assert both == 0


STATES = [(), (1,), (0, 4)]
# The models write both letters.
HOW = {"until": ["G", "J"], "do_sample": False, "max_gen_toks": 12}
PROMPTS = [
    "the cat sat",
    "a mat",
    "stone " * 9,
    "old town rain " * 5,
    "rain",
    "a mat and a stone",
]


def requests(kinds=2):
    how = [{**HOW, "max_gen_toks": 12 + 4 * (i % kinds)} for i in range(len(PROMPTS))]
    asked = zip(PROMPTS, how, strict=True)
    return [Instance("generate_until", {}, each, i) for i, each in enumerate(asked)]


def written(model, work, state=0, kinds=2):
    # Made of the whole model.
    replay = model.replay

    def write(prompts, some):
        with skip_blocks(model.model, STATES[state]):
            return generate_texts(replay, STATES[state], prompts, some, work)

    engine = Harness(model, lambda rows: [], write)
    return engine.generate_until(requests(kinds)), engine.written


def texts(found, harness, context, **rest):
    """Note the number of prompts generated at once, and their length."""
    return context.shape


def ending_alone(plain, request):
    """Return the tokens of an answer generated alone, and whether it stopped before its limit."""
    prompt, how = request.args
    most = how["max_gen_toks"]
    ids = plain.tokenizer(prompt, return_tensors="pt").input_ids
    row = plain.model.generate(ids, max_new_tokens=most, do_sample=False)[0]
    for count in range(1, most + 1):
        text = plain.tokenizer.decode(row[ids.shape[1] :][:count])
        if {"G", "J"} & {*text}:
            return count, True
    return most, False


@parametrize("state", range(len(STATES)))
def test_texts_are_the_harness_s(model, state):
    plain = HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=2)
    with skip_blocks(model.model, STATES[state]):
        expected = plain.generate_until(requests(), disable_tqdm=True)
        alone = [ending_alone(plain, request) for request in requests()]
    found, made = written(model, Work(16), state)
    assert found == expected
    assert any(expected)
    answers = [made[prompt][1] for prompt in PROMPTS]
    assert [(len(row + end), bool(end)) for row, end in answers] == alone
    assert [made[p][0] for p in PROMPTS] == [
        model.tokenizer(p).input_ids for p in PROMPTS
    ]


def test_prompts_of_one_go_fit_some_micro_batches(model, spy):
    went = spy(HFLM, "_model_generate", texts)
    written(model, Work(10), kinds=1)
    assert sum(count for count, _ in went) == len(PROMPTS)
    assert any(count > 1 for count, _ in went)
    # A longer prompt is generated alone.
    assert all(
        count == 1 or count * length <= MICRO_BATCHES * 10 for count, length in went
    )
    assert max(length for _, length in went) > MICRO_BATCHES * 10 / 2


def test_a_killed_run_goes_on_at_the_texts_that_are_left(model, tmp_path, spy):
    work = Work(10, journal=tmp_path / "texts.journal")
    whole = [written(model, Work(10), state, 1) for state in (0, 1)]
    counts = spy(HFLM, "_model_generate", texts, stop=6)
    with pytest.raises(KeyboardInterrupt):
        [written(model, work, state, 1) for state in (0, 1)]
    assert [written(model, work, state, 1) for state in (0, 1)] == whole
    assert sum(count for count, _ in counts) == 2 * len(PROMPTS)


def test_how_far_the_writing_is_is_seen(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("isingcut.console.progress.QUIET_SECONDS", 0.0)
    for name, size in (("test", 2), ("train", 8)):
        write_jsonl(
            tmp_path / "gsm8k" / f"{name}.jsonl", [gsm8k(i)[1] for i in range(size)]
        )
    task = prepare_task("gsm8k", tmp_path)
    found = score_states(model, task, STATES[:2], Work(64, terminal))
    assert [s.metric for s in found] == ["exact_match,flexible-extract"] * 2
    # The prompts are longer than a tiny model's positions.
    said = capsys.readouterr().err
    assert said.count("prompts of gsm8k are longer than") == 1
    assert said.count("\ngsm8k: ") >= 3
