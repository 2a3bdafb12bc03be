"""Run examples/tour.py as a notebook: examples/tour.ipynb and the page docs/tour.md.

python examples/make_tour.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jupytext
from nbclient import NotebookClient

HERE = Path(__file__).parent


def execute(source: Path) -> Any:
    """The notebook of a percent-format script, with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = jupytext.read(source)
    notebook.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    NotebookClient(notebook, timeout=1800, kernel_name="python3").execute()
    for cell in notebook.cells:
        # When a cell ran, and on which machine, would make every run a change.
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]}
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    return notebook


def page(notebook: Any) -> str:
    """The notebook as Markdown: text, code, and what the code printed."""
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        shown = "".join(
            output.get("text") or output.get("data", {}).get("text/plain", "")
            for output in cell.outputs
        )
        if shown.strip():
            parts.append(f"```text\n{shown.rstrip()}\n```")
    note = "*This page is `examples/tour.ipynb`, run by `examples/make_tour.py`.*"
    parts.insert(1, note)
    return "\n\n".join(parts) + "\n"


def main(folder: Path | None = None) -> None:
    notebook = execute(HERE / "tour.py")
    jupytext.write(notebook, (folder or HERE) / "tour.ipynb", fmt="ipynb")
    target = (folder or HERE.parent / "docs") / "tour.md"
    target.write_text(page(notebook), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
