"""How an option is declared, and the one place where a value of it is checked.

A field of `RunConfig` or `HealConfig` says all there is to know of its option: default, help,
type, bounds, spelling. The command line, YAML files and Python are checked against that alone,
each before a model, a text or a run folder is looked at.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
import numbers
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from isingcut.errors import InputError
from isingcut.inputs import user_path

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")


def option(
    default: Any,
    stage: str,
    help_: str,
    *,
    low: float = -math.inf,
    above: float = -math.inf,
    high: float = math.inf,
    choices: tuple[str, ...] | Callable[[], tuple[str, ...]] = (),
    reads: Callable[[str], Any] | None = None,
    room: str = "",
    several: bool = False,
    apart: str = "",
    path: bool = False,
    typed: bool = False,
    argument: bool = False,
    metavar: str | None = None,
    volatile: bool = False,
) -> Any:
    """A field that is an option.

    Args:
        default: of the field's type; None where it is decided later.
        stage: the first stage of a run that it can change.
        help_: one line.
        low, above, high: the smallest number, the number that it must exceed, the largest.
        choices: the only words, or a function that gives them where they take time to find.
        reads: reads the text, and raises `InputError` where it cannot.
        room: the sub-package whose registry has its names; ``several`` of them, by commas.
        apart: another option; no block may be in the lists of both.
        path: a path, or something else that never begins with ``~``.
        typed: given anew on every command line or in every call; never read from a file.
        argument: the command line takes it by position.
        metavar: its value's name in the command line's help.
        volatile: changes no result, only how it is come by.
    """
    metadata = {k: v for k, v in locals().items() if k not in ("default", "help_")}
    return dataclasses.field(default=default, metadata={**metadata, "help": help_})


def options_from(kind: type[Options], values: Mapping[str, Any], source: str) -> Options:
    """Options of one kind by name (dashes and underscores both work), each of its type.

    Raises:
        InputError: unknown name (with a suggestion) or a value of the wrong type.
    """
    known = {f.name: f for f in dataclasses.fields(kind)}
    found = {}
    for raw, value in values.items():
        name = str(raw).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, list(known), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(
                f"{source}: unknown option {shown(raw)}{hint} known: {', '.join(known)}"
            )
        if name in found:
            raise InputError(f"{source}: {name} appears twice, with a dash and an underscore")
        found[name] = _of_type(known[name], value, f"{source}: {name}")
    return kind(**found)


def from_yaml(kind: type[Options], path: Path) -> dict[str, Any]:
    """The options that a YAML file gives, checked.

    Raises:
        InputError: the file cannot be read, an unknown name, a value out of bounds, or an option
            that has to be typed.
    """
    from isingcut.options.yaml_file import load_yaml

    content = load_yaml(path)
    names = {str(k).replace("-", "_") for k in content}
    for f in dataclasses.fields(kind):
        if f.metadata["typed"] and f.name in names:
            raise InputError(
                f"{path}: {f.name} is not read from a file; type {flag(f)} on each command line"
            )
    given = options_from(kind, content, str(path))
    return check_given(kind, {name: getattr(given, name) for name in names}, str(path))


def check_given(
    kind: type[DataclassInstance], values: Mapping[str, Any], source: str = ""
) -> dict[str, Any]:
    """Some options of one kind as they were given, checked in every way, names of parts too.

    Args:
        source: the file that they are from; empty for the command line.

    Returns:
        The values in their types, with ``~`` for the home folder replaced.
    """
    known = {f.name: f for f in dataclasses.fields(kind)}
    found = {}
    for name, value in values.items():
        f = known[name]
        found[name] = checked(f, value, f"{source}: {name}" if source else flag(f))
        if f.metadata["room"] and found[name] != f.default:
            part_of(f, found[name])
    check_apart(kind, found)
    return found


def check_all(config: Options) -> Options:
    """Options with every value checked but the names of parts, which a run folder may have from
    a plug-in that is not installed here.

    Raises:
        InputError: one line that names the option, what was expected and what came.
    """
    fields = dataclasses.fields(config)
    found = {f.name: checked(f, getattr(config, f.name), flag(f)) for f in fields}
    check_apart(type(config), found)
    return dataclasses.replace(config, **found)


def checked(f: dataclasses.Field[Any], value: Any, told: str) -> Any:
    """A value of an option in its type, within its bounds and spelled as it should be.

    Args:
        told: what messages call the option.
    """
    value = _of_type(f, value, told)
    if value == f.default or value is None:
        return value
    rules = f.metadata
    if isinstance(value, str):
        return _checked_text(f, value, told)
    if isinstance(value, bool):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{told} must be a finite number, got {value}")
    if value < rules["low"]:
        raise InputError(f"{told} must be at least {rules['low']}, got {shown(value)}")
    if value <= rules["above"]:
        raise InputError(f"{told} must be above {rules['above']}, got {shown(value)}")
    if value > rules["high"]:
        raise InputError(f"{told} must be at most {rules['high']}, got {shown(value)}")
    return value


def _checked_text(f: dataclasses.Field[Any], value: str, told: str) -> str:
    rules = f.metadata
    choices = rules["choices"]() if callable(rules["choices"]) else rules["choices"]
    if choices and value not in choices:
        raise InputError(f"{told} must be one of {', '.join(choices)}; got {shown(value)}")
    if not value.strip() and f.default:
        raise InputError(f"{told} is empty; leave it out, or give a value")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise InputError(f"{told} must be UTF-8 text, got {shown(value)}") from e
    if "\0" in value:
        raise InputError(f"{told} holds a NUL byte: {shown(value)}")
    if rules["path"] and value.startswith("~"):
        return str(user_path(value))
    if rules["reads"] is not None and value:
        try:
            rules["reads"](value)
        except InputError as e:
            raise InputError(f"{told}: {e}") from e
    return value


def part_of(f: dataclasses.Field[Any], value: str) -> None:
    """Look up the parts that an option names.

    Raises:
        UnknownNameError: there is none of a name.
    """
    registry = importlib.import_module(f"isingcut.{f.metadata['room']}").registry
    names = value.split(",") if f.metadata["several"] else [value]
    for name in names:
        registry.get(name.strip())


def check_apart(kind: type[DataclassInstance], values: Mapping[str, Any]) -> None:
    """Refuse a block that is in two lists which may not share one."""
    for f in dataclasses.fields(kind):
        other = f.metadata["apart"]
        one, two = values.get(f.name), values.get(other)
        if other and one and two:
            both = sorted({*f.metadata["reads"](one)} & {*f.metadata["reads"](two)})
            if both:
                raise InputError(
                    f"{flag(f)} and --{other} both name block {both[0]}; name it in one of them"
                )


def flag(f: dataclasses.Field[Any]) -> str:
    """What the command line calls an option."""
    return f.name.upper() if f.metadata["argument"] else "--" + f.name.replace("_", "-")


def _of_type(f: dataclasses.Field[Any], value: Any, told: str) -> Any:
    """``value`` as the declared type, or an error: never a guess."""
    declared = str(f.type)
    base = declared.removesuffix(" | None")
    if value is None and base != declared:
        return None
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if base == "bool" and isinstance(value, bool):
        return value
    if base == "int" and number and isinstance(value, numbers.Integral):
        return int(value)
    if base == "float" and number:
        try:
            return float(value)
        except OverflowError as e:
            raise InputError(f"{told} must be a finite number, got {shown(value)}") from e
    if base == "str" and (number or isinstance(value, str | Path)):
        return str(value) if not number or abs(value) < 1e60 else shown(value)
    if base == "str" and isinstance(value, list | tuple):
        return ",".join(str(v) for v in value)
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    raise InputError(f"{told} must be {words[base]}, got {shown(value)}")


def shown(value: Any) -> str:
    """A value as messages show it: short, whatever it is."""
    if isinstance(value, int) and abs(value) >= 10**60:
        # Python refuses to write numbers of many thousand digits.
        return "a number of more than 60 digits"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
