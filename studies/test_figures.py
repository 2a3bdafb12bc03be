"""Figures in the documentation match the studies' results and the defaults in the code."""

import importlib
import re
from pathlib import Path

from isingcut.options.config import RunConfig
from isingcut.options.heal import HealConfig
from studies.runner import run

ROOT = Path(__file__).resolve().parents[1]
TABLE = re.compile(r"<!-- figures: ([\w ]+) -->\n((?:\|.*\n)+)")


def decimals(text):
    return re.findall(r"\d+\.\d+", text)


def test_marked_tables_are_of_the_results(capsys):
    shown = {}
    for name in ("choice", "frontier", "healing", "published", "quality"):
        module = importlib.import_module(f"studies.{name}.study")
        run(getattr(module, name.capitalize()), ["--summary"])
        shown[name] = [*map(float, decimals(capsys.readouterr().out))]
    wrong = []
    tables = 0
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for names, table in TABLE.findall(page.read_text()):
            known = [y for name in names.split() for y in shown[name]]
            tables = tables + 1
            for figure in decimals(table):
                half = 0.5 * 10.0 ** -len(figure.partition(".")[2]) + 1e-9
                if not any(abs(float(figure) - y) <= half for y in known):
                    wrong.append(f"{page.relative_to(ROOT)}: {figure}")
    assert not wrong
    assert tables > 10


def test_defaults_are_of_the_code():
    tokens = RunConfig().patch_tokens
    assert HealConfig().patch_tokens == tokens
    for page, words in {
        "choosing": f"fit it on {tokens:,} tokens",
        "healing": f"up to `--patch-tokens`, {tokens:,} by default",
        "experiments/patch": f"A run takes {tokens:,} tokens",
    }.items():
        assert words in " ".join((ROOT / "docs" / f"{page}.md").read_text().split())
