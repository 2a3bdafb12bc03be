"""The files of one removal in a run folder, for every form of the report.

Reads files only, never a model, and does not import torch. A missing file is None.
"""

from __future__ import annotations

import os
import shlex
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

from isingcut.files import cuts, evaluations, healings, runs, schema, stages, states
from isingcut.files.ownership import check_recorded
from isingcut.files.results import read_document
from isingcut.files.store import Store
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.options.parsed import Budgets
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
        store: the run folder.
        target: the folder with the files of one removal; by default the run folder.

    Attributes:
        blocks: the blocks of the model, with their costs.
        energy: name of the run's main energy.
        model: name or path of the model, as given in the options.
        calibration: record of the calibration text, or None.
        gguf: path of the cut GGUF file of the current checkpoint, or None.
        healed: whether a healed checkpoint of this cut exists.
        called: the run folder in commands, by default its name, because a path may be private.

    Raises:
        StageFileError: an existing file is damaged or was changed since the run wrote it.
    """

    def __init__(self, store: Store, target: Path | None = None) -> None:
        self.store = store
        self.folder = store.path
        self.run = store.run
        self.target = target or store.path
        self.called = store.path.resolve().name
        origin = self.run.provenance
        self.blocks = self.run.blocks.blocks
        self.energy = self.run.config.energy
        self.model = origin.model.name
        self.calibration = origin.calibration
        product = store.find_product(self.target)
        # If it is of this cut, the evaluation is of the healed checkpoint.
        self.healed = product.name == "healed" and product.is_dir()
        packed = self.target / "model.gguf"
        self.gguf = (
            packed if packed.is_file() and not self.is_outdated(packed) else None
        )

    def record(self, path: Path) -> runs.StageRecord | None:
        """Return the record in `run.json` of a finished stage's file or folder, or None."""
        record = self.store.find_record(path)
        return record if record and record.done else None

    def is_outdated(self, path: Path) -> bool:
        """Whether a file was made from an earlier text, energy or checkpoint than the current."""
        found = self.store.find_outdated(path, ranked=False)
        return found is not None and found.value != "spectrum"

    def read(
        self, path: Path, read: Callable[[Path], T], made_with: str = ""
    ) -> T | None:
        """Read a file; return None if it is missing, unfinished or outdated.

        Args:
            made_with: name of the folder in ``target`` whose record includes the file; by default
                the file has its own record.
        """
        recorded = self.target / made_with if made_with else path
        begun = self.store.find_record(recorded)
        unfinished = not begun.done if begun else made_with
        if unfinished or not os.path.lexists(path) or self.is_outdated(recorded):
            return None
        if not made_with:
            check_recorded(begun, path)
        return read(path)

    candidates = _document("candidates.json", states.CandidatesFile)
    evaluation = _document("evaluation.json", evaluations.EvaluationFile)
    benchmarks = _document("benchmarks.json", evaluations.BenchmarksFile)
    removal = _document("model/isingcut.json", cuts.CutRecord, "model")
    healing = _document("healed/healing.json", healings.HealingFile, "healed")
    packing = _document("packing.json", runs.PackingFile)
    _solved = _document("spectrum.json", states.SpectrumFile)

    @cached_property
    def spectrum(self) -> states.SpectrumFile | None:
        """Content of `spectrum.json`, with the further states that a search found."""
        if self._solved and self.candidates:
            return add_searched_states(self._solved, self.candidates.candidates)
        return self._solved

    @cached_property
    def baselines(self) -> list[states.BaselineFile]:
        """Contents of all `baseline-NAME.json` of this removal, lowest measured KL first.

        After `run --overwrite` with another removal, the folder has those of the earlier one, too.
        """
        read = partial(read_document, model=states.BaselineFile)
        files = sorted(self.target.glob("baseline-*.json"))
        own = filter(None, (self.read(file, read) for file in files))
        if self.candidates:
            size = len(self.candidates.chosen.removed)
            own = filter(lambda baseline: len(baseline.removed) == size, own)
        return sorted(own, key=lambda baseline: baseline.kl)

    @cached_property
    def hamiltonian(self) -> Hamiltonian | None:
        """Hamiltonian of the run's main energy, or None before it is measured."""
        return self.read(self.folder / "hamiltonian.safetensors", Hamiltonian.load)

    @cached_property
    def energies(self) -> dict[str, Hamiltonian]:
        """All measured Hamiltonians by the name of their energy, the main energy first."""
        energies = {self.energy: self.hamiltonian}
        for path in sorted(self.folder.glob("hamiltonian.*.safetensors")):
            name = path.name.removeprefix("hamiltonian.").removesuffix(".safetensors")
            energies[name] = self.read(path, Hamiltonian.load)
        return {name: energy for name, energy in energies.items() if energy}

    @cached_property
    def removals(self) -> list[RunFiles]:
        """All solved or ranked removals of the run folder, fewest removed blocks first."""
        below = sorted(p for p in self.folder.glob("remove-*") if p.is_dir())
        removals = [RunFiles(self.store, place) for place in (self.folder, *below)]
        known = [r for r in removals if r.spectrum or r.candidates]
        return sorted(known, key=lambda r: len(r.best.removed) if r.best else 0)

    @property
    def solved(self) -> runs.StageOptions | None:
        """The options that this removal was solved with; None for blocks named by hand."""
        record = self.record(self.target / "spectrum.json")
        return record.options if record else None

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
            return next((r for r in rows if r.removed == self.removed), None)
        return self.spectrum.states[0] if self.spectrum else None

    def gone(self, cost: str) -> int:
        """Return the sum of a cost over the removed blocks; 0 before a choice."""
        return sum(getattr(self.blocks[i], cost) for i in self.removed or ())

    @property
    def meta(self) -> states.EnergyMeta:
        """Provenance of the main energy; empty before it is measured."""
        return states.EnergyMeta(**(self.hamiltonian.meta if self.hamiltonian else {}))

    @property
    def removed(self) -> list[int] | None:
        """Blocks removed from the checkpoint, or the ranking's chosen blocks before a cut."""
        made = self.record(self.target / "model")
        if self.removal and made:
            return made.options.removed
        return self.candidates.chosen.removed if self.candidates else None

    @property
    def summary(self) -> str:
        """Paragraph on the removed blocks and how they were chosen; empty before a choice."""
        removed = self.removed
        return "" if removed is None else words.sentence("summary", self, removed)

    @property
    def verdict(self) -> str:
        """The paragraphs of the `judgement` as lines of one text; empty before a choice."""
        return "\n".join(self.judgement)

    @property
    def judgement(self) -> list[str]:
        """What to expect, a list of figures (each begins with a dash), the budget, and the next
        command alone; none before a choice."""
        if self.removed is not None:
            return words.paragraphs("verdict", self)
        return words.paragraphs("packing_words", self) if self.packing else []

    @property
    def wanted_speed(self) -> float:
        """How many times as fast decoding should be, of the solved budget; 0 without a wish."""
        part = Budgets(self.solved.budget if self.solved else "").part("speed")
        return 1 + (part.share or 0.0) if part else 0.0

    @property
    def last(self) -> str:
        """Name of the final model: `cut`, `patched` or `healed`."""
        if self.healed:
            return "healed"
        return "patched" if self.patch and self.patch.changed else "cut"

    @property
    def patch(self) -> cuts.PatchRecord | None:
        """Record of the checkpoint's patch; None before a cut or if no patch was requested."""
        return self.removal.patch if self.removal else None

    @cached_property
    def scores(self) -> list[Row]:
        """Rows of the evaluation of the original and the cut models; empty without one."""
        if not self.evaluation:
            return []
        return evaluation_rows(self.evaluation, self.endings)

    @property
    def endings(self) -> evaluations.Endings | None:
        """How the answers to the fixed prompts and to the tasks ended; None without any."""
        answers = self.evaluation and self.evaluation.answers
        pairs = list[evaluations.EndingPair](answers.pairs if answers else [])
        pairs += self.benchmarks.endings if self.benchmarks else []
        return evaluations.Endings(pairs=pairs) if pairs else None

    @property
    def lost(self) -> float:
        """Largest share that the answers lost: `Endings.lost`, or of the followed instructions."""
        rows = self.benchmarks.rows if self.benchmarks else []
        followed = [r for r in rows if r.metric.startswith("followed") and r.original]
        shares = [1 - r.cut / r.original for r in followed if r.more_than_noise]
        if self.answered and self.endings:
            shares.append(self.endings.lost)
        return max(shares, default=0.0)

    @property
    def answered(self) -> tuple[int, int, int] | None:
        """The prompts that the final model answers, that the original answers, and all of them;
        None for a model without a chat template, or without likelihoods."""
        answers = self.evaluation and self.evaluation.answers
        if not (answers and answers.chat and self.endings):
            return None
        after, before = (self.endings.answered(side) for side in ("after", "before"))
        return (int(sum(after)), int(sum(before)), len(after)) if after else None

    @property
    def judged(self) -> dict[str, states.Judged]:
        """Agreement of each energy's ranking with the measured losses, by the energy's name."""
        ranking = self.candidates
        if not ranking:
            return {}
        return {self.energy: ranking.fidelity, **ranking.fidelity_of_others}

    @property
    def warnings(self) -> list[str]:
        """Warnings about the energy, the choice, the cut, its repair and its figures."""
        return list(dict.fromkeys(words.paragraphs("warnings", self)))

    @property
    def outdated(self) -> list[str]:
        """What was made from an earlier value, and the command that makes it again."""
        found = defaultdict[stages.Outdated, list[str]](list)
        places = dict.fromkeys([self.folder, self.target])
        for key in self.run.stages:
            path = self.folder / key
            outdated = self.store.find_outdated(path)
            if outdated and path.parent in places and os.path.lexists(path):
                found[outdated].append(path.name)
        return [
            f"{' and '.join(names)}: made before the {outdated.value} changed; "
            f"{outdated.remedy(self.arguments)}"
            for outdated, names in found.items()
        ]

    @property
    def winners(self) -> list[states.BaselineFile]:
        """Baselines that keep all constraints and have a lower KL than the chosen state."""
        ranking = self.candidates
        if not ranking:
            return []
        # Candidates that were patched for the choice count too: patched, they were no better.
        patched = [row.kl for row in ranking.candidates if row.patched_kl is not None]
        mine = min([ranking.chosen.kl, *patched])
        return [b for b in self.baselines if b.kl < mine and not b.violated]

    @property
    def title(self) -> str:
        """Name of the model, with its number of blocks and of removed blocks."""
        total = f"{len(self.blocks)} {'sublayers' if self.split else 'blocks'}"
        if self.removed is None:
            return f"{self.model}: {total}"
        return f"{self.model} without {len(self.removed)} of its {total}"

    @property
    def split(self) -> bool:
        """Whether the blocks are sublayers."""
        return any(block.layer != block.index for block in self.blocks)

    def name_blocks(self, removed: Sequence[int]) -> str:
        """Return blocks as words, sublayers by the numbers of their layers."""
        if not self.split:
            named = f"block{'s' if len(removed) > 1 else ''} {words.numbers(removed)}"
            return f"{named} (of {len(self.blocks)}, numbered from 0)"
        layers = defaultdict[str, list[int]](list)
        for i in removed:
            layers[self.blocks[i].kind].append(self.blocks[i].layer)
        named = " and ".join(
            f"the {kind} of layer{'s' if len(own) > 1 else ''} {words.numbers(own)}"
            for kind, own in layers.items()
        )
        return f"{named} (of {self.blocks[-1].layer + 1} layers, numbered from 0)"

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
        card = self.removal and self.removal.card
        return card.loads_with if card else PLAIN_CLASS

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
    spectrum: states.SpectrumFile, rows: list[states.MeasuredState]
) -> states.SpectrumFile:
    """Add the candidates that a search found beyond a spectrum, and rank all by energy.

    A spectrum with a state that was not ranked (solved again since) is returned unchanged.
    """
    own = {tuple(s.removed) for s in spectrum.states}
    if not own <= {tuple(r.removed) for r in rows}:
        return spectrum
    more = [r for r in rows if tuple(r.removed) not in own]
    ordered = sorted([*spectrum.states, *more], key=lambda s: s.energy)
    ranked = [
        states.Ranked(rank=k, energy=s.energy, removed=s.removed)
        for k, s in enumerate(ordered)
    ]
    return spectrum.model_copy(update={"states": ranked, "searched": len(more)})
