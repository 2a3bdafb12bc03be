"""The command line of the kit, and its reports as Markdown: parts of a page between marks."""

from __future__ import annotations

import argparse
import importlib.metadata
import multiprocessing
import os
import resource
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from isingcut.errors import InputError
from isingcut.testing.tiny import FAMILIES
from sweep.conformance import Report, check_entry, check_family, entries

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))

from make_patches import replace_part

# Of one architecture.
_SECONDS, _BYTES = 600, 4 * 10**9
OUTCOMES = ("passed", "refused", "failed", "not built")


def main(arguments: Sequence[str]) -> int:
    """Check families, or everything that transformers has; 1 when one failed, 2 for a bad name."""
    parser = argparse.ArgumentParser(prog="python -m sweep")
    parser.add_argument("names", nargs="*", help="families; with --all model types")
    parser.add_argument("--all", action="store_true", help="every decoder of transformers")
    parser.add_argument("--states", type=int, help="states cut: 6 of a family, else 2")
    parser.add_argument("--docs", type=Path, help="also write the outcomes to this Markdown file")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args(list(arguments))
    with tempfile.TemporaryDirectory() as room:
        try:
            tasks = _tasks(options, Path(room))
        except InputError as error:
            print(error)
            return 2
        reports = _run(tasks, options.workers)
    shown = outcomes if options.all else table
    print(shown(reports))
    if options.docs:
        replace_part(options.docs, "outcomes" if options.all else "table", shown(reports))
    for outcome in OUTCOMES:
        count = sum(r.outcome == outcome for r in reports)
        print(f"architectures_{outcome.replace(' ', '_')}: {count}")
    return int(any(r.outcome == "failed" for r in reports))


def _run(tasks: Mapping[str, Callable[[], Report]], workers: int) -> list[Report]:
    """The reports, in order, each made in a process of its own: forked, so that torch and
    transformers are imported once."""
    reports: list[Report] = []
    context = multiprocessing.get_context("fork")
    with context.Pool(workers, _limit, maxtasksperchild=1) as pool:
        pending = {name: pool.apply_async(task) for name, task in tasks.items()}
        for name, result in pending.items():
            try:
                report = result.get(_SECONDS)
            except multiprocessing.TimeoutError:
                reason = f"no result within {_SECONDS} s: too slow, or its process died"
                report = Report(name, "failed", reason=reason)
            reports.append(report)
            print(
                f"[{len(reports)}/{len(tasks)}] {name}: {report.outcome}"
                f" {report.reason or report.kinds}",
                flush=True,
            )
    return reports


def _limit() -> None:
    """Let a process that takes much more memory than it has now fail, and print nothing."""
    if sys.platform.startswith("linux"):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        most = pages * resource.getpagesize() + _BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    torch.set_num_threads(1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)


def _tasks(options: argparse.Namespace, room: Path) -> dict[str, Callable[[], Report]]:
    """What to check, by name; checkpoints go to folders of their own in ``room``."""
    names, states = options.names, options.states
    if options.all:
        return {
            e.name: partial(check_entry, e, room / str(i), states=states or 2)
            for i, e in enumerate(entries(names))
        }
    unknown = sorted(set(names) - set(FAMILIES))
    if unknown:
        raise InputError(f"no family {unknown[0]!r}; there are {', '.join(FAMILIES)}")
    return {
        name: partial(check_family, name, room / name, states=states or 6)
        for name in names or FAMILIES
    }


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
