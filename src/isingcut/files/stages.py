"""The files of a run's stages as a table, and which results are out of date.

    calibration -> energy -> [pack] -> solve -> rank -> cut -> [heal] -> evaluate, benchmarks

Each stage writes one file or folder, and its record in `run.json` has its options and the
fingerprints of the results that it read. `find_outdated` compares these with the current ones.
`is_made` decides whether a result has to be made, also in a healing (`healing.work_folder`).
Nothing else decides whether a result is up to date. `runs.stages` makes and reads the files.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from isingcut.files.runs import RunFile, StageRecord


@dataclass(frozen=True)
class StageFile:
    """The file or folder of one stage, and what it depends on.

    Args:
        verb: the command that runs it.
        file: its file or folder; a pattern if it writes several.
        reads: the results that it reads, as names in `READS`.
        options: the options of a run that its record has as they were typed.
        of_run: whether a run has it once, not for each removal.
    """

    verb: str
    file: str
    reads: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    of_run: bool = False

    @property
    def main(self) -> str:
        """The name of its file or folder, of the main one if it writes several."""
        return self.file.replace("*", "")


_SEARCH = ("remove", "budget", "keep", "drop")
SOLVING = ("keep", "drop", "solver", "states", "solve_seconds")
"""The options that are typed for `solve`, and not for the stages that use its spectrum."""
STAGE_FILES = {
    "calibration": StageFile(
        "energy",
        "calibration.safetensors",
        options=("calibration", "length", "rank_samples", "report_samples", "seed"),
        of_run=True,
    ),
    "energy": StageFile(
        "energy",
        "hamiltonian*.safetensors",
        reads=("calibration",),
        options=("energy", *_SEARCH, "effort"),
        of_run=True,
    ),
    "pack": StageFile(
        "run",
        "packing.json",
        reads=("calibration",),
        options=("budget", "keep", "drop", "patch", "patch_tokens", "seed"),
    ),
    "solve": StageFile(
        "solve",
        "spectrum.json",
        reads=("energy",),
        options=("remove", "budget", "seed", *SOLVING),
    ),
    "rank": StageFile(
        "rank",
        "candidates.json",
        reads=("energy", "spectrum"),
        options=("random_states", "choose"),
    ),
    "baseline": StageFile("baseline", "baseline-*.json", reads=("calibration",)),
    "cut": StageFile("excise", "model", reads=("calibration",)),
    "heal": StageFile("run", "healed", reads=("calibration", "model")),
    "gguf": StageFile("excise", "model.gguf", reads=("product",)),
    "evaluate": StageFile(
        "evaluate", "evaluation.json", reads=("calibration", "product")
    ),
    "benchmarks": StageFile("evaluate", "benchmarks.json", reads=("product",)),
}
"""The stages, in the order of a run."""


def is_made(file: Path, made_from: str, now: str) -> bool:
    """Whether a file or folder exists, and was made from what is there now.

    Args:
        made_from: fingerprint of all that it was made from.
        now: the same of what it would be made from now.
    """
    return made_from == now and os.path.lexists(file)


def find_stage(file: Path) -> StageFile | None:
    """Return the stage that writes a file or folder, by its name; None for other files."""
    return next(
        (stage for stage in STAGE_FILES.values() if fnmatch(file.name, stage.file)),
        None,
    )


def find_product(run: RunFile, folder: Path, target: Path) -> Path:
    """Return the final checkpoint of a removal: the healed one of the current cut, else `model/`.

    Args:
        folder: the run folder.
        target: the folder with the files of the removal.
    """
    healed = target / STAGE_FILES["heal"].file
    made = run.find_record(folder, healed)
    current = made is not None and made.done and not find_outdated(run, folder, healed)
    return healed if current else target / STAGE_FILES["cut"].file


def find_outdated(run: RunFile, folder: Path, file: Path) -> str:
    """Return which result a file or folder was made from that has been made again since.

    Args:
        run: the content of run.json in ``folder``.
        file: a stage's file or folder.

    Returns:
        ``"calibration"``, ``"energy"``, ``"spectrum"`` or ``"model"``; empty if it is up to date.
    """
    stage = find_stage(file)
    made = run.find_record(folder, file)
    if stage is None or made is None:
        return ""
    read = made.options.content()
    places = {
        "calibration": ("calibration", folder / STAGE_FILES["calibration"].file),
        "energy": ("energy", folder / STAGE_FILES["energy"].main),
        "model": ("model", file.with_name(STAGE_FILES["cut"].file)),
    }
    for name in stage.reads:
        if name == "spectrum":
            solved = run.find_record(folder, file.with_name(STAGE_FILES["solve"].file))
            if solved is not None and not _has_options(made, solved):
                return name
            continue
        if name == "product":
            key = "model"
            source = find_product(run, folder, file.parent)
        else:
            key, source = places[name]
        now = run.find_record(folder, source)
        if now is not None and read.get(key) not in (None, now.fingerprint):
            return key
    return ""


def _has_options(made: StageRecord, solved: StageRecord) -> bool:
    """Whether a ranking has the options of a spectrum."""
    read = made.options.content()
    now = solved.options.content()
    return all(read[key] == value for key, value in now.items() if key in read)
