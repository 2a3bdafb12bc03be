"""Count the code lines of the package, its measurements and its tests, by folder, with ceilings.

    python benchmarks/house.py

A code line holds code: it is no blank line, comment or docstring. `[tool.isingcut.ceiling]` in
pyproject.toml sets the maximum of the package, of `benchmarks` and `studies` together, and of
`tests`; above one of these the command fails. A change that deletes code lowers the ceiling; a
change that raises it explains in CHANGELOG.md what the lines are for.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
import tomllib
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "isingcut": ("src/isingcut",),
    "benchmarks": ("benchmarks", "studies"),
    "tests": ("tests",),
}
LAYOUT = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    *(tokenize.ENCODING, tokenize.ENDMARKER),
}


def code_lines(source: str) -> int:
    """Return the number of lines of a Python file that hold code."""
    lines = set[int]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        # A string that is a statement is a docstring, also below an attribute.
        match node:
            case ast.Expr(ast.Constant(str()), lineno=first, end_lineno=int(last)):
                lines.difference_update(range(first, last + 1))
    return len(lines)


def main() -> None:
    """Print the lines of each folder and the sums; exit 1 if a sum is above its ceiling."""
    ceiling = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    ceiling, above = ceiling["tool"]["isingcut"]["ceiling"], []
    for name, folders in FOLDERS.items():
        rooms: Counter[str] = Counter()
        for folder in folders:
            for file in (ROOT / folder).rglob("*.py"):
                parts = file.relative_to(ROOT / folder).parts[:-1][:1]
                rooms["/".join((folder, *parts))] += code_lines(file.read_text(encoding="utf-8"))
        for room, count in rooms.most_common():
            print(f"{count:7}  {room}")
        print(f"code_lines_{name}: {rooms.total()}")
        if rooms.total() > ceiling[name]:
            above.append(f"{rooms.total()} code lines of {name}, the ceiling is {ceiling[name]}")
    if above:
        sys.exit(f"{'; '.join(above)}: delete as many, or raise it in pyproject.toml and say why")


if __name__ == "__main__":
    main()
