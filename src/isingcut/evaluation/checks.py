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
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from isingcut.data.corpora import manual

Question = dict[str, str]

_LENGTHS = (1000, 2000, 4000)
_DEPTHS = (0.1, 0.5, 0.9)
_THINGS = ("blue locker", "green door", "red suitcase")
_CHARACTERS = 4


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


def has_words(answer: str, bounds: Sequence[int]) -> bool:
    """Whether the number of words between white space is within the bounds."""
    return bounds[0] <= len(answer.split()) <= bounds[1]


def has_sentences(answer: str, bounds: Sequence[int]) -> bool:
    """Whether the number of sentences, which end at ``.``, ``!`` or ``?``, is within the bounds."""
    sentences = re.split(r"[.!?][\"')]*\s+", answer)
    return bounds[0] <= len(sentences) <= bounds[1]


def has_lines(answer: str, bounds: Sequence[int]) -> bool:
    """Whether the number of lines that are not blank is within the bounds."""
    return bounds[0] <= len(_lines(answer)) <= bounds[1]


def has_case(answer: str, case: str) -> bool:
    """Whether all letters are ``upper`` or ``lower`` case, and there is one."""
    return answer.isupper() if case == "upper" else answer.islower()


def includes(answer: str, words: Mapping[str, int]) -> bool:
    """Whether each word occurs at least so many times, in any case."""
    return all(_count(answer, word) >= least for word, least in words.items())


def excludes(answer: str, words: Iterable[str]) -> bool:
    """Whether none of the words occurs, in any case."""
    return not any(_count(answer, word) for word in words)


def lacks(answer: str, characters: str) -> bool:
    """Whether none of the characters occurs."""
    return not set(answer) & set(characters)


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


def ends_with(answer: str, phrase: str) -> bool:
    """Whether the answer ends with the phrase, letter by letter."""
    return answer.endswith(phrase)


CHECKS: dict[str, Callable[[str, Any], bool]] = {
    "words": has_words,
    "sentences": has_sentences,
    "lines": has_lines,
    "case": has_case,
    "includes": includes,
    "excludes": excludes,
    "lacks": lacks,
    "numbered": is_numbered,
    "bullets": is_bulleted,
    "json": is_json,
    "title": has_title,
    "ends": ends_with,
}
"""The checks by name: functions of an answer and of the prompt's argument."""


def _lines(answer: str) -> list[str]:
    return [line.strip() for line in answer.splitlines() if line.strip()]


def _count(answer: str, word: str) -> int:
    found: list[str] = re.findall(r"\w+", answer.lower())
    return found.count(word.lower())
