"""The stages after the energy: solve, rank, excise, evaluate, report; one function each.

Each writes its file of the run folder and does nothing when that file is there, made with the
same options (`RunFolder.stage`). Solving needs the Hamiltonian's file only; no model is loaded.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from isingcut.errors import InputError, StageFileError
from isingcut.files import atomic_folder, fingerprint, read_json, write_json
from isingcut.inputs import regular_file
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem
from isingcut.ising.spectrum import Spectrum
from isingcut.measure.sharing import forget
from isingcut.options.config import RunConfig
from isingcut.outputs import file_sha256, refuse_source
from isingcut.runs.folder import RunFolder, slug
from isingcut.runs.healing_stages import chosen_after_healing, product
from isingcut.runs.measuring import names, other_path, splits_of, upstream, work_of
from isingcut.runs.removal import make_problem

if TYPE_CHECKING:
    from isingcut.data.tokens import TokenSet
    from isingcut.runs.session import Session

# What is made of one state.
_CUT = ("model", "model.gguf")
# Of a list of blocks in the name of a folder; a hash stands for more.
_LONGEST_NAME = 100


def solve(folder: RunFolder, config: RunConfig) -> Spectrum:
    """Stage `solve`: `spectrum.json` of one removal, from the Hamiltonian's file alone."""
    from isingcut.ising.solvers import imports
    from isingcut.ising.solvers import solve as find

    file = folder.path / "hamiltonian.safetensors"
    if not file.exists():
        raise StageFileError(
            f"expected {file}, which is not there; run: isingcut energy MODEL --out {folder.path}"
        )
    problem = problem_of(folder, config)
    options = _solve_options(folder, config)

    def make(path: Path) -> None:
        if imports(config.solver) and folder.typed_solver != config.solver:
            raise InputError(
                f"{folder.path} asks for the solver {config.solver}, whose code would be imported; "
                f"if you trust it, type it yourself: --solver {config.solver}"
            )
        spectrum = find(
            problem, config.solver, config.states, diverse=config.diverse, **_solver_options(config)
        )
        spectrum.save(path)

    target = folder.target(config.removal)
    return folder.stage("solve", target / "spectrum.json", options, make, Spectrum.load)


def problem_of(folder: RunFolder, config: RunConfig) -> Problem:
    """The constrained problem of one removal of this folder's Hamiltonian."""
    hamiltonian = folder.load(folder.path / "hamiltonian.safetensors", Hamiltonian.load)
    return make_problem(hamiltonian, folder.manifest["blocks"], config)


def _solver_options(config: RunConfig) -> dict[str, Any]:
    """Seed and time limit, for a solver that has such options."""
    from isingcut.ising.solvers import registry

    part = registry.get(config.solver)
    fields = {f.name for f in dataclasses.fields(part)} if dataclasses.is_dataclass(part) else set()
    given = {"seed": config.seed, "seconds": config.solve_seconds}
    return {k: v for k, v in given.items() if k in fields}


def _solve_options(folder: RunFolder, config: RunConfig) -> dict[str, Any]:
    record = folder.manifest["stages"].get("hamiltonian.safetensors")
    if record is None or not record["done"]:
        raise StageFileError(
            f"the energy of {folder.path} is not finished; "
            f"run: isingcut energy MODEL --out {folder.path}"
        )
    keys = ("remove", "budget", "keep", "drop", "solver", "states", "diverse", "seed")
    return {"energy": record["fingerprint"]} | {k: getattr(config, k) for k in keys}


def rank(session: Session, folder: RunFolder) -> dict[str, Any]:
    """Stage `rank`: `candidates.json`, the spectrum's states beside random ones, measured."""
    config = session.config
    target = folder.target(config.removal)
    spectrum = folder.load(_needs(folder, config, "spectrum.json", "solve"), Spectrum.load)
    others = {
        name: folder.load(other_path(folder, name), Hamiltonian.load) for name in names(config.also)
    }
    options = _solve_options(folder, config) | {
        "random_states": config.random_states,
        "choose": config.choose,
        "also": sorted(others),
    }
    journal = target / "candidates.journal"

    def make(path: Path) -> None:
        from isingcut.evaluation import candidates

        split = splits_of(folder)["rank"]
        problem = problem_of(folder, config)
        considered = with_found(spectrum, problem, config)
        with session.computing(folder):
            ranking = candidates.rank(
                session.replay,
                split,
                problem,
                considered,
                random_states=config.random_states,
                seed=config.seed,
                choose=config.choose,
                work=work_of(session, journal),
            )
        content = candidates.to_dict(ranking, problem.hamiltonian, others, config.removal)
        write_json(path, "candidates", content)

    file = target / "candidates.json"
    found = folder.stage("rank", file, options, make, _load_candidates, together=True)
    # Not before the stage is recorded as done: a kill in between would cost all of it.
    if not folder.processes.rank:
        forget(journal)
    return found


def with_found(spectrum: Spectrum, problem: Problem, config: RunConfig) -> Spectrum:
    """The candidates to measure: a spectrum, and what a search found for the same removal."""
    search = problem.hamiltonian.meta.get("search", {})
    found = search.get("targets", {}).get(config.removal, {}).get("finalists", [])
    if not found:
        return spectrum
    states = np.zeros((len(found), problem.n), dtype=bool)
    for row, finalist in zip(states, found, strict=True):
        row[finalist["removed"]] = True
    return Spectrum.from_states(
        problem,
        np.concatenate([spectrum.states, states]),
        # The lowest stay the lowest, whatever else is measured beside them.
        proven=spectrum.proven,
        solver=f"{spectrum.solver} and search",
        seconds=spectrum.seconds,
        info=spectrum.info,
    )


def _load_candidates(path: Path) -> dict[str, Any]:
    return read_json(path, "candidates")


def _needs(folder: RunFolder, config: RunConfig, name: str, stage: str) -> Path:
    """A file of an earlier stage of this removal."""
    path = folder.target(config.removal) / name
    if not path.exists():
        which = f"--remove {config.remove}" if config.remove else f"--budget {config.budget}"
        raise StageFileError(
            f"expected {path}, which is not there; type: isingcut {stage} {folder.path} {which}"
        )
    return path


def chosen_blocks(folder: RunFolder, config: RunConfig) -> list[int]:
    """The blocks that the ranking of one removal chose, or the healed candidates after it."""
    after = chosen_after_healing(folder, config)
    if after is not None:
        return after
    found = folder.load(_needs(folder, config, "candidates.json", "rank"), _load_candidates)
    return [int(i) for i in found["chosen"]["removed"]]


def place_of(folder: RunFolder, config: RunConfig, removed: Sequence[int] | None) -> Path:
    """Where the model of a state is written: with the other files of its removal.

    A state that is named by its blocks shares that folder with no other: where another one was
    chosen or cut there, and may not be replaced, it has a folder of its own.

    Args:
        removed: the blocks that were named; None is the chosen state.
    """
    target = folder.target(config.removal)
    if removed is None or folder.overwrite:
        return target
    stages = folder.manifest["stages"]
    cut = (stages.get(str((target / name).relative_to(folder.path))) for name in _CUT)
    there = [record["options"]["removed"] for record in cut if record is not None]
    ranked = target / "candidates.json"
    if ranked.exists():
        there.append(folder.load(ranked, _load_candidates)["chosen"]["removed"])
    if all(sorted(blocks) == sorted(removed) for blocks in there):
        return target
    named = "-".join(map(str, removed))
    if len(named) > _LONGEST_NAME:
        named = fingerprint({"removed": list(removed)})[:16]
    return folder.path / f"remove-{slug(config.removal)}-blocks-{named}"


def excise(session: Session, folder: RunFolder, removed: Sequence[int] | None = None) -> Path:
    """Stage `excise`: `model/`, verified against the original with the same blocks skipped.

    Args:
        removed: these blocks instead of the chosen ones; see `place_of` for where they go.
    """
    blocks = list(removed) if removed is not None else chosen_blocks(folder, session.config)
    options = {"removed": blocks}

    def make(path: Path) -> None:
        write_checkpoint(session, folder, blocks, path, overwrite=True)

    file = place_of(folder, session.config, removed) / "model"
    return folder.stage("excise", file, options, make, lambda path: path)


def write_checkpoint(
    session: Session,
    folder: RunFolder,
    removed: Sequence[int],
    out: Path,
    *,
    overwrite: bool = False,
) -> None:
    """The checkpoint without the blocks ``removed``, with its model card, verified, at ``out``.

    Raises:
        OutputExistsError: ``out`` is there and ``overwrite`` is false.
        VerificationError: it does not compute what it should; nothing is left at ``out``.
    """
    from isingcut.models.cutting.checkpoint import excise as write_cut
    from isingcut.models.cutting.verify import verify
    from isingcut.report.card import card_parts, model_card

    blocks = list(removed)
    parts = card_parts(folder.path, folder.target(session.config.removal), blocks)
    record = {
        "format": "isingcut-removal",
        "version": 1,
        "removed": blocks,
        "of": len(session.stack),
        "model": folder.manifest["provenance"]["model"],
        "card": parts,
    }
    sources = [session.source, *folder.sources]
    with atomic_folder(out, overwrite=overwrite, sources=sources) as temporary:
        temporary.rmdir()
        write_cut(
            session.source,
            blocks,
            temporary,
            extra_files={
                "README.md": model_card(parts),
                "isingcut.json": json.dumps(record, indent=1) + "\n",
            },
        )
        trust = session.config.trust_remote_code
        if session.streaming:
            from isingcut.models.streaming.proof import verify_streamed

            verify_streamed(session.streamed[1], blocks, temporary, trust_remote_code=trust)
        else:
            verify(session.loaded.model, blocks, temporary, trust_remote_code=trust)


def check_gguf(session: Session, folder: RunFolder, source: Path) -> None:
    """Refuse a GGUF file that is damaged, lacks tensors, or is of another model than the run.

    Raises:
        CheckpointError: damaged or incomplete.
        InputError: of another model, or not there.
    """
    from isingcut.models.checkpoint.gguf_header import read_gguf
    from isingcut.models.cutting.gguf_match import check_same_model

    header = read_gguf(source)
    header.blocks()
    # The file that the run was made from needs no comparison; another packing of it does.
    if folder.manifest["provenance"]["model"].get("gguf_sha256") != file_sha256(source):
        check_same_model(header, session.source)


def excise_gguf(
    folder: RunFolder, config: RunConfig, source: Path, removed: Sequence[int] | None = None
) -> Path:
    """`model.gguf`: the same blocks cut out of a GGUF file, its tensors' bytes untouched."""
    from isingcut.models.cutting.gguf import cut_gguf

    regular_file(source, "the GGUF file")
    blocks = list(removed) if removed is not None else chosen_blocks(folder, config)
    options = {"removed": blocks, "source": file_sha256(source)}

    def make(path: Path) -> None:
        cut_gguf(source, blocks, path, overwrite=True)

    file = place_of(folder, config, removed) / "model.gguf"
    refuse_source(file, [source])
    return folder.stage("excise", file, options, make, lambda path: path)


def evaluate(session: Session, folder: RunFolder) -> dict[str, Any]:
    """Stage `evaluate`: `evaluation.json`, the original and the cut model on unseen text."""
    config = session.config
    target = folder.target(config.removal)
    _needs(folder, config, "model", "excise")
    checkpoint = product(folder, config)
    excised = folder.record(checkpoint)
    file = target / "evaluation.json"
    whole = {"model": excised["fingerprint"], **upstream(folder)}
    without_speed = {**whole, "skip_speed": True}
    # What lacks speed only is completed; what has it already holds all that was asked for.
    skip = config.skip_speed and not folder.made_with(file, whole)
    begun = None
    if not skip and folder.made_with(file, without_speed):
        begun = folder.load(file, lambda path: read_json(path, "evaluation"))

    def make(path: Path) -> None:
        from isingcut.evaluation.quality import before_and_after, with_speed
        from isingcut.models.load import load

        folder.check(checkpoint)
        tokens = splits_of(folder)["report"]
        session.tuned(folder)
        if session.streaming:
            write_json(path, "evaluation", _evaluate_streamed(session, checkpoint, tokens))
            return
        loaded = session.loaded
        cut = load(
            checkpoint,
            **loaded.place,
            trust_remote_code=config.trust_remote_code,
        )
        common: Any = {
            "trust_remote_code": config.trust_remote_code,
            "progress": session.progress,
        }
        if begun is not None:
            found = with_speed(begun, loaded, cut, tokens, **common)
        else:
            found = before_and_after(
                loaded,
                cut,
                tokens,
                batch_tokens=session.tuning.batch_tokens,
                skip_speed=skip,
                **common,
            )
        write_json(path, "evaluation", found)

    return folder.stage(
        "evaluate",
        file,
        without_speed if skip else whole,
        make,
        lambda path: read_json(path, "evaluation"),
        completes=None if skip else without_speed,
    )


def _evaluate_streamed(session: Session, checkpoint: Path, tokens: TokenSet) -> dict[str, Any]:
    from isingcut.evaluation.streamed_scores import evaluate_streamed

    _, original = session.streamed
    _, cut = session.open_streamed(checkpoint, beside=original)
    return evaluate_streamed(
        original,
        cut,
        tokens,
        batch_tokens=session.tuning.batch_tokens,
        progress=session.progress,
    )


def report(folder: RunFolder, remove: str) -> Path:
    """Stage `report`: `report.html`, `.md` and `.json`, from the folder's files alone."""
    from isingcut.report.write import write_report

    target = folder.target(remove)
    write_report(folder.path, target)
    return target / "report.md"
