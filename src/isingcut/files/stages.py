"""The declarations of a run's stages.

    calibration -> energy -> [pack] -> solve -> rank -> cut -> [heal] -> evaluate, benchmarks

Each stage writes one file or folder, and its record in `run.json` has the options, values and
fingerprints of results that it read. `store.Store.find_outdated` compares these with the current
ones. `is_made` decides whether a result has to be made, also in a healing (`healing.work_folder`).
Nothing else decides whether a result is up to date. `runs.stages.stage` binds the function that
makes a result to its declaration here; it gets what is declared, and nothing else.
"""

import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

NUMERICS = ("dtype", "attention")
"""The options of the computation that a result depends on beyond rounding."""


@dataclass(frozen=True)
class Declaration:
    """The file or folder that one stage writes, what it depends on, and how it runs.

    Args:
        verb: the command that runs it.
        file: its file or folder; a pattern if it writes several.
        reads: the results that it reads: a stage, or ``choice`` (the blocks that the ranking
            chose), ``model`` or ``product`` (see `store.Store.find_product`) of its removal.
        values: what it is made from beside these and the options that name it (`options`), found
            before it begins: hashes of files, blocks that the user named, ...
        unused: names among all of these that do not matter, by the options and values.
        model: whether it opens the model.
        numerics: whether it computes with it, so that `NUMERICS` matter.
        of_run: whether a run has it once, not for each removal.
        together: whether all processes make the file, or rank 0 only.
        journals: patterns of the journals next to the file, ``{}`` for its name. They are deleted
            once the result is recorded, so that a kill before that loses nothing.
        additions: values whose change needs no `--overwrite`, because nothing else is lost; of a
            mapping, unless it changes an entry.
    """

    verb: str
    file: str
    reads: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    unused: Callable[[Mapping[str, Any]], Collection[str]] = lambda read: ()
    model: bool = True
    numerics: bool = True
    of_run: bool = False
    together: bool = False
    journals: tuple[str, ...] = ()
    additions: tuple[str, ...] = ()

    @property
    def main(self) -> str:
        """The name of its file or folder, of the main one if it writes several."""
        return self.file.replace("*", "")


_WORD = re.compile(r"\w+")
_ROWS = ("remove", "budget", "keep", "must_remove")
_PATCH = ("patch", "patch_tokens", "patch_share")
SOLVING = ("keep", "must_remove", "solver", "states")
"""The options that are typed for `solve`, and not for the stages that use its spectrum."""
STAGES = {
    "calibration": Declaration(
        "energy",
        "calibration.safetensors",
        values=("energy_samples", "texts"),
        # Only a text that the model writes itself depends on how it computes.
        unused=lambda read: (
            () if {"self", "chat"} & {*_WORD.findall(read["calibration"])} else NUMERICS
        ),
        of_run=True,
    ),
    "energy": Declaration(
        "energy",
        "hamiltonian*.safetensors",
        reads=("calibration",),
        values=("energy", "measured_samples", "settings"),
        # A search looks near some states; another energy is of all.
        unused=lambda read: () if read["searched"] else ("effort", *_ROWS),
        of_run=True,
        together=True,
        journals=("{}.journal",),
    ),
    "pack": Declaration(
        "run",
        "packing.json",
        reads=("calibration",),
        values=("repair", "unseen"),
        together=True,
        journals=("packing.journal",),
    ),
    "solve": Declaration(
        "solve",
        "spectrum.json",
        reads=("energy",),
        model=False,
        numerics=False,
    ),
    "rank": Declaration(
        "rank",
        "candidates.json",
        reads=("calibration", "energy", "spectrum"),
        values=("compared", "tasks"),
        unused=lambda read: () if read["trial_tokens"] else _PATCH,
        together=True,
        journals=(
            *("candidates.journal", "random.journal", "patched.journal"),
            *("searched.journal", ".questions/*.journal"),
        ),
    ),
    "baseline": Declaration(
        "baseline",
        "baseline-*.json",
        reads=("calibration",),
        values=("baseline", "settings", "count", "measured_samples"),
        together=True,
        journals=("{}.journal", "gradients-{}.journal"),
    ),
    "cut": Declaration(
        "excise",
        "model",
        reads=("calibration", "choice"),
        values=("removed", "named", "repair", "unseen"),
        unused=lambda read: (
            ("calibration", "patch_tokens", "patch_share", "unseen", *NUMERICS)
            if read["repair"] == "none"
            else ()
        ),
    ),
    "heal": Declaration(
        "run",
        "healed",
        reads=("calibration", "model"),
        values=("training",),
    ),
    "gguf": Declaration(
        "excise",
        "model.gguf",
        reads=("product",),
        values=("removed", "source", "type"),
        numerics=False,
    ),
    "evaluate": Declaration(
        "evaluate",
        "evaluation.json",
        reads=("calibration", "product"),
        values=("gguf", "decoded", "prompts"),
        journals=("evaluation.journal", "answers-*.journal"),
        additions=("gguf", "prompts"),
    ),
    "benchmarks": Declaration(
        "evaluate",
        "benchmarks.json",
        reads=("product",),
        values=("left_out", "tasks"),
        journals=(".benchmarks/*.journal",),
        additions=("tasks",),
    ),
}
"""The stages, in the order of a run."""


@dataclass(frozen=True)
class Outdated:
    """A result that was made from an earlier value.

    Args:
        file: the file or folder that read the value.
        value: ``"calibration"``, ``"energy"``, ``"spectrum"``, ``"choice"`` or ``"model"``.
    """

    file: Path
    value: str

    def remedy(self, arguments: str) -> str:
        """Say what makes it again.

        Args:
            arguments: those that select its removal, to type after a verb.
        """
        name, stage = find_stage(self.file)
        if name in ("solve", "rank", "cut", "gguf", "evaluate"):
            return f"type: isingcut {stage.verb} {arguments} --overwrite"
        return "type the command that made it again, with --overwrite"


def find_stage(file: Path) -> tuple[str, Declaration]:
    """Return the name and the declaration of the stage that writes a file or folder."""
    return next(s for s in STAGES.items() if fnmatch(file.name, s[1].file))


def is_made(file: Path, made_from: str, now: str) -> bool:
    """Whether a file or folder exists, and was made from what is there now.

    Args:
        made_from: fingerprint of all that it was made from.
        now: the same of what it would be made from now.
    """
    return made_from == now and os.path.lexists(file)
