"""Find the code that never computed on a fake card.

    make cards-sites

It runs all tests and records their sites. A site is a line of isingcut that issues a torch
operation: the innermost frame in the package, so that what transformers computes counts for the
line that called it. The coverage is the share of these sites that ran in a path on cards
(`tests/test_card_paths.py`), or in a test with a tensor on a card. Some of those compute on the
host there (masks of texts, an optimiser's state), which is counted; files that never meet a card
are left out (`HOST`). Reads of attributes (shape, device) are no operations. Subprocesses that a
test starts by a command are not recorded.
Ends with one line `name: value` per figure, and fails if a test failed or the coverage is too low.
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
"""Lowest coverage that passes. The aim is 95; the command lists what is missing."""
PATHS = Path("tests/test_card_paths.py")
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


SEEN, IN_PATH, ON_CARD = range(3)


class Recorder(TorchFunctionMode):
    """Records the sites of the threads that entered it.

    Attributes:
        path: whether the test is a path on cards.
        seen: sites that issued an operation, each with the closest that it came to a card:
            `SEEN`, `IN_PATH` or `ON_CARD`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.path = False
        self.seen: dict[tuple[str, int, str], int] = {}

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
            before = self.seen.get(site, SEEN)
            if before != ON_CARD:
                on_card = bool(cards._CARDS) and any(
                    isinstance(x, Tensor) and x.device.type == cards._TYPE
                    for x in cards._leaves((args, kwargs, out))
                )
                now = ON_CARD if on_card else IN_PATH if self.path else SEEN
                self.seen[site] = max(before, now)
        return out


_RECORDER = Recorder()


@contextlib.contextmanager
def record(*, path: bool = False) -> Iterator[None]:
    """Record the sites of this process, also of its new threads, if the variable names a folder.

    All sites that the process has recorded are written at the end.
    """
    folder = os.environ.get(FOLDER)
    if not folder:
        yield
        return
    _RECORDER.path = path
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
                level,
            ]
            for (name, line, function), level in sorted(_RECORDER.seen.items())
        ]
        (place / f"{os.getpid()}.json").write_text(json.dumps(found))


def load(folder: Path) -> dict[tuple[str, str, str], int]:
    """Return file, function and text of the recorded sites, and how close they came to a card."""
    found: dict[tuple[str, str, str], int] = {}
    for file in folder.glob("*.json"):
        for name, function, text, level in json.loads(file.read_text()):
            site = name, function, text
            found[site] = max(found.get(site, SEEN), level)
    return found


def main() -> int:
    """Run all tests, print the sites that met no card, and return the exit code."""
    os.environ[FOLDER] = str(PLACE)
    shutil.rmtree(PLACE, ignore_errors=True)
    failed = pytest.main([*sys.argv[1:], "tests"])
    known = {
        f"{file}:{function}: {text}": level
        for (file, function, text), level in load(PLACE).items()
    }
    wanted = [name for name in sorted(known) if not name.startswith(tuple(HOST))]
    missed = [name for name in wanted if known[name] == SEEN]
    for name in missed:
        print(f"not on a card: {name}")
    for name, why in HOST.items():
        print(f"left out: {name}: {why}")
    coverage = 100 * (1 - len(missed) / len(wanted))
    print(f"card_sites: {len(wanted)}")
    print(f"card_sites_on_host: {sum(known[name] == IN_PATH for name in wanted)}")
    print(f"card_coverage_percent: {coverage:.1f}")
    return int(bool(failed) or coverage < LEAST)


if __name__ == "__main__":
    sys.exit(main())
