"""The files of one removal in a run folder, for every form of the report.

Reads files only, never a model, and does not import torch. A missing file is None.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

from isingcut.files import (
    cuts,
    evaluations,
    healings,
    runs,
    schema,
    stages,
    states,
)
from isingcut.files.ownership import check_recorded
from isingcut.files.results import check_blocks, read_document
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.report import words
from isingcut.report.rows import Row, evaluation_rows

T = TypeVar("T")
D = TypeVar("D", bound=schema.Document)

PLAIN_CLASS = "AutoModelForCausalLM"
"""Default transformers class for loading a checkpoint."""


def _document(
    name: str, model: type[D], made_with: str = ""
) -> cached_property[D | None]:
    """Make a property that reads a file of a removal; for ``made_with`` see `RunFiles.read`."""
    return cached_property(
        lambda files: files.read(
            files.target / name, partial(read_document, model=model), made_with
        )
    )


class RunFiles:
    """The content of a report; each file is read and checked on first access.

    Args:
        folder: the run folder, with its `run.json`.
        target: the folder with the files of one removal; by default the run folder.
        run: the content of `run.json`, if it was read already.

    Attributes:
        blocks: the blocks of the model, with their costs.
        energy: name of the run's main energy.
        model: name or path of the model, as given in the options.
        calibration: record of the calibration text, or None.
        gguf: path of the cut GGUF file of the current checkpoint, or None.
        healed: whether a healed checkpoint of this cut exists.
        called: the run folder in commands, by default its name, because a path may be private.

    Raises:
        StageFileError: `run.json` is missing, or an existing file is damaged, was changed
            since the run wrote it, or does not fit the run's model.
    """

    def __init__(
        self, folder: Path, target: Path | None = None, run: runs.RunFile | None = None
    ) -> None:
        self.folder = folder
        self.target = target or folder
        self.called = folder.resolve().name
        self.run = run or read_document(folder / "run.json", runs.RunFile)
        origin = self.run.provenance
        self.blocks = self.run.blocks.blocks
        self.energy = self.run.config.energy
        self.model = origin.model.name
        self.calibration = origin.calibration
        found = stages.find_product(self.run, self.folder, self.target)
        # If it is of this cut, the evaluation is of the healed checkpoint.
        self.healed = found.name == "healed" and found.is_dir()
        packed = self.target / "model.gguf"
        self.gguf = (
            packed if packed.is_file() and not self.is_outdated(packed) else None
        )

    def record(self, path: Path) -> runs.StageRecord | None:
        """Return the record in `run.json` of a finished stage's file or folder, or None."""
        found = self.run.find_record(self.folder, path)
        return found if found is not None and found.done else None

    def is_outdated(self, path: Path) -> bool:
        """Whether a file was made from an earlier text, energy or checkpoint than the current."""
        return stages.find_outdated(self.run, self.folder, path) not in ("", "spectrum")

    def read(
        self, path: Path, read: Callable[[Path], T], made_with: str = ""
    ) -> T | None:
        """Read a file; return None if it is missing, unfinished or outdated.

        Args:
            made_with: name of the folder in ``target`` whose record includes the file; by default
                the file has its own record.
        """
        recorded = self.target / made_with if made_with else path
        begun = self.run.find_record(self.folder, recorded)
        unfinished = not begun.done if begun else made_with
        if unfinished or not os.path.lexists(path) or self.is_outdated(recorded):
            return None
        if not made_with:
            check_recorded(begun, path)
        found = read(path)
        check_blocks(path, found, len(self.blocks))
        return found

    candidates = _document("candidates.json", states.CandidatesFile)
    evaluation = _document("evaluation.json", evaluations.EvaluationFile)
    benchmarks = _document("benchmarks.json", evaluations.BenchmarksFile)
    removal = _document("model/isingcut.json", cuts.CutRecord, "model")
    healing = _document("healing.json", healings.HealingFile, "healed")
    packing = _document("packing.json", runs.PackingFile)
    _solved = _document("spectrum.json", states.SpectrumFile)

    @cached_property
    def spectrum(self) -> states.SpectrumFile | None:
        """Content of `spectrum.json`, with the further states that a search found."""
        return self._solved and add_searched_states(self._solved, self.candidates)

    @cached_property
    def baselines(self) -> list[states.BaselineFile]:
        """Contents of all `baseline-NAME.json` of this removal, lowest measured KL first.

        After `run --overwrite` with another removal, the folder has those of the earlier one, too.
        """
        files = sorted(self.target.glob("baseline-*.json"))
        found = [
            self.read(file, partial(read_document, model=states.BaselineFile))
            for file in files
        ]
        chosen = (
            None if self.candidates is None else len(self.candidates.chosen.removed)
        )
        own = [b for b in found if b is not None and chosen in (None, len(b.removed))]
        return sorted(own, key=lambda b: b.kl)

    @cached_property
    def hamiltonian(self) -> Hamiltonian | None:
        """Hamiltonian of the run's main energy, or None before it is measured."""
        return self.read(self.folder / "hamiltonian.safetensors", Hamiltonian.load)

    @cached_property
    def energies(self) -> dict[str, Hamiltonian]:
        """All measured Hamiltonians by the name of their energy, the main energy first."""
        found = {self.energy: self.hamiltonian}
        for path in sorted(self.folder.glob("hamiltonian.*.safetensors")):
            name = path.name.removeprefix("hamiltonian.").removesuffix(".safetensors")
            found[name] = self.read(path, Hamiltonian.load)
        return {name: energy for name, energy in found.items() if energy is not None}

    @property
    def comparable(self) -> bool:
        """Whether the main energy has the unit of the measured KL, nats per token."""
        return self.hamiltonian is not None and self.hamiltonian.unit == "nats/token"

    @cached_property
    def removals(self) -> list[RunFiles]:
        """All solved or ranked removals of the run folder, fewest removed blocks first."""
        below = sorted(p for p in self.folder.glob("remove-*") if p.is_dir())
        all_of_them = [
            RunFiles(self.folder, place, self.run) for place in (self.folder, *below)
        ]
        found = [
            r for r in all_of_them if r.spectrum is not None or r.candidates is not None
        ]
        return sorted(found, key=lambda r: 0 if r.best is None else len(r.best.removed))

    @property
    def solved(self) -> runs.StageOptions | None:
        """The options that this removal was solved with; None for blocks named by hand."""
        found = self.record(self.target / "spectrum.json")
        return None if found is None else found.options

    @property
    def name(self) -> str:
        """The requested removal, for example ``"6"`` or ``"params=25%"``."""
        if self.target == self.folder:
            return self.run.config.remove or self.run.config.budget
        requested = self.solved and (self.solved.remove or self.solved.budget)
        return str(requested or self.target.name.removeprefix("remove-"))

    @property
    def best(self) -> states.MeasuredState | states.Ranked | None:
        """The removed state as the ranking measured it, or the ranking's choice before a cut.

        Before a ranking, this is the ground state of the spectrum, without a loss. None without a
        spectrum, or if the blocks were given by hand and the ranking did not measure them.
        """
        if (ranking := self.candidates) is not None:
            rows = (ranking.chosen, *ranking.candidates, *ranking.random)
            return next((r for r in rows if sorted(r.removed) == self.removed), None)
        return None if self.spectrum is None else self.spectrum.states[0]

    def gone(self, cost: str) -> int:
        """Return the sum of a cost over the removed blocks; 0 before a choice."""
        return sum(getattr(self.blocks[i], cost) for i in self.removed or ())

    @property
    def meta(self) -> states.EnergyMeta:
        """Provenance of the main energy; empty before it is measured."""
        found = {} if self.hamiltonian is None else dict(self.hamiltonian.meta)
        return states.EnergyMeta.model_validate(found)

    @property
    def removed(self) -> list[int] | None:
        """Blocks removed from the checkpoint, or the ranking's chosen blocks before a cut."""
        made = self.record(self.target / "model")
        if self.removal is not None and made is not None:
            return sorted(made.options.removed or [])
        return (
            None if self.candidates is None else sorted(self.candidates.chosen.removed)
        )

    @property
    def summary(self) -> str:
        """Paragraph on the removed blocks and how they were chosen; empty before a choice."""
        return (
            ""
            if self.removed is None
            else words.sentence("summary", self, self.removed)
        )

    @property
    def verdict(self) -> str:
        """The sentences of the `verdict` as one text; empty before a choice."""
        return " ".join(self.judgement)

    @property
    def judgement(self) -> list[str]:
        """Sentences on quality, size, speed, budget and the next step; none before a choice."""
        if self.removed is not None:
            return words.paragraphs("verdict", self)
        return [] if self.packing is None else words.paragraphs("packing_words", self)

    @property
    def last(self) -> str:
        """Name of the final model: `cut`, `patched` or `healed`."""
        if self.healed:
            return "healed"
        return "patched" if self.patch is not None and self.patch.changed else "cut"

    @property
    def patch(self) -> cuts.PatchRecord | None:
        """Record of the checkpoint's patch; None before a cut or if no patch was requested."""
        return None if self.removal is None else self.removal.patch

    @cached_property
    def scores(self) -> list[Row]:
        """Rows of the evaluation of the original and the cut models; empty without one."""
        return [] if self.evaluation is None else evaluation_rows(self.evaluation)

    @property
    def judged(self) -> dict[str, states.Judged]:
        """Agreement of each energy's ranking with the measured losses, by the energy's name."""
        if self.candidates is None:
            return {}
        return {
            self.energy: self.candidates.fidelity,
            **self.candidates.fidelity_of_others,
        }

    @property
    def warnings(self) -> list[str]:
        """Warnings about the energy, the choice, the cut, its repair and its figures."""
        found: list[str] = []
        if self.hamiltonian is not None and self.spectrum is not None:
            found += words.search_warnings(self.hamiltonian.meta, [self.name])
        if self.candidates is not None:
            found += words.ranking_warnings(self.energy, self.candidates)
        if self.removal is not None:
            found += self.removal.proof.remarks if self.removal.proof else []
            found += words.patch_warnings(self.removal)
        if self.evaluation is not None:
            found += words.patch_warnings(self.evaluation)
            found += words.paragraphs("part_warnings", self.evaluation)
        if self.calibration is not None:
            found += words.overlap_warnings(self.calibration.overlap)
            found += words.repeat_warnings(self.calibration)
        if self.healing is not None:
            found += words.healing_warnings(self.healing)
        return list(dict.fromkeys(found))

    @property
    def winners(self) -> list[states.BaselineFile]:
        """Baselines that keep all constraints and have a lower KL than the chosen state."""
        if self.candidates is None:
            return []
        # Candidates that were patched for the choice count too: patched, they were no better.
        known = (self.candidates.chosen, *self.candidates.candidates)
        mine = min(
            row.kl for row in known if row is known[0] or row.patched_kl is not None
        )
        return [b for b in self.baselines if b.kl < mine and not b.violated]

    @property
    def title(self) -> str:
        """Name of the model, with its number of blocks and of removed blocks."""
        total = len(self.blocks)
        removed = self.removed
        if removed is None:
            return f"{self.model}: {total} blocks"
        return f"{self.model} without {len(removed)} of its {total} blocks"

    @property
    def arguments(self) -> str:
        """Command-line arguments that select this removal, to type after a stage's verb."""
        name = shlex.quote(self.called)
        if self.target == self.folder:
            return name
        if self.solved is None and not self.name.isdigit():
            return f"{name} --blocks {','.join(map(str, self.removed or ()))}"
        flag = "--budget" if self.solved and not self.solved.remove else "--remove"
        return f"{name} {flag} {self.name}"

    @property
    def loads_with(self) -> str:
        """Name of the transformers class that loads the checkpoint."""
        card = None if self.removal is None else self.removal.card
        return PLAIN_CLASS if card is None else card.loads_with

    @property
    def product(self) -> Path:
        """The folder of the final checkpoint."""
        return self.target / ("healed" if self.healed else "model")

    @property
    def checkpoint(self) -> str | None:
        """Path of the final checkpoint from the run folder's parent, or None before a cut."""
        if self.removal is None:
            return None
        return (Path(self.called) / self.product.relative_to(self.folder)).as_posix()


def add_searched_states(
    spectrum: states.SpectrumFile, candidates: states.CandidatesFile | None
) -> states.SpectrumFile:
    """Add the candidates that a search found beyond a spectrum, and rank all by energy.

    A spectrum with a state that was not ranked (solved again since) is returned unchanged.
    """
    own = {tuple(s.removed) for s in spectrum.states}
    rows = () if candidates is None else candidates.candidates
    if not own <= {tuple(r.removed) for r in rows}:
        return spectrum
    more = [r for r in rows if tuple(r.removed) not in own]
    ordered = sorted([*spectrum.states, *more], key=lambda s: s.energy)
    ranked = [
        states.Ranked(rank=k, energy=s.energy, removed=s.removed)
        for k, s in enumerate(ordered)
    ]
    return spectrum.model_copy(update={"states": ranked, "searched": len(more)})
