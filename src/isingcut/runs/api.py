"""The Python API: `prune`, `open_run`, and the run that they return.

    run = isingcut.prune("my-model", remove=8)
    run.spectrum
    run.save("smaller-model")

All results are in a run folder, so that you can start a run in Python and inspect, report or resume
it in a shell, and the other way round.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isingcut.console.progress import Progress, as_progress
from isingcut.data.mixture import register_texts
from isingcut.errors import InputError
from isingcut.files import ownership, writing
from isingcut.files.inputs import user_path
from isingcut.files.states import CandidatesFile, MeasuredState
from isingcut.files.store import Store
from isingcut.formats.sources import save_loaded_model
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.spectrum import Spectrum
from isingcut.ising.states import read_whole
from isingcut.memory import convert_memory_errors
from isingcut.options.config import RunConfig
from isingcut.processes import Processes
from isingcut.report.run_files import RunFiles
from isingcut.report.words import ranking_warnings
from isingcut.runs import cutting, evaluating, solving
from isingcut.runs.checks import check_options
from isingcut.runs.folder import list_sources, read_config
from isingcut.runs.pipeline import (
    cut_and_heal,
    measure_and_rank,
    open_again,
    solve_and_rank,
)
from isingcut.runs.pipeline import (
    open_run as open_whole,
)
from isingcut.runs.stages import Runner

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class State:
    """One measured state of a model's blocks.

    Attributes:
        removed: the removed blocks, ascending, numbered from 0.
        energy: the energy, in the unit of the Hamiltonian.
        kl: KL(original || cut), nats per token, on text that the energy did not use.
        kl_se: standard error of ``kl`` over samples; None for a single sample.
        nll: negative log-likelihood, nats per token.
        position: rank among the candidates by energy, 0 for the lowest.

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
    """One removal of a measured model: its spectrum, its chosen state, and its outputs.

    Made by `prune` or `open_run`. Missing results are computed on first use and kept in the run
    folder.

    Examples:
        >>> isingcut.open_run("my-run")
        <isingcut run of my-model: remove 3 of 10 blocks>
    """

    def __init__(
        self, folder: Store, config: RunConfig, runner: Callable[[], Runner]
    ) -> None:
        self._folder = folder
        self._open = runner
        self.config = config
        # The program may change its working folder before the next use.
        folder.path = folder.path.absolute()

    @property
    def _runner(self) -> Runner:
        """The runner that all removals share."""
        return self._open()

    def __repr__(self) -> str:
        removal = self.config.removal
        what = (
            f"remove {removal} of {self.blocks} blocks"
            if removal
            else f"{self.blocks} blocks"
        )
        return f"<isingcut run of {self.config.model}: {what}>"

    @property
    def path(self) -> Path:
        """The folder with this removal's files, an absolute path.

        Examples:
            >>> isingcut.open_run("my-run").path.name
            'my-run'
        """
        return self._folder.target(self.config.removal)

    @property
    def blocks(self) -> int:
        """The number of blocks of the original.

        Examples:
            >>> isingcut.open_run("my-run").blocks
            10
        """
        return len(self._folder.run.blocks.blocks)

    @cached_property
    def hamiltonian(self) -> Hamiltonian:
        """The measured energy.

        Examples:
            >>> isingcut.open_run("my-run").hamiltonian.unit
            'nats/token'
        """
        return solving.read_energy(self._folder)

    @cached_property
    def spectrum(self) -> Spectrum:
        """The low-energy states, ranked.

        Examples:
            >>> len(isingcut.open_run("my-run").spectrum)
            20
        """
        return solving.solve(Runner.of_files(self._folder), self.config)

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
        if self._folder.find_finished(self.path / "candidates.json") is not None:
            # Reading finished results needs no model.
            return solving.read_ranking(self._folder, self.config)
        return solve_and_rank(self._runner, self.config)

    @property
    def candidates(self) -> list[State]:
        """The measured states of the spectrum, in the order of their energy.

        Examples:
            >>> run = isingcut.open_run("my-run")
            >>> run.chosen in run.candidates
            True
        """
        return [_state(row, k) for k, row in enumerate(self._ranked.candidates)]

    @property
    def chosen(self) -> State:
        """The chosen state, which `save` cuts.

        Examples:
            >>> isingcut.open_run("my-run").chosen.kl > 0
            True
        """
        row = self._ranked.chosen
        return _state(row, row.position)

    @property
    def curve(self) -> list[State]:
        """The chosen state of every removal ranked in this folder, fewest blocks first.

        Examples:
            >>> [len(state.removed) for state in isingcut.open_run("my-run").curve]
            [3]
        """
        ranked = [files.candidates for files in RunFiles(self._folder).removals]
        chosen = [file.chosen for file in ranked if file is not None]
        states = [_state(row, row.position) for row in chosen]
        return sorted(states, key=lambda s: (len(s.removed), s.kl))

    @property
    def fidelity(self) -> dict[str, Any]:
        """Rank correlation of energy and measured KL: ``spearman``, the ends of its interval, and
        the number of states ``n``.

        Examples:
            >>> isingcut.open_run("my-run").fidelity["n"]
            60
        """
        return self._ranked.fidelity.kl.content()

    @property
    def warnings(self) -> list[str]:
        """Problems with the results so far, and what to do about them; usually empty.

        Examples:
            >>> [w for w in isingcut.open_run("my-run").warnings if "poorly" in w]
            []
        """
        return RunFiles(self._folder, self.path).warnings

    def at(self, remove: int | str) -> Run:
        """Return another removal of the same Hamiltonian; ranking it needs the model.

        Examples:
            >>> isingcut.open_run("my-run").at(4).spectrum.states.sum(axis=1).tolist()[:2]
            [4, 4]
        """
        return Run(self._folder, self.config.at(remove), self._open)

    @convert_memory_errors()
    def save(
        self,
        out: str | Path,
        *,
        blocks: Sequence[int] | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Write the smaller model, a plain Hugging Face checkpoint with a model card.

        The cut is reloaded and compared with the original with the same blocks skipped. Then it is
        patched (unless ``patch="none"``) and verified again. With the option ``heal`` it is also
        distilled.

        Args:
            out: the new folder.
            blocks: cut these blocks instead of the chosen ones; patched, but not distilled.
            overwrite: allow replacing ``out``.

        Raises:
            OutputExistsError: ``out`` exists.
            BusyError: another process writes there.
            VerificationError: the comparison failed; nothing was kept.

        Examples:
            >>> run = isingcut.open_run("my-run")
            >>> sorted(p.name for p in run.save("by-hand", blocks=[1, 4]).glob("*.safetensors"))
            ['model.safetensors']
        """
        target = user_path(out)
        removed = None if blocks is None else _numbers(blocks)
        sources = [self._runner.context.source, *list_sources(self._folder)]
        sources.append(self._folder.path)
        ownership.check_output(target, overwrite=overwrite, sources=sources)
        with writing.lock_place(target):
            product = self._product(removed)
            with writing.atomic_folder(
                target, overwrite=overwrite, sources=sources
            ) as temporary:
                shutil.copytree(product, temporary, dirs_exist_ok=True)
        return target

    def _product(self, removed: Sequence[int] | None = None) -> Path:
        """Write and return the final checkpoint in the run folder."""
        if removed is not None:
            return cutting.make_model(self._runner, self.config, removed)
        _ = self._ranked
        return cut_and_heal(self._runner, self.config)

    @convert_memory_errors()
    def evaluate(self) -> dict[str, Any]:
        """Measure perplexity, KL, size and speed of both models, on unseen text.

        The smaller model is the patched one, or the healed one with ``heal``.

        Returns:
            the content of evaluation.json: ``before`` and ``after``, ``kl`` with ``kl_se``; for a
            patched model also the exact ``cut``, for a healed one also ``patched``.

        Examples:
            >>> scores = isingcut.open_run("my-run").evaluate()
            >>> scores["after"]["blocks"], scores["before"]["blocks"]
            (7, 10)
        """
        self._product()
        scores = evaluating.evaluate(self._runner, self.config)
        evaluating.rewrite_card(self._folder, self.path)
        return scores.content()

    def report(self) -> Path:
        """Write the report of the results so far; return the path of its Markdown.

        Examples:
            >>> isingcut.open_run("my-run").report().name
            'report.md'
        """
        return solving.report(self._folder, self.path)


def _numbers(blocks: Sequence[int]) -> list[int]:
    with contextlib.suppress(TypeError, InputError):
        numbers = sorted({read_whole(b, "a block") for b in blocks})
        if numbers and numbers[0] >= 0:
            return numbers
    raise InputError(f"blocks must be a list of block numbers, got {blocks!r:.60}")


def _state(row: MeasuredState, position: int) -> State:
    return State(tuple(row.removed), row.energy, row.kl, row.kl_se, row.nll, position)


class PoorEnergyWarning(UserWarning):
    """The energy ranked measured losses poorly; the message has the figures and what to do."""


@convert_memory_errors()
def prune(
    model: str | Path | PreTrainedModel,
    remove: int | str | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    out: str | Path | None = None,
    progress: Progress | bool | None = None,
    **options: Any,
) -> Run:
    """Measure the energy of a model's blocks, solve for the best removals, measure and choose.

    Args:
        model: a Hugging Face folder, a hub id, a ``.gguf`` file, ``"smollm2"``, or a
            loaded transformers model, which is saved into a temporary folder that is deleted with
            the returned object.
        remove: number of blocks to remove (8), or of each kind (``"attention=2,moe=3"``), or a
            range (``"4..15"``, see `Run.curve` and `Run.at`); optional with a ``budget``.
        tokenizer: the tokenizer of a loaded model.
        out: the run folder; finished results there are reused. By default, a temporary folder
            that is deleted with the returned object.
        progress: as in `run`.
        options: every other field of `RunConfig`; ``calibration`` may be a list of texts too.

    Returns:
        the run. `Run.save` writes the checkpoint.

    Raises:
        IsingcutError: bad input, in one line; nothing was written.

    Warns:
        PoorEnergyWarning: the energy ranked the measured states poorly.

    Examples:
        >>> run = isingcut.prune(
        ...     "my-model", remove=3, calibration="my-text.txt", samples=4, length=16
        ... )
        >>> len(run.chosen.removed)
        3
        >>> run.spectrum.proven
        True
        >>> run.save("smaller-model").name
        'smaller-model'
    """
    shown = as_progress(progress)
    loaded = None if isinstance(model, str | Path) else model
    processes = Processes.join()
    if processes.size > 1 and (loaded is not None or out is None):
        raise InputError(
            "several processes need a model on disk and an out folder; give both"
        )
    if tokenizer is not None and loaded is None:
        raise InputError(
            "tokenizer is only for a loaded model; a folder or hub id has its own"
        )
    # Temporary folders are deleted with the returned object.
    with contextlib.ExitStack() as kept:
        if not isinstance(options.get("calibration", ""), str | Path):
            options["calibration"] = kept.enter_context(
                register_texts(options["calibration"])
            )
        if out is None:
            out = kept.enter_context(writing.temporary_folder()) / "run"
        named = model if loaded is None else type(loaded).__name__
        given = {
            "model": named,
            "remove": "" if remove is None else remove,
            "out": out,
            **options,
        }
        config = check_options(None, given, "isingcut.prune")
        if loaded is not None:
            # Save the model last, because that takes long for a large one.
            config = config.replace(
                model=kept.enter_context(save_loaded_model(loaded, tokenizer))
            )
        with open_whole(config, shown, processes, need_removal=True) as runner:
            rankings = measure_and_rank(runner, config)
        run = Run(runner.folder, config, lambda: runner)
        weakref.finalize(run, kept.pop_all().close)
    if processes.rank:
        return run
    texts = [
        text for ranked in rankings for text in ranking_warnings(config.energy, ranked)
    ]
    for text in dict.fromkeys(texts):
        warnings.warn(text, PoorEnergyWarning, stacklevel=3)
    return run


def open_run(
    folder: str | Path,
    remove: int | str | None = None,
    *,
    model: str | Path | None = None,
    progress: Progress | bool | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Run:
    """Open a finished or unfinished run folder, made in Python or on the command line.

    Args:
        folder: the run folder.
        remove: one of its removals; by default the one it was made for.
        model: the current name or path of its model; by default the old one.
        progress: as in `run`.
        overwrite: allow replacing outputs made with other options.
        trust_remote_code: allow the model's own code to run; a run folder never stores this.

    Raises:
        StageFileError: not a run folder, or a damaged one.

    Examples:
        >>> isingcut.open_run("my-run").blocks
        10
    """
    shown = as_progress(progress)
    run = Store.open(user_path(folder), overwrite=overwrite)
    if model is not None and os.path.lexists(user_path(model)):
        model = user_path(model).absolute()
    config = read_config(run) if remove is None else read_config(run).at(remove)
    config = config.replace(
        model=config.model if model is None else model,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    ).validate()
    return Run(run, config, cache(lambda: open_again(run, config, shown)))
