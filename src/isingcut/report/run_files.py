"""What the files of a run folder say of one removal, for every form of the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.report.choice import one_pass_words
from isingcut.report.fidelity import ranking_warnings
from isingcut.report.rows import Row, evaluation_rows, plus_minus
from isingcut.report.words import numbers, overlap_warnings, part_warnings, patch_warnings

PLAIN_CLASS = "AutoModelForCausalLM"
"""What loads a checkpoint of which nothing else is known."""


@dataclass(frozen=True)
class RemovalFiles:
    """The results of one removal of a run: the run's own, or one of its `remove-SPEC` folders.

    Attributes:
        name: what was asked for, for example ``"6"`` or ``"params=25%"``.
        cut: blocks that its checkpoint lacks, None before there is one.
        own: it is the removal that is being reported.
    """

    name: str
    spectrum: dict[str, Any] | None
    candidates: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    cut: list[int] | None
    own: bool

    @property
    def best(self) -> dict[str, Any] | None:
        """What was cut, as the ranking measured it; before a cut, the ranking's choice.

        Before a ranking it is the ground state, without a loss. None where blocks were named by
        hand that no ranking measured.
        """
        if self.candidates is not None:
            found: dict[str, Any] = self.candidates["chosen"]
            if self.cut is None or sorted(found["removed"]) == self.cut:
                return found
            rows = [*self.candidates["candidates"], *self.candidates["random"]]
            return next((r for r in rows if sorted(r["removed"]) == self.cut), None)
        if self.spectrum is not None and self.spectrum["states"]:
            ground: dict[str, Any] = self.spectrum["states"][0]
            return ground
        return None


@dataclass(frozen=True, eq=False)
class RunFiles:
    """Everything a report is made of.

    Attributes:
        folder: the run folder.
        target: where the files of this removal are: the run folder itself or one below it.
        run: `run.json`.
        removal: the record inside the checkpoint, `model/isingcut.json`.
        others: Hamiltonians measured beside the main one, by name.
        baselines: the contents of all `baseline-NAME.json`, lowest measured KL first.
        healing: `healing.json`: losses over the steps, and the scores before and after.
        healed_candidates: `healed-candidates.json`: candidates compared after a little healing.
        benchmarks: `benchmarks.json`: under ``rows`` task, metric, scores of both models.
        removals: all removals solved in the folder, fewest blocks first.
        healed: a healed checkpoint is there; the evaluation is then of it.
        exact: the exact cut is there beside the patched one.
        gguf: a cut GGUF file is there.
    """

    folder: Path
    target: Path
    run: dict[str, Any]
    spectrum: dict[str, Any] | None = None
    candidates: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    removal: dict[str, Any] | None = None
    hamiltonian: Hamiltonian | None = None
    others: dict[str, Hamiltonian] = field(default_factory=dict)
    baselines: list[dict[str, Any]] = field(default_factory=list)
    healing: dict[str, Any] | None = None
    healed_candidates: dict[str, Any] | None = None
    benchmarks: dict[str, Any] | None = None
    removals: list[RemovalFiles] = field(default_factory=list)
    healed: bool = False
    exact: bool = False
    gguf: bool = False

    @property
    def blocks(self) -> list[dict[str, Any]]:
        """The model's blocks as `run.json` describes them."""
        blocks: list[dict[str, Any]] = self.run["blocks"]["blocks"]
        return blocks

    @property
    def energy(self) -> str:
        """The name of the energy that chose."""
        return str(self.run["config"]["energy"])

    @property
    def model(self) -> str:
        """The model as it was named."""
        return str(self.run["provenance"]["model"]["name"])

    @property
    def calibration(self) -> dict[str, Any]:
        """The text that it was measured on; empty before there is one."""
        found: dict[str, Any] | None = self.run["provenance"].get("calibration")
        return found or {}

    @property
    def meta(self) -> dict[str, Any] | None:
        """The energy's provenance."""
        return None if self.hamiltonian is None else dict(self.hamiltonian.meta)

    @property
    def removed(self) -> list[int] | None:
        """What is gone from the checkpoint; without one, what was chosen."""
        if self.removal is not None:
            return sorted(self.removal["removed"])
        return None if self.candidates is None else sorted(self.candidates["chosen"]["removed"])

    @property
    def summary(self) -> str:
        """What was removed and why, in one paragraph; empty before a choice."""
        return "" if self.removed is None else self.summary_of(self.removed)

    def summary_of(self, removed: Sequence[int]) -> str:
        """The same of any removal: only what the files say of it."""
        noun, verb = ("Block", "is") if len(removed) == 1 else ("Blocks", "are")
        said = f"{noun} {numbers(removed)} of {len(self.blocks)} (numbered from 0) {verb} removed."
        return f"{said} {self._reason(sorted(removed))}"

    def _reason(self, removed: list[int]) -> str:
        candidates, healed, meta = self.candidates, self.healed_candidates, self.meta or {}
        if candidates is None:
            return "The run's files hold no measured ranking behind this choice."
        chosen, count = candidates["chosen"], len(candidates["candidates"])
        won = one_pass_words(candidates) if sorted(chosen["removed"]) == removed else ""
        if healed is not None and sorted(healed["chosen"]["removed"]) == removed:
            best, tried = healed["chosen"], len(healed["candidates"])
            steps = f"{best['steps']} steps" if best.get("steps") else "a few steps"
            figures = (
                f"(KL {plus_minus(best['kl'], best['kl_se'])} nats per token, before "
                f"{best['kl_before']:.4f})"
            )
            if tried == 1:
                return (
                    f"Its measured KL was the lowest; the budget was too small to compare it with "
                    f"others after {steps} of healing {figures}. {won}".rstrip()
                )
            return (
                f"{tried} candidates were healed for {steps} on the same text and measured again; "
                f"this one was then the best {figures}. {won}".rstrip()
            )
        if sorted(chosen["removed"]) != removed:
            return "They were named by hand, not chosen from a spectrum."
        text = f", measured on {meta['tokens']} tokens" if "tokens" in meta else ""
        text += f" as {meta['loss']}" if text and "loss" in meta else ""
        given = f"the {count} lowest states of an Ising model over the blocks"
        if "search" in meta:
            given = (
                f"{count} candidates: the lowest states of an Ising model over the blocks, and "
                "what its search and one pass of the original had found"
            )
        position = chosen["position"]
        place = "the ground state" if position == 0 else f"state {position}"
        energy = f"{chosen['energy']:.4g} {candidates['energy_unit']}".rstrip()
        return (
            f"An energy (`{self.energy}`{text}) gave {given}; each was then measured on "
            f"{candidates['tokens']} other tokens. The choice is {place} of that spectrum (0 is "
            f"the lowest), energy {energy}, for this reason: {chosen['why']} "
            f"(KL {plus_minus(chosen['kl'], chosen['kl_se'])} nats per token). "
            f"{won}".rstrip()
        )

    @property
    def last(self) -> str:
        """What the final model is."""
        if self.healed:
            return "healed"
        return "patched" if (self.patch or {}).get("changed") else "cut"

    @property
    def patch(self) -> dict[str, Any] | None:
        """What was patched of the checkpoint; None where nothing was to be."""
        return None if self.removal is None else self.removal.get("patch")

    @property
    def scores(self) -> list[Row]:
        """The original and the final model; none before they were evaluated."""
        return [] if self.evaluation is None else evaluation_rows(self.evaluation, last=self.last)

    @property
    def judged(self) -> dict[str, dict[str, Any]]:
        """How well each energy ranked measured losses, by the energy's name."""
        if self.candidates is None:
            return {}
        return {
            self.energy: self.candidates["fidelity"],
            **self.candidates.get("fidelity_of_others", {}),
        }

    @property
    def warnings(self) -> list[str]:
        """What a reader must know before trusting the energy, the cut, its patch or its figures."""
        said = [] if self.proof is None else list(self.proof["remarks"])
        patch = [*patch_warnings(self.removal or {}), *patch_warnings(self.evaluation or {})]
        said += dict.fromkeys(patch)
        said += part_warnings(self.evaluation or {"kl": 0.0})
        said += overlap_warnings(self.calibration.get("overlap", {}))
        if self.candidates is None:
            return said
        return ranking_warnings(self.energy, self.candidates) + said

    @property
    def proof(self) -> dict[str, Any] | None:
        """How the exact cut was proven; None where none is there, or an older one."""
        return None if self.removal is None else self.removal.get("proof")

    @property
    def won(self) -> list[str]:
        """Baselines that keep all constraints and have a lower measured KL than the choice."""
        if self.candidates is None:
            return []
        mine = float(self.candidates["chosen"]["kl"])
        return [
            b["baseline"] for b in self.baselines if float(b["kl"]) < mine and not b["violated"]
        ]

    @property
    def not_run(self) -> list[str]:
        """Stages whose files are not there."""
        absent = {
            "energy": self.hamiltonian,
            "solve": self.spectrum,
            "rank": self.candidates,
            "excise": self.removal,
            "evaluate": self.evaluation,
        }
        return [stage for stage, found in absent.items() if found is None]

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
        record = self.run["stages"].get(key)
        return name if record is None else f"{name} --remove {record['options'].get('remove')}"

    @property
    def loads_with(self) -> str:
        """The class of transformers that loads the checkpoint."""
        card = (self.removal or {}).get("card") or {}
        return str(card.get("loads_with", PLAIN_CLASS))

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
