"""How an option is declared, and the one place where a value of it is checked.

A field of `RunConfig` or `HealConfig` says all there is to know of its option: type, bounds or
words, default, help. The command line, YAML files and Python are checked against that alone,
each before a model, a text or a run folder is looked at.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
import numbers
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, get_args

from pydantic import (
    ConfigDict,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass

from isingcut.errors import InputError
from isingcut.options.yaml_file import load_yaml

# Built when an option is first given: `--help` only reads the fields.
STRICT = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid", defer_build=True)

_AS_TEXT = (str, Path, numbers.Real, list, tuple)
_WRONG = {
    "int_type": "must be a whole number, got {shown}",
    "float_type": "must be a number, got {shown}",
    "bool_type": "must be true or false, got {shown}",
    "literal_error": "must be one of {words}; got {shown}",
    "finite_number": "must be a finite number, got {shown}",
    "greater_than_equal": "must be at least {ge:.0f}, got {shown}",
    "greater_than": "must be above {gt:.0f}, got {shown}",
    "less_than_equal": "must be at most {le:.0f}, got {shown}",
    "value_error": "{error}",
}
"""What pydantic finds, in our words."""


def option(
    default: Any,
    help_: str,
    stage: str = "heal",
    *,
    room: str = "",
    typed: bool = False,
    argument: bool = False,
    metavar: str | None = None,
    volatile: bool = False,
) -> Any:
    """A field that is an option.

    Args:
        default: of the field's type; None where it is decided later.
        help_: one line.
        stage: the first stage of a run that it can change.
        room: the sub-package whose registry has its names, which may be several, by commas.
        typed: given anew on every command line or in every call; never read from a file.
        argument: the command line takes it by position.
        metavar: its value's name in the command line's help.
        volatile: changes no result, only how it is come by.
    """
    metadata = {k: v for k, v in locals().items() if k not in ("default", "help_")}
    return dataclasses.field(default=default, metadata={**metadata, "help": help_})


class OptionError(InputError):
    """A value that an option cannot have.

    Args:
        f: the option.
        wrong: what is wrong with it.
    """

    def __init__(self, f: dataclasses.Field[Any], wrong: str) -> None:
        # What a reader of spellings says comes after a colon.
        self.name, self.wrong = f.name, wrong if wrong.startswith(":") else f" {wrong}"
        super().__init__(flag(f) + self.wrong)


@dataclass(frozen=True, config=STRICT)
class Options:
    """Options that are checked when they are given, in whatever way.

    Raises:
        InputError: one line that names the option, what was expected and what came.
    """

    if TYPE_CHECKING:
        __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
        __pydantic_fields__: ClassVar[dict[str, Any]]

    def replace(self, **changes: Any) -> Self:
        """A copy with some options changed."""
        return dataclasses.replace(self, **changes)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        """Numbers of any library as Python's; for a text also numbers, paths and lists."""
        assert info.field_name is not None
        kind = plain_type(cls, info.field_name)
        if kind is str:
            return _text(value, cls.__dataclass_fields__[info.field_name].default)
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if kind is int and number and isinstance(value, numbers.Integral):
            return int(value)
        if kind is float and number:
            try:
                return float(value)
            except OverflowError:
                return math.inf
        return value

    @model_validator(mode="wrap")
    @classmethod
    def _told(cls, values: Any, check: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return check(values)
        except ValidationError as e:
            first = e.errors(include_url=False)[0]
            name = str(first["loc"][0])
            if name not in cls.__dataclass_fields__:
                raise TypeError(f"{cls.__name__} has no option {name!r}") from None
            words = ", ".join(map(str, get_args(cls.__pydantic_fields__[name].annotation)))
            context = {**first.get("ctx", {}), "words": words, "shown": shown(first["input"])}
            wrong = _WRONG[first["type"]].format(**context)
            raise OptionError(cls.__dataclass_fields__[name], wrong) from None


Kind = TypeVar("Kind", bound=Options)


def plain_type(kind: type[Options], name: str) -> type:
    """The plain type of an option: str, int, float or bool."""
    annotation = kind.__pydantic_fields__[name].annotation
    while inner := get_args(annotation):
        annotation = inner[0]
    # What is left of Literal[...] is a word.
    return annotation if isinstance(annotation, type) else str


def _text(value: Any, default: str) -> str:
    if isinstance(value, bool) or not isinstance(value, _AS_TEXT):
        raise ValueError(f"must be text, got {shown(value)}")
    if isinstance(value, list | tuple):
        value = ",".join(map(str, value))
    text = shown(value) if isinstance(value, int) else str(value)
    if default and not text.strip():
        raise ValueError("is empty; leave it out, or give a value")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"must be UTF-8 text, got {shown(text)}") from e
    if "\0" in text:
        raise ValueError(f"holds a NUL byte: {shown(text)}")
    return text


def options_from(kind: type[Kind], values: Mapping[str, Any], source: str = "") -> Kind:
    """Options of one kind by name (dashes and underscores both work).

    Args:
        source: where they are from, for messages; empty for the command line.

    Raises:
        InputError: unknown name (with a suggestion), or a value that the option cannot have.
    """
    known = list(kind.__dataclass_fields__)
    found: dict[str, Any] = {}
    for raw, value in values.items():
        name = str(raw).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(
                f"{source}: unknown option {shown(raw)}{hint} known: {', '.join(known)}"
            )
        if name in found:
            raise InputError(f"{source}: {name} appears twice, with a dash and an underscore")
        found[name] = value
    try:
        return kind(**found)
    except OptionError as e:
        raise InputError(f"{source}: {e.name}{e.wrong}" if source else str(e)) from e


def given_options(
    kind: type[Options], values: Mapping[str, Any], source: str = ""
) -> dict[str, Any]:
    """Only the options that were given, once the parts which they name are found.

    A run folder may name a part of a plug-in that is not installed here: only what is given anew
    is looked up.

    Raises:
        InputError: as `options_from`, or there is no part of a name.
    """
    options = options_from(kind, values, source)
    names = {str(k).replace("-", "_") for k in values}
    for f in dataclasses.fields(options):
        value = getattr(options, f.name)
        if f.name in names and f.metadata["room"] and value != f.default:
            registry = importlib.import_module(f"isingcut.{f.metadata['room']}").registry
            for part in value.split(","):
                registry.get(part.strip())
    return {name: getattr(options, name) for name in kind.__dataclass_fields__ if name in names}


def from_yaml(kind: type[Options], path: Path) -> dict[str, Any]:
    """The options that a YAML file gives.

    Raises:
        InputError: the file cannot be read, an option that has to be typed, or as `given_options`.
    """
    content = load_yaml(path)
    for f in dataclasses.fields(kind):
        if f.metadata["typed"] and {f.name, f.name.replace("_", "-")} & content.keys():
            raise InputError(
                f"{path}: {f.name} is not read from a file; type {flag(f)} on each command line"
            )
    return given_options(kind, content, str(path))


def flag(f: dataclasses.Field[Any]) -> str:
    """What the command line calls an option."""
    return f.name.upper() if f.metadata["argument"] else "--" + f.name.replace("_", "-")


def shown(value: Any) -> str:
    """A value as messages show it: short, whatever it is."""
    if isinstance(value, int) and abs(value) >= 10**60:
        # Python refuses to write numbers of many thousand digits.
        return "a number of more than 60 digits"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
