"""YAML as a file of options needs it: plain values of YAML 1.2, bounded, with nothing to expand.

``true`` and ``false`` are the booleans (``on``, ``off``, ``yes`` and ``no`` are words), ``2e-5`` is
a number. Aliases, tags and names that appear twice are refused: the first can make gigabytes of a
few lines, and of the last one would win unseen.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from isingcut.errors import InputError
from isingcut.files.inputs import read_text

_LARGEST = 64 * 1024
_DEEPEST = 20
_STRING = "tag:yaml.org,2002:str"
_TAGS = {_STRING, "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"}
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file of options.

    Raises:
        InputError: no plain UTF-8 file of at most 64 KiB, not readable as YAML, or no mapping.
    """
    text = read_text(path, "the options file", limit=_LARGEST)
    try:
        content = parse_yaml(text)
    except ValueError as e:
        raise InputError(f"{path} is not a readable YAML file: {e}") from e
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold 'option: value' lines, found {type(content).__name__}")
    return content


def parse_yaml(text: str) -> Any:
    """The value of one YAML document.

    Raises:
        ValueError: not YAML; an alias, a tag, a name twice; or nested deeper than 20.
    """
    # Not at the top: `--help` needs none of it.
    import yaml

    try:
        depth = 0
        for event in yaml.parse(text, yaml.BaseLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(
                    f"line {_line(event)}: aliases (*{event.anchor}) are not read here"
                )
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise ValueError(f"line {_line(event)}: nested deeper than {_DEEPEST} levels")
        return _value(yaml.compose(text, yaml.BaseLoader))
    except yaml.YAMLError as e:
        raise ValueError(" ".join(str(e).split())) from e


def _value(node: Any) -> Any:
    if node is None:
        return None
    if node.tag not in _TAGS:
        raise ValueError(f"line {_line(node)}: tags ({node.tag}) are not read here")
    if node.id == "scalar":
        return _scalar(node)
    if node.id == "sequence":
        return [_value(item) for item in node.value]
    found: dict[Any, Any] = {}
    for key, value in node.value:
        if key.id != "scalar":
            raise ValueError(f"line {_line(key)}: a name must be a word")
        name = _scalar(key)
        if name in found:
            raise ValueError(f"line {_line(key)}: {key.value!r} appears twice")
        found[name] = _value(value)
    return found


def _scalar(node: Any) -> Any:
    text: str = node.value
    if node.style is not None:
        return text
    if text in _WORDS:
        return _WORDS[text]
    if not _NUMBER.fullmatch(text):
        return text
    if len(text) > 100:
        raise ValueError(f"line {_line(node)}: a number of {len(text)} digits")
    return int(text) if text.lstrip("+-").isdigit() else float(text)


def _line(place: Any) -> int:
    return int(place.start_mark.line) + 1
