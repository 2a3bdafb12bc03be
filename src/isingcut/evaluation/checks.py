"""Two tasks with generated answers that need no judge, no data and no network.

`instructions`: prompts whose answers programs can check, such as "in 20 to 40 words". An answer is
right if all checks of its prompt pass; only white space around it is ignored. They see the form:
a text without sense may pass.

`needle`: a sentence with a number, hidden in a text of about 1, 2 or 4 thousand tokens, at four
characters a token. The text is Python's manual, which depends on Python's version.
"""

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from isingcut.data.corpora import manual

Question = dict[str, str]

_LENGTHS = (1000, 2000, 4000)
_DEPTHS = (0.1, 0.5, 0.9)
_THINGS = ("blue locker", "green door", "red suitcase")
_CHARACTERS = 4
# The end of a sentence: ``.``, ``!`` or ``?``.
_END = re.compile(r"[.!?][\"')]*\s+")


def read_instructions() -> list[Question]:
    """Return the prompts, each with its checks as JSON: the argument of each by name."""
    text = Path(__file__).with_name("instructions.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()]
    return [{**record, "checks": json.dumps(record["checks"])} for record in records]


def score_instruction(
    question: Mapping[str, str], answers: Sequence[str]
) -> dict[str, int]:
    """Score one generated answer: 1 if it passes all checks of the question."""
    answer = answers[0].strip()
    checks = json.loads(question["checks"])
    passed = (CHECKS[name](answer, argument) for name, argument in checks.items())
    return {"followed": int(all(passed))}


def hide_needles() -> list[Question]:
    """Return one question for each length, depth and hidden sentence."""
    text = " ".join(" ".join(manual()).split())
    rng = random.Random(0)
    questions = []
    for tokens, depth, thing in product(_LENGTHS, _DEPTHS, _THINGS):
        size = tokens * _CHARACTERS
        start = rng.randrange(len(text) - size)
        place = start + round(depth * size)
        before, stop, rest = text[start:place].rpartition(". ")
        number = str(rng.randrange(1000, 10_000))
        needle = f"The number of the {thing} is {number}. "
        after = text[place : start + size]
        question = f"\n\nQuestion: What is the number of the {thing}?\nAnswer:"
        context = before + stop + needle + rest + after + question
        questions.append({"context": context, "number": number})
    return questions


def score_needle(question: Mapping[str, str], answers: Sequence[str]) -> dict[str, int]:
    """Score one generated answer: 1 if the hidden number is in it."""
    found = re.findall(r"\d+", answers[0])
    return {"found": int(question["number"] in found)}


# Checks -----------------------------------------------------------------------------------


def is_numbered(answer: str, items: int) -> bool:
    """Whether all lines together are a list with the numbers ``1.``, ``2.`` and so on."""
    lines = enumerate(_lines(answer), start=1)
    numbered = [re.match(rf"{i}\. \S", line) for i, line in lines]
    return len(numbered) == items and all(numbered)


def is_bulleted(answer: str, items: int) -> bool:
    """Whether all lines together are a list of so many items that start with ``- ``."""
    lines = _lines(answer)
    return len(lines) == items and all(line.startswith("- ") for line in lines)


def is_json(answer: str, keys: Sequence[str]) -> bool:
    """Whether the answer is a JSON object with exactly the keys."""
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and set(found) == set(keys)


def has_title(answer: str, brackets: Sequence[str]) -> bool:
    """Whether the first of several lines is a title in the brackets."""
    first, *others = _lines(answer) or [""]
    left, right = map(re.escape, brackets)
    return bool(others and re.fullmatch(rf"{left}[^][<>]+{right}", first))


CHECKS: dict[str, Callable[[str, Any], bool]] = {
    # Whether the number of words, sentences or lines that are not blank is within the bounds.
    "words": lambda answer, bounds: _within(answer.split(), bounds),
    "sentences": lambda answer, bounds: _within(_END.split(answer), bounds),
    "lines": lambda answer, bounds: _within(_lines(answer), bounds),
    # Whether all letters are ``upper`` or ``lower`` case, and there is one.
    "case": lambda answer, case: (
        answer.isupper() if case == "upper" else answer.islower()
    ),
    # Whether each word occurs at least so many times, or none occurs, in any case.
    "includes": lambda answer, words: all(
        _count(answer, word) >= least for word, least in words.items()
    ),
    "excludes": lambda answer, words: not any(_count(answer, w) for w in words),
    # Whether none of the characters occurs.
    "lacks": lambda answer, characters: not set(answer) & set(characters),
    "numbered": is_numbered,
    "bullets": is_bulleted,
    "json": is_json,
    "title": has_title,
    # Whether the answer ends with the phrase, letter by letter.
    "ends": str.endswith,
}
"""The checks by name: functions of an answer and of the prompt's argument."""


def _within(parts: Sequence[str], bounds: Sequence[int]) -> bool:
    return bounds[0] <= len(parts) <= bounds[1]


def _lines(answer: str) -> list[str]:
    return [line.strip() for line in answer.splitlines() if line.strip()]


def _count(answer: str, word: str) -> int:
    found: list[str] = re.findall(r"\w+", answer.lower())
    return found.count(word.lower())
