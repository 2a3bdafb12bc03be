"""Packaged templates with their values filled in.

Values are escaped in HTML and in Markdown, where `...` in them stays code; generated text in
Markdown goes into code fences, and control characters are spelled out in both.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
from collections.abc import Iterable
from functools import cache
from importlib.resources import files as resources
from typing import Any

import jinja2
from markupsafe import Markup, escape

from isingcut.console.printing import printable
from isingcut.files.provenance import __version__
from isingcut.report import rows, words


def render(template: str, **values: Any) -> str:
    """A packaged template with its values filled in."""
    return printable(_environment().get_template(template).render(**values))


def render_page(template: str, **values: Any) -> str:
    """An HTML template, with styles and the script, the only one that may run."""
    script = _packaged("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return render(
        template,
        **values,
        css=Markup(_packaged("report.css")),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
        version=__version__,
    )


@cache
def _packaged(name: str) -> str:
    return resources("isingcut.report").joinpath("templates", name).read_text(encoding="utf-8")


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("isingcut.report"),
        undefined=jinja2.StrictUndefined,
        autoescape=lambda name: name is None or name.endswith(".html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_in_markdown,
    )
    filters = (code, cell, cells, fenced, words.listed, words.numbers)
    environment.filters |= {function.__name__: function for function in filters}
    environment.globals |= {**vars(rows), **vars(words)}
    return environment


def code(text: str) -> Markup:
    """Escaped text in which `...` becomes code; elsewhere signs are minuses and units stay put."""
    parts = str(escape(text)).split("`")
    plain = [re.sub(r"(?<![\w.-])-(?=\d)", "−", p) for p in parts[::2]]
    plain = [re.sub(r"(?<=\d) (?=%)|(?<=\d) (?=±)|(?<=±) ", "\u00a0", p) for p in plain]
    marked = [f"<code>{p}</code>" for p in parts[1::2]]
    return Markup("".join(a + b for a, b in itertools.zip_longest(plain, marked, fillvalue="")))


@jinja2.pass_eval_context
def _in_markdown(context: Any, value: Any) -> Any:
    """A value of a Markdown template, escaped; what HTML escapes by itself is left alone."""
    return value if context.autoescape or isinstance(value, Markup) else markdown(str(value))


# Inside a word an underscore means nothing, and a bracket only where an address follows.
_MEANS = re.compile(r"[\\*~]|(?<!\w)_|_(?!\w)|\](?=\()|&(?=#?\w+;)")


def markdown(text: str) -> Markup:
    """Text in which `...` becomes code and all else stands for itself, on one line."""
    parts = re.split("`+", re.sub(r"\s*\n\s*", " ", text))
    parts[::2] = [_MEANS.sub(r"\\\g<0>", p).replace("<", "&lt;") for p in parts[::2]]
    parts[1::2] = [f"`{p}`" if p else "" for p in parts[1::2]]
    return Markup("".join(parts))


def cell(text: str) -> Markup:
    """`markdown` for a table, whose cells a bar would part."""
    return Markup(str(markdown(str(text))).replace("|", r"\|"))


def cells(row: Iterable[str]) -> Markup:
    """The cells of a table's row, with bars between them."""
    return Markup(" | ".join(map(cell, row)))


def fenced(text: str) -> Markup:
    """``text`` as a code block whose fence no run of backticks in it can close."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}text\n{text}\n{fence}")
