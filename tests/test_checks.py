"""Tasks that need no judge: the checks, the prompts, the needles, and the chat template."""

import json
import re
from dataclasses import replace

import pytest
import yaml
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing

from isingcut.evaluation import checks
from isingcut.evaluation.benchmark import benchmark
from isingcut.evaluation.checks import CHECKS, score_instruction, score_needle
from isingcut.evaluation.harness import Harness
from isingcut.evaluation.questions import check_tasks, prepare_task, task_names
from isingcut.evaluation.scores import score_states
from isingcut.testing.tiny import CHAT_TEMPLATE
from shared import ModelError, module_fixture, parametrize, refuses
from tiny import load_tiny, tiny_tokenizer

QUESTIONS = checks.read_instructions()
NEEDLES = checks.hide_needles()

# For each check an argument, answers that pass, and answers that do not.
CASES = yaml.safe_load(r"""
words: [[2, 3], ["one two", "one,  two\nthree"], ["one", "a b c d"]]
sentences:
  - [2, 2]
  - ["It rains. Go!", "He said \"Go.\" Why?", "Pi is 3.14. And no more"]
  - ["It rains.", "No. No. No.", "It is 3.14 long."]
lines: [[2, 2], ["a\nb", "a\n\n \nb"], ["a b", "a\nb\nc"]]
case: [upper, ["WET FLOOR 2!"], ["Wet FLOOR", "12"]]
includes: [{win: 2, us: 1}, ["Win, win for US"], ["win us", "winner wins us"]]
excludes: [[cold, white], ["a scolding"], ["so Cold.", "white-ish", "WHITE"]]
lacks: [",;", ["a. b"], ["a, b", "a;b"]]
numbered:
  - 2
  - ["1. a\n2. b", "1. a, b\n\n 2. c"]
  - ["1. a", "1. a\n2. b\n3. c", "Sure:\n1. a\n2. b", "1. a\n3. b", "1.\n2. b"]
bullets: [2, ["- a\n- b"], ["- a", "* a\n* b", "-a\n-b", "- a\n- b\nDone"]]
json:
  - [a, b]
  - ['{"b": [1], "a": {}}']
  - ['{"a": 1}', '{"a": 1, "b": 2, "c": 3}', '["a", "b"]', "no", "{'a': 1, 'b': 2}",
     "```json\n{\"a\": 1, \"b\": 2}\n```"]
title:
  - ["<<", ">>"]
  - ["<<A title>>\n\nText."]
  - ["<<A title>>", "<A title>\nText.", "A <<title>>\nText.", "<<>>\nText.", ""]
ends: ["That is all.", ["Blue. That is all."], ["That is all", "That is all. No"]]
""")
CASES["json"][2].append("[" * 10**5)


def test_every_check_has_cases():
    assert list(CASES) == list(CHECKS)
    used = {name for q in QUESTIONS for name in json.loads(q["checks"])}
    assert used == set(CHECKS)


@parametrize("name", CASES)
def test_a_check_passes_and_refuses(name):
    argument, right, wrong = CASES[name]
    assert [a for a in right if not CHECKS[name](a, argument)] == []
    assert [a for a in wrong if CHECKS[name](a, argument)] == []


def test_lower_case_and_all_checks_of_a_prompt():
    question = {"checks": '{"case": "lower", "words": [1, 2]}'}
    answers = {" it's wet \n": 1, "It's wet": 0, "it is wet": 0, "": 0}
    found = {a: score_instruction(question, [a])["followed"] for a in answers}
    assert found == answers


def test_prompts_are_sixty_and_say_what_is_checked():
    assert len({q["context"] for q in QUESTIONS}) == len(QUESTIONS) == 60
    said = {"upper": "capital letters only", "lower": "lower case only"}
    said |= {",": "without a comma", ".": "without a full stop", "eE": "letter e"}
    said |= {
        "0123456789": "without digits",
        "[": "square brackets",
        "<<": "<<My title>>",
    }
    said |= {"]": "title", ">>": ">>"}
    for question in QUESTIONS:
        prompt = question["context"]
        for name, argument in json.loads(question["checks"]).items():
            parts = [argument] if isinstance(argument, str | int) else [*argument]
            if name in ("words", "sentences", "lines"):
                least, most = argument
                exact = f"exactly {most} {name}".removesuffix("s" * (most == 1))
                named = [f"{least} to {most} {name}", exact, f"at most {most} words"]
                if name == "lines":
                    named.append(f"{most} trees, one in each line")
                    named.append(f"{most} colours in capital letters only, one in each")
                assert any(
                    n in prompt for n in named if least in (1, most) or n == named[0]
                )
                continue
            for part in parts:
                assert said.get(part, str(part)) in prompt
            if name == "includes":
                counts = [f"at least {n} times" for n in argument.values() if n > 1]
                assert all(n in prompt for n in counts)


def write_answer(wanted):
    """Write an answer that passes the checks, without a look at how they are computed."""
    least = wanted.get("words", [1])[0]
    words = [w for word, n in wanted.get("includes", {}).items() for w in [word] * n]
    if "json" in wanted:
        return json.dumps(dict.fromkeys(wanted["json"], "unknown"))
    marks = [f"{i + 1}. " for i in range(wanted.get("numbered", 0))]
    marks += ["- "] * wanted.get("bullets", 0)
    marks = marks or [""] * wanted.get("lines", [0])[0]
    if marks:
        text = "\n".join(mark + " ".join(["calm"] * least) for mark in marks)
    elif "sentences" in wanted:
        sentences = [" ".join([*["calm"] * least, *words]) + ".", *["So it is."] * 9]
        count = wanted["sentences"][0] - ("ends" in wanted)
        text = " ".join(sentences[:count])
    else:
        tail = wanted.get("ends", "").split()
        room = (
            max(least, len(words) + 1) - len(tail) - len(wanted.get("title", [])) // 2
        )
        text = " ".join([*words, *["calm"] * (room - len(words))])
    if "title" in wanted:
        text = "calm".join(wanted["title"]) + "\n" + (text or "calm")
    if "ends" in wanted:
        text = f"{text} {wanted['ends']}"
    upper = wanted.get("case") == "upper"
    return text.upper() if upper else text.lower() if "case" in wanted else text


@parametrize("question", QUESTIONS, ids=range(60))
def test_every_prompt_can_be_followed(question):
    answer = write_answer(json.loads(question["checks"]))
    assert score_instruction(question, [answer]) == {"followed": 1}, answer


ENDLESS = [
    "word " * 200,
    "WORD, " * 200,
    "No. " * 100,
    "1. a\n" * 60,
    "- a\n" * 60,
    "{" * 200,
]


@parametrize("answer", ["", " \n", *ENDLESS])
def test_nothing_and_endless_text_follow_no_prompt(answer):
    passed = [
        q["context"] for q in QUESTIONS if score_instruction(q, [answer])["followed"]
    ]
    assert passed == []


def test_needles_are_where_they_should_be():
    places = [
        (tokens, depth) for tokens in (1000, 2000, 4000) for depth in (0.1, 0.5, 0.9)
    ]
    assert len(NEEDLES) == 3 * len(places)
    assert len({q["number"] for q in NEEDLES}) == len(NEEDLES)
    for i, question in enumerate(NEEDLES):
        tokens, depth = places[i // 3]
        text, ask = question["context"].split("\n\nQuestion: ")
        needle = re.search(r"The number of the (.*) is (\d+)\. ", text)
        assert len(text) == 4 * tokens + len(needle[0])
        assert needle.start() / len(text) == pytest.approx(depth, abs=0.1)
        assert needle[2] == question["number"]
        assert text.count(question["number"]) == 1
        assert text[: needle.start()].endswith(". ")
        assert ask == f"What is the number of the {needle[1]}?\nAnswer:"
    assert checks.hide_needles() == NEEDLES


def test_an_answer_with_the_whole_number_is_right():
    question = {"number": "4817"}
    answers = {" 4817.": 1, "It is 4817": 1, "48170": 0, "4,817": 0, "": 0, "481": 0}
    found = {a: score_needle(question, [a])["found"] for a in answers}
    assert found == answers


@module_fixture
def models(shared):
    return {
        name: load_tiny(shared.checkpoint(seed=i, max_position_embeddings=512))
        for i, name in enumerate(("original", "cut"))
    }


def with_template(model, template, *, bos=False):
    """Return a model with another chat template, whose tokenizer may add a BOS token."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    if bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
        assert tokenizer("a").input_ids[0] == 1
    return replace(model, tokenizer=tokenizer)


def read_prompts(model, name, monkeypatch):
    """Return the prompts of two questions as the model reads them: tokens without padding."""
    prompts = []

    def write(engine, *, context, attention_mask, **settings):
        pairs = zip(context, attention_mask, strict=True)
        prompts.extend(ids[seen.bool()].tolist() for ids, seen in pairs)
        return context

    monkeypatch.setattr(HFLM, "_model_generate", write)
    score_states(model, prepare_task(name, None, 2), [()])
    return sorted(prompts)


OWN_BOS = "<s><|user|>{{ messages[0].content }}</s><|assistant|>"
ASKED = [QUESTIONS[i]["context"] for i in (0, 59)]


@parametrize("template", [CHAT_TEMPLATE, OWN_BOS])
@parametrize("bos", [False, True])
def test_the_model_reads_the_template_once(models, template, bos, monkeypatch):
    model = with_template(models["original"], template, bos=bos)
    found = read_prompts(model, "instructions", monkeypatch)
    whole = [
        model.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for text in ASKED
    ]
    assert found == sorted(whole)
    for prompt in map(model.tokenizer.decode, found):
        assert prompt.startswith("<s><|user|>" if template == OWN_BOS else "<|user|>")
        marks = [prompt.count(mark) for mark in ("<|user|>", "<|assistant|>", "<s>")]
        assert marks == [1, 1, int(template == OWN_BOS)]


def test_without_a_template_the_model_reads_the_bare_prompt(models, monkeypatch):
    model = with_template(models["original"], None, bos=True)
    found = read_prompts(model, "instructions", monkeypatch)
    assert found == sorted(model.tokenizer(text).input_ids for text in ASKED)


def test_a_template_that_refuses_is_one_line(models):
    model = with_template(models["original"], "{{ raise_exception('no') }}")
    with refuses("instructions: the model's chat template refuses", ModelError):
        score_states(model, prepare_task("instructions", None, 1), [()])


def test_a_model_without_an_end_token_answers(models):
    tokenizer = tiny_tokenizer()
    for name in ("eos_token", "pad_token", "unk_token"):
        setattr(tokenizer, name, None)
    model = replace(models["original"], tokenizer=tokenizer)
    (found,) = score_states(model, prepare_task("instructions", None, 2), [()])
    assert [len(row) for _, (row, _) in found.written] == [256] * 2
    assert len(tokenizer) == len(tiny_tokenizer())


@parametrize(
    "name, metric, most", [("instructions", "followed", 256), ("needle", "found", 32)]
)
def test_a_task_without_data_runs_and_resumes(
    models, name, metric, most, tmp_path, spy, capsys
):
    check_tasks([name], None, 2)
    assert name in task_names()
    task = prepare_task(name, tmp_path, 2)
    assert len(set(task.pool())) == 2
    assert task.source == prepare_task(name, None, 2).source
    wrote = spy(
        HFLM,
        "_model_generate",
        lambda found, *_, context, **__: found.shape[1] - context.shape[1],
    )
    (row,), _ = benchmark(models, [task], kept=tmp_path)
    assert (row.task, row.metric, row.n, row.shots) == (name, metric, 2, 0)
    assert row.test == "mcnemar"
    assert max(wrote) <= most
    # The tiny models do not stop.
    assert [pair.before.ended for pair in row.endings] == [False] * 2
    assert [pair.after.tokens for pair in row.endings] == [most] * 2
    assert all(pair.after.likelihood < 0 for pair in row.endings)
    calls = len(wrote)
    assert benchmark(models, [task], kept=tmp_path) == ([row], {})
    assert len(wrote) == calls
    # The text is longer than the tiny model's positions.
    said = capsys.readouterr().err
    assert ("2 of 2 prompts of needle are longer than the 512" in said) == (
        name == "needle"
    )


def test_a_right_answer_scores(models, monkeypatch):
    def write(engine, requests, **settings):
        made = ([5], ([6, 7], [2]))
        engine.written = dict.fromkeys((each.args[0] for each in requests), made)
        return [each.doc.get("number", "calm calm") for each in requests]

    monkeypatch.setattr(Harness, "generate_until", write)
    model = models["original"]
    (found,) = score_states(model, prepare_task("needle", None), [()])
    assert found.values.tolist() == found.certainties.tolist() == [1.0] * 27
    assert [row for _, (row, _) in found.written] == [[6, 7]] * 27
    (found,) = score_states(model, prepare_task("instructions", None), [()])
    right = [score_instruction(q, ["calm calm"])["followed"] for q in QUESTIONS]
    assert found.values.tolist() == right
    assert 0 < sum(right) < 9
