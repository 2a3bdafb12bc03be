"""A removal of a measured model as an object: its spectrum, its choice, what can be made of it."""

from __future__ import annotations

import operator
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from isingcut.errors import InputError
from isingcut.files.documents.states import CandidatesFile, CutRecord, MeasuredState
from isingcut.files.inputs import user_path
from isingcut.files.locks import locked
from isingcut.files.outputs import check_output
from isingcut.files.writing import atomic_folder, read_document
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.spectrum import Spectrum
from isingcut.memory import convert_memory_errors
from isingcut.options.config import RunConfig
from isingcut.report.words import patch_warnings, ranking_warnings, search_warnings
from isingcut.runs import patching, pipeline, solving, stages
from isingcut.runs.folder import RunFolder
from isingcut.runs.session import Session
from isingcut.runs.solving import load_candidates

__all__ = ["Run", "State"]


@dataclass(frozen=True)
class State:
    """One measured state of a model's blocks.

    Attributes:
        removed: the blocks that go, ascending, numbered from 0.
        energy: what the Hamiltonian says of it, in the Hamiltonian's unit.
        kl: KL(original || cut), nats per token, on text the energy has not seen.
        kl_se: its standard error over samples; None for a single sample.
        nll: negative log-likelihood, nats per token.
        position: place among the candidates by energy, 0 for the lowest.

    Examples:
        >>> run = isingcut.open_run("my-run")
        >>> list(run.chosen.removed) == run.spectrum.removed(run.chosen.position)
        True
    """

    removed: tuple[int, ...]
    energy: float
    kl: float
    kl_se: float | None
    nll: float
    position: int


class Run:
    """One removal of a measured model: its spectrum, its choice, and what can be made of it.

    Made by `prune` or `open_run`. What is not there yet is made when it is first asked for, and
    kept in the run folder.

    Examples:
        >>> isingcut.open_run("my-run")
        <isingcut run of my-model: 3 of 10 blocks go>
    """

    def __init__(
        self, folder: RunFolder, config: RunConfig, session: Callable[[], Session]
    ) -> None:
        self._folder, self._open, self.config = folder, session, config

    @cached_property
    def _session(self) -> Session:
        return self._open()

    def __repr__(self) -> str:
        go = " go" if self.config.removal.isdecimal() else ""
        what = f"{self.config.removal} of {self.blocks} blocks{go}"
        return f"<isingcut run of {self.config.model}: {what}>"

    @property
    def path(self) -> Path:
        """The folder that holds this removal's files.

        Examples:
            >>> isingcut.open_run("my-run").path
            PosixPath('my-run')
        """
        return self._folder.target(self.config.removal)

    @property
    def blocks(self) -> int:
        """How many blocks the original has.

        Examples:
            >>> isingcut.open_run("my-run").blocks
            10
        """
        return len(self._folder.manifest["blocks"]["blocks"])

    @cached_property
    def hamiltonian(self) -> Hamiltonian:
        """The measured energy.

        Examples:
            >>> isingcut.open_run("my-run").hamiltonian.unit
            'nats/token'
        """
        return self._folder.load(self._folder.path / "hamiltonian.safetensors", Hamiltonian.load)

    @cached_property
    def spectrum(self) -> Spectrum:
        """The low-energy states, ranked.

        Examples:
            >>> len(isingcut.open_run("my-run").spectrum)
            20
        """
        return solving.solve(self._folder, self.config)

    @cached_property
    def ranking(self) -> dict[str, Any]:
        """The content of candidates.json: candidates and random states with their losses.

        Examples:
            >>> run = isingcut.open_run("my-run")
            >>> len(run.ranking["candidates"]) == len(run.spectrum)
            True
        """
        return self._ranked.content()

    @cached_property
    @convert_memory_errors()
    def _ranked(self) -> CandidatesFile:
        file = self.path / "candidates.json"
        if self._folder.finished(file) is not None:
            # Reading what is there needs no model.
            return self._folder.load(file, load_candidates)
        return pipeline.solve_and_rank(self._session, self._folder)

    @property
    def candidates(self) -> list[State]:
        """The spectrum's states as measured, in the order of their energy.

        Examples:
            >>> run = isingcut.open_run("my-run")
            >>> min(run.candidates, key=lambda s: s.kl) == run.chosen
            True
        """
        return [_state(row, k) for k, row in enumerate(self._ranked.candidates)]

    @property
    def chosen(self) -> State:
        """The state that was chosen, and that `save` cuts.

        With the option ``heal_top`` the choice is made again after healing, when `save` or
        `evaluate` is called; this stays the choice of the ranking.

        Examples:
            >>> isingcut.open_run("my-run").chosen.kl > 0
            True
        """
        return _state(self._ranked.chosen, self._ranked.chosen.position)

    @property
    def curve(self) -> list[State]:
        """The chosen state of every removal that was ranked in this folder, fewest blocks first.

        Examples:
            >>> [len(state.removed) for state in isingcut.open_run("my-run").curve]
            [3]
        """
        home = self._folder.path
        files = [home / "candidates.json", *home.glob("remove-*/candidates.json")]
        chosen = [self._folder.load(f, load_candidates).chosen for f in files if f.exists()]
        states = [_state(row, row.position) for row in chosen]
        return sorted(states, key=lambda s: (len(s.removed), s.kl))

    @property
    def fidelity(self) -> dict[str, Any]:
        """How well the energy ranked measured KL: ``spearman`` and ``kendall`` with their
        intervals (``_low``, ``_high``), and ``n`` states.

        Examples:
            >>> isingcut.open_run("my-run").fidelity["n"]
            60
        """
        return self._ranked.fidelity.kl.content()

    @property
    def warnings(self) -> list[str]:
        """What to know before trusting the choice, and what to do; empty where all is well.

        Examples:
            >>> [w for w in isingcut.open_run("my-run").warnings if "poorly" in w]
            []
        """
        far = search_warnings(self.hamiltonian.meta, [self.config.removal])
        return far + ranking_warnings(self.config.energy, self._ranked) + self._unpatched()

    def _unpatched(self) -> list[str]:
        """Why a checkpoint that is there could not be patched."""
        model = self.path / "model"
        if self._folder.finished(model) is None:
            return []
        record = self._folder.load(model, lambda p: read_document(p / "isingcut.json", CutRecord))
        return patch_warnings(record)

    def at(self, remove: int | str) -> Run:
        """Another removal of the same Hamiltonian; solving takes seconds, ranking needs the model.

        Examples:
            >>> isingcut.open_run("my-run").at(4).spectrum.states.sum(axis=1).tolist()[:2]
            [4, 4]
        """
        config = self.config.replace(remove=remove, budget="")
        return Run(self._folder, config, lambda: self._session.at(config))

    @convert_memory_errors()
    def save(
        self, out: str | Path, *, blocks: Sequence[int] | None = None, overwrite: bool = False
    ) -> Path:
        """Write the smaller model, a plain Hugging Face checkpoint with a model card.

        The cut is reloaded and proven to compute what the original does with the same blocks
        skipped; then it is patched (``patch="none"`` leaves that out), and the same is shown of
        the patched one. With the option ``heal`` that is distilled, and the result is written.

        Args:
            out: the new folder.
            blocks: cut these instead of the chosen ones; they are patched, not distilled.
            overwrite: ``out`` may be replaced.

        Raises:
            OutputExistsError: ``out`` is there.
            BusyError: another process writes there.
            VerificationError: the proof failed; nothing was kept.

        Examples:
            >>> run = isingcut.open_run("my-run")
            >>> sorted(p.name for p in run.save("by-hand", blocks=[1, 4]).glob("*.safetensors"))
            ['model.safetensors']
        """
        target = user_path(out)
        removed = None if blocks is None else _numbers(blocks)
        sources = [self._session.source, *self._folder.sources, self._folder.path]
        check_output(target, overwrite=overwrite, sources=sources)
        with locked(target):
            if removed is None and (self.config.patch != "none" or self.config.heal):
                product = self._product()
                with atomic_folder(target, overwrite=overwrite, sources=sources) as temporary:
                    shutil.copytree(product, temporary, dirs_exist_ok=True)
                return target
            removed = list(self.chosen.removed) if removed is None else removed
            patching.write_model(self._session, self._folder, removed, target, overwrite=overwrite)
        return target

    def _product(self) -> Path:
        """The final checkpoint in the run folder."""
        _ = self._ranked
        return pipeline.cut_and_heal(self._session, self._folder)

    @convert_memory_errors()
    def evaluate(self) -> dict[str, Any]:
        """Perplexity, KL, size, speed and memory of both models, on text nothing was chosen on.

        The smaller model is the patched one, or the one distilled from it.

        Returns:
            the content of evaluation.json: ``before`` and ``after``, ``kl`` with ``kl_se``; of a
            patched model also the exact ``cut``, of a distilled one what was ``patched``.

        Examples:
            >>> found = isingcut.open_run("my-run").evaluate()
            >>> found["after"]["blocks"], found["before"]["blocks"]
            (7, 10)
        """
        self._product()
        return stages.evaluate(self._session, self._folder).content()

    def report(self) -> Path:
        """Write the report of what is there so far; the path of its Markdown.

        Examples:
            >>> isingcut.open_run("my-run").report().name
            'report.md'
        """
        return solving.report(self._folder, self.config.removal)


def _numbers(blocks: Sequence[int]) -> list[int]:
    try:
        if found := sorted({operator.index(b) for b in blocks}):
            return found
    except TypeError:
        pass
    raise InputError(f"blocks must be a list of block numbers, got {blocks!r:.60}")


def _state(row: MeasuredState, position: int) -> State:
    return State(tuple(row.removed), row.energy, row.kl, row.kl_se, row.nll, position)
