"""Run a study: `python -m studies NAME`. Its class is named like its folder, capitalised."""

import importlib
import sys

from studies.runner import run

if __name__ == "__main__":
    known = "quality, choice, healing, clients, frontier, published"
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in known.split(", "):
        sys.exit(f"usage: python -m studies NAME [--help], NAME one of {known}")
    run(
        getattr(importlib.import_module(f"studies.{name}.study"), name.capitalize()),
        sys.argv[2:],
    )
