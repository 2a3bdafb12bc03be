"""Count what a reader of this repository has to read, with ceilings.

    python benchmarks/house.py

It counts the tokens of the package, of `benchmarks` and `studies`, and of `tests`;
the lines that the package ships beside Python; the words of the documentation; and the files that
name all options of a run at once, instead of those that they read. A token is one of Python's,
without comments, docstrings and layout.
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
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "package": ("src/isingcut",),
    "studies": ("benchmarks", "studies"),
    "tests": ("tests",),
}
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
SHIPPED = {".j2", ".html", ".css", ".js", ".yaml", ".svg", ".md", ".txt"}


def count_tokens(source: str) -> int:
    """Return the number of tokens of a Python file."""
    prose = set[int]()
    for node in ast.walk(ast.parse(source)):
        match node:
            # A string that is a statement is a docstring, also below an attribute.
            case ast.Expr(ast.Constant(str()), lineno=first, end_lineno=int(last)):
                prose.update(range(first, last + 1))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return sum(t.type not in LAYOUT and t.start[0] not in prose for t in tokens)


def find_packed(source: str) -> Iterator[int]:
    """Yield the lines that assign several values, none of which reads a name assigned there."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Assign([ast.Tuple(targets)], ast.Tuple(values)):
                if not find_names(targets) & find_names(values):
                    yield node.lineno


def find_names(parts: list[ast.expr]) -> set[str]:
    """Return the names in some expressions."""
    return {n.id for p in parts for n in ast.walk(p) if isinstance(n, ast.Name)}


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
        tokens = 0
        for file in (f for folder in folders for f in (ROOT / folder).rglob("*.py")):
            source = file.read_text(encoding="utf-8")
            tokens += count_tokens(source)
            place = file.relative_to(ROOT)
            wrong += [f"{place}:{at} is packed" for at in find_packed(source)]
        found[f"code_tokens_{name}"] = tokens
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
