"""Benchmark questions that are refused, and refused output paths of their scores."""

import json
import os

from arena import Row, rows, tried
from damage import both, config, overflow, tensors

from shared import cells


def asked(*records, task="arc_easy/test"):
    """Return a step that writes questions to the folder `data`."""

    def prepare(arena):
        path = arena.here / "data" / f"{task}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (r if isinstance(r, str) else json.dumps(r) for r in records)
        path.write_text("\n".join(lines) + "\n")

    return prepare


def special(make):
    def prepare(arena):
        (arena.here / "data/arc_easy").mkdir(parents=True)
        make(arena.here / "data/arc_easy/test.jsonl")

    return prepare


def huge(path):
    path.touch()
    os.truncate(path, 2**28 + 1)


def evaluate(
    tasks="arc_easy", more="", data="--data {here}/data", out="{here}/scores.json"
):
    command = f"evaluate {{run}}/model --original {{model}} --out {out} --device cpu"
    return f"{command} {tasks and f'--tasks {tasks}'} {data} {more}"


SUM = {"context": "What is 1 plus 1?", "solution": "It is 2.", "answer": "2"}
GOOD = {"context": "Which is it?", "choices": ["one", "two"], "answer": 1}
# Name :: what differs from a good question :: expected line.
CHANGES = r"""
an answer beyond :: {"answer": 2} :: line 3: expected 'answer', a number from 0 to 1, got
a truth value as answer :: {"answer": true} :: expected 'answer', a number from 0 to 1, got
one choice :: {"choices": ["one"], "answer": 0} :: line 3: expected .*'choices'
a blank choice :: {"choices": ["one", " "], "answer": 0} :: line 3: expected .*'choices'
no context :: {"context": ""} :: line 3: expected a text 'context', got ''
half a character :: {"context": "a\ud800"} :: line 3 is not valid JSON
"""
BENCHMARKS = [
    Row(
        f"question: {name}",
        evaluate(),
        line,
        asked(GOOD, "", {**GOOD, **json.loads(new)}),
    )
    for name, new, line in cells(CHANGES)
]
MANY = asked(GOOD, "", {**GOOD, "choices": ["x"] * 1000})
BENCHMARKS.append(Row("many choices", evaluate(), "line 3: expected .*'choices'", MANY))
# Name :: lines of a file of prompts :: expected line.
PROMPTS = r"""
nothing :: :: has no prompts; give one a line, or 'messages'
no JSON :: {"messages": :: line 1 is not valid JSON
a list :: [1] :: line 1 must be a JSON object
no messages :: {"prompt": "a"} :: line 1: the 'content' of each turn must be a text
a word :: {"messages": "a"} :: line 1: 'messages' must be a list of objects
no user :: {"messages": [{"role": "assistant", "content": "a"}]} :: line 1 must end with a turn of
a number :: {"messages": [{"role": "user", "content": 1}]} :: line 1: the 'content' of each turn
half a character :: {"text": "a\ud800"} :: line 1 is not valid JSON
"""
BENCHMARKS += [
    Row(
        f"prompts: {name}",
        evaluate("", "--prompts {here}/data/mine.jsonl", ""),
        line,
        asked(content, task="mine"),
    )
    for name, content, line in cells(PROMPTS)
]
BENCHMARKS += rows(
    [
        (
            "prompts and tasks",
            evaluate("instructions", "--prompts {text}", ""),
            "--tasks and --prompts write different files",
        ),
        (
            "a prompt beyond the positions",
            evaluate("", "--prompts {here}/data/mine.jsonl", ""),
            r"prompt 1 of --prompts has \d+ tokens; an answer takes up to 8 more",
            asked(json.dumps({"text": "word " * 99}), task="mine"),
        ),
    ]
)
BENCHMARKS += rows(
    [
        (f"questions: {name}", evaluate(), line, prepare)
        for name, line, prepare in (
            ("a list", "line 2 must be a JSON object", asked(GOOD, "[1]")),
            (
                "nested",
                "line 2 is not valid JSON: recursion",
                asked(GOOD, "[" * 100000),
            ),
            ("nothing", "has no questions", asked("")),
            ("a pipe", "is a pipe; expected a regular file", special(os.mkfifo)),
            ("huge", "has 268435457 bytes; expected at most", special(huge)),
            (
                "missing",
                "arc_easy/test.jsonl does not exist",
                asked(GOOD, task="piqa/val"),
            ),
            ("no folder", "--data .*data is not a folder", lambda a: None),
        )
    ]
)
NOT_FINITE = ".*model is NaN or infinite on the text that begins"
BLOCK = "arc_easy: the output of block 2 .* of"
WRITES = (
    "gsm8k: the logits of .*model are NaN or infinite at token .* of a generated text"
)
LONG = config(max_position_embeddings=4096)
THE_MODEL = tensors(overflow)
OVERFLOWS = [
    (
        "the original",
        "arc_easy",
        f"{BLOCK} {NOT_FINITE} 'Question: Wh'",
        asked(GOOD),
        THE_MODEL,
    ),
    (
        "the cut",
        "arc_easy",
        f"{BLOCK} .*run/{NOT_FINITE} 'Question: Wh'",
        asked(GOOD),
        tensors(overflow, "run/model"),
    ),
    (
        "as it writes",
        "gsm8k",
        WRITES,
        both(asked(SUM, task="gsm8k/test"), asked(*[SUM] * 8, task="gsm8k/train")),
        both(LONG, THE_MODEL),
    ),
]
BENCHMARKS += rows(
    [
        (f"overflows: {n}", evaluate(task), line, both(*make))
        for n, task, line, *make in OVERFLOWS
    ]
)
NUMBER = asked({"text": 7}, task="lambada/test")
ONE_WORD = asked({"text": "one"}, task="lambada/test")
EMPTY = asked(GOOD, "", {**GOOD, "choices": ["one", ""]}, task="own")
OWN = r"data/own.jsonl line 3: expected 'choices', .* none empty, got \['one', ''\]"
BLANK = "line 1: expected '_' and then text in 'context'"
MMLU = asked({**GOOD, "subject": "x"}, task="mmlu/test")
OTHERS = [
    ("unknown task", evaluate("zorp"), "unknown local", asked(GOOD)),
    ("no task", evaluate(","), "--tasks is empty", asked(GOOD)),
    ("data alone", evaluate(""), "need benchmarks", asked(GOOD)),
    ("no questions", evaluate(more="--questions 0"), "Invalid value|questions", asked(GOOD)),
    ("an empty choice", evaluate("{here}/data/own.jsonl", data=""), OWN, EMPTY),
    ("a name twice", evaluate("{here}/own.jsonl,{here}/data/own.jsonl", data=""),
     "two files named own.jsonl", EMPTY),
    ("a number", evaluate("lambada"), "line 1: expected a text 'text', got 7", NUMBER),
    ("a blank at the end", evaluate("winogrande"), BLANK,
     asked({**GOOD, "context": "It was _ "}, task="winogrande/dev")),
    ("two of four", evaluate("mmlu_0shot"), "line 1: expected 4 'choices', got 2", MMLU),
    ("one word", evaluate("lambada"), "line 1: expected ' ' and then text in 'text'", ONE_WORD),
]  # fmt: skip
PLACES = [
    ("{here}/data/arc_easy/test.jsonl", "", "lies in .*data, an input of this command"),
    ("{home}/diary.txt", "--overwrite", "is not replaced"),
]
BENCHMARKS += rows(OTHERS)
BENCHMARKS += rows(
    [
        (f"to {out}", evaluate(more=more, out=out), line, asked(GOOD))
        for out, more, line in PLACES
    ]
)


test_questions_that_are_refused = tried(BENCHMARKS)
