"""How the package is laid out: entries, modules, lines, imports inside functions, contracts.

    python benchmarks/house.py [--src src]

An import inside a function is counted where it is one of the package's own modules: the verbs of
the command line keep `--help` fast with them, and the stages keep solving and reporting free of
torch. The import contracts are those of pyproject.toml, checked by import-linter.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

PACKAGE = "isingcut"
LONG = 300


def inner_imports(tree: ast.AST) -> int:
    """Statements that import a module of the package from inside a function."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    # Of functions in functions once.
    inner = {
        node
        for function in ast.walk(tree)
        if isinstance(function, functions)
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom)
    }
    return sum((node.module or "").partition(".")[0] == PACKAGE for node in inner)


def contracts_broken(repository: Path) -> int:
    """How many of the import contracts do not hold."""
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter], cwd=repository, capture_output=True, text=True, check=False)
    line = next(x for x in done.stdout.splitlines() if x.startswith("Contracts: "))
    return int(line.split(",")[1].split()[0])


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--src", type=Path, default=Path(__file__).parent.parent / "src")
    options = parser.parse_args()
    root = options.src / PACKAGE
    files = {p: p.read_text(encoding="utf-8") for p in sorted(root.rglob("*.py"))}
    lines = {p: text.count("\n") for p, text in files.items()}
    inner = {p: inner_imports(ast.parse(text)) for p, text in files.items()}
    rooms: Counter[str] = Counter()
    for path, count in inner.items():
        parts = path.relative_to(root).parts
        rooms[parts[0] if len(parts) > 1 else "."] += count
    print("room         modules   lines  imports inside functions")
    for room in sorted(rooms):
        own = [
            p
            for p in files
            if (p.relative_to(root).parts[0] == room) or (room == "." and p.parent == root)
        ]
        print(f"{room:12} {len(own):7} {sum(lines[p] for p in own):7} {rooms[room]:8}")
    for path in sorted((p for p in lines if lines[p] > LONG), key=lines.__getitem__, reverse=True):
        print(f"over {LONG} lines: {path.relative_to(root)} ({lines[path]})")
    entries = [p for p in root.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()]
    print(f"top_level_entries: {len(entries)}")
    print(f"modules: {len(files)}")
    print(f"source_lines: {sum(lines.values())}")
    print(f"largest_file_lines: {max(lines.values())}")
    print(f"function_level_imports: {sum(inner.values())}")
    print(f"contracts_broken: {contracts_broken(options.src.parent)}")


if __name__ == "__main__":
    main()
