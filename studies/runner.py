"""Runner of the studies: resumable parts, one command line, tables and figures.

    python -m studies NAME --plan              # list the unfinished parts
    python -m studies NAME [--minutes 100]     # make them, the most important first
    python -m studies NAME --collect           # finished parts -> studies/NAME/results/NAME.json
    python -m studies NAME --summary           # print tables and figures of the results files

A part is one unit of work. Its result is one JSON file below `--work`, which is written atomically.
A finished part is never made again, and a killed one resumes from its journal. Several processes
may share a work folder if `--only` gives them different parts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from isingcut.errors import InputError, IsingcutError
from isingcut.files.writing import atomic_file

STUDIES = Path(__file__).resolve().parent
Content = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One unit of work, whose result is one file of the work folder.

    Attributes:
        name: path of the file below `parts`, without the suffix.
        make: function that computes the content, given the path of the part's own journal.
        tokens: estimated cost, in tokens of forward passes through the whole model.
    """

    name: str
    make: Callable[[Path], Content]
    tokens: float = 0.0


def read(path: Path) -> Content:
    """Return the content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, content: Content) -> None:
    """Write a JSON file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


class Study(ABC):
    """Base class of the studies: their parts, results file and summary.

    Args:
        options: parsed command line.

    Attributes:
        name: name of the study, of its folder and of its results file.
        settings: names of the options that every part depends on.
        defaults: the study's own default values of shared options.
        seconds: seconds per token of a part's cost.

    Raises:
        InputError: the work folder was made with other settings.
    """

    name: ClassVar[str]
    settings: ClassVar[tuple[str, ...]] = ()
    defaults: ClassVar[Content] = {}
    seconds: float = 0.0

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work = Path(options.work)
        given = json.loads(
            json.dumps({k: getattr(options, k) for k in self.settings}, default=str)
        )
        path = self.work / "settings.json"
        if not path.exists():
            write(path, given)
        for name, there in read(path).items():
            if (now := given.get(name)) != there:
                raise InputError(
                    f"{self.work} was made with {name} {there}, not {now}; choose another --work"
                )

    @classmethod  # noqa: B027
    def add_options(cls, add: Callable[..., Any]) -> None:
        """Add the study's own options to the command line."""

    @abstractmethod
    def parts(self) -> Sequence[Part]:
        """Return all parts that can be named so far, the most important first."""

    @abstractmethod
    def collect(self) -> Content:
        """Return the content of the results file, computed from the finished parts."""

    @staticmethod
    @abstractmethod
    def show(content: Content) -> dict[str, Any]:
        """Print the tables of a results file and return its figures by name."""

    def path(self, name: str) -> Path:
        """Return the path of a part's file."""
        return self.work / "parts" / f"{name}.json"

    def done(self, name: str) -> bool:
        """Return whether a part is finished."""
        return self.path(name).exists()

    def read(self, name: str) -> Content:
        """Return the content of a finished part."""
        return read(self.path(name))

    def under(self, folder: str) -> list[Content]:
        """Return the contents of the finished parts below a folder, sorted by path."""
        return [
            read(path)
            for path in sorted((self.work / "parts" / folder).rglob("*.json"))
        ]

    def left(self) -> list[Part]:
        """Return the unfinished parts that `--only` selects, without duplicates."""
        only = tuple(self.options.only or ("",))
        named = {p.name: p for p in self.parts() if p.name.startswith(only)}
        return [p for p in named.values() if not self.done(p.name)]

    def minutes(self, parts: Sequence[Part]) -> float:
        """Return the minutes that parts are expected to take."""
        return sum(p.tokens for p in parts) * self.seconds / 60

    def make(self, part: Part) -> float:
        """Make a part and return the minutes it took."""
        path = self.path(part.name)
        began = time.perf_counter()
        path.parent.mkdir(parents=True, exist_ok=True)
        content = part.make(path.with_name(f"{path.stem}.journal"))
        seconds = time.perf_counter() - began
        write(path, {"seconds": round(seconds, 1), **content})
        for journal in path.parent.glob(f"{path.stem}.journal*"):
            journal.unlink()
        return seconds / 60


def show_plan(study: Study) -> None:
    """Print the unfinished parts and their expected minutes."""
    waiting = study.left()
    for part in waiting:
        print(f"{part.name:<60}{study.minutes([part]):>9.1f} min")
    print(
        f"{len(waiting)} parts that can be named now, {study.minutes(waiting):.0f} min"
    )


def make_parts(study: Study) -> None:
    """Make the unfinished parts, including those that can only be named once others are finished.

    Raises:
        IsingcutError: parts failed; the others are made first.
    """
    began = time.perf_counter()
    tried = set[str]()
    failed = list[str]()
    while waiting := [p for p in study.left() if p.name not in tried]:
        part = waiting[0]
        spent = (time.perf_counter() - began) / 60
        tried.add(part.name)
        expected = study.minutes([part])
        if spent + expected > study.options.minutes:
            print(
                f"{part.name} does not fit into the time; run again to go on",
                flush=True,
            )
            continue
        rest = study.minutes(waiting)
        print(
            f"[{spent:6.1f} min] {part.name}: {expected:.1f} of {rest:.0f} min",
            flush=True,
        )
        try:
            print(f"{'':13}took {study.make(part):.1f} min", flush=True)
        except IsingcutError as error:
            failed.append(part.name)
            print(f"{'':13}failed: {error}", flush=True)
    if failed:
        raise IsingcutError(f"{len(failed)} parts failed: {', '.join(failed)}")


def collect(study: Study) -> Content:
    """Return the content of the results file.

    Raises:
        InputError: it needs parts that are not finished.
    """
    try:
        return study.collect()
    except (FileNotFoundError, KeyError) as error:
        if not study.left():
            raise
        raise InputError(
            "the results need parts that are not finished; see --plan"
        ) from error


def numbers(text: str) -> list[int]:
    """Parse a list of integers such as ``3,6,9``."""
    return [int(item) for item in text.split(",")]


def parse(study: type[Study], words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line of a study."""
    parser = argparse.ArgumentParser(
        prog=f"python -m studies {study.name}",
        description=f"{sys.modules[study.__module__].__doc__}\n{__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    study.add_options(add)
    parser.set_defaults(**study.defaults)
    add("--work", default=f"{study.name}-work", help="folder of the parts")
    add("--results", type=Path, help="results file to write or to show")
    add(
        "--only",
        action="append",
        metavar="PREFIX",
        help="parts to make; may be repeated",
    )
    add(
        "--minutes",
        type=float,
        default=600.0,
        help="start no part expected to end later",
    )
    for name in ("plan", "collect", "summary"):
        add(f"--{name}", action="store_true")
    return parser.parse_args(words)


def run(study: type[Study], words: Sequence[str]) -> None:
    """Run the command line of a study."""
    options = parse(study, words)
    folder = STUDIES / study.name / "results"
    shown = [options.results] if options.results else sorted(folder.glob("*.json"))
    try:
        if options.collect:
            shown = [options.results or folder / f"{study.name}.json"]
            write(shown[0], collect(study(options)))
        elif not options.summary:
            shown = []
            (show_plan if options.plan else make_parts)(study(options))
    except IsingcutError as error:
        raise SystemExit(f"error: {error}") from None
    for path in shown:
        for name, value in study.show(read(path)).items():
            print(
                f"{name}: {value:.4g}"
                if isinstance(value, float)
                else f"{name}: {value}"
            )
