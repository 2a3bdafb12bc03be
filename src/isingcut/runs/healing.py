"""Stage `heal`: distil the original into the run's model; whether it can is looked at before
anything is measured.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from isingcut.data import healing_text
from isingcut.data.calibration import Calibration
from isingcut.data.mixture import places_in
from isingcut.data.text_files import only_once
from isingcut.errors import InputError
from isingcut.files.documents import HealingFile
from isingcut.files.writing import read_document
from isingcut.healing import RECORD
from isingcut.healing.checks import check_training
from isingcut.healing.heal import heal_checkpoint, sample_length
from isingcut.models.processes import launched
from isingcut.options.config import HealConfig, RunConfig, distil_config, heal_config
from isingcut.runs.cutting import HEALED
from isingcut.runs.folder import RunFolder
from isingcut.runs.measuring import upstream
from isingcut.runs.session import Session
from isingcut.runs.solving import each_removal


def check_options(config: RunConfig) -> None:
    """Refuse healing options that cannot work, before any model is read.

    Raises:
        InputError: as `heal_config`, or a text that cannot be healed with.
    """
    if config.heal:
        _check_text(config, distil_config(config))
    elif config.patch != "none":
        heal_config(config)


def check(session: Session) -> None:
    """Refuse before anything is written what healing would refuse at the end.

    The patch alone is refused nowhere: where it cannot be, the run says so and goes on.
    """
    config = session.config
    if not config.heal:
        return
    healing = heal_config(config)
    check_training(healing)
    if len(each_removal(config)) > 1:
        raise InputError(
            "a run over a range of removals cuts no checkpoint, so there is none to heal; "
            "give one number with --remove"
        )
    if launched():
        raise InputError(
            "healing inside a run is done by one process; heal the cut model afterwards with: "
            "torchrun ... -m isingcut heal"
        )
    if session.streaming:
        raise InputError(
            "a model that is streamed from disk cannot be healed in the run: training needs the "
            "weights in memory; heal the cut model with `isingcut heal` on a larger machine"
        )


def _check_text(config: RunConfig, healing: HealConfig) -> None:
    sources = places_in(healing.text)
    if "self" in sources:
        raise InputError(
            "healing needs real text; name some in a file given as --heal-options (text: FILE)"
        )
    measured = places_in(config.calibration)
    if pipes := [source for source in sources if source in measured and only_once(source)]:
        raise InputError(
            f"healing needs more of the text than was measured on, but {pipes[0]} is a pipe, "
            "which can be read once; write it into a file, or name another text in a file given "
            "as --heal-options (text: FILE)"
        )


def heal(session: Session, folder: RunFolder) -> Path | None:
    """Stage `heal`: `healed/`, distilled from `model/`, and `healing.json`. None without it."""
    config = session.config
    if not config.heal:
        return None
    healing = distil_config(config)
    target = folder.target(config.removal)
    start = target / "model"
    made = folder.record(start)
    removed = made.options.removed or []
    plain = dataclasses.asdict(healing)
    for name in ("student", "teacher", "out", "device", "trust_remote_code", "overwrite"):
        del plain[name]
    options = {**plain, **upstream(folder), "model": made.fingerprint}

    def make(path: Path) -> None:
        if (target / RECORD).exists():
            # Replaced at the end; what is no record of a healing is refused now.
            read_document(target / RECORD, HealingFile)
        # That no split of the run holds.
        text = healing_text.build(
            healing.text,
            session.loaded.tokenizer,
            samples=healing.samples,
            report_samples=healing.report_samples,
            length=sample_length(healing, session.loaded.model),
            seed=healing.seed,
            used=folder.load(folder.path / "calibration.safetensors", Calibration.load),
            model=session.loaded.model,
        )
        ours = healing.replace(overwrite=True)
        heal_checkpoint(ours, session.loaded, removed, start, text, path, session.progress)
        shutil.copyfile(path / RECORD, target / RECORD)

    return folder.stage("heal", target / HEALED, options, make, lambda path: path)
