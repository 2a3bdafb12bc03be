"""The files of a run's stages as a table, and which results are out of date.

    calibration -> energy -> [pack] -> solve -> rank -> cut -> [heal] -> evaluate, benchmarks

Each stage writes one file or folder, and its record in `run.json` has its options and the
fingerprints of the results that it read. `find_outdated` compares these with the current ones.
`is_made` decides whether a result has to be made, also in a healing (`healing.work_folder`).
Nothing else decides whether a result is up to date. `runs.stages` makes and reads the files.
"""

import os
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from isingcut.files.runs import RunFile


@dataclass(frozen=True)
class StageFile:
    """The file or folder of one stage, and what it depends on.

    Args:
        verb: the command that runs it.
        file: its file or folder; a pattern if it writes several.
        reads: the results that it reads: a stage, or ``spectrum``, ``choice`` (the blocks that the
            ranking chose), ``model`` or ``product`` (see `find_product`) of its removal.
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


_SEARCH = ("remove", "budget", "keep", "must_remove")
SOLVING = ("keep", "must_remove", "solver", "states", "solve_seconds")
"""The options that are typed for `solve`, and not for the stages that use its spectrum."""
STAGE_FILES = {
    "calibration": StageFile(
        "energy",
        "calibration.safetensors",
        options=(
            *("calibration", "length", "rank_samples", "report_samples", "seed"),
            "units",
        ),
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
        options=("budget", "keep", "must_remove", "patch", "patch_tokens", "seed"),
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
    "cut": StageFile("excise", "model", reads=("calibration", "choice")),
    "heal": StageFile("run", "healed", reads=("calibration", "model")),
    "gguf": StageFile("excise", "model.gguf", reads=("product",)),
    "evaluate": StageFile(
        "evaluate", "evaluation.json", reads=("calibration", "product")
    ),
    "benchmarks": StageFile("evaluate", "benchmarks.json", reads=("product",)),
}
"""The stages, in the order of a run."""
MADE_AGAIN = {"energy": "solve", "spectrum": "rank", "choice": "excise"}
"""The verb that makes what was made from an earlier value, by the value; `run` of all others."""


def is_made(file: Path, made_from: str, now: str) -> bool:
    """Whether a file or folder exists, and was made from what is there now.

    Args:
        made_from: fingerprint of all that it was made from.
        now: the same of what it would be made from now.
    """
    return made_from == now and os.path.lexists(file)


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
    """Return which value that a file or folder was made from is another one now.

    A result is out of date too if one that it was made from is.

    Args:
        run: the content of run.json in ``folder``.
        file: a stage's file or folder.

    Returns:
        ``"calibration"``, ``"energy"``, ``"spectrum"``, ``"choice"`` or ``"model"``; empty if it is
        up to date.
    """
    made = run.find_record(folder, file)
    if made is None:
        return ""
    read = made.options.content()
    for name in next(
        s for s in STAGE_FILES.values() if fnmatch(file.name, s.file)
    ).reads:
        if name == "choice" and made.options.named:
            continue
        source = _find_source(run, folder, file, name)
        now = run.find_record(folder, source)
        if now is None:
            continue
        key = "model" if name == "product" else name
        if name == "spectrum":
            options = now.options.content()
            same = all(read.get(k, value) == value for k, value in options.items())
        elif name == "choice":
            same = now.chosen in (None, made.options.removed)
        else:
            same = read.get(key) in (None, now.fingerprint)
        if not same:
            return key
        if earlier := find_outdated(run, folder, source):
            return earlier
    return ""


def _find_source(run: RunFile, folder: Path, file: Path, name: str) -> Path:
    """Return the file or folder that another one reads, by its name among the `reads`."""
    if name == "product":
        return find_product(run, folder, file.parent)
    beside = {"spectrum": "solve", "choice": "rank", "model": "cut"}
    if name in beside:
        return file.with_name(STAGE_FILES[beside[name]].file)
    return folder / STAGE_FILES[name].main
