"""The text of reports: sentences, maps of states, and packaged templates filled with values.

Values are escaped in HTML and in Markdown, except that `...` in them still marks code. In Markdown,
generated text is put into code fences. Control characters are escaped in both.
"""

import base64
import hashlib
import re
import shlex
from collections.abc import Iterable, Sequence
from functools import cache, partial
from importlib.util import find_spec
from itertools import zip_longest
from typing import Any

import jinja2
from jinja2.environment import TemplateModule
from markupsafe import Markup, escape

from isingcut.console.printing import printable
from isingcut.data.text_files import is_read_again
from isingcut.files import cuts, states
from isingcut.files.provenance import __version__
from isingcut.options.text import TEXT
from isingcut.report import plots, rows


def numbers(blocks: Sequence[int]) -> str:
    """Return block numbers as words: "2, 5 and 9", or "3 to 6" for three or more in a row."""
    if len(blocks) > 2 and [*blocks] == [*range(blocks[0], blocks[-1] + 1)]:
        return f"{blocks[0]} to {blocks[-1]}"
    *most, last = map(str, blocks)
    return f"{', '.join(most)} and {last}" if most else last


def join_blocks(removed: Sequence[int]) -> str:
    """Return block numbers separated by spaces."""
    return " ".join(map(str, removed))


def sentence(name: str, *about: Any) -> str:
    """Render a macro of `templates/words.j2` with its arguments, as one line."""
    return " ".join(paragraphs(name, *about))


def paragraphs(name: str, *about: Any) -> list[str]:
    """Render a macro as a list of paragraphs, which blank lines of the template separate."""
    text = re.split(r"\n\s*\n", str(getattr(_sentences(), name)(*about)))
    joined = [" ".join(words.replace(_NOTHING, "").split()) for words in text]
    return list(filter(None, joined))


def table(name: str, *about: Any, columns: int = 0) -> list[tuple[str, ...]]:
    """Render a macro as table rows: one per line, ``::`` between cells, backticks around code.

    Args:
        columns: number of columns; a further ``::`` is text of the last one. 0: any number.
    """
    text = str(getattr(_sentences(), name)(*about))
    lines = text.replace(_NOTHING, "").split("\n")
    split = [line.split("::", columns - 1) for line in lines if line.strip()]
    return [tuple(cell.strip() for cell in row) for row in split]


search_warnings = partial(paragraphs, "search_warnings")
ranking_warnings = partial(paragraphs, "ranking_warnings")
overlap_warnings = partial(paragraphs, "overlap_warnings")
repeat_warnings = partial(paragraphs, "repeat_warnings")
patch_warnings = partial(paragraphs, "patch_warnings")
healing_warnings = partial(paragraphs, "healing_warnings")


def _environment(**more: Any) -> jinja2.Environment:
    """Make an environment whose templates may call the functions named here, and no others."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("isingcut.report"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **more,
    )
    functions = (
        cell,
        cells,
        correlation_text,
        fence_text,
        is_read_again,
        join_blocks,
        known_rows,
        numbers,
        paragraphs,
        plots.meter,
        policy_hash,
        rows.benchmark_rows,
        rows.flip_rows,
        rows.healing_rows,
        rows.healing_start,
        rows.judge,
        rows.kl_of,
        rows.plus_minus,
        sentence,
        shlex.quote,
        state_map,
        table,
        was_tuned,
    )
    named = {function.__name__: function for function in functions}
    environment.filters |= {**named, "kl": lambda row: rows.kl_of(row).text()}
    environment.globals |= {
        **named,
        "CUT_RANKING": rows.CUT_RANKING,
        "version": __version__,
        "TEXT": TEXT,
        "find_spec": find_spec,
    }
    return environment


# What an empty value prints, so that its line is not a blank one, which would end a paragraph.
_NOTHING = "\0"


@cache
def _sentences() -> TemplateModule:
    environment = _environment(
        finalize=lambda value: re.sub(r"\s*\n\s*", " ", str(value)) or _NOTHING
    )
    return environment.get_template("words.j2").module


def known_rows(
    ranking: states.CandidatesFile | None, removed: Sequence[int]
) -> list[tuple[states.MeasuredState, int]]:
    """Return the first ranking row of a state and its number of tokens, or an empty list."""
    if ranking is None:
        return []
    known = [(row, ranking.tokens) for row in ranking.candidates]
    known += [(row, ranking.random_tokens) for row in ranking.random]
    return [(row, n) for row, n in known if row.removed == list(removed)][:1]


def correlation_text(ranks: states.Correlations) -> str:
    """Format a rank correlation with its 95 % interval."""
    low = ranks.spearman_low
    high = ranks.spearman_high
    if ranks.spearman is None:
        return "undefined" if ranks.n else "not measured"
    interval = "" if None in (low, high) else f" ({low:.2f} to {high:.2f})"
    return f"{ranks.spearman:.2f}{interval}"


def was_tuned(patch: cuts.PatchRecord) -> bool:
    """Whether tuning changed layers next to the cuts."""
    held_out = patch.tuning.held_out_kl if patch.tuning is not None else []
    return bool(held_out) and min(held_out) < held_out[0]


def state_map(removed: Sequence[int], n: int) -> str:
    """Return a state with one character per block: # is kept, · is removed."""
    return "".join("·" if i in removed else "#" for i in range(n))


# Pages --------------------------------------------------------------------------------


def render(template: str, **values: Any) -> str:
    """Render a packaged template of Markdown or HTML with the given values."""
    pages = _pages(template.endswith(".html.j2"))
    return printable(pages.get_template(template).render(**values).strip() + "\n")


@cache
def _pages(html: bool) -> jinja2.Environment:
    """Make the environment of one form, in which each value is escaped unless it is `Markup`."""
    escaped = code if html else markdown
    return _environment(
        autoescape=True,
        keep_trailing_newline=True,
        finalize=lambda value: escaped(value) if type(value) is str else value,
    )


def policy_hash(script: str) -> str:
    """Return the source by which a content security policy allows one script."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def code(text: str) -> Markup:
    """Escape text for HTML: `...` becomes code; elsewhere set minus signs and no-break spaces."""
    parts = str(escape(text)).split("`")
    plain = [re.sub(r"(?<![\w.-])-(?=\d)", "−", p) for p in parts[::2]]
    plain = [re.sub(r"(?<=\d) (?=[%±])|(?<=±) ", "\u00a0", p) for p in plain]
    marked = [f"<code>{p}</code>" for p in parts[1::2]]
    return Markup("".join(a + b for a, b in zip_longest(plain, marked, fillvalue="")))


# Characters with a meaning in Markdown: an underscore only outside words, a bracket only if an
# address follows.
_MEANS = re.compile(r"[\\*~]|(?<!\w)_|_(?!\w)|\](?=\()|&(?=#?\w+;)")


def markdown(text: str) -> Markup:
    """Escape text for Markdown, on one line; only `...` keeps its meaning, as code."""
    parts = re.split("`+", re.sub(r"\s*\n\s*", " ", text))
    parts[::2] = [_MEANS.sub(r"\\\g<0>", p).replace("<", "&lt;") for p in parts[::2]]
    parts[1::2] = [f"`{p}`" if p else "" for p in parts[1::2]]
    return Markup("".join(parts))


def cell(text: str) -> Markup:
    """Escape text for a cell of a Markdown table, as `markdown`, and bars too."""
    return Markup(str(markdown(str(text))).replace("|", r"\|"))


def cells(row: Iterable[str]) -> Markup:
    """Join the escaped cells of a Markdown table row with bars."""
    return Markup(" | ".join(map(cell, row)))


def fence_text(text: str) -> Markup:
    """Return ``text`` as a code block, with a fence longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}text\n{text}\n{fence}")
