"""Questions of benchmarks that are refused, and places where their scores may not go."""

import json
import os

from arena import Row
from heal_rows import parametrised, rows
from heal_rows import tensors as of_cut
from model_files import both, config, overflow, tensors


def asked(*records, task="arc_easy/test"):
    """A folder of questions, `data`."""

    def prepare(arena):
        path = arena.here / "data" / f"{task}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (r if isinstance(r, str) else json.dumps(r) for r in records)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    return prepare


def special(make):
    def prepare(arena):
        (arena.here / "data" / "arc_easy").mkdir(parents=True)
        make(arena.here / "data" / "arc_easy" / "test.jsonl")

    return prepare


def huge(path):
    path.touch()
    os.truncate(path, 2**28 + 1)


def evaluate(more="--tasks arc_easy --data {here}/data", out="{here}/scores.json"):
    return f"evaluate {{run}}/model --original {{model}} --out {out} --device cpu {more}"


SUM = {"context": "What is 1 plus 1?", "solution": "It is 2.", "answer": "2"}
GOOD = {"context": "Which is it?", "choices": ["one", "two"], "answer": 1}
ANSWER = r"line 3: expected 'answer', a number from 0 to 1, got"
CHOICES = r"line 3: expected .*'choices'"
BENCHMARKS = [
    Row(f"question: {name}", evaluate(), line, asked(GOOD, "", {**GOOD, **change}))
    for name, line, change in (
        ("an answer beyond", ANSWER, {"answer": 2}),
        ("a negative answer", ANSWER, {"answer": -1}),
        ("a letter as answer", ANSWER, {"answer": "B"}),
        ("a truth value as answer", ANSWER, {"answer": True}),
        ("no answer", ANSWER, {"answer": None}),
        ("one choice", CHOICES, {"choices": ["one"], "answer": 0}),
        ("no choices", CHOICES, {"choices": []}),
        ("numbers as choices", CHOICES, {"choices": [1, 2]}),
        ("a text as choices", CHOICES, {"choices": "one two"}),
        ("a blank choice", CHOICES, {"choices": ["one", " "], "answer": 0}),
        ("many choices", CHOICES, {"choices": ["x"] * 1000}),
        ("no context", "line 3: expected a text 'context', got ''", {"context": ""}),
        ("a number as context", "line 3: expected a text 'context', got 7", {"context": 7}),
    )
]
BENCHMARKS += rows(
    [
        (f"questions: {name}", evaluate(), line, prepare)
        for name, line, prepare in (
            ("no JSON", "line 2: it is no JSON", asked(GOOD, "{")),
            ("a list", "line 2: expected an object", asked(GOOD, "[1]")),
            ("no number", "line 2: it is no JSON", asked(GOOD, '{"answer": NaN}')),
            ("nested", "line 2: it is no JSON .*nested", asked(GOOD, "[" * 100000)),
            ("nothing", "holds no questions", asked("")),
            ("a pipe", "is a pipe; expected a plain file", special(os.mkfifo)),
            ("a folder", "is a folder; expected a plain file", special(os.mkdir)),
            ("huge", "has 268435457 bytes; expected at most", special(huge)),
            (
                "not UTF-8",
                "is not UTF-8 text",
                special(lambda p: p.write_bytes(b'{"context": "\xff"}')),
            ),
            ("a link to nothing", "is a link to nothing", special(lambda p: p.symlink_to("gone"))),
            ("missing", "there is no file .*arc_easy/test.jsonl", asked(GOOD, task="piqa/val")),
            ("no folder", "--data .*data is no folder", lambda a: None),
        )
    ]
)
NOT_FINITE = ".*model is NaN or infinite on the text that begins"
BENCHMARKS += rows(
    [
        (
            "the original overflows",
            evaluate(),
            f"arc_easy: the output of block 2 .* of {NOT_FINITE} 'Question: Wh'",
            both(asked(GOOD), tensors(overflow)),
        ),
        (
            "the cut model overflows",
            evaluate(),
            f"arc_easy: the output of block 2 .* of .*run/{NOT_FINITE} 'Question: Wh'",
            both(asked(GOOD), of_cut("run/model", overflow)),
        ),
        (
            "one overflows on a text",
            evaluate("--tasks wikitext2 --data {here}/data"),
            f"wikitext2: the perplexity of .*run/{NOT_FINITE} 'one two",
            both(
                asked({"text": "one two " * 30}, task="wikitext2/test_raw"),
                of_cut("run/model", overflow),
            ),
        ),
        (
            "one overflows as it writes",
            evaluate("--tasks gsm8k --data {here}/data"),
            "gsm8k: the logits of .*model are NaN or infinite at token .* that it generates",
            both(
                asked(SUM, task="gsm8k/test"),
                asked(*[SUM] * 8, task="gsm8k/train"),
                config(max_position_embeddings=4096),
                tensors(overflow),
            ),
        ),
        ("unknown task", evaluate("--tasks zorp --data {here}/data"), "unknown local", asked(GOOD)),
        ("no task", evaluate("--tasks , --data {here}/data"), "names no benchmark", asked(GOOD)),
        ("no tasks", evaluate("--data {here}/data"), "names no benchmark", asked(GOOD)),
        ("no questions", evaluate("--tasks arc_easy --questions 0"), "Invalid value|questions"),
        ("text without data", evaluate("--tasks wikitext2"), "wikitext2 is read from a folder"),
        (
            "a file with an empty choice",
            evaluate("--tasks {here}/data/own.jsonl"),
            r"data/own.jsonl, line 3: expected 'choices', .* none empty, got \['one', ''\]",
            asked(GOOD, "", {**GOOD, "choices": ["one", ""]}, task="own"),
        ),
        (
            "an article without text",
            evaluate("--tasks wikitext2 --data {here}/data"),
            "line 1: expected a text 'text', got 7",
            asked({"text": 7}, task="wikitext2/test_raw"),
        ),
        (
            "no blank",
            evaluate("--tasks winogrande --data {here}/data"),
            "line 1: expected '_' in 'context'",
            asked(GOOD, task="winogrande/dev"),
        ),
        (
            "three choices of four",
            evaluate("--tasks mmlu_0shot --data {here}/data"),
            "line 1: expected 4 'choices', got 2",
            asked({**GOOD, "subject": "x"}, task="mmlu/test"),
        ),
        (
            "one word",
            evaluate("--tasks lambada --data {here}/data"),
            "line 1: expected ' ' in 'text'",
            asked({"text": "one"}, task="lambada/test"),
        ),
        (
            "a run, an unknown task",
            "evaluate {run} --tasks zorp --data {here}/data",
            "unknown local task 'zorp'",
            asked(GOOD),
        ),
        (
            "the questions as output",
            evaluate(out="{here}/data/arc_easy/test.jsonl"),
            "lies in .*data, which this command reads",
            asked(GOOD),
        ),
        (
            "a user's file as output",
            evaluate("--tasks arc_easy --data {here}/data --overwrite", out="{home}/diary.txt"),
            "stays as it is",
            asked(GOOD),
        ),
        (
            "the model as output",
            evaluate("--tasks arc_easy --data {here}/data --overwrite", out="{model}/config.json"),
            "lies in .*model, which this command reads",
            asked(GOOD),
        ),
    ]
)


@parametrised(BENCHMARKS)
def test_questions_that_are_refused(arena, row):
    arena.try_row(row)
