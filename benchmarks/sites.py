"""Run everything that computes on fake cards, and find the code that never computed on one.

    make test && make cards

The paths are in `tests/card_paths.py`. A site is a line of isingcut that issues a torch operation:
the innermost frame in the package, so that what transformers computes counts for the line that
called it. `make test` records the sites of all tests. The coverage is the share of these sites that
ran in a path on cards, or in a test with a tensor on a card. Some of those compute on the host
there (masks of texts, an optimiser's state), which is counted; files that never meet a card are
left out (`HOST`). Reads of attributes (shape, device) are no operations. Subprocesses that a test
starts by a command are not recorded.
Ends with one line `name: value` per figure, and fails if a path failed or the coverage is too low.
"""

from __future__ import annotations

import contextlib
import json
import linecache
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.overrides import TorchFunctionMode

import cards
import isingcut

ROOT = str(Path(isingcut.__file__).parent) + os.sep
FOLDER = "CARD_SITES"
"""The environment variable with the folder for the records of all processes."""
PLACE = Path("card-sites")
LEAST = 94.0
"""Lowest coverage that passes. The aim is 95; `make cards` lists what is missing."""
HOST: dict[str, str] = {
    "data/": "texts and tokens are on the host until a model reads them",
    "formats/": "files are read, converted and written on the host",
    "options/": "values of options",
    "processes.py": "processes exchange bytes in host memory",
    "models/streaming/reader.py:Reader": "reads and converts parts in host memory",
    "models/streaming/reader.py:StoredPart.__init__": "plans a buffer",
    "models/streaming/reader.py:_": "plans parts on the meta device",
    "testing/": "makes and checks tiny models",
    "models/compute/divergence.py:_Divergence.forward: both": "compiled for CPUs",
    "models/compute/divergence.py:_Divergence.forward: run_in_threads": "compiled for CPUs",
    "models/compute/divergence.py:RowSums._add_compiled": "compiled for CPUs",
    "models/compute/head.py:_to_gradient: given": "compiled for CPUs",
    "models/compute/head.py:_to_gradient: run_in_threads": "compiled for CPUs",
    "measure/gates.py:row_dots: out": "compiled for CPUs",
    "measure/gates.py:row_dots: fill_row_dots": "compiled for CPUs",
    "models/device.py": "chooses and counts devices",
    "healing/training/train.py:Watch.on_step_end: torch.distributed": "several processes",
    "measure/streams.py:_check_stream": "only words of an error",
    "measure/streams.py:check_finite": "only words of an error",
    "healing/repairs/linear.py:<module>": "the name of the host",
    "models/compute/head.py:OutputHead._back_weight: return weight.T": "laid out for CPUs",
    "models/streaming/store.py:_Buffer.load: part.fill(self._host)": "fills host memory",
}
"""Code that never meets a card, by the start of ``file:function: line``, and why."""


class Recorder(TorchFunctionMode):
    """Records the sites of the threads that entered it.

    Attributes:
        seen: sites that issued an operation; true if one was on a fake card.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[tuple[str, int, str], bool] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        frame: Any = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith(ROOT):
            frame = frame.f_back
        if frame is not None and getattr(func, "__name__", "") not in (
            "__get__",
            "__set__",
        ):
            code = frame.f_code
            site = (code.co_filename, frame.f_lineno, code.co_qualname)
            if not self.seen.get(site):
                self.seen[site] = bool(cards._CARDS) and any(
                    isinstance(x, Tensor) and x.device.type == cards._TYPE
                    for x in cards._leaves((args, kwargs, out))
                )
        return out


_RECORDER = Recorder()


@contextlib.contextmanager
def record() -> Iterator[None]:
    """Record the sites of this process, also of its new threads, if the variable names a folder.

    All sites that the process has recorded are written at the end.
    """
    folder = os.environ.get(FOLDER)
    if not folder:
        yield
        return
    run = threading.Thread.run

    def recorded(self: threading.Thread) -> None:
        with _RECORDER:
            run(self)

    threading.Thread.run = recorded  # type: ignore[method-assign]
    try:
        with _RECORDER:
            yield
    finally:
        threading.Thread.run = run  # type: ignore[method-assign]
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        found = [
            [
                name.removeprefix(ROOT),
                function,
                linecache.getline(name, line).strip(),
                card,
            ]
            for (name, line, function), card in sorted(_RECORDER.seen.items())
        ]
        (place / f"{os.getpid()}.json").write_text(json.dumps(found))


def load(folder: Path) -> dict[tuple[str, str, str], bool]:
    """Return file, function and text of the recorded sites; true if one was seen on a card."""
    found: dict[tuple[str, str, str], bool] = {}
    for file in folder.glob("*.json"):
        for name, function, text, card in json.loads(file.read_text()):
            site = name, function, text
            found[site] = found.get(site, False) or card
    return found


class Failures:
    """A plugin of pytest that counts the paths and those that failed."""

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        ended = {
            k: len(terminalreporter.stats.get(k, ()))
            for k in ("passed", "failed", "error")
        }
        self.failed = ended["failed"] + ended["error"]
        self.total = ended["passed"] + self.failed


def main() -> int:
    """Run all paths, print the sites that no path reached, and return the exit code."""
    known = load(PLACE / "tests")
    failures = Failures()
    if not known:
        print(f"{PLACE} has no records of the tests; type: make test")
        return 2
    os.environ[FOLDER] = str(PLACE / "cards")
    shutil.rmtree(PLACE / "cards", ignore_errors=True)
    pytest.main([*sys.argv[1:], "tests/card_paths.py"], plugins=[failures])
    reached = load(PLACE / "cards")
    named = {
        f"{file}:{function}: {text}": (file, function, text)
        for file, function, text in known
    }
    wanted = [named[name] for name in sorted(named) if not name.startswith(tuple(HOST))]
    # Some tests use fake cards too.
    reached |= {site: True for site, card in known.items() if card}
    missed = [site for site in wanted if site not in reached]
    host = sum(not reached[site] for site in wanted if site in reached)
    for name, function, text in missed:
        print(f"not on a card: {name}:{function}: {text}")
    for name, why in HOST.items():
        print(f"left out: {name}: {why}")
    coverage = 100 * (1 - len(missed) / len(wanted))
    print(f"card_sites: {len(wanted)}")
    print(f"card_sites_on_host: {host}")
    print(f"card_coverage_percent: {coverage:.1f}")
    print(f"card_paths: {failures.total}")
    print(f"card_paths_failed: {failures.failed}")
    return int(bool(failures.failed) or coverage < LEAST)


if __name__ == "__main__":
    sys.exit(main())
