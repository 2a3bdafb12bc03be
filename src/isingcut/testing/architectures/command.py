"""The command line of the kit."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path

from isingcut.errors import InputError
from isingcut.testing.architectures.conformance import Report, check_entry, check_family
from isingcut.testing.architectures.entries import entries
from isingcut.testing.architectures.tables import OUTCOMES, outcomes, replace_part, table
from isingcut.testing.architectures.workers import Died, run_apart
from isingcut.testing.configurations import FAMILIES

_TURNS = 7


def states_of(name: str, turn: int) -> int:
    """How many states of an architecture are cut: 8 where it is its turn, as each has it once
    in `_TURNS` numbers, else 2."""
    return 8 if (zlib.crc32(name.encode()) - turn) % _TURNS == 0 else 2


def main(arguments: Sequence[str]) -> int:
    """Check families, or everything that transformers has; 1 when one failed, 2 for a bad name."""
    parser = argparse.ArgumentParser(prog="python -m isingcut.testing architectures")
    parser.add_argument("names", nargs="*", help="families; with --all model types")
    parser.add_argument("--all", action="store_true", help="every decoder of transformers")
    parser.add_argument("--states", type=int, help="states cut: 6 of a family, else 2 or 8")
    parser.add_argument(
        "--turn",
        type=int,
        default=date.today().toordinal(),
        help=f"whose turn it is for 8 states, of {_TURNS} parts (default: by the day)",
    )
    parser.add_argument("--docs", type=Path, help="also write the outcomes to this Markdown file")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="memory of a process")
    parser.add_argument("--seconds", type=float, default=600.0, help="time for one architecture")
    options = parser.parse_args(list(arguments))
    with tempfile.TemporaryDirectory() as room:
        try:
            tasks = _tasks(options, Path(room))
        except InputError as error:
            print(error)
            return 2
        reports = _run(tasks, options)
    shown = outcomes if options.all else table
    print(shown(reports))
    if options.docs:
        replace_part(options.docs, "outcomes" if options.all else "table", shown(reports))
    for outcome in OUTCOMES:
        count = sum(r.outcome == outcome for r in reports)
        print(f"architectures_{outcome.replace(' ', '_')}: {count}")
    return int(any(r.outcome == "failed" for r in reports))


def _run(tasks: Mapping[str, Callable[[], Report]], options: argparse.Namespace) -> list[Report]:
    reports: list[Report] = []
    began = time.monotonic()
    limits = {"gigabytes": options.gigabytes, "seconds": options.seconds}
    for name, found in run_apart(tasks, workers=options.workers, **limits):
        report = Report(name, "failed", reason=found.reason) if isinstance(found, Died) else found
        reports.append(report)
        spent = time.monotonic() - began
        left = spent / len(reports) * (len(tasks) - len(reports))
        print(
            f"[{len(reports)}/{len(tasks)}, {left:.0f} s left] {name}: {report.outcome}"
            f" {report.reason or report.kinds}",
            flush=True,
        )
    order = list(tasks)
    return sorted(reports, key=lambda r: order.index(r.name))


def _tasks(options: argparse.Namespace, room: Path) -> dict[str, Callable[[], Report]]:
    """What to check, by name; checkpoints go to folders of their own in ``room``."""
    names, states = options.names, options.states
    if options.all:
        found = entries(names)
        return {
            e.name: partial(
                check_entry, e, room / str(i), states=states or states_of(e.name, options.turn)
            )
            for i, e in enumerate(found)
        }
    unknown = sorted(set(names) - set(FAMILIES))
    if unknown:
        raise InputError(f"no family {unknown[0]!r}; there are {', '.join(FAMILIES)}")
    return {
        name: partial(check_family, name, room / name, states=states or 6)
        for name in names or FAMILIES
    }
