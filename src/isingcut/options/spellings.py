"""What is typed for a removal, a budget, blocks, an effort, memory or a device, and its meaning.

Every reader takes the text of one option and raises `InputError` where it cannot be read, before
anything else is looked at. Numbers are bounded here, so that no text of a few characters can ask
for a list of a billion.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from isingcut.errors import InputError

LAST_BLOCK = 99_999
"""The largest number of a block, or of blocks, that can be typed."""

_KIND = r"[A-Za-z][A-Za-z0-9_.+-]*"
_PLAIN = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
_BYTES = {
    "": 1.0,
    "k": 1e3,
    "m": 1e6,
    "g": 1e9,
    "t": 1e12,
    "kb": 1e3,
    "mb": 1e6,
    "gb": 1e9,
    "tb": 1e12,
    "kib": 2.0**10,
    "mib": 2.0**20,
    "gib": 2.0**30,
    "tib": 2.0**40,
}
_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6}
_LONGEST_EFFORT = 1e6
_MOST_TOKENS = 1e12


@dataclass(frozen=True)
class Quantity:
    """Something that a budget can count.

    Attributes:
        cost: the key of a block that is counted.
        whole: the key of the blocks' description that a share refers to; empty: the blocks' sum.
        units: of an amount, in lower case; "" where a bare number means something.
        early: known from the model's configuration, before its weights are there.
    """

    cost: str
    whole: str
    units: Mapping[str, float]
    early: bool = False


QUANTITIES = {
    "params": Quantity("parameters", "total_parameters", _PLAIN, early=True),
    "bytes": Quantity("bytes", "total_bytes", _BYTES),
    "kv": Quantity("kv_bytes_per_token", "", _BYTES),
    "latency": Quantity("latency_seconds", "", _SECONDS),
}
"""What a `--budget` can be of.

Shares of parameters and bytes are of the whole model, embeddings included; shares of the KV cache
and of latency are of the blocks' sum.
"""


@dataclass(frozen=True)
class Budget:
    """One parsed `--budget`: a quantity and a share of it or an amount."""

    quantity: str
    share: float | None
    amount: float | None


def parse_removal(text: str) -> range | dict[str, int]:
    """``"8"`` and ``"4..15"`` -> the numbers of blocks; ``"attention=2,moe=3"`` -> one per kind.

    Raises:
        InputError: none of these, a number of 0 or above 99,999, or a range that runs backwards.
    """
    span = re.fullmatch(r"\s*(\d+)\s*(?:\.\.\s*(\d+)\s*)?", text)
    if span is not None:
        first = last = _bounded(span[1])
        if span[2] is not None:
            last = _bounded(span[2])
            if first >= last:
                raise InputError(
                    f"{_cut(text)} is no range; write one such as 4..15, the smaller number first"
                )
        if first < 1:
            raise InputError(f"{_cut(text)} removes nothing; at least 1 block has to go")
        return range(first, last + 1)
    counts: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(rf"\s*({_KIND})\s*=\s*(\d+)\s*", part)
        if match is None:
            raise InputError(
                f"cannot read {_cut(text)} as a removal; write a number (8), a range (4..15) or "
                "counts per kind (attention=2,moe=3)"
            )
        if match[1] in counts:
            raise InputError(f"kind {_cut(match[1])} occurs twice in {_cut(text)}")
        counts[match[1]] = _bounded(match[2])
    if not any(counts.values()):
        raise InputError(f"{_cut(text)} removes nothing; at least 1 block has to go")
    return counts


def parse_budgets(text: str) -> list[Budget]:
    """``"params=20%,latency=3ms"`` -> a budget each.

    Raises:
        InputError: as `parse_budget`, or a quantity twice.
    """
    found = [parse_budget(part) for part in text.split(",")]
    names = [b.quantity for b in found]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{name!r} occurs twice in {_cut(text)}; give its larger one only")
    return found


def parse_budget(text: str) -> Budget:
    """``"params=25%"`` -> a share; ``"bytes=1.5GB"``, ``"latency=3ms"`` -> an amount.

    Raises:
        InputError: not of that form, an unknown quantity or unit, or nothing that would go.
    """
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not value:
        raise InputError(
            f"cannot read {_cut(text)} as a budget; write quantity=share or quantity=amount, "
            "for example params=25% or bytes=1.5GB"
        )
    if name not in QUANTITIES:
        raise InputError(
            f"budget {_cut(text)}: unknown quantity {_cut(name)}; known: {', '.join(QUANTITIES)}"
        )
    share, amount = _measure(value, QUANTITIES[name].units, f"budget {_cut(text)}")
    return Budget(name, share, amount)


def parse_memory(text: str) -> tuple[float | None, float | None]:
    """``"50%"`` -> a share (0.5, None); ``"8GB"`` -> an amount (None, 8e9) in bytes.

    Raises:
        InputError: neither, or nothing.
    """
    return _measure(text.strip(), _BYTES, f"an amount like 8GB or a share like 50%, {_cut(text)}")


def _measure(text: str, units: Mapping[str, float], what: str) -> tuple[float | None, float | None]:
    """A share, or an amount in the smallest unit; exactly one of the two."""
    match = re.fullmatch(r"(\d{1,30}(?:\.\d{0,30})?)\s*(%|[A-Za-z]*)", text)
    if match is None:
        raise InputError(f"{what}: {_cut(text)} is no share (25%) and no amount (1.5GB)")
    value, unit = float(match[1]), match[2].lower()
    if value == 0:
        raise InputError(f"{what}: {_cut(text)} is nothing; give more than 0")
    if unit == "%":
        if value > 100:
            raise InputError(f"{what}: a share lies between 0% and 100%")
        return value / 100, None
    if unit not in units:
        known = ", ".join(["%", *(u for u in units if u)])
        raise InputError(f"{what}: unknown unit {_cut(match[2])}; known: {known}")
    return None, value * units[unit]


def parse_effort(text: str) -> tuple[float | None, bool]:
    """An amount, and whether it is in minutes; None for no amount.

    Raises:
        InputError: neither a number of passes nor of minutes.
    """
    words = text.strip().lower()
    if not words:
        return None, False
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{0,12})?)\s*(|passes|minutes|min|hours|h)", words)
    amount = float(match[1]) if match else 0.0
    if match is None or not 0 < amount <= _LONGEST_EFFORT:
        raise InputError(
            f"{_cut(text)}: expected passes over the calibration text (150) or a time (20min, 2h), "
            f"of at most {_LONGEST_EFFORT:,.0f}"
        )
    return amount * (60.0 if match[2] in ("hours", "h") else 1.0), match[2] not in ("", "passes")


def parse_healing(text: str) -> tuple[float | None, float | None]:
    """``"5Mtokens"`` -> (5e6, None) tokens; ``"10min"`` -> (None, 600.0) seconds.

    ``"all"`` and nothing, for all of a text, give (None, None).

    Raises:
        InputError: none of these, or an amount out of bounds.
    """
    words = text.strip()
    if words.lower() in ("", "all"):
        return None, None
    # Of the one letter m only the small one is minutes: 5M may be meant as tokens.
    match = re.fullmatch(
        r"(\d{1,15}(?:\.\d{0,12})?)\s*"
        r"(?:([kmgKMG]?)\s*(?i:tokens|token|tok)|((?i:minutes|min|hours|h)|m))",
        words,
    )
    amount = float(match[1]) if match else 0.0
    if match is not None and match[3]:
        amount *= 60.0 if match[3].lower() in ("hours", "h") else 1.0
        if 0 < amount <= _LONGEST_EFFORT:
            return None, 60 * amount
    elif match is not None:
        amount *= _PLAIN[match[2].lower()]
        if 1 <= amount <= _MOST_TOKENS:
            return amount, None
    raise InputError(
        f"{_cut(text)}: expected a time (10min, 2h), tokens (500ktokens, 5Mtokens) or all, of at "
        f"most {_LONGEST_EFFORT:,.0f} minutes or {_MOST_TOKENS:,.0f} tokens"
    )


def parse_device(text: str) -> str:
    """A device's name as torch spells it.

    Raises:
        InputError: not auto, cpu, cuda, cuda:N or another type of torch's.
    """
    if not re.fullmatch(r"auto|[a-z]{2,12}(:\d{1,3})?", text):
        raise InputError(f"must be auto, cpu, cuda or cuda:N; got {_cut(text)}")
    return text


def parse_indices(text: str) -> list[int]:
    """``"0,1,5-8"`` -> [0, 1, 5, 6, 7, 8].

    Raises:
        InputError: no list of block numbers, or a number above 99,999.
    """
    spans = []
    for part in text.split(","):
        span = block_span(part.strip())
        if span is None:
            raise InputError(
                f"cannot read {_cut(text)} as block numbers; write for example 0,1,5-8"
            )
        spans.append(span)
    return expanded(spans)


def block_span(text: str) -> tuple[int, int] | None:
    """``"5-8"`` -> (5, 8) and ``"5"`` -> (5, 5); None where it is neither.

    Raises:
        InputError: a number above 99,999.
    """
    match = re.fullmatch(r"(\d+)\s*(?:-\s*(\d+))?", text)
    if match is None:
        return None
    first = _bounded(match[1])
    last = first if match[2] is None else _bounded(match[2])
    return (first, last) if first <= last else None


def expanded(spans: Iterable[tuple[int, int]]) -> list[int]:
    """All numbers of some spans, ascending, each once; as long as their union, however many."""
    found: list[int] = []
    for first, last in sorted(spans):
        found.extend(range(max(first, found[-1] + 1 if found else 0), last + 1))
    return found


def _bounded(digits: str) -> int:
    # Counted before it is read: Python itself refuses numbers of many thousand digits.
    if len(digits.lstrip("0")) > len(str(LAST_BLOCK)):
        raise InputError(f"{_cut(digits)} is too large; numbers of blocks end at {LAST_BLOCK:,}")
    return int(digits)


def _cut(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
