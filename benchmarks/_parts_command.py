"""What the command lines of the benchmarks that work in parts have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from isingcut.errors import IsingcutError
from isingcut.files.writing import read_json

TASK_TOKENS = {
    "arc_easy": 114,
    "arc_challenge": 130,
    "hellaswag": 312,
    "piqa": 71,
    "winogrande": 45,
    "lambada": 82,
    "mmlu_0shot": 129,
    "boolq": 320,
    "openbookqa": 70,
    "gsm8k": 1200,
}
"""Tokens a question costs, all choices together; for estimates only."""
HERE = Path(__file__).resolve().parent


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows a benchmark's own words as they are."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_working(parser: argparse.ArgumentParser, name: str, results: str | None = None) -> None:
    """Options for where parts and results are, which parts to make, and what else to do.

    Args:
        name: of the benchmark; its work folder is called so.
        results: what is said of the results file where it is not ``results/NAME.json``.
    """
    add = parser.add_argument
    add("--data", default=str(HERE.parents[1] / "shared" / "data"))
    add("--work", default=f"{name}-work", help="folder of the parts")
    default = None if results else str(HERE / "results" / f"{name}.json")
    add("--results", default=default, help=results or "results file to write or read")
    add("--only", action="append", default=[], metavar="PREFIX", help="parts to run")
    add("--minutes", type=float, default=600.0, help="start no part expected to end later")
    add("--threads", type=int, default=0, help="0 leaves it to torch")
    add("--quiet", action="store_true", help="no bars within a part")
    add("--plan", action="store_true", help="show what is left and stop")
    add("--collect", action="store_true", help="write the results file from finished parts")
    add("--summary", action="store_true", help="print the results file")


def results_of(options: argparse.Namespace, name: str) -> list[Path]:
    """The results files that are meant: the one given, the model's; to be shown, all there are."""
    both = [HERE / "results" / f"{name}{m}.json" for m in ("", "_coder")]
    if options.results:
        return [Path(options.results)]
    if options.summary and not options.collect:
        return [path for path in both if path.exists()]
    return [both[options.model == "coder"]]


def obey(
    options: argparse.Namespace,
    results: Sequence[Path],
    kind: str,
    show: Callable[[dict[str, Any]], None],
    opened: Callable[[], Any],
    collect: Callable[[Any, Path], dict[str, Any]],
    work: Callable[[Any], None],
) -> None:
    """Print the results files, or collect the first of them from finished parts, or make parts.

    Args:
        kind: of a results file.
        show: prints what is in one.
        opened: opens the benchmark's work folder.
        collect: makes and writes the content of a results file.
        work: shows what is left and, without ``--plan``, does it.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        if options.collect:
            show(collect(opened(), results[0]))
        elif options.summary:
            for path in results:
                show(read_json(path, kind))
        else:
            work(opened())
    except IsingcutError as error:
        raise SystemExit(f"error: {error}") from None


def bits(right: Iterable[float]) -> str:
    """Right or wrong by question."""
    return "".join("1" if r else "0" for r in right)
