"""What the files of a run folder say of one removal, for every form of the report.

Reads files only, never a model, and loads no torch. A file that is not there is None.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

from isingcut.files import cuts, documents, evaluations, healings, runs, schema, states
from isingcut.files.ownership import check_recorded
from isingcut.files.results import read_document
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.report import words
from isingcut.report.rows import Row, evaluation_rows

T = TypeVar("T")
D = TypeVar("D", bound=schema.Document)

PLAIN_CLASS = "AutoModelForCausalLM"
"""What loads a checkpoint of which nothing else is known."""


def _document(name: str, model: type[D], made_with: str = "") -> cached_property[D | None]:
    """Declare a file of a removal; for ``made_with`` see `RunFiles.read`."""
    return cached_property(
        lambda files: files.read(
            files.target / name, partial(read_document, model=model), made_with
        )
    )


class RunFiles:
    """Everything a report is made of; a file is read and checked when it is first looked at.

    Args:
        folder: the run folder, with its `run.json`.
        target: where the files of one removal are; by default the run folder itself.
        run: `run.json`, where it is read already.

    Attributes:
        blocks: the model's blocks.
        energy: the name of the energy that chose.
        model: the model as it was named.
        calibration: the text that it was measured on.
        gguf: the cut GGUF file, if there is one.
        healed: whether there is a healed checkpoint.

    Raises:
        StageFileError: `run.json` is missing, or a file that is there is damaged, was changed
            since the run wrote it, or does not fit the run's model.
    """

    def __init__(
        self, folder: Path, target: Path | None = None, run: runs.RunFile | None = None
    ) -> None:
        self.folder, self.target = folder, target or folder
        self.run = run or read_document(folder / "run.json", runs.RunFile)
        origin, self.blocks = self.run.provenance, self.run.blocks.blocks
        self.energy, self.model = self.run.config.energy, origin.model.name
        self.calibration = origin.calibration
        # The evaluation is then of that checkpoint.
        self.healed = (self.target / "healed").is_dir()
        packed = self.target / "model.gguf"
        self.gguf = packed if packed.is_file() and not self.is_outdated(packed) else None

    def record(self, path: Path) -> runs.StageRecord | None:
        """What `run.json` says of a file or folder that a finished stage wrote."""
        found = self.run.stages.get(path.relative_to(self.folder).as_posix())
        return found if found is not None and found.done else None

    def is_outdated(self, path: Path) -> bool:
        """Whether a file was made from an earlier checkpoint than the one that is there now."""
        made, product = self.record(path), self.record(self.product)
        model = made and path != self.product and made.options.content().get("model")
        return bool(model and product and model != product.fingerprint)

    def read(self, path: Path, read: Callable[[Path], T], made_with: str = "") -> T | None:
        """Read what a finished stage wrote; None where it did not, or of an earlier checkpoint.

        Args:
            made_with: the folder of this removal that it is in or next to, which has a record.
        """
        recorded = self.target / made_with if made_with else path
        begun = recorded.relative_to(self.folder).as_posix() in self.run.stages
        unfinished = self.record(recorded) is None and (begun or made_with)
        if unfinished or not os.path.lexists(path) or self.is_outdated(recorded):
            return None
        if not made_with:
            check_recorded(self.run.stages, self.folder, path)
        found = read(path)
        documents.check_blocks(path, found, len(self.blocks))
        return found

    candidates = _document("candidates.json", states.CandidatesFile)
    evaluation = _document("evaluation.json", evaluations.EvaluationFile)
    benchmarks = _document("benchmarks.json", evaluations.BenchmarksFile)
    removal = _document("model/isingcut.json", cuts.CutRecord, "model")
    healing = _document("healing.json", healings.HealingFile, "healed")
    packing = _document("packing.json", runs.PackingFile)

    @cached_property
    def spectrum(self) -> states.SpectrumFile | None:
        """`spectrum.json`, with the states that a search found beyond it."""
        found = self.read(
            self.target / "spectrum.json", partial(read_document, model=states.SpectrumFile)
        )
        return found and with_searched(found, self.candidates)

    @cached_property
    def baselines(self) -> list[states.BaselineFile]:
        """All `baseline-NAME.json`, lowest measured KL first."""
        files = sorted(self.target.glob("baseline-*.json"))
        found = [
            self.read(file, partial(read_document, model=states.BaselineFile)) for file in files
        ]
        return sorted((b for b in found if b is not None), key=lambda b: b.kl)

    @cached_property
    def hamiltonian(self) -> Hamiltonian | None:
        """The energy that chose."""
        return self.read(self.folder / "hamiltonian.safetensors", Hamiltonian.load)

    @cached_property
    def energies(self) -> dict[str, Hamiltonian]:
        """All measured energies by name, the one that chose first."""
        found = {self.energy: self.hamiltonian}
        for path in sorted(self.folder.glob("hamiltonian.*.safetensors")):
            name = path.name.removeprefix("hamiltonian.").removesuffix(".safetensors")
            found[name] = self.read(path, Hamiltonian.load)
        return {name: energy for name, energy in found.items() if energy is not None}

    @property
    def comparable(self) -> bool:
        """The energy is in the unit of a loss."""
        return self.hamiltonian is not None and self.hamiltonian.unit == "nats/token"

    @cached_property
    def removals(self) -> list[RunFiles]:
        """All removals that were solved in the folder, fewest blocks first."""
        below = sorted(p for p in self.folder.glob("remove-*") if p.is_dir())
        all_of_them = [RunFiles(self.folder, place, self.run) for place in (self.folder, *below)]
        found = [r for r in all_of_them if r.spectrum is not None or r.candidates is not None]
        return sorted(found, key=lambda r: 0 if r.best is None else len(r.best.removed))

    @property
    def name(self) -> str:
        """The requested removal, for example ``"6"`` or ``"params=25%"``."""
        if self.target == self.folder:
            return self.run.config.remove or self.run.config.budget
        solved = self.record(self.target / "spectrum.json")
        requested = solved and (solved.options.remove or solved.options.budget)
        return str(requested or self.target.name.removeprefix("remove-"))

    @property
    def best(self) -> states.MeasuredState | states.Ranked | None:
        """What was cut, as the ranking measured it; before a cut, the ranking's choice.

        Before a ranking it is the ground state, without a loss. None where blocks were named by
        hand that no ranking measured.
        """
        if (ranking := self.candidates) is not None:
            rows = (ranking.chosen, *ranking.candidates, *ranking.random)
            return next((r for r in rows if sorted(r.removed) == self.removed), None)
        return None if self.spectrum is None else self.spectrum.states[0]

    def gone(self, cost: str) -> int:
        """How much of a cost of blocks the removed ones have, once there are some."""
        return sum(getattr(self.blocks[i], cost) for i in self.removed or ())

    @property
    def meta(self) -> states.EnergyMeta:
        """The energy's provenance; empty before it is measured."""
        found = {} if self.hamiltonian is None else dict(self.hamiltonian.meta)
        return states.EnergyMeta.model_validate(found)

    @property
    def removed(self) -> list[int] | None:
        """What is gone from the checkpoint; without one, what was chosen."""
        made = self.record(self.target / "model")
        if self.removal is not None and made is not None:
            return sorted(made.options.removed or [])
        return None if self.candidates is None else sorted(self.candidates.chosen.removed)

    @property
    def summary(self) -> str:
        """What was removed and why, in one paragraph; empty before a choice."""
        return "" if self.removed is None else words.sentence("summary", self, self.removed)

    @property
    def verdict(self) -> str:
        """What a reader must know to decide; empty before a choice."""
        if self.removed is not None:
            return words.sentence("verdict", self)
        return "" if self.packing is None else words.sentence("packing_words", self)

    @property
    def last(self) -> str:
        """What the final model is."""
        if self.healed:
            return "healed"
        return "patched" if self.patch is not None and self.patch.changed else "cut"

    @property
    def patch(self) -> cuts.PatchRecord | None:
        """What was patched of the checkpoint; None where nothing was to be."""
        return None if self.removal is None else self.removal.patch

    @cached_property
    def scores(self) -> list[Row]:
        """The original and the final model; none before they were evaluated."""
        return [] if self.evaluation is None else evaluation_rows(self.evaluation, last=self.last)

    @property
    def judged(self) -> dict[str, states.Judged]:
        """How well each energy ranked measured losses, by the energy's name."""
        if self.candidates is None:
            return {}
        return {self.energy: self.candidates.fidelity, **self.candidates.fidelity_of_others}

    @property
    def warnings(self) -> list[str]:
        """What a reader must know before trusting the energy, the cut, its patch or its figures."""
        said: list[str] = []
        if self.candidates is not None:
            said += words.ranking_warnings(self.energy, self.candidates)
        if self.removal is not None and self.removal.proof is not None:
            said += self.removal.proof.remarks
        patched = (f for f in (self.removal, self.evaluation) if f is not None)
        said += dict.fromkeys(line for f in patched for line in words.patch_warnings(f))
        if self.evaluation is not None:
            said += words.part_warnings(self.evaluation)
        text = self.calibration
        return said + words.overlap_warnings({} if text is None else text.overlap)

    @property
    def winners(self) -> list[states.BaselineFile]:
        """Baselines that keep all constraints and have a lower measured KL than the choice."""
        if self.candidates is None:
            return []
        # What was patched for the choice has lost to it.
        known = (self.candidates.chosen, *self.candidates.candidates)
        mine = min(row.kl for row in known if row is known[0] or row.patched_kl is not None)
        return [b for b in self.baselines if b.kl < mine and not b.violated]

    @property
    def title(self) -> str:
        """The model and how many of its blocks are gone."""
        total, removed = len(self.blocks), self.removed
        if removed is None:
            return f"{self.model}: {total} blocks"
        return f"{self.model} without {len(removed)} of its {total} blocks"

    @property
    def arguments(self) -> str:
        """What to type after a stage's verb to work on this removal."""
        name = self.folder.resolve().name
        if self.target == self.folder:
            return name
        key = (self.target / "spectrum.json").relative_to(self.folder).as_posix()
        solved = self.run.stages.get(key)
        return name if solved is None else f"{name} --remove {solved.options.remove}"

    @property
    def loads_with(self) -> str:
        """The class of transformers that loads the checkpoint."""
        card = None if self.removal is None else self.removal.card
        return PLAIN_CLASS if card is None else card.loads_with

    @property
    def product(self) -> Path:
        """The folder of the final checkpoint."""
        return self.target / ("healed" if self.healed else "model")

    @property
    def checkpoint(self) -> str | None:
        """How the checkpoint is reached from where the run folder is."""
        if self.removal is None:
            return None
        below = self.product.relative_to(self.folder)
        return (Path(self.folder.resolve().name) / below).as_posix()


def with_searched(
    spectrum: states.SpectrumFile, candidates: states.CandidatesFile | None
) -> states.SpectrumFile:
    """A spectrum with the candidates that a search found beyond it, ranked by energy.

    A spectrum that was solved anew since is left as it is.
    """
    own = {tuple(s.removed) for s in spectrum.states}
    rows = () if candidates is None else candidates.candidates
    if not own <= {tuple(r.removed) for r in rows}:
        return spectrum
    more = [r for r in rows if tuple(r.removed) not in own]
    ordered = sorted([*spectrum.states, *more], key=lambda s: s.energy)
    ranked = [
        states.Ranked(rank=k, energy=s.energy, removed=s.removed) for k, s in enumerate(ordered)
    ]
    return spectrum.model_copy(update={"states": ranked, "searched": len(more)})
