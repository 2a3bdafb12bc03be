"""Stage `heal`: distil the original into the run's model.

It writes its folder and does nothing when that is there, made with the same options
(`RunFolder.stage`).
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isingcut.data.calibration import Calibration
from isingcut.data.healing_text import HealingText
from isingcut.files.documents.scores import ComparedCandidate, HealedCandidates, HealingFile
from isingcut.files.writing import read_document
from isingcut.healing import RECORD
from isingcut.healing.heal import heal_checkpoint, read_healing_text
from isingcut.healing.job import Job
from isingcut.options.healing import HealConfig
from isingcut.options.spellings import parse_healing
from isingcut.runs.folder import RunFolder
from isingcut.runs.healing_options import CHOICE, HEALED, distil_config
from isingcut.runs.measuring import upstream
from isingcut.runs.session import Session


def text_of(session: Session, folder: RunFolder, config: HealConfig) -> HealingText:
    """Text to heal with that no split of the run holds."""
    own = folder.load(folder.path / "calibration.safetensors", Calibration.load)
    return read_healing_text(config, session.loaded, own)


def training_options(folder: RunFolder, config: HealConfig) -> dict[str, Any]:
    """What the result of a training in a run depends on, but for the model that is trained."""
    plain = dataclasses.asdict(config)
    for name in ("student", "teacher", "out", "device", "trust_remote_code", "overwrite"):
        del plain[name]
    return {**plain, **upstream(folder)}


def heal(session: Session, folder: RunFolder) -> Path | None:
    """Stage `heal`: `healed/`, distilled from `model/`, and `healing.json`. None without it."""
    config = session.config
    if not config.heal:
        return None
    healing = distil_config(config)
    target = folder.target(config.removal)
    start = target / "model"
    made = folder.record(start)
    removed = list(map(int, made["options"]["removed"]))
    if config.tried:
        tried = folder.load(target / CHOICE, lambda p: read_document(p, HealedCandidates))
        healing = healing.replace(effort=_left(healing.effort, tried.candidates))
    options = {**training_options(folder, healing), "model": made["fingerprint"]}

    def make(path: Path) -> None:
        if (target / RECORD).exists():
            # Replaced at the end; what is no record of a healing is refused now.
            read_document(target / RECORD, HealingFile)
        text = text_of(session, folder, healing)
        ours = healing.replace(overwrite=True)
        given = (session.loaded, tuple(removed), start, text.train, path, ours, session.progress)
        heal_checkpoint(Job(*given), text, path)
        shutil.copyfile(path / RECORD, target / RECORD)

    return folder.stage("heal", target / HEALED, options, make, lambda path: path)


def _left(effort: str, tried: Sequence[ComparedCandidate]) -> str:
    """What trials of candidates have left over of a budget; a third, however long they took."""
    tokens, seconds = parse_healing(effort)
    if seconds is not None:
        left = max(seconds / 3, seconds - sum(row.seconds for row in tried))
        return f"{left / 60:.6f}min"
    if tokens is not None:
        left = max(tokens / 3, tokens - sum(row.tokens for row in tried))
        return f"{max(1, int(left))}tokens"
    return effort
