"""Stage `baseline`: another method's choice on a run folder's own text, and what it is worth.

The baseline sees the samples that built the energy; its choice is measured on the split that
ranks the candidates, so that `baseline-NAME.json` and `candidates.json` compare as they stand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from isingcut.baselines import registry
from isingcut.errors import InputError
from isingcut.files.documents.states import BaselineFile, CandidatesFile
from isingcut.files.writing import read_document, write_document
from isingcut.ising.states import states_of
from isingcut.measure.losses import measure
from isingcut.measure.work import Work, forget
from isingcut.options.config import RunConfig
from isingcut.options.declaration import shown
from isingcut.options.yaml_file import parse_yaml
from isingcut.runs.folder import RunFolder
from isingcut.runs.measuring import samples_of, splits_of, upstream
from isingcut.runs.removal import removal_rows
from isingcut.runs.session import Session

_LARGEST = 1_000_000


def baseline_part(name: str, settings: Sequence[str]) -> Any:
    """The baseline called ``name`` with settings as ``option=value`` texts.

    Raises:
        InputError: no such option, a value of another type than its default's, or a number
            above a million.
    """
    part = registry.get(name)
    known = {f.name: f.default for f in dataclasses.fields(part)}
    chosen: dict[str, Any] = {}
    for setting in settings:
        option, equals, text = setting.partition("=")
        option = option.strip().replace("-", "_")
        if not equals or option not in known:
            listed = ", ".join(known) or "none"
            raise InputError(f"--set {shown(setting)}: expected OPTION=VALUE; {name} has: {listed}")
        try:
            value = parse_yaml(text)
        except ValueError as e:
            raise InputError(f"--set {shown(setting)} is not a readable value ({e})") from e
        if isinstance(value, list):
            value = tuple(value)
        # Only a number may stand where the default is left to the method.
        expected = int if known[option] is None else type(known[option])
        items = value if isinstance(value, tuple) and expected is tuple else ()
        if type(value) is not expected or any(type(v) is not int for v in items):
            raise InputError(
                f"--set {shown(setting)}: expected a value like {known[option]!r}, "
                f"got {shown(text)}"
            )
        if any(isinstance(v, int) and abs(v) > _LARGEST for v in (value, *items)):
            raise InputError(f"--set {shown(setting)}: numbers end at {_LARGEST:,}")
        chosen[option] = value
    return part(**chosen)


def compare(
    session: Session, folder: RunFolder, name: str, settings: Sequence[str] = ()
) -> BaselineFile:
    """Run one baseline for the removal of the session's options: `baseline-NAME.json`.

    A method knows numbers of blocks only: where the removal is a budget or a number per kind, it
    removes as many as the run's chosen state, and ``violated`` says what it breaks.

    Returns:
        The file: what is removed, with its losses on the ranking split, the price in passes and
        heads (see `isingcut.baselines.base.Outcome`), and the constraints of the run that the
        method does not know and breaks.
    """
    config = session.config
    part = baseline_part(name, settings)
    count = _count(folder, config)
    rows = removal_rows(folder.manifest["blocks"], config)
    samples = samples_of(config, config.energy)
    target = folder.target(config.removal)
    options = upstream(folder) | {
        "baseline": name,
        "options": repr(part),
        "remove": count,
        "rows": [row.name for row in rows],
        "samples": samples,
        "seed": config.seed,
        "dtype": str(session.loaded.dtype),
    }

    def make(path: Path) -> None:
        splits = splits_of(folder)
        searched = splits["energy"].select(range(samples))
        with session.computing(folder):
            work = Work(session.tuning.batch_tokens, session.progress, journal)
            outcome = part.choose(session.replay, searched, count, work, config.seed)
            found = measure(
                session.replay,
                splits["rank"],
                states_of(len(session.replay), [outcome.removed]),
                replace(work, journal=None),
                "measuring the choice",
            )
        content = BaselineFile(
            baseline=name,
            options=dataclasses.asdict(part),
            settings=list(settings),
            removed=list(outcome.removed),
            **found.losses(0),
            passes=outcome.passes,
            heads=outcome.heads,
            tokens_searched=searched.tokens,
            tokens_judged=int(found.counts.sum()),
            violated=[row.name for row in rows if not row.satisfied(found.states)[0]],
            info=outcome.info,
        )
        write_document(path, content)

    file = target / f"baseline-{name}.json"
    journal = file.with_name(file.name + ".journal")
    return folder.stage(
        "baseline",
        file,
        options,
        make,
        lambda path: read_document(path, BaselineFile),
        together=True,
        forget=lambda: forget(journal),
    )


def _count(folder: RunFolder, config: RunConfig) -> int:
    """How many blocks go: the number asked for, else as many as the run's chosen state has."""
    if config.remove.counts:
        return config.remove.counts[0]
    ranked = folder.target(config.removal) / "candidates.json"
    if not ranked.exists():
        raise InputError(
            f"a baseline removes a plain number of blocks, and nothing was chosen yet for "
            f"{config.removal!r} to take it from; give --remove like 6, or rank first"
        )
    found = folder.load(ranked, lambda path: read_document(path, CandidatesFile))
    return len(found.chosen.removed)
