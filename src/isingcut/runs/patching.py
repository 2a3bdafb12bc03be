"""Stage `patch`: the cut of one state, with a linear map folded into the block before each cut.

calibration's text -> fit -> patched checkpoint, verified; where no layer can take a map, the exact
cut, which then says why.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isingcut.data.calibration import Calibration
from isingcut.data.fitting_text import FittingText, to_fit
from isingcut.data.mixture import told
from isingcut.files.writing import (
    atomic_folder,
    clear_os_errors,
    read_json,
    temporary_prefix,
    without_header,
)
from isingcut.healing.job import Job
from isingcut.healing.patch.files import RECORD
from isingcut.healing.patch.linear import CANNOT, patch_checkpoint, unpatched
from isingcut.report.card import model_card
from isingcut.runs.cutting import CUT, excise, place_of, write_checkpoint
from isingcut.runs.folder import RunFolder
from isingcut.runs.healing_options import patch_config
from isingcut.runs.measuring import upstream
from isingcut.runs.session import Session
from isingcut.runs.solving import chosen_blocks


def make_model(session: Session, folder: RunFolder, removed: Sequence[int] | None = None) -> Path:
    """`model/` of one state: the exact cut, proven, and patched where the options say so.

    The exact cut is kept beside it as `cut/` with the option ``keep_cut``, and until the patched
    one is finished.

    Args:
        removed: these blocks instead of the chosen ones; see `place_of` for where they go.
    """
    config = session.config
    if config.patch == "none":
        return excise(session, folder, removed)
    blocks = list(removed) if removed is not None else chosen_blocks(folder, config)
    place = place_of(folder, config, removed)
    healing = patch_config(config)
    how = {"tokens": healing.patch_tokens, "maps": "reads", "tuned": healing.tunes}
    options = {"removed": blocks, "patch": {**how, **upstream(folder)}}

    def make(path: Path) -> None:
        cut = excise(session, folder, removed, name=CUT)
        _write(session, folder, blocks, cut, path, keep=config.keep_cut, overwrite=True)

    def drop() -> None:
        if not config.keep_cut:
            folder.drop(place / CUT)

    model = folder.stage("patch", place / "model", options, make, lambda path: path, forget=drop)
    if config.keep_cut:
        excise(session, folder, removed, name=CUT)
    return model


def write_model(
    session: Session,
    folder: RunFolder,
    removed: Sequence[int],
    out: Path,
    *,
    overwrite: bool = False,
) -> None:
    """The same outside the run folder, which learns nothing of it.

    Raises:
        OutputExistsError: ``out`` is there and ``overwrite`` is false.
        VerificationError: a proof failed; nothing is left at ``out``.
    """
    if session.config.patch == "none":
        write_checkpoint(session, folder, removed, out, overwrite=overwrite)
        return
    with clear_os_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = tempfile.TemporaryDirectory(".part", temporary_prefix(out), out.parent)
    with aside as place:
        cut = Path(place) / CUT
        write_checkpoint(session, folder, removed, cut)
        _write(session, folder, removed, cut, out, keep=False, overwrite=overwrite)


def _write(
    session: Session,
    folder: RunFolder,
    removed: Sequence[int],
    cut: Path,
    out: Path,
    *,
    keep: bool,
    overwrite: bool,
) -> None:
    """The patched checkpoint at ``out``, with its record and card; unpatched where it must be.

    Args:
        keep: leave ``cut`` where it is, whatever comes of it.
    """
    sources = [session.source, *folder.sources, cut]
    with atomic_folder(out, overwrite=overwrite, sources=sources) as temporary:
        temporary.rmdir()
        try:
            found = _patched(session, folder, removed, cut, temporary)
        except CANNOT as e:
            found = unpatched(removed, e)
            if keep:
                shutil.copytree(cut, temporary)
            else:
                cut.rename(temporary)
        record = without_header(read_json(temporary / RECORD, "removal"))
        record["card"]["patch"] = record["patch"] = found
        content = {"format": "isingcut-removal", "version": 1, **record}
        with clear_os_errors(out):
            text = json.dumps(content, indent=1) + "\n"
            (temporary / RECORD).write_text(text, encoding="utf-8")
            (temporary / "README.md").write_text(model_card(record["card"]), encoding="utf-8")


def _patched(
    session: Session, folder: RunFolder, removed: Sequence[int], cut: Path, out: Path
) -> dict[str, Any]:
    """What was fitted, on which text, and how it was proven.

    Raises:
        ArchitectureError, FitError: nothing can be patched, with the reason.
    """
    loaded, used, text = session.loaded, session.config.calibration, _text(session, folder)
    how = patch_config(session.config).replace(batch_tokens=session.tuning.batch_tokens)
    job = Job(
        loaded,
        tuple(removed),
        cut,
        text.tokens,
        out.parent,
        how,
        session.progress,
        session.streamed[1] if session.streaming else None,
    )
    found = patch_checkpoint(job, out)
    return {
        "unpatched": [],
        **found,
        "text": {
            "source": told(used),
            "samples": text.tokens.samples,
            "searched": text.searched,
            "tokens": int(text.tokens.mask.sum()),
            "asked": session.config.patch_tokens,
            "short": text.short,
        },
    }


def _text(session: Session, folder: RunFolder) -> FittingText:
    loaded = session.loaded
    used = folder.load(folder.path / "calibration.safetensors", Calibration.load)
    return to_fit(used, loaded.tokenizer, session.config.patch_tokens, loaded.model)
