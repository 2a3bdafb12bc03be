"""A run's folder, by its options: make it, open it, and find the model and text that it read."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from isingcut.console.printing import say
from isingcut.data.mixture import places_in
from isingcut.errors import ModelError, OutputExistsError
from isingcut.files import ownership, runs, writing
from isingcut.files.inputs import user_path
from isingcut.files.provenance import command_line, model_path, versions
from isingcut.files.store import MANIFEST, Store
from isingcut.formats.sources import list_differences, model_identity
from isingcut.options.config import RunConfig
from isingcut.options.declaration import options_from
from isingcut.options.search import Search

# Options of one command only. Trust is given on each command line, because another person may open
# the folder.
_NOT_KEPT = ("out", "overwrite", "trust_remote_code")


def create_or_open(
    config: RunConfig, model: runs.ModelIdentity, blocks: runs.BlockList
) -> Store:
    """Create the folder for a run of ``config``, or open an earlier one of the same model.

    Raises:
        OutputExistsError: ``out`` is something else, or a run of another model.
    """
    path = user_path(config.out)
    refuse_foreign(config)
    kept = dataclasses.asdict(config)
    for name in _NOT_KEPT:
        del kept[name]
    options = runs.Config(**kept)
    now = {"model": model, **model_path(path, config.model)}
    if Store.exists(path):
        folder = Store.open(path, overwrite=config.overwrite)
        before = folder.run.provenance.model
        made = read_config(folder)
        what = ""
        if changed := list_differences(before.content(), model.content()):
            what = f"{path} is a run of another model ({before.name}; different: {changed})"
        elif made.units != config.units:
            what = f"{path} is a run with --units {made.units}"
        if what:
            if not config.overwrite:
                raise OutputExistsError(
                    f"{what}; choose another --out or pass --overwrite"
                )
            say(f"isingcut: warning: {what}; everything is made again")
            # Keep the records, so that only recorded files may be replaced.
            for record in folder.run.stages.values():
                record.fingerprint = ""
                record.done = False
            folder.run.blocks = blocks
        if not made.removal or config.overwrite:
            folder.run.config = options
        folder.run.provenance = runs.Provenance(**folder.run.provenance.content() | now)
    else:
        run = runs.RunFile(
            config=options,
            stages={},
            blocks=blocks,
            provenance=runs.Provenance(
                **versions(), command_line=command_line(), **now
            ),
            complete=False,
        )
        folder = Store(path, run, config.overwrite)
    folder.typed_solver = config.solver
    folder.save()
    return folder


def refuse_foreign(config: RunConfig) -> None:
    """Raise if ``out`` is not free for a run, or is among the inputs of the run.

    Raises:
        InputError: ``out`` is, contains or lies in the model, the text or a config file.
        OutputExistsError: ``out`` exists and is not a run folder.
    """
    path = user_path(config.out)
    ownership.refuse_source(path, read_by(config))
    if path.is_file():
        raise OutputExistsError(f"{path} is a file; choose a folder for --out")
    begun = path.is_dir() and all(map(writing.is_leftover, path.iterdir()))
    if path.exists() and not Store.exists(path) and not begun:
        raise OutputExistsError(
            f"{path} already exists and is not an isingcut run; nothing was written, and "
            "--overwrite replaces only files of isingcut: choose another --out"
        )


def read_config(store: Store) -> RunConfig:
    """Return the options that a run folder was made with."""
    stored = store.run.config.content()
    # It is never stored, but another person may have edited the file.
    stored.pop("trust_remote_code", None)
    # What it sets is stored; it must not replace an option that is typed now.
    stored.pop("quick", None)
    # An option of earlier versions; and the record of the evaluation has the prompts.
    for name in ("solve_seconds", "prompts"):
        stored.pop(name, None)
    options = options_from(RunConfig, stored, str(store.path / MANIFEST))
    return options.replace(out=str(store.path))


def list_sources(store: Store) -> list[Path]:
    """List the inputs of a run on this machine."""
    inputs = read_by(read_config(store))
    if seen := store.run.provenance.model_path:
        inputs += [store.path / seen.absolute, store.path / seen.relative]
    return inputs


def model_places(store: Store, name: str) -> list[str]:
    """List possible places of the run's model: its name, or its path relative to its folder.

    Args:
        name: the model's current name; a name other than the run's own is used as it is.

    Raises:
        ModelError: it was a local model, and is in none of these places.
    """
    places = store.run.provenance.model_path
    if places is None or name != store.run.config.model:
        return [name]
    seen = dict.fromkeys([name, places.absolute, str(store.path / places.relative)])
    there = [place for place in seen if user_path(place).exists()]
    if not there:
        raise ModelError(
            f"the model of {store.path} is no longer at {', '.join(seen)}; give its place with "
            "--model"
        )
    return there


def model_warnings(store: Store) -> list[str]:
    """Return a warning if a run's model changed, unless its folder is not here."""
    made_with = store.run.provenance.model.content()
    places = [store.path / place for _, place in store.run.provenance.model_path or ()]
    there = [place for place in places if (place / "config.json").is_file()]
    changed = [list_differences(made_with, model_identity(p)) for p in there]
    if not all(changed) or not changed:
        return []
    return [
        f"the model of {store.path} has changed since (different: {changed[0]}); these results "
        "are of the earlier version"
    ]


def each_removal(config: Search) -> list[Search]:
    """Return the options of each removal: one per number of a range such as `4..15`."""
    if not config.remove.is_range:
        return [config]
    return [config.replace(remove=m) for m in config.remove.counts]


def read_by(config: RunConfig) -> list[Path]:
    """List the files and folders that a run with these options reads."""
    tasks = map(str.strip, config.tasks.split(","))
    files = [name for name in tasks if name.endswith(".jsonl")]
    named = [config.model, *places_in(config.calibration), config.data, *files]
    named.append(config.prompts)
    return list(filter(os.path.lexists, map(user_path, filter(None, named))))
