"""Write what the sweep found into architectures.md, one line for all families of one outcome.

PYTHONPATH=tests:benchmarks python -m sweep     # all: also writes tests/sweep/results.jsonl
python docs/make_architectures.py
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("architectures.md")
RESULTS = Path(__file__).parents[1] / "tests" / "sweep" / "results.jsonl"
_NAMED = "cuts exactly at given blocks, but is not measured: "
_SHORTER = (
    (r"^\w+ cannot be cut exactly: ", ""),
    (r"[:;] (such blocks can be cut|isingcut|it depends|expected one of) ?.*", ""),
    (r"^\w+ (is an encoder-decoder|does not run on text alone).*", r"\1"),
    (
        r"^block 0 \(\w+\) passes on a stream of shape .*",
        "its stream is not (batch, tokens, width)",
    ),
    (r"^the layers of \w+ have no two sublayers.*", "no layer has two sublayers"),
    (r"^\w+ is not its sublayers one after the other \((.*?)\).*", r"\1"),
    (
        r"^transformers has no text-generating decoder.*",
        "transformers has no decoder of it",
    ),
)


def _family(name: str) -> str:
    return name.removesuffix(" (image-text)").removesuffix("_text")


def _line(report: dict[str, Any]) -> tuple[str, str]:
    """Return the outcome of one architecture and what a user needs to know about it."""
    reason = report.get("reason", "")
    if report["outcome"] == "passed":
        return "cut exactly", re.sub(r", because [^;]*", "", report.get("rows", ""))
    if report["outcome"] == "not built":
        return "not known", "transformers cannot build a small one here"
    outcome = (
        "only blocks that you name" if reason.startswith(_NAMED) else report["outcome"]
    )
    return outcome, _shorten(reason.removeprefix(_NAMED))


def _shorten(reason: str) -> str:
    for pattern, shorter in _SHORTER:
        reason = re.sub(pattern, shorter, reason)
    return reason


def _names(reports: Iterable[dict[str, Any]]) -> str:
    return ", ".join(sorted({_family(r["name"]) for r in reports}))


def made(version: str, reports: list[dict[str, Any]]) -> str:
    """Return the generated part of the page."""
    of_family = defaultdict(list)
    for report in reports:
        of_family[_family(report["name"])].append(report)
    lines = defaultdict(list)
    for family, of_one in sorted(of_family.items()):
        for report in of_one if len({_line(r) for r in of_one}) > 1 else of_one[:1]:
            lines[_line(report)].append(
                family if report is of_one[0] else report["name"]
            )
    plain = lines.pop(("cut exactly", ""), [])
    rows = [f"| {', '.join(lines[key])} | {' | '.join(key)} |" for key in sorted(lines)]
    text_only = _names(r for r in reports if "text_only" in r)
    counts = ", ".join(
        f"{sum(r['outcome'] == outcome for r in reports)} {outcome}"
        for outcome in ("passed", "refused", "failed", "not built")
    )
    passed = [r for r in reports if r["outcome"] == "passed"]
    whole = [r for r in passed if "unsplit" in r]
    unsplit = [
        f"- {reason}: {_names(r for r in whole if _shorten(r['unsplit']) == reason)}."
        for reason in sorted({_shorten(r["unsplit"]) for r in whole})
    ]
    mtp = []
    for form in ("numbered on", "named"):
        of_form = [r for r in reports if r.get("mtp") == form]
        drafts = _names(r for r in of_form if "drafts" in r)
        kept = _names(r for r in of_form if "drafts" not in r)
        mtp.append(f"| {form} | {drafts} | {kept} |")
    return "\n".join(
        [
            f"transformers {version}: {len(reports)} decoders, {counts}.",
            "",
            f"Cut exactly, any blocks: {', '.join(plain)}.",
            "",
            "| families | outcome | notes |",
            "|---|---|---|",
            *rows,
            "",
            f"Take images, and were compared on text only: {text_only}.",
            "",
            f"With `--units sublayers` {len(passed) - len(whole)} of the {len(passed)} are cut "
            "exactly without an attention (or other mixer) and an MLP. The others are refused:",
            "",
            *unsplit,
            "",
            "| MTP layers | transformers drafts with them | kept, not run |",
            "|---|---|---|",
            *mtp,
        ]
    )


def page() -> str:
    """Return the whole page."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines()
    first, *reports = map(json.loads, lines)
    start, end = "<!-- results -->", "<!-- end of results -->"
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(start)
    return f"{before}{start}\n{made(first['transformers'], reports)}\n{end}{rest.partition(end)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
