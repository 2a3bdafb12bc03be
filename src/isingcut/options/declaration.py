"""Declare options, and check every value that is given for one.

A field of an options class holds the type, bounds or choices, default and help of its
option. Values from the command line, YAML files and Python are all checked against it, before a
model, a text or a run folder is opened.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, get_args, get_type_hints

from isingcut.errors import InputError, nearest, suggest
from isingcut.files.inputs import find_surrogate, read_text
from isingcut.options.parsed import Parsed

_WRONG = {
    "int_type": "must be a whole number, got {shown}",
    "float_type": "must be a number, got {shown}",
    "bool_type": "must be true or false, got {shown}",
    "string_type": "must be text, got {shown}",
    "literal_error": "must be one of {words}; got {shown}{near}",
    "finite_number": "must be a finite number, got {shown}",
    "greater_than": "must be above {gt:.0f}, got {shown}",
    "greater_than_equal": "must be at least {ge:.0f}, got {shown}",
    "less_than_equal": "must be at most {le:.0f}, got {shown}",
    "value_error": "{error}",
}
"""Messages for the error types of pydantic."""
_FURTHER = {"metavar": None, "typed": False, "argument": False, "stages": ""}


def option(default: Any, help_: str, **further: Any) -> Any:
    """Declare a dataclass field that is an option.

    Args:
        default: value of the field's type; None if the value is decided later.
        help_: help text, one line.
        further: ``typed``: must be given on each command line or call, never in a file.
            ``argument``: a positional argument. ``metavar``: the name of the value in the help.
            ``stages``: the stages of a run that read it, separated by spaces.
    """
    metadata = {**_FURTHER, **further, "help": help_}
    return dataclasses.field(default=default, metadata=metadata)


class OptionError(InputError):
    """An option is unknown or has an invalid value.

    Args:
        f: field of the option; None if it is unknown.
        wrong: description of the fault, to follow the option's name.
    """

    def __init__(self, f: dataclasses.Field[Any] | None, wrong: str) -> None:
        super().__init__((flag(f) if f else "") + wrong)
        self.in_file = (f.name if f else "") + wrong


@dataclass(frozen=True, init=False)
class Options:
    """Base of the option classes; every value is checked on construction.

    Raises:
        InputError: one line with the option, the expected value and the given value; or no option
            has that name, with a suggestion.
    """

    if TYPE_CHECKING:
        __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def __init__(self, **values: Any) -> None:
        known = type(self).__dataclass_fields__
        for name, f in known.items():
            object.__setattr__(self, name, f.default)
        for name, value in values.items():
            if name not in known:
                hint = suggest(name, known)
                raise OptionError(None, f"unknown option {shorten(name)}{hint}")
            if value is not known[name].default:
                value = _check_value(type(self), known[name], value)
            object.__setattr__(self, name, value)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some options changed."""
        return type(self)(**{**vars(self), **changes})


Kind = TypeVar("Kind", bound=Options)


def options_of(kind: Any, stage: str) -> list[str]:
    """List the options of a class, or of an object of it, that a stage reads."""
    return [
        f.name
        for f in dataclasses.fields(kind)
        if stage in f.metadata["stages"].split()
    ]


class Only:
    """A view of an object in which only some attributes can be read, also by its own properties.

    A stage gets its options as one, so that it cannot depend on an option that it does not declare.

    Args:
        of: the object.
        names: the attributes that can be read.
        reader: what reads them, for the message.
        values: further attributes.

    Raises:
        LookupError: another attribute was read.
    """

    def __init__(
        self, of: Any, names: Collection[str], reader: str, **values: Any
    ) -> None:
        self._of = of
        self._names = names
        self._reader = reader
        self._values = values

    def __getattr__(self, name: str) -> Any:
        if name in self._values:
            return self._values[name]
        if name in self._names:
            return getattr(self._of, name)
        of_class = getattr(type(self._of), name, None)
        if isinstance(of_class, property | FunctionType):
            return of_class.__get__(self)
        raise LookupError(f"{self._reader} reads {name}, which it does not declare")


# `Any`, because mypy treats a dataclass type as unhashable.
@functools.cache
def _types(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def plain_type(kind: Any, name: str) -> type:
    """Return the plain type of an option: int, float, bool, or str for all that is parsed."""
    annotation = _types(kind)[name]
    while inner := get_args(annotation):
        annotation = inner[0]
    return annotation if annotation in (int, float, bool) else str


@functools.cache
def _validator(kind: Any, name: str) -> Callable[[Any], Any]:
    # Imported here because `--help` does not need it.
    from pydantic import ConfigDict, TypeAdapter

    strict = ConfigDict(strict=True, allow_inf_nan=False)
    return TypeAdapter(_types(kind)[name], config=strict).validate_python


def _check_value(kind: Any, f: dataclasses.Field[Any], value: Any) -> Any:
    from pydantic import ValidationError

    # Arrays and numbers of NumPy and PyTorch.
    value = getattr(value, "tolist", lambda: value)()
    plain = plain_type(kind, f.name)
    try:
        if plain is str:
            value = _text(value)
        elif plain is not bool and isinstance(value, str) and value:
            value = parse_yaml(value)
        return _validator(kind, f.name)(value)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        context = {**first.get("ctx", {}), "shown": shorten(first["input"])}
        # Pydantic lists choices as 'a', 'b' or 'c'.
        words = str(context.get("expected")).replace("'", "").replace(" or ", ", ")
        near = nearest(context["shown"], words.split(", "))
        wrong = _WRONG[first["type"]].format(**context, words=words, near=near)
        raise OptionError(f, f" {wrong}") from None
    except (InputError, ValueError) as e:
        # Of a text that is parsed.
        raise OptionError(f, f": {e}") from None


def _text(value: Any) -> Any:
    """Convert paths, numbers, lists and sections to text."""
    if isinstance(value, dict):
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
    if find_surrogate(text):
        raise InputError(f"must be UTF-8 text, got {shorten(text)}")
    return text


def options_from(kind: type[Kind], values: Mapping[str, Any], source: str = "") -> Kind:
    """Build an options object from a mapping of names (with dashes or underscores) to values.

    Args:
        source: origin of the values, for messages; empty for the command line.

    Raises:
        InputError: an unknown name (with a suggestion), a repeated name, or an invalid value.
    """
    given: dict[str, Any] = {}
    for raw, value in values.items():
        name = str(raw).replace("-", "_")
        if name in given:
            raise InputError(
                f"{source}: {name} appears twice, with a dash and an underscore"
            )
        given[name] = value
    try:
        return kind(**given)
    except OptionError as e:
        raise InputError(f"{source}: {e.in_file}" if source else str(e)) from e


def read_options(
    kind: type[Options], values: Mapping[str, Any], source: str = ""
) -> dict[str, Any]:
    """Check the given options, and return only these.

    Raises:
        InputError: as for `options_from`, or an option is given without a value.
    """
    options = options_from(kind, values, source)
    names = {str(k).replace("-", "_") for k in values}
    given = {}
    for f in dataclasses.fields(kind):
        if f.name not in names:
            continue
        value = given[f.name] = getattr(options, f.name)
        # A file may repeat the default, as run.json does.
        repeated = source and value == f.default
        if isinstance(value, str) and not value.strip(" ,") and not repeated:
            called = f"{source}: {f.name}" if source else flag(f)
            raise InputError(f"{called} is empty; give a value, or remove the option")
    return given


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


class Section(Parsed):
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
