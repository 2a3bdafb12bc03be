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
    made = run.find_record(folder, file)
    if made is None:
        return ""
    read = made.options.content()
    stages = [s for s in STAGE_FILES.values() if fnmatch(file.name, s.file)]
    for name in stages[0].reads if stages else ():
        if name == "spectrum":
            solved = run.find_record(folder, file.with_name(STAGE_FILES["solve"].file))
            options = solved.options.content() if solved else {}
            if any(read.get(key, value) != value for key, value in options.items()):
                return name
            continue
        if name == "product":
            source = find_product(run, folder, file.parent)
        elif name == "model":
            source = file.with_name(STAGE_FILES["cut"].file)
        else:
            source = folder / STAGE_FILES[name].main
        key = "model" if name == "product" else name
        now = run.find_record(folder, source)
        if now is not None and read.get(key) not in (None, now.fingerprint):
            return key
    return ""
