"""Write options.md, the tables of all options, from the declarations of the options.

python docs/make_options.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from isingcut.options.config import RunConfig
from isingcut.options.declaration import Options, flag
from isingcut.options.heal import HealConfig

HEAD = """# Options

In a YAML file and in Python, leave out the leading dashes and write `_` instead of `-`:
`--rank-samples 8`, `rank_samples: 8`, `rank_samples=8`. A list may be a list there: `--keep 0,29`,
`keep: [0, 29]`, `keep=[0, 29]`. Each verb has the options that apply to it
(`isingcut VERB --help`).
"""
_TYPES = {
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "string": "text",
}


def _values(schema: dict[str, Any]) -> str:
    (schema, *_) = schema.get("anyOf", [schema])
    if "enum" in schema:
        return ", ".join(schema["enum"])
    words = _TYPES[schema["type"]]
    if "exclusiveMinimum" in schema:
        words += (
            f" above {schema['exclusiveMinimum']:,.0f}, to {schema['maximum']:,.0f}"
        )
    elif "minimum" in schema:
        words += f", {schema['minimum']:,.0f} to {schema['maximum']:,.0f}"
    return words


def table(kind: type[Options]) -> str:
    """Return the table of the options of one class: name, values, default, help."""
    schemas = TypeAdapter(kind).json_schema()["properties"]
    rows = ["| option | values | default | |", "|---|---|---|---|"]
    for f in kind.__dataclass_fields__.values():
        default = "" if f.default is None else str(f.default)
        default = "false" if f.default is False else default
        cells = [f"`{flag(f)}`", _values(schemas[f.name]), default, f.metadata["help"]]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def page() -> str:
    """Return the whole page."""
    return f"{HEAD}\n## Of a run\n\n{table(RunConfig)}\n## Of healing\n\n{table(HealConfig)}"


if __name__ == "__main__":
    Path(__file__).with_name("options.md").write_text(page(), encoding="utf-8")
