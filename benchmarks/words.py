"""Check the words of the README and the longest sentence of the documentation against limits.

    python benchmarks/words.py

Only prose counts: no code blocks, tables, headings, HTML, generated parts, pictures or link
targets. A sentence ends at a full stop, or with its paragraph or list item. The pages of
experiments are left out. Too long sentences are printed; above any limit the command fails.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"words_readme": 750, "mean_sentence_readme": 16, "longest_sentence_docs": 35}
GENERATED = re.compile(r"<!-- (\w+) -->.*?<!-- end of \1 -->|<!--.*?-->", re.DOTALL)
FENCED = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)
ITEM = re.compile(r" *(?:[-*+]|\d+\.) +")
NO_PROSE = re.compile(r" *(?:\||#+ |<|:::|!!!|$)")


def paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs and list items of a Markdown page, each in one line."""
    lines = list[str]()
    indent = 0
    after_prose = False
    for line in FENCED.sub("", GENERATED.sub("", text)).splitlines():
        item = ITEM.match(line)
        if item and (indent or item.end() < 6):
            indent = item.end()
        elif line[:1].strip() and not after_prose:
            indent = 0
        code = not after_prose and not item and line.startswith(" " * (indent + 4))
        if item or code or NO_PROSE.match(line):
            yield " ".join(lines)
            lines = []
            after_prose = bool(item)
        if item or not (code or NO_PROSE.match(line)):
            lines.append(line[item.end() if item else 0 :].strip())
            after_prose = True
    yield " ".join(lines)


def sentences(text: str) -> Iterator[list[str]]:
    """Yield the sentences of a Markdown page as lists of words."""
    for paragraph in paragraphs(text):
        plain = re.sub(
            r"`[^`]*`", lambda code: re.sub(r"[.!?]", "", code[0]), paragraph
        )
        plain = re.sub(
            r"(!?)\[([^]]*)\]\([^)]*\)", lambda x: "" if x[1] else x[2], plain
        )
        for sentence in re.split(r"""(?<=[.!?])["')*_]*\s""", plain):
            if words := [word for word in sentence.split() if re.search(r"\w", word)]:
                yield words


def main() -> None:
    """Print the three figures; exit 1 if one is above its limit."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    found = [
        (page, s)
        for page in pages
        if "experiments" not in str(page.relative_to(ROOT))
        for s in sentences(page.read_text(encoding="utf-8"))
    ]
    readme = [len(sentence) for page, sentence in found if page.name == "README.md"]
    for page, sentence in found:
        if len(sentence) > LIMITS["longest_sentence_docs"]:
            print(
                f"{page.relative_to(ROOT)}: {len(sentence)} words: {' '.join(sentence)}"
            )
    figures = {
        "words_readme": sum(readme),
        "mean_sentence_readme": round(sum(readme) / len(readme), 1),
        "longest_sentence_docs": max(len(sentence) for _, sentence in found),
    }
    for name, figure in figures.items():
        print(f"{name}: {figure}")
    if above := [name for name, figure in figures.items() if figure > LIMITS[name]]:
        sys.exit(
            f"above the limits {LIMITS}: {', '.join(above)}; shorten the sentences named"
        )


if __name__ == "__main__":
    main()
