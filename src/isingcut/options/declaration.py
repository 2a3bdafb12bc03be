"""Declare options, and check every value that is given for one.

A field of `RunConfig` or `HealConfig` holds the type, bounds or choices, default and help of its
option. Values from the command line, YAML files and Python are all checked against it, before a
model, a text or a run folder is opened.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, get_args, get_type_hints

from isingcut.errors import InputError
from isingcut.files.inputs import read_text
from isingcut.options.spellings import Spelling

_WRONG = {
    "int_type": "must be a whole number, got {shown}",
    "float_type": "must be a number, got {shown}",
    "bool_type": "must be true or false, got {shown}",
    "string_type": "must be text, got {shown}",
    "literal_error": "must be one of {words}; got {shown}",
    "finite_number": "must be a finite number, got {shown}",
    "greater_than": "must be above {gt:.0f}, got {shown}",
    "greater_than_equal": "must be at least {ge:.0f}, got {shown}",
    "less_than_equal": "must be at most {le:.0f}, got {shown}",
    "value_error": "{error}",
}
"""Messages for the error types of pydantic."""
_FURTHER = {
    "room": "",
    "bare": "",
    "metavar": None,
    "typed": False,
    "argument": False,
    "filled": False,
}


def option(default: Any, help_: str, stage: str = "heal", **further: Any) -> Any:
    """Declare a dataclass field that is an option.

    Args:
        default: value of the field's type; None if the value is decided later.
        help_: help text, one line.
        stage: first stage of a run that the option can change.
        further: ``room``: sub-package with the registry of allowed names; a value may list
            several, comma-separated. ``typed``: must be given on each command line or call,
            never in a file. ``argument``: a positional argument. ``metavar``: the name of the
            value in the help. ``bare``: the value of the option when it is typed without one.
            ``filled``: a value that is given may not be empty.
    """
    metadata = {**_FURTHER, **further, "stage": stage, "help": help_}
    return dataclasses.field(default=default, metadata=metadata)


# Pydantic is imported when the first value is checked, so its own annotations cannot be used here.
@dataclass(frozen=True)
class Then:
    """A function that converts a value of the right type, or rejects it with a ValueError."""

    function: Callable[[Any], Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic import AfterValidator

        return AfterValidator(self.function).__get_pydantic_core_schema__(
            source, handler
        )


class OptionError(InputError):
    """An option has an invalid value.

    Args:
        f: field of the option.
        wrong: description of the fault, to follow the option's name.
    """

    def __init__(self, f: dataclasses.Field[Any], wrong: str) -> None:
        self.name = f.name
        self.wrong = wrong
        super().__init__(flag(f) + self.wrong)


@dataclass(frozen=True)
class Options:
    """Base of the option classes; every value is checked on construction.

    Raises:
        InputError: one line with the option, the expected value and the given value.
    """

    if TYPE_CHECKING:
        __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some options changed."""
        return dataclasses.replace(self, **changes)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value is not f.default:
                object.__setattr__(self, f.name, _check_value(type(self), f, value))


Kind = TypeVar("Kind", bound=Options)


# `Any`, because mypy treats a dataclass type as unhashable.
@functools.cache
def _types(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def plain_type(kind: Any, name: str) -> type:
    """Return the plain type of an option: str, int, float or bool."""
    annotation = _types(kind)[name]
    while inner := get_args(annotation):
        annotation = inner[0]
    # Literal[...] and `Spelling` are parsed from text.
    plain = isinstance(annotation, type) and not issubclass(annotation, str)
    return annotation if plain else str


@functools.cache
def _validator(kind: Any, name: str) -> Callable[[Any], Any]:
    # Imported here because `--help` does not need it.
    from pydantic import ConfigDict, TypeAdapter

    strict = ConfigDict(strict=True, allow_inf_nan=False)
    return TypeAdapter(_types(kind)[name], config=strict).validate_python


def _check_value(kind: Any, f: dataclasses.Field[Any], value: Any) -> Any:
    from pydantic import ValidationError

    try:
        return _validator(kind, f.name)(
            _plain(value, plain_type(kind, f.name), f.default)
        )
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        context = {**first.get("ctx", {}), "shown": shorten(first["input"])}
        # Pydantic lists choices as 'a', 'b' or 'c'.
        words = str(context.get("expected")).replace("'", "").replace(" or ", ", ")
        wrong = _WRONG[first["type"]].format(**context, words=words)
        raise OptionError(f, f" {wrong}") from None
    except ValueError as e:
        raise OptionError(f, f" {e}") from None
    except InputError as e:
        # Of a `Spelling`; its message is a sentence of its own.
        raise OptionError(f, f": {e}") from None


def _plain(value: Any, kind: type, default: Any) -> Any:
    """Convert arrays and numbers of NumPy and PyTorch to Python's, and paths and lists to text."""
    value = getattr(value, "tolist", lambda: value)()
    if kind is str:
        return _text(value, default)
    # Python does not convert integers of more than 308 digits to floats.
    return (
        math.inf
        if kind is float and isinstance(value, int) and value >= 10**308
        else value
    )


def _text(value: Any, default: str) -> Any:
    if isinstance(value, dict) and isinstance(default, Section):
        value = json.dumps(
            value,
            ensure_ascii=False,
            default=lambda v: getattr(v, "tolist", v.__str__)(),
        )
    if isinstance(value, list | tuple | range | set):
        value = ",".join(map(str, value))
    if isinstance(value, bool) or not isinstance(value, str | Path | int | float):
        return value
    text = shorten(value) if isinstance(value, int) else str(value)
    if default and not text.strip():
        raise ValueError("is empty; give a value, or remove the option")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"must be UTF-8 text, got {shorten(text)}") from e
    if "\0" in text:
        raise ValueError(f"must not contain a NUL byte, got {shorten(text)}")
    return text


def options_from(kind: type[Kind], values: Mapping[str, Any], source: str = "") -> Kind:
    """Build an options object from a mapping of names (with dashes or underscores) to values.

    Args:
        source: origin of the values, for messages; empty for the command line.

    Raises:
        InputError: an unknown name (with a suggestion), a repeated name, or an invalid value.
    """
    known = list(kind.__dataclass_fields__)
    found: dict[str, Any] = {}
    for raw, value in values.items():
        name = str(raw).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(
                f"{source}: unknown option {shorten(raw)}{hint} known: {', '.join(known)}"
            )
        if name in found:
            raise InputError(
                f"{source}: {name} appears twice, with a dash and an underscore"
            )
        found[name] = value
    try:
        return kind(**found)
    except OptionError as e:
        raise InputError(f"{source}: {e.name}{e.wrong}" if source else str(e)) from e


def read_options(
    kind: type[Options], values: Mapping[str, Any], source: str = ""
) -> dict[str, Any]:
    """Check the given options, look up the parts that they name, and return only these options.

    A run folder may name a part of a plug-in that is not installed here, so only the parts of the
    options given now are looked up.

    Raises:
        InputError: as for `options_from`, or no registered part has a given name.
    """
    options = options_from(kind, values, source)
    names = {str(k).replace("-", "_") for k in values}
    for f in dataclasses.fields(options):
        value = getattr(options, f.name)
        # A file may repeat the default, as run.json does.
        stated = f.name in names and not (source and value == f.default)
        if stated and f.metadata["filled"] and not value.strip(" ,"):
            called = f"{source}: {f.name}" if source else flag(f)
            raise InputError(f"{called} is empty; give a value, or remove the option")
        if f.name in names and f.metadata["room"] and value != f.default:
            registry = importlib.import_module(
                f"isingcut.{f.metadata['room']}"
            ).registry
            for part in map(str.strip, value.split(",")):
                registry.check(part)
    return {
        name: getattr(options, name)
        for name in kind.__dataclass_fields__
        if name in names
    }


def from_yaml(kind: type[Options], path: Path) -> dict[str, Any]:
    """Read options from a YAML file.

    Raises:
        InputError: not a regular UTF-8 file of at most 64 KiB, not valid YAML, or not a mapping; an
            option must be typed; or as for `read_options`.
    """
    text = read_text(path, "the options file", limit=_LARGEST_YAML)
    try:
        content = parse_yaml(text)
    except ValueError as e:
        raise InputError(f"{path} is not a readable YAML file: {e}") from e
    if not isinstance(content, dict):
        raise InputError(
            f"{path} must have 'option: value' lines, got {type(content).__name__}"
        )
    for f in dataclasses.fields(kind):
        if f.metadata["typed"] and {f.name, f.name.replace("_", "-")} & content.keys():
            raise InputError(
                f"{path}: {f.name} cannot be set in a file; type {flag(f)} on each command line"
            )
    return read_options(kind, content, str(path))


def flag(f: dataclasses.Field[Any]) -> str:
    """Return the name of an option on the command line."""
    return f.name.upper() if f.metadata["argument"] else "--" + f.name.replace("_", "-")


def read_number(text: str) -> Any:
    """Return the number that a YAML file or a typed option spells; other text as it is."""
    for kind in (int, float):
        if re.fullmatch(_PLAIN_VALUES[kind.__name__], text):
            with contextlib.suppress(
                ValueError
            ):  # Python does not convert thousands of digits.
                return kind(text)
    return text


def shorten(value: Any) -> str:
    """Return any value as short text, for messages."""
    if isinstance(value, int) and abs(value) >= 10**60:
        # Python does not convert numbers with many thousand digits to text.
        return "a number of more than 60 digits"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# YAML

_LARGEST_YAML = 64 * 1024
_PLAIN_VALUES = {
    "null": r"|~|null|Null|NULL",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?([0-9]*\.[0-9]+|[0-9]+\.|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?",
}
"""Pattern of a plain YAML value of each type; any other value is text."""


def parse_yaml(text: str) -> Any:
    """Parse one YAML document.

    Raises:
        ValueError: not valid YAML, an alias, a tag, a repeated name, or nested too deeply.
    """
    # Imported here because `--help` does not need it.
    import yaml

    try:
        return yaml.load(text, _loader())
    except yaml.YAMLError as e:
        raise ValueError(" ".join(str(e).split())) from e
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class Section(Spelling):
    """Options by name: a section of the `--config` file, or ``"{max_steps: 4}"`` typed.

    Attributes:
        values: options by name; they are checked when they are used.
    """

    def __init__(self, text: str = "") -> None:
        self.values = parse_yaml(text) if text else {}
        if not isinstance(self.values, dict):
            words = "must be a section of the --config file, or typed as {name: value}"
            raise ValueError(f"{words}; got {shorten(text)}")


@functools.cache
def _loader() -> Any:
    import yaml

    safe: Any = yaml.SafeLoader

    class Loader(safe):  # type: ignore[misc]
        yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012
        yaml_constructors = {  # noqa: RUF012
            tag: make
            for tag, make in safe.yaml_constructors.items()
            if tag is None
            or tag.rpartition(":")[2] in (*_PLAIN_VALUES, "str", "seq", "map")
        }

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError(
                    f"aliases (*{self.peek_event().anchor}) are not supported"
                )
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = Counter(str(key.value) for key, _ in node.value)
            if twice := [name for name, count in names.items() if count > 1]:
                raise yaml.YAMLError(f"{twice[0]!r} appears twice")
            return super().construct_mapping(node, deep)

    for tag, pattern in _PLAIN_VALUES.items():
        whole = re.compile(f"(?:{pattern})$")
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", whole, None)
    return Loader
