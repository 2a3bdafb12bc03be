"""Types of options: bounded numbers, and texts that are parsed: a removal, a budget, blocks, ...

Each text is parsed once, when the option is given. Numbers are bounded here, so that a few
characters cannot request a list of a billion entries.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Interval as Bounds

from isingcut.errors import InputError, suggest

Count = Annotated[int, Bounds(ge=1, le=1_000_000)]
Few = Annotated[int, Bounds(ge=2, le=1_000_000)]
Tokens = Annotated[int, Bounds(ge=1, le=2**20)]
Length = Annotated[int, Bounds(ge=8, le=2**20)]
Seed = Annotated[int, Bounds(ge=0, le=2**32 - 1)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
PatchTokens = Annotated[int, Bounds(ge=64, le=2**30)]

LAST_BLOCK = 99_999
"""Largest block number, and largest number of blocks, that can be typed."""

# Other digits, underscores and leading zeros are refused, as in YAML and in numeric options.
_WHOLE = r"(0|[1-9][0-9]*)"
_KIND = r"[A-Za-z][A-Za-z0-9_.+-]*"
_SHARE = {"%": 0.01}
_PLAIN = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
_BYTES = {"b": 1.0} | {
    f"{k}{b}": 1e3**e for e, k in enumerate("kmgt", 1) for b in ("", "b")
}
_BYTES |= {f"{k}ib": 1024.0**e for e, k in enumerate("kmgt", 1)}
# `lazy` is the fake device of the tests.
_DEVICES = "cpu|cuda|xpu|mps|hpu|mtia|xla|lazy"
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_TIMES = {"minutes": 60.0, "min": 60.0, "m": 60.0, "hours": 3600.0, "h": 3600.0}
_LONGEST = 1e6
_MOST_TOKENS = 1e12


class Parsed(str):
    """A typed text with its parsed values; an empty text sets nothing.

    Subclasses set attributes from the text.

    Raises:
        InputError: the text cannot be parsed.
    """

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(
            cls, core_schema.str_schema()
        )


@dataclass(frozen=True)
class Quantity:
    """A quantity that a budget can limit.

    Attributes:
        cost: key of a block's cost.
        whole: key of the total that a share refers to; empty for the sum over the blocks.
        units: values of the units in lower case; ``%`` is a share.
        unit: unit in messages.
        early: whether it is known from the model's configuration, before its weights are read.
        packed: whether it is of the model in a GGUF type, which `isingcut run` chooses by
            measurement; an amount is then an upper limit.
        context: whether it depends on a number of tokens.
    """

    cost: str
    whole: str
    units: Mapping[str, float]
    unit: str
    early: bool = False
    packed: bool = False
    context: bool = False


QUANTITIES = {
    "params": Quantity(
        "parameters", "total_parameters", _SHARE | _PLAIN, "M", early=True
    ),
    "bytes": Quantity("bytes", "total_bytes", _SHARE | _BYTES, "MB", early=True),
    "kv": Quantity("kv_bytes_per_token", "", _SHARE | _BYTES, "kB"),
    "latency": Quantity("latency_seconds", "", _SHARE | _SECONDS, "ms", context=True),
    "speed": Quantity("decode_seconds", "decode_seconds", _SHARE, "%", context=True),
    "file": Quantity("bytes", "other", _BYTES, "MB", packed=True),
    "memory": Quantity("bytes", "other", _BYTES, "GB", packed=True, context=True),
    "decode": Quantity("read", "read_other", _SHARE, "%", packed=True, context=True),
}
"""The quantities of a `--budget`.

Shares of parameters and bytes refer to the whole model, embeddings included; shares of the KV cache
and of latency to the sum over the blocks; shares of decoding to the bytes that the original reads.
Latency is prefill through the blocks, without the head; a share of speed is gained, not removed.
"""


@dataclass(frozen=True)
class Budget:
    """One part of a `--budget`: a quantity with a share or an amount, for a context in tokens."""

    name: str
    share: float | None
    amount: float | None
    context: int = 0

    @property
    def quantity(self) -> Quantity:
        return QUANTITIES[self.name]


class Removal(Parsed):
    """The number of blocks to remove: ``"8"``, ``"4..15"``, or by kind, ``"attention=2,moe=3"``.

    Attributes:
        counts: numbers of blocks, one or a range; empty if `kinds` is set.
        kinds: number of blocks of each kind.
    """

    def __init__(self, text: str = "") -> None:
        self.counts = range(0)
        self.kinds = dict[str, int]()
        if not text:
            return
        span = re.fullmatch(rf"\s*{_WHOLE}\s*(?:\.\.\s*{_WHOLE}\s*)?", text)
        if span is not None:
            first = _read_bounded(span[1])
            last = _read_bounded(span[2] or span[1])
            if span[2] and first >= last:
                raise InputError(
                    f"{_cut(text)} is not a range; put the smaller number first, as in 4..15"
                )
            self.counts = range(first, last + 1)
        for part in text.split(",") if span is None else ():
            match = re.fullmatch(rf"\s*({_KIND})\s*=\s*{_WHOLE}\s*", part)
            if match is None:
                raise InputError(
                    f"cannot read {_cut(text)} as a removal; write a number (8), a range (4..15), "
                    "counts per kind (attention=2,moe=3), or a share as --budget params=20%"
                )
            if match[1] in self.kinds:
                raise InputError(f"kind {_cut(match[1])} occurs twice in {_cut(text)}")
            self.kinds[match[1]] = _read_bounded(match[2])
        if self.counts[:1] == range(1) or not (self.counts or any(self.kinds.values())):
            raise InputError(f"{_cut(text)} removes nothing; remove at least 1 block")

    @property
    def is_range(self) -> bool:
        """Whether it stands for several removals."""
        return len(self.counts) > 1


class Budgets(Parsed):
    """The least removal: a share ``"params=25%"``, or amounts ``"bytes=1.5GB,kv=3kB"``.

    Or the largest size of a packed model: ``"file=90MB"``, ``"memory=2GB@8k"``.

    Attributes:
        parts: one `Budget` per quantity.
        packed: whether the quantities are of a packed model.
    """

    def __init__(self, text: str = "") -> None:
        self.parts = [_read_budget(part) for part in text.split(",")] if text else []
        names = [b.name for b in self.parts]
        for name in names:
            if names.count(name) > 1:
                raise InputError(
                    f"{name!r} occurs twice in {_cut(text)}; keep one of the two"
                )
        self.packed = any(b.quantity.packed for b in self.parts)
        if others := [b.name for b in self.parts if b.quantity.packed != self.packed]:
            raise InputError(
                f"{_cut(text)}: a GGUF type is chosen for it; omit {others[0]}"
            )

    def part(self, name: str) -> Budget | None:
        """Return the part of a quantity."""
        return next((b for b in self.parts if b.name == name), None)


def _read_budget(text: str) -> Budget:
    name, _, value = (part.strip() for part in text.partition("="))
    what = f"budget {_cut(text)}"
    if not value:
        raise InputError(
            f"cannot read {_cut(text)} as a budget; write quantity=share or quantity=amount, "
            "for example params=25% or bytes=1.5GB"
        )
    if name not in QUANTITIES:
        raise InputError(
            f"{what}: unknown quantity {_cut(name)}{suggest(name, QUANTITIES)}"
        )
    quantity = QUANTITIES[name]
    tokens = 0
    if quantity.context:
        value, at, context = (part.strip() for part in value.partition("@"))
        match = re.fullmatch(r"([0-9]{1,9})\s*(k?)", context.lower())
        tokens = int(match[1]) * (1024 if match[2] else 1) if match else 0
        if not tokens and (at or quantity.units is _BYTES):
            raise InputError(
                f"{what}: expected a context in tokens behind @, as {name}={value}@8k"
            )
    return Budget(name, *_measure(value, quantity.units, what), tokens)


class Memory(Parsed):
    """An amount of memory: ``"8GB"``, or a share of the free memory, ``"50%"``.

    Attributes:
        share, amount: at most one of them is not None.
    """

    def __init__(self, text: str = "") -> None:
        self.share: float | None = None
        self.amount: float | None = None
        if text:
            what = f"memory {_cut(text)}"
            self.share, self.amount = _measure(text.strip(), _SHARE | _BYTES, what)


class Effort(Parsed):
    """The limit of a search: ``"150"`` passes over the calibration text, or ``"20min"``.

    Attributes:
        passes, seconds: at most one of them is not None.
    """

    def __init__(self, text: str = "") -> None:
        self.passes, self.seconds = _read_limit(text, "()(?:passes)?")
        minutes = (self.seconds or 0) / 60
        if text.strip() and not 0 < (self.passes or minutes) <= _LONGEST:
            raise InputError(
                f"{_cut(text)}: expected passes over the calibration text (150) or a time (20min, "
                f"2h), of at most {_LONGEST:,.0f} passes or minutes"
            )


class BlockList(Parsed):
    """Block numbers: ``"0,1,5-8"``, separated by commas, spaces or lines, in brackets or not.

    Attributes:
        numbers: block numbers, ascending, without duplicates.
    """

    def __init__(self, text: str = "") -> None:
        numbers = set[int]()
        parts = re.split(r"[\s,;]+", re.sub(r"\s*-\s*", "-", text.strip("[]() \t\n")))
        for part in dict.fromkeys(parts) if text else ():
            match = re.fullmatch(rf"{_WHOLE}(?:-{_WHOLE})?", part)
            first = _read_bounded(match[1]) if match else 0
            last = _read_bounded(match[2] or match[1]) if match else -1
            if first > last:
                raise InputError(
                    f"cannot read {_cut(text)} as block numbers; write for example 0,1,5-8"
                )
            numbers.update(range(first, last + 1))
        self.numbers = sorted(numbers)


class Training(Parsed):
    """The length of the healing: ``"5Mtokens"``, ``"10min"``, or all text (``"all"`` or empty).

    Attributes:
        tokens, seconds: at most one of them is not None.
    """

    def __init__(self, text: str = "") -> None:
        self.tokens, self.seconds = _read_limit(text, r"([kmg]?)\s*(?:tokens?|tok)")
        if text.strip().lower() in ("", "all"):
            return
        minutes = (self.seconds or 0) / 60
        if not (0 < minutes <= _LONGEST or 1 <= (self.tokens or 0) <= _MOST_TOKENS):
            raise InputError(
                f"{_cut(text)}: expected a time (10min, 2h), tokens (500ktokens, 5Mtokens) or all, "
                f"of at most {_LONGEST:,.0f} minutes or {_MOST_TOKENS:,.0f} tokens"
            )


class Named(Parsed):
    """One of a few forms of a name.

    Attributes:
        pattern: pattern of these forms; ``forms`` describes them.
    """

    pattern: str
    forms: str

    def __init__(self, text: str) -> None:
        if not re.fullmatch(self.pattern, text):
            raise InputError(f"must be {self.forms}; got {_cut(text)}")


class Device(Named):
    """The torch name of a device, or of several devices, separated by commas."""

    pattern = rf"auto|({_DEVICES})(:[0-9]{{1,3}}(,\1:[0-9]{{1,3}})*)?"
    forms = "auto, cpu, cuda, cuda:N or cuda:N,cuda:M"


class Method(Named):
    """What a healing trains: all weights, low-rank matrices or nothing."""

    pattern = r"full|none|lora(:[1-9][0-9]{0,4})?"
    forms = "one of full, lora or lora:RANK, none"


def _read_limit(text: str, counted: str) -> tuple[float | None, float | None]:
    """Parse an amount of what the pattern ``counted`` names, or a time; return it or its seconds.

    Both are None if the text is neither, or zero.
    """
    # "m" means minutes, but "M" does not, because 5M may mean tokens.
    unit = rf"(?:((?i:minutes|min|hours|h)|m)|(?i:{counted}))"
    match = re.fullmatch(rf"([0-9]{{1,15}}(?:\.[0-9]{{0,12}})?)\s*{unit}", text.strip())
    if match is None:
        return None, None
    amount = float(match[1])
    if match[2]:
        return None, amount * _TIMES[match[2].lower()] or None
    return amount * _PLAIN.get(match[3].lower(), 1.0) or None, None


def _measure(
    text: str, units: Mapping[str, float], what: str
) -> tuple[float | None, float | None]:
    """Parse a share, or an amount in the smallest unit; exactly one of the two is not None."""
    match = re.fullmatch(r"([0-9]{1,30}(?:\.[0-9]{0,30})?)\s*(%|[A-Za-z]*)", text)
    if match is None:
        raise InputError(
            f"{what}: expected a share (25%) or an amount (1.5GB), got {_cut(text)}"
        )
    unit = match[2].lower()
    if unit not in units:
        wrong = f"unknown unit {_cut(match[2])}" if unit else "no unit"
        raise InputError(f"{what}: {wrong}; known: {', '.join(units)}")
    value = float(match[1]) * units[unit]
    if value == 0:
        raise InputError(f"{what}: expected more than 0, got {_cut(text)}")
    if unit != "%":
        return None, value
    if value > 1:
        raise InputError(f"{what}: a share must be between 0% and 100%")
    return value, None


def _read_bounded(digits: str) -> int:
    # Check the length first: Python does not convert many thousand digits.
    if len(digits) > len(str(LAST_BLOCK)):
        raise InputError(
            f"{_cut(digits)} is too large; the largest block number is {LAST_BLOCK:,}"
        )
    return int(digits)


def _cut(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
