"""Parts of the quality benchmark: one JSON file each, skipped once it is there; the driver.

A part is named like `choose/wiki/sleb-nll`, and that is its file in the work folder. It is
written atomically, so a part is there or not; what runs inside one keeps a journal beside it.
Two processes may work on one folder as long as they run different parts (`--only`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isingcut.errors import InputError, IsingcutError
from isingcut.files import documents
from isingcut.files.writing import read_json, write_json

KIND = "quality-part"
# The benchmark's own files, which no run has: their keys are checked where they are used.
documents.KINDS.update({KIND: documents.Strict, "quality-settings": documents.Strict})


@dataclass(frozen=True)
class Price:
    """What a part costs: full passes and output heads over so many tokens."""

    tokens: float
    passes: float
    heads: float

    def seconds(self, speed: Speed) -> float:
        return self.tokens * (self.passes * speed.block_pass + self.heads * speed.head)


@dataclass(frozen=True)
class Speed:
    """Measured seconds per token of a pass through all blocks, and of one compared head."""

    block_pass: float
    head: float


@dataclass(frozen=True)
class Part:
    """One file of the work folder.

    Attributes:
        name: its path without the suffix.
        make: computes the content; is given the path of a journal of its own.
        prices: estimates of its cost; several where it works on texts of different sizes.
        needs: parts whose files it reads.
    """

    name: str
    make: Callable[[Path], dict[str, Any]]
    prices: tuple[Price, ...] = ()
    needs: tuple[str, ...] = ()

    def seconds(self, speed: Speed) -> float:
        return sum(p.seconds(speed) for p in self.prices)


@dataclass(frozen=True)
class Stage:
    """Parts that can be named only when the stage is reached.

    Attributes:
        parts: the parts, as far as they can be named now.
        expected: a guess of the stage's price while other parts are missing.
    """

    title: str
    parts: Callable[[], Sequence[Part]]
    expected: Callable[[], Sequence[Price]] = field(default=tuple)


class Store:
    """The work folder.

    Args:
        folder: created when missing.
        settings: what every part depends on; a folder of other settings is refused.

    Raises:
        InputError: the folder was made with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        path = folder / "settings.json"
        if path.exists():
            before = read_json(path, "quality-settings")["settings"]
            plain = json.loads(json.dumps(settings))
            changed = [k for k in {**before, **plain} if before.get(k) != plain.get(k)]
            if changed:
                words = "; ".join(
                    f"{k}: {before.get(k)!r} there, {plain.get(k)!r} now" for k in changed
                )
                raise InputError(
                    f"{folder} was made with other settings ({words}); choose another --work"
                )
        else:
            write_json(path, "quality-settings", {"settings": settings})

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def done(self, name: str) -> bool:
        return self.path(name).exists()

    def read(self, name: str) -> dict[str, Any]:
        return read_json(self.path(name), KIND)

    def under(self, prefix: str) -> list[tuple[str, dict[str, Any]]]:
        """Name and content of every finished part below a folder, sorted by name."""
        found = []
        for path in sorted((self.folder / prefix).rglob("*.json")):
            name = path.relative_to(self.folder).with_suffix("").as_posix()
            found.append((name, self.read(name)))
        return found

    def run(self, part: Part) -> float:
        """Make one part; seconds taken."""
        path = self.path(part.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        journal = path.with_suffix(".journal")
        began = time.perf_counter()
        content = part.make(journal)
        seconds = time.perf_counter() - began
        write_json(path, KIND, {"part": part.name, "seconds": round(seconds, 2), **content})
        for left in path.parent.glob(f"{path.stem}.journal*"):
            left.unlink()
        return seconds


def show_plan(stages: Iterable[Stage], store: Store, speed: Speed, *, parts: bool) -> float:
    """Print what is left to do and what it is expected to take; seconds in all.

    Args:
        parts: also print every part.
    """
    print(
        f"\nplan ({1000 * speed.block_pass:.2f} ms a token for all blocks, "
        f"{1000 * speed.head:.2f} ms for an output head with its comparison)"
    )
    print(f"{'':<44}{'parts':>6}{'passes x ktoken':>17}{'heads x ktoken':>16}{'minutes':>9}")

    def line(words: str, count: int, prices: Sequence[Price]) -> float:
        passes = sum(p.tokens * p.passes for p in prices) / 1000
        heads = sum(p.tokens * p.heads for p in prices) / 1000
        seconds = sum(p.seconds(speed) for p in prices)
        print(f"{words:<44}{count:>6}{passes:>17.0f}{heads:>16.0f}{seconds / 60:>9.1f}")
        return seconds

    total = 0.0
    for stage in stages:
        left = [p for p in stage.parts() if not store.done(p.name)]
        waiting = list(stage.expected())
        total += line(stage.title, len(left), [*(q for p in left for q in p.prices), *waiting])
        for part in left if parts else ():
            line(f"  {part.name}", 1, part.prices)
        if parts and waiting:
            line("  expected, once the parts before it are done", 0, waiting)
    print(f"{'all':<44}{'':>39}{total / 60:>9.1f}\n", flush=True)
    return total


def drive(
    stages: Sequence[Stage],
    store: Store,
    speed: Speed,
    *,
    only: Sequence[str],
    minutes: float,
    planned: float = 0.0,
) -> bool:
    """Make what is missing, in order; False when the time was up first.

    A part that fails with an error of isingcut's is named, and the others are made.

    Args:
        planned: seconds that everything left is expected to take, for the estimate shown.
        only: prefixes of the parts to make; empty for all.
        minutes: no part is started that is expected to end later than this.
    """
    began = time.perf_counter()
    left_out = 0
    failed: list[str] = []
    for stage in stages:
        for part in stage.parts():
            if store.done(part.name) or (only and not part.name.startswith(tuple(only))):
                continue
            missing = [n for n in part.needs if not store.done(n)]
            if missing:
                print(f"{part.name}: waits for {', '.join(missing)}", flush=True)
                continue
            expected = part.seconds(speed)
            spent = time.perf_counter() - began
            if spent + expected > 60 * minutes:
                left_out += 1
                continue
            print(f"[{spent / 60:6.1f} min] {part.name}: about {expected / 60:.1f} min", flush=True)
            left = max(expected, planned) / 60
            print(f"{'':13}all that is planned: about {left:.0f} min left", flush=True)
            planned -= expected
            try:
                taken = store.run(part)
            except IsingcutError as error:
                failed.append(part.name)
                print(f"{'':13}{part.name} failed: {error}", flush=True)
                continue
            print(f"{'':13}{part.name}: took {taken / 60:.1f} min", flush=True)
    if left_out:
        print(f"{left_out} parts did not fit into {minutes:g} minutes; run again to go on")
    if failed:
        raise IsingcutError(f"{len(failed)} parts failed: {', '.join(failed)}")
    return not left_out
