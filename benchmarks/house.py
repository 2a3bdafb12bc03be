"""Count what a reader of this repository has to read, with ceilings.

    python benchmarks/house.py

It counts the tokens and code lines of the package, of `benchmarks` and `studies`, and of `tests`;
the lines that the package ships beside Python; the words of the documentation; and the files that
name all options of a run at once, instead of those that they read. A token is one of Python's,
without comments, docstrings and layout. A code line has at least one token.
`[tool.isingcut.ceiling]` in pyproject.toml sets the maximum of each; above one of these the command
fails. A change that deletes code lowers the ceiling; a change that raises it explains in
CHANGELOG.md what the tokens buy.

It also fails on a packed line, which assigns independent values: ``a, b = 1, f(x)``.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "package": ("src/isingcut",),
    "studies": ("benchmarks", "studies"),
    "tests": ("tests",),
}
LAYOUT = {
    *(
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
    ),
    *(tokenize.ENCODING, tokenize.ENDMARKER),
}
SHIPPED = {".j2", ".html", ".css", ".js", ".yaml", ".svg", ".md", ".txt"}


def count_code(source: str) -> tuple[int, int]:
    """Return the numbers of code lines and of tokens of a Python file."""
    prose = set[int]()
    for node in ast.walk(ast.parse(source)):
        match node:
            # A string that is a statement is a docstring, also below an attribute.
            case ast.Expr(ast.Constant(str()), lineno=first, end_lineno=int(last)):
                prose.update(range(first, last + 1))
    lines = set[int]()
    tokens = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT and token.start[0] not in prose:
            tokens += 1
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines), tokens


def find_packed(source: str) -> Iterator[int]:
    """Yield the lines that assign several values, none of which reads a name assigned there."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Assign([ast.Tuple(targets)], ast.Tuple(values)):
                given = {
                    n.id
                    for part in targets
                    for n in ast.walk(part)
                    if isinstance(n, ast.Name)
                }
                read = {
                    n.id
                    for part in values
                    for n in ast.walk(part)
                    if isinstance(n, ast.Name)
                }
                if not given & read:
                    yield node.lineno


def count_words() -> int:
    """Return the number of words of the documentation, without the README."""
    pages = [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")]
    texts = (
        page.read_text(encoding="utf-8") for page in pages if page.name != "README.md"
    )
    return sum(len(re.findall(r"\S+", text)) for text in texts)


def main() -> None:
    """Print the counts; exit 1 if one is above its ceiling or a line is packed."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    ceiling = settings["tool"]["isingcut"]["ceiling"]
    found = dict[str, int]()
    wrong = list[str]()
    for name, folders in FOLDERS.items():
        rooms: Counter[str] = Counter()
        lines = 0
        for folder in folders:
            for file in (ROOT / folder).rglob("*.py"):
                source = file.read_text(encoding="utf-8")
                of_file, tokens = count_code(source)
                parts = file.relative_to(ROOT / folder).parts[:-1][:1]
                rooms["/".join((folder, *parts))] += tokens
                lines += of_file
                wrong += [
                    f"{file.relative_to(ROOT)}:{at} is packed"
                    for at in find_packed(source)
                ]
        for room, tokens in rooms.most_common():
            print(f"{tokens:7} tokens  {room}")
        print(f"code_lines_{name}: {lines}")
        found[f"code_tokens_{name}"] = rooms.total()
    files = [file for file in (ROOT / "src").rglob("*") if file.suffix in SHIPPED]
    texts = (file.read_text(encoding="utf-8") for file in files)
    found["shipped_lines_beside_python"] = sum(len(text.splitlines()) for text in texts)
    found["words_docs"] = count_words()
    package = (ROOT / "src").rglob("*.py")
    named = [re.search(r"\bRunConfig\b", file.read_text("utf-8")) for file in package]
    found["places_for_config"] = sum(map(bool, named))
    for name, count in found.items():
        print(f"{name}: {count}")
        if count > ceiling[name]:
            wrong.append(f"{name} is {count}, the ceiling is {ceiling[name]}")
    if wrong:
        sys.exit(
            f"{'; '.join(wrong)}: delete as many, or raise it in pyproject.toml and say why"
        )


if __name__ == "__main__":
    main()
