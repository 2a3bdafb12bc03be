"""The stages that measure states and models: `rank` and `evaluate`.

Each writes its file of the run folder and does nothing when that file is there, made with the
same options (`RunFolder.stage`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from isingcut.data.tokens import TokenSet
from isingcut.evaluation import candidates
from isingcut.evaluation.benchmark import forget_scores
from isingcut.evaluation.quality import (
    before_and_after,
    perplexity,
    quality,
)
from isingcut.evaluation.questions import split_names
from isingcut.evaluation.speed import with_memory
from isingcut.files.documents.scores import (
    EvaluationFile,
    FurtherPart,
    FurtherScores,
    PairScores,
)
from isingcut.files.documents.states import (
    CandidatesFile,
    ChosenState,
    CutRecord,
    OnePass,
    OnePassLoss,
)
from isingcut.files.writing import read_document, write_document
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem
from isingcut.ising.spectrum import Spectrum
from isingcut.ising.states import blocks_of, states_of
from isingcut.measure.losses import measure
from isingcut.measure.work import Work, forget
from isingcut.options.config import RunConfig
from isingcut.report.words import chosen_by_tasks
from isingcut.runs.benchmarking import (
    asked_options,
    check_asked,
    check_whole,
    choose_by_tasks,
    data_of,
    last_blocks,
)
from isingcut.runs.cutting import product
from isingcut.runs.folder import RunFolder
from isingcut.runs.measuring import names, other_path, splits_of, upstream, work_of
from isingcut.runs.session import Session
from isingcut.runs.solving import load_candidates, needs, problem_of, solve_options


def rank(session: Session, folder: RunFolder) -> CandidatesFile:
    """Stage `rank`: `candidates.json`, the spectrum's states beside random ones, measured."""
    config = session.config
    target = folder.target(config.removal)
    spectrum = folder.load(needs(folder, config, "spectrum.json", "solve"), Spectrum.load)
    others = {
        name: folder.load(other_path(folder, name), Hamiltonian.load) for name in names(config.also)
    }
    options = solve_options(folder, config) | {
        "random_states": config.random_states,
        "choose": config.choose,
        "also": sorted(others),
        **asked_options(config),
    }
    check_whole(session, check_asked(config), data_of(config), config.questions)
    journal, scores = target / "candidates.journal", target / ".asked"

    def make(path: Path) -> None:
        split = splits_of(folder)["rank"]
        problem = problem_of(folder, config)
        considered = with_found(spectrum, problem, config)
        with session.computing(folder):
            found = candidates.rank(
                session.replay,
                split,
                problem,
                considered,
                remove=config.removal,
                others=others,
                random_states=config.random_states,
                seed=config.seed,
                choose=config.choose,
                work=work_of(session, journal),
            )
        if quick := one_pass(found, problem.hamiltonian.meta.get("search", {})):
            found = found.model_copy(update={"one_pass": quick})
        if config.choose == "tasks" and not folder.processes.rank:
            rows = found.candidates
            position, by_tasks = choose_by_tasks(session, rows, scores)
            why = chosen_by_tasks(by_tasks, rows[position].kl, min(row.kl for row in rows))
            chosen = ChosenState(**rows[position].content(), position=position, why=why)
            found = found.model_copy(update={"by_tasks": by_tasks, "chosen": chosen})
        write_document(path, found)

    file = target / "candidates.json"

    def drop() -> None:
        forget(journal)
        forget(candidates.random_journal(journal))
        forget_scores(scores, split_names(config.tasks))

    return folder.stage("rank", file, options, make, load_candidates, together=True, forget=drop)


def with_found(spectrum: Spectrum, problem: Problem, config: RunConfig) -> Spectrum:
    """The candidates to measure: a spectrum, and what a search found for the same removal.

    To choose by questions, the state without the last blocks is one too where it is allowed: what
    writes worst may answer best.
    """
    searched = problem.hamiltonian.meta.get("search", {}).get("targets", {})
    mine = searched.get(config.removal, {})
    found = [row["removed"] for row in (*mine.get("finalists", []), *mine.get("one_pass", []))]
    solver = f"{spectrum.solver} and search" if found else spectrum.solver
    if config.choose == "tasks":
        last = states_of(problem.n, [last_blocks(problem.n, len(spectrum.removed(0)))])
        found += [blocks_of(state) for state in last[problem.feasible(last)]]
    if not found:
        return spectrum
    return Spectrum.from_states(
        problem,
        np.concatenate([spectrum.states, states_of(problem.n, found)]),
        # The lowest stay the lowest, whatever else is measured beside them.
        proven=spectrum.proven,
        solver=solver,
        seconds=spectrum.seconds,
        info=spectrum.info,
    )


def one_pass(ranking: CandidatesFile, search: Mapping[str, Any]) -> OnePass | None:
    """What one pass chooses as the ranking measured it, with its price and the search's.

    Args:
        search: of the energy's metadata; empty where it is not a search's.
    """
    found = search.get("targets", {}).get(ranking.remove, {}).get("one_pass", [])
    rows = {tuple(row.removed): row.content() for row in ranking.candidates}
    if not found:
        return None
    return OnePass(
        states=[OnePassLoss(**{**rows[tuple(s["removed"])], **s}) for s in found],
        passes=search["one_pass_passes"],
        search_passes=search["passes"],
        searched_for=len(search["targets"]),
    )


def evaluate(
    session: Session, folder: RunFolder, removed: Sequence[int] | None = None
) -> EvaluationFile:
    """Stage `evaluate`: `evaluation.json`, the original and the cut model on unseen text.

    Args:
        removed: the cut model is the one without these blocks, instead of the chosen one.
    """
    config = session.config
    if removed is None:
        needs(folder, config, "model", "excise")
    checkpoint = product(folder, config, removed)
    excised = folder.record(checkpoint)
    file = checkpoint.with_name("evaluation.json")
    whole = {"model": excised["fingerprint"], **upstream(folder)}
    without_speed = {**whole, "skip_speed": True}
    # What lacks speed may be made anew; what has it already holds all that was asked for.
    skip = config.skip_speed and not folder.made_with(file, whole)

    def make(path: Path) -> None:
        folder.check(checkpoint)
        tokens = splits_of(folder)["report"]
        session.tuned(folder)
        beside = _beside(session, checkpoint, tokens)
        cut, streamed = session.open_cut(checkpoint)
        progress = session.progress
        found = before_and_after(
            session.streamed[1] if session.streaming else session.loaded,
            streamed or cut,
            tokens,
            batch_tokens=session.tuning.batch_tokens,
            skip_speed=skip,
            progress=progress,
        ).model_copy(update=beside)
        if streamed is None and not skip:
            del cut
            if session.loaded.device.type != "cpu":
                session.leave_device()
            found = with_memory(
                found,
                {"before": session.source, "after": checkpoint},
                length=int(tokens.input_ids.shape[1]),
                trust_remote_code=config.trust_remote_code,
                progress=progress,
            )
        write_document(path, found)

    return folder.stage(
        "evaluate",
        file,
        without_speed if skip else whole,
        make,
        lambda path: read_document(path, EvaluationFile),
        completes=None if skip else without_speed,
    )


def _beside(session: Session, checkpoint: Path, tokens: TokenSet) -> dict[str, Any]:
    """What an evaluation says besides: what the last model is, and the models on the way to it."""
    model = checkpoint.with_name("model")
    record = read_document(model / "isingcut.json", CutRecord)
    patch, healed = record.patch, checkpoint != model
    changed = patch is not None and patch.changed
    last = "healed" if healed else "patched" if changed else "cut"
    found: dict[str, Any] = {"last": last}
    if patch is not None and patch.unpatched:
        found["unpatched"] = patch.unpatched
    if last != "cut":
        found["cut"] = _exact_cut(session, record.removed, tokens)
    if healed and changed:
        original = session.streamed[1] if session.streaming else session.loaded.model
        loaded, streamed = session.open_cut(model)
        size = session.tuning.batch_tokens
        patched = streamed or loaded.model
        scores = quality(original, patched, tokens, size, progress=session.progress)
        parts = {name: FurtherPart(**_after(part)) for name, part in scores.parts.items()}
        mixed: dict[str, Any] = {"parts": parts} if parts else {}
        found["patched"] = FurtherScores(**_after(scores), **mixed)
    return found


def _after(scores: PairScores) -> dict[str, Any]:
    return {**dict(scores.after), "kl": scores.kl, "kl_se": scores.kl_se}


def _exact_cut(session: Session, removed: Sequence[int], tokens: TokenSet) -> FurtherScores:
    """The scores of the exact cut: of the original with its blocks skipped."""
    state = np.zeros((1, len(session.replay)), dtype=bool)
    state[0, list(removed)] = True
    measured = measure(
        session.replay,
        tokens,
        state,
        Work(session.tuning.batch_tokens, session.progress),
        "perplexity and KL of the exact cut",
    )
    parts = {
        name: FurtherPart(**_with_perplexity(measured.of_samples(rows).losses(0)))
        for name, rows in tokens.rows_by_part.items()
    }
    mixed: dict[str, Any] = {"parts": parts} if parts else {}
    return FurtherScores(**_with_perplexity(measured.losses(0)), **mixed)


def _with_perplexity(losses: dict[str, Any]) -> dict[str, Any]:
    return {**dict(perplexity(losses["nll"], losses["nll_se"])), **losses}
