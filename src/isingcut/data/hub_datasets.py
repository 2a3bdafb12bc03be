"""Rows of a `datasets` data set, from the hub or a local folder, shuffled as they stream."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import datasets
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import logging as hub_logging

from isingcut.errors import CalibrationError, first_line

# The HTTP library's own base class: hub versions are built on different ones.
_TRANSPORT = cast(type[Exception], HfHubHTTPError.__mro__[1])
_ERRORS = (
    *(OSError, ValueError, KeyError, ImportError, RuntimeError, NotImplementedError),
    _TRANSPORT,
)

_EXPECTED = (
    "expected NAME, NAME/CONFIG, OWNER/NAME/CONFIG or a local folder, each optionally followed by "
    ":SPLIT"
)


def stream(
    source: str, *, seed: int, buffer: int, advice: str = _EXPECTED
) -> Iterator[dict[str, Any]]:
    """Rows in an order that depends on ``seed`` only.

    Args:
        source: ``NAME``, ``OWNER/NAME``, either followed by ``/CONFIG``, or a local folder
            (data files, or what `save_to_disk` wrote); then optionally ``:SPLIT``. Without a
            split, ``train`` where there is one, else the first.
        buffer: rows kept in memory for shuffling.
        advice: how a message ends that says why it cannot be read.

    Raises:
        CalibrationError: no such data set, configuration or split, or the hub is out of reach.
    """
    name, split = source, None
    if not Path(source).expanduser().is_dir() and ":" in source:
        name, split = source.rsplit(":", 1)
    problems = []
    for path, config in _readings(name):
        try:
            with _quiet():
                splits = _open(path, config)
                if split is None:
                    split = "train" if "train" in splits else next(iter(splits))
                if split not in splits:
                    raise CalibrationError(
                        f"the data set {name} has no split {split!r}; it has {', '.join(splits)}"
                    )
                rows = splits[split].shuffle(seed=seed, buffer_size=buffer)
                yield from rows
            return
        except _ERRORS as e:
            problems.append(first_line(e))
    raise CalibrationError(f"cannot read the data set {name!r} ({problems[0]}); {advice}")


def _readings(name: str) -> list[tuple[str, str | None]]:
    """What a name may mean: in A/B, A is an owner or, failing that, B is a configuration."""
    folder = Path(name).expanduser()
    parts = name.split("/")
    if folder.is_dir() or len(parts) == 1:
        return [(str(folder) if folder.is_dir() else name, None)]
    if len(parts) == 2:
        return [(name, None), (parts[0], parts[1])]
    return [("/".join(parts[:2]), "/".join(parts[2:]))]


def _open(path: str, config: str | None) -> Any:
    """Split names to iterable data sets."""
    if Path(path).is_dir() and list(Path(path).rglob("state.json")):
        saved = datasets.load_from_disk(path)
        parts = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
        return {k: v.to_iterable_dataset() for k, v in parts.items()}
    return datasets.load_dataset(path, config, streaming=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Both libraries write a warning for each of their retries."""
    loggers = (datasets.logging, hub_logging)
    levels = [logger.get_verbosity() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.set_verbosity(level)
