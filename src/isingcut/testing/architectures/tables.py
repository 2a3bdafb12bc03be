"""Reports as Markdown, and as parts of a page between marks."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

from isingcut.testing.architectures.conformance import Report

OUTCOMES = ("passed", "refused", "failed", "not built")


def table(reports: Sequence[Report]) -> str:
    """The reports as a Markdown table."""
    lines = [
        "| family | outcome | blocks | states cut | largest difference | sublayer gate | remarks |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in reports:
        gate = ("yes" if r.sublayer else "no: block gate only") if r.outcome == "passed" else ""
        size = f"{r.difference:.1e}" if r.states else ""
        lines.append(
            f"| {r.name} | {r.outcome} | {r.kinds} | {r.states or ''} | {size} | {gate} "
            f"| {_cell(r.reason or '; '.join(filter(None, (r.rows, _text_only(r)))))} |"
        )
    return "\n".join(lines)


def outcomes(reports: Sequence[Report]) -> str:
    """Every architecture once: those that passed as a list, the others with their reasons."""
    version = importlib.metadata.version("transformers")
    by_outcome = {o: [r for r in reports if r.outcome == o] for o in OUTCOMES}
    passed = by_outcome["passed"]
    lines = [
        f"transformers {version}: {len(reports)} decoders, "
        + ", ".join(f"{len(found)} {outcome}" for outcome, found in by_outcome.items())
        + ".",
        "",
        "Passed: " + ", ".join(sorted(r.name for r in passed)) + ".",
        "",
        *_on_text_only(passed),
        "| architecture | outcome | reason |",
        "|---|---|---|",
    ]
    for outcome in OUTCOMES[1:]:
        found = sorted(by_outcome[outcome], key=lambda r: r.name)
        lines += [f"| {r.name} | {outcome} | {_cell(r.reason)} |" for r in found]
    return "\n".join(lines)


def _on_text_only(passed: Sequence[Report]) -> list[str]:
    found = sorted(f"{r.name}: {_cell(r.unseen)}" for r in passed if r.unseen)
    if not found:
        return []
    head = f"Of these, {len(found)} take images and were proven on text only:"
    return [head, "", *(f"- {line}" for line in found), ""]


def _text_only(report: Report) -> str:
    return f"proven on text only: {report.unseen}" if report.unseen else ""


def _cell(words: str) -> str:
    return words.replace("|", "/").replace("\n", " ").replace("<", "&lt;")


def replace_part(path: Path, mark: str, text: str) -> None:
    """Put ``text`` between ``<!-- mark -->`` and ``<!-- end of mark -->`` of a page."""
    start, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(start)
    _, closed, after = rest.partition(end)
    assert closed, f"{path} has no part between {start} and {end}"
    path.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")
