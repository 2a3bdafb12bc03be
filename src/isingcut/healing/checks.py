"""Check a healing's options, checkpoint and output before torch is imported.

The command line calls `check_inputs` first, so that a mistake is answered at once.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from isingcut.data import corpora
from isingcut.data.corpora import text_hashes
from isingcut.data.mixture import places_in
from isingcut.data.text_files import is_read_again, is_read_once
from isingcut.errors import InputError, IsingcutError
from isingcut.files.cuts import CardParts, CutRecord
from isingcut.files.healings import HealingFile
from isingcut.files.inputs import load_json, user_path
from isingcut.files.ownership import find_change, folder_hash
from isingcut.files.results import fingerprint, read_document
from isingcut.files.stages import is_made
from isingcut.files.store import Store
from isingcut.formats.sources import check_name, model_identity, resolve
from isingcut.healing import CUT, RECORD
from isingcut.healing.repairs import registry
from isingcut.healing.work_folder import check_places, describe_options
from isingcut.options.heal import HealConfig
from isingcut.options.text import TEXT
from isingcut.report.run_files import RunFiles

RemovalRecord = CutRecord | HealingFile
"""The record of a cut: the removed blocks, and the number of blocks before the cut."""


def check_inputs(
    config: HealConfig, sources: Sequence[str | os.PathLike[str]] = ()
) -> HealConfig:
    """Check all that needs no model; return the options with those that follow from the checkpoint.

    Args:
        sources: further input files, which the output never replaces.

    Raises:
        IsingcutError: the healing would fail later.
    """
    config = config.validate()
    for name in ("student", "out"):
        if not getattr(config, name):
            raise InputError(
                f"--{name} is missing" if name != "student" else "STUDENT is missing"
            )
    registry.check(config.repair)
    student = user_path(config.student)
    if (store := find_run(student)) is not None:
        run = RunFiles(store, student.resolve())
        if not (student / "config.json").is_file():
            student = run.product
        config = config.replace(
            text=config.text or _text_of(run), teacher=config.teacher or run.model
        )
    config = config.replace(student=str(student), text=config.text or TEXT)
    corpora.check(config.text)
    known = read_removal(student)
    if not config.teacher:
        original = None if known is None else original_of(known).get("name")
        if original is None:
            raise InputError(
                f"{student} has no record of its original model; give the original with --teacher"
            )
        config = config.replace(teacher=original)
    check_name(config.teacher, trust_remote_code=config.trust_remote_code)
    start = start_of(student)
    if start != "cut" and (
        config.method == "none" or config.patch not in (None, "none")
    ):
        raise InputError(
            f"{student} is {start} already, but a patch needs the exact cut; remove --patch and "
            "give a --method, or give the exact cut (isingcut excise --patch none)"
        )
    if config.method == "none" and config.patch is None:
        # The patch is the only repair, so it is an error if it is impossible.
        config = config.replace(patch=config.repair)
    if not is_finished(config):
        names = (config.student, config.teacher, *places_in(config.text))
        inputs = [*(user_path(name) for name in names if name), *sources]
        check_places(config, user_path(config.out), inputs)
    return config


def find_run(student: Path) -> Store | None:
    """Open the run folder that a path is, or that has it as a checkpoint; None outside a run."""
    place = student.resolve()
    places = (place, *place.parents[:2])
    return next(map(Store.open, filter(Store.exists, places)), None)


def _text_of(run: RunFiles) -> str:
    """Return the text of a run; raise unless it can be read again."""
    text = run.calibration.source if run.calibration else TEXT
    try:
        if not is_read_again(text):
            raise InputError(f"{text} cannot be read again")
        corpora.check(text)
    except IsingcutError as e:
        where = f"this is the text of the run {run.folder}"
        e.args = (f"{e}; {where}, give another with --text",)
        raise
    return text


def is_finished(config: HealConfig) -> bool:
    """Whether the output is the unchanged result of a healing with these options and inputs.

    Args:
        config: options from `check_inputs`.
    """
    out = user_path(config.out)
    if (
        config.overwrite
        or not (out / RECORD).is_file()
        or find_change(out, folder_hash(out) or "")
        or any(map(is_read_once, places_in(config.text)))
    ):
        return False
    made = read_document(out / RECORD, HealingFile).provenance
    teacher = resolve(config.teacher, trust_remote_code=config.trust_remote_code)
    now = request_of(config, user_path(config.student), teacher)
    return is_made(out, made.get("request", ""), now)


def request_of(config: HealConfig, student: Path, teacher: Path) -> str:
    """Return a fingerprint of a healing's options, and of its text and models before they are read.

    Unlike its identity, it needs no model.
    """
    models = [model_identity(folder)["sha256"] for folder in (student, teacher)]
    return fingerprint([describe_options(config), models, text_hashes(config.text)])


def read_removal(folder: Path) -> RemovalRecord | None:
    """Read the removed blocks from the record in a checkpoint; None without a record.

    Raises:
        InputError: not a checkpoint, or an unreadable record.
    """
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} is not a checkpoint (no config.json); give the cut model"
        )
    name = next((n for n in (CUT, RECORD) if (folder / n).exists()), None)
    if name is None:
        return None
    record = load_json(folder / name, "the record of the cut")
    kind: type[RemovalRecord] = CutRecord if name == CUT else HealingFile
    try:
        return kind.model_validate(record)
    except ValidationError as e:
        why = e.errors(include_url=False)[0]["msg"]
        raise InputError(
            f"{folder / name} is not a readable record of a cut ({why:.200}); delete it to find "
            "the blocks by their weights"
        ) from e


def original_of(removal: RemovalRecord) -> dict[str, Any]:
    """Return the original's name and `sources.model_identity`; empty if not recorded."""
    if isinstance(removal, CutRecord):
        return removal.model
    teacher: dict[str, Any] = removal.provenance.get("teacher") or {}
    return teacher


def start_of(student: Path) -> Literal["cut", "patched", "healed"]:
    """Return the state of a checkpoint by its records: ``cut``, ``patched`` or ``healed``."""
    if (student / RECORD).exists():
        return "healed"
    parts = card_parts_of(student)
    patched = parts is not None and parts.patch is not None and parts.patch.cuts
    return "patched" if patched else "cut"


def card_parts_of(student: Path) -> CardParts | None:
    record = read_removal(student)
    return record.card if isinstance(record, CutRecord) else None
