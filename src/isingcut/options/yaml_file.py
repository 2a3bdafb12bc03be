"""YAML as a file of options needs it: PyYAML's safe loader with the plain values of YAML 1.2.

``true`` and ``false`` are the booleans (``on``, ``off``, ``yes`` and ``no`` are words), ``2e-5`` is
a number. Aliases and names that appear twice are refused: the first can make gigabytes of a few
lines, and of the last one would win unseen.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from isingcut.errors import InputError
from isingcut.files.inputs import read_text

_LARGEST = 64 * 1024
_PLAIN = {
    "null": r"|~|null|Null|NULL",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?([0-9]*\.[0-9]+|[0-9]+\.|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?",
}
"""How a plain value of each type is written; what is none of them is a word."""


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
        ValueError: not YAML, an alias, a tag, a name twice, or nested too deeply.
    """
    # Not at the top: `--help` needs none of it.
    import yaml

    try:
        return yaml.load(text, _loader())
    except yaml.YAMLError as e:
        raise ValueError(" ".join(str(e).split())) from e
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


@functools.cache
def _loader() -> Any:
    import yaml

    safe: Any = yaml.SafeLoader

    class Loader(safe):  # type: ignore[misc]
        yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012
        yaml_constructors = {  # noqa: RUF012
            tag: make
            for tag, make in safe.yaml_constructors.items()
            if tag is None or tag.rpartition(":")[2] in (*_PLAIN, "str", "seq", "map")
        }

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError(f"aliases (*{self.peek_event().anchor}) are not read here")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [str(key.value) for key, _ in node.value]
            if twice := [name for name in names if names.count(name) > 1]:
                raise yaml.YAMLError(f"{twice[0]!r} appears twice")
            return super().construct_mapping(node, deep)

    for tag, pattern in _PLAIN.items():
        whole = re.compile(f"(?:{pattern})$")
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", whole, None)
    return Loader
