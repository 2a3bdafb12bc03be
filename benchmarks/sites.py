"""Record the call sites in isingcut that issue torch operations, and those that did on a fake card.

A site is a line of the innermost frame in `isingcut`, with its function. Sites of blocks that
transformers runs are thus the lines that call them. Reads of attributes (shape, device) are no
operations. `make test` records the sites of its tests in the folder `SITES`; `make cards` compares
with them what it ran on fake cards (`tests/card_paths.py`).
"""

from __future__ import annotations

import contextlib
import json
import linecache
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

import cards
import isingcut

ROOT = str(Path(isingcut.__file__).parent) + os.sep
FOLDER = "CARD_SITES"
"""The environment variable with the folder for the records of all processes."""
Site = tuple[str, int, str]
"""File, line and function."""


class Recorder(TorchFunctionMode):
    """Records the sites of the threads that entered it.

    Attributes:
        seen: sites that issued an operation; true if one was on a fake card.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[Site, bool] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        frame: Any = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith(ROOT):
            frame = frame.f_back
        if frame is not None and getattr(func, "__name__", "") not in ("__get__", "__set__"):
            code = frame.f_code
            site = (code.co_filename, frame.f_lineno, code.co_qualname)
            if not self.seen.get(site):
                self.seen[site] = bool(cards._CARDS) and any(
                    isinstance(x, Tensor) and x.device.type == cards._TYPE
                    for x in cards._leaves((args, kwargs, out))
                )
        return out


@contextlib.contextmanager
def record() -> Iterator[None]:
    """Record the sites of this process, also of its new threads, if the variable names a folder."""
    folder = os.environ.get(FOLDER)
    if not folder:
        yield
        return
    recorder, run = Recorder(), threading.Thread.run

    def recorded(self: threading.Thread) -> None:
        with recorder:
            run(self)

    threading.Thread.run = recorded  # type: ignore[method-assign]
    try:
        with recorder:
            yield
    finally:
        threading.Thread.run = run  # type: ignore[method-assign]
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        found = [
            [name.removeprefix(ROOT), function, linecache.getline(name, line).strip(), card]
            for (name, line, function), card in sorted(recorder.seen.items())
        ]
        (place / f"{os.getpid()}.json").write_text(json.dumps(found))


def load(folder: Path) -> dict[Site, bool]:
    """Return the sites of all records in a folder; true if one was seen on a card."""
    found: dict[Site, bool] = {}
    for file in folder.glob("*.json"):
        for *site, card in json.loads(file.read_text()):
            found[tuple(site)] = found.get(tuple(site), False) or card
    return found
