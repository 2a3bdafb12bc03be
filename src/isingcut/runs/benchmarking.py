"""Benchmarks of a run: candidates to choose by them, then both models on other questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isingcut.console.progress import Part
from isingcut.errors import InputError
from isingcut.evaluation.benchmark import (
    benchmark,
    choose_by_questions,
    contenders,
    draw_half,
    forget_scores,
    journal_of,
    text_scores,
)
from isingcut.evaluation.questions import WIKITEXT, check_tasks, prepare_task, split_names
from isingcut.evaluation.scores import ScoredModel, Scores, score_states
from isingcut.files.documents.scores import BenchmarksFile
from isingcut.files.documents.states import ByTasks, CandidatesFile, MeasuredState
from isingcut.files.inputs import user_path
from isingcut.files.writing import fingerprint, read_document, write_document
from isingcut.measure.work import Work
from isingcut.options.config import RunConfig
from isingcut.report.words import listed
from isingcut.runs.cutting import product
from isingcut.runs.folder import RunFolder
from isingcut.runs.removal import each_removal
from isingcut.runs.session import Session


def check_asked(config: RunConfig) -> list[str]:
    """Refuse tasks of a run's options that cannot be asked, before a model is loaded.

    Returns:
        their names, each once.

    Raises:
        InputError, MissingExtraError: as `questions.check_tasks`, or there is nothing to choose by,
            or to score.
    """
    if not config.tasks:
        return []
    if config.choose != "tasks" and len(each_removal(config)) > 1:
        raise InputError("--tasks scores a checkpoint, and a range cuts none; leave it out")
    names = check_tasks(split_names(config.tasks), data_of(config), config.questions)
    if config.choose == "tasks" and names == [WIKITEXT]:
        raise InputError("wikitext2 is a text; to --choose by --tasks takes one with questions")
    return names


def check_whole(
    session: Session, tasks: Sequence[str], data: Path | None, questions: int | None
) -> None:
    """Refuse tasks that take the whole model where it is streamed.

    Args:
        tasks, data, questions: as in `benchmarks`.

    Raises:
        InputError: a text to read, or a task whose answers are written.
    """
    if not tasks or not session.streaming:
        return
    for name in tasks:
        if name == WIKITEXT or prepare_task(name, data, questions).generates:
            raise InputError(
                f"{name} takes the whole model, which does not fit the memory allowed; raise "
                "--memory-limit, or leave it out of --tasks"
            )


def asked_options(config: RunConfig) -> dict[str, Any]:
    """What a choice by questions depends on; nothing where the choice is another."""
    if config.choose != "tasks":
        return {}
    return {name: getattr(config, name) for name in ("tasks", "data", "questions", "seed")}


def data_of(config: RunConfig) -> Path | None:
    """The folder of the questions that a run's options name."""
    return user_path(config.data) if config.data else None


def last_blocks(size: int, count: int) -> list[int]:
    """So many at the end of a stack of ``size``."""
    return list(range(size - count, size))


def choose_by_tasks(
    session: Session, rows: Sequence[MeasuredState], kept: Path
) -> tuple[int, ByTasks]:
    """The best of a few candidates on half of the questions of the run's tasks.

    Each is the original with its blocks skipped: no checkpoint is written.

    Args:
        rows: of `candidates.json`.
        kept: folder of journals.

    Returns:
        its position in ``rows``, and how it was chosen.
    """
    config = session.config
    tasks = {
        task.name: task
        for name in check_asked(config)
        if name != WIKITEXT
        for task in [prepare_task(name, data_of(config), config.questions)]
    }
    pool = {name: task.pool() for name, task in tasks.items()}
    last = last_blocks(len(session.stack), len(rows[0].removed))
    best = contenders(rows, last)
    drawn = draw_half(pool, config.seed)
    model = ScoredModel(session.loaded, session.replay)
    # Fewer where one is ahead early.
    most = len(best) * sum(map(len, drawn.values()))
    with session.progress(f"asking {len(best)} candidates at most {most} questions", most) as bar:

        def ask(left: Sequence[Sequence[int]], name: str, keys: Sequence[str]) -> list[Scores]:
            journal = journal_of(kept, tasks[name], model.loaded, [*left, *keys])
            part = Part(bar, len(keys) * len(left))
            work = Work(session.tuning.batch_tokens, part, journal)
            only = frozenset(keys).__contains__
            found = score_states(model, tasks[name], left, work, wanted=only)
            right, blocks = max(
                (float(s.values.mean()), listed(r)) for s, r in zip(found, left, strict=True)
            )
            part.finish(f"without {blocks} {right:.0%} of {name}")
            return found

        position, found = choose_by_questions([rows[i].removed for i in best], drawn, ask)
    return best[position], found


def left_out(folder: RunFolder, config: RunConfig) -> list[str]:
    """The questions that chose a run's state, which may not judge it."""
    ranked = folder.target(config.removal) / "candidates.json"
    if folder.finished(ranked) is None:
        return []
    found = folder.load(ranked, lambda path: read_document(path, CandidatesFile)).by_tasks
    return [] if found is None else found.asked


def score_tasks(session: Session, folder: RunFolder) -> None:
    """Stage `benchmarks` on the tasks of a run's options, where it has some."""
    config = session.config
    if names := list(dict.fromkeys(split_names(config.tasks))):
        benchmarks(session, folder, names, data=data_of(config), questions=config.questions)


def benchmarks(
    session: Session,
    folder: RunFolder,
    tasks: Sequence[str],
    removed: Sequence[int] | None = None,
    *,
    data: Path | None = None,
    questions: int | None = None,
) -> BenchmarksFile:
    """Stage `benchmarks`: `benchmarks.json`, both models on the same questions.

    Args:
        tasks: task names, see `benchmark.benchmark`; ``wikitext2`` is its perplexity.
        removed: the cut model is the one without these blocks, instead of the chosen one.
        data: folder of the questions; None uses the hub.
        questions: at most so many a task.
    """
    config = session.config
    checkpoint = product(folder, config, removed)
    made = folder.manifest["stages"].get(str(checkpoint.relative_to(folder.path)))
    if made is None or not checkpoint.exists():
        raise InputError(f"there is no {checkpoint}; excise (and heal) first")
    but = left_out(folder, config)
    options = {
        "model": made["fingerprint"],
        "tasks": list(tasks),
        "questions": questions,
        "data": data is not None,
        **({"left_out": fingerprint(but)} if but else {}),
    }

    work = checkpoint.with_name(".benchmarks")

    def make(path: Path) -> None:
        session.tuned(folder)
        content = score_both(
            session, checkpoint, tasks, data=data, questions=questions, but=but, kept=work
        )
        write_document(path, content)

    return folder.stage(
        "benchmarks",
        checkpoint.with_name("benchmarks.json"),
        options,
        make,
        lambda path: read_document(path, BenchmarksFile),
        forget=lambda: forget_scores(work, tasks),
    )


def score_both(
    session: Session,
    checkpoint: Path,
    tasks: Sequence[str],
    *,
    data: Path | None = None,
    questions: int | None = None,
    but: Sequence[str] = (),
    kept: Path | None = None,
) -> BenchmarksFile:
    """What `benchmarks.json` says: the session's model and a checkpoint cut from it.

    Args:
        tasks: as in `benchmarks`, known to the harness.
        but: questions to leave out, by their keys.
        kept: folder of journals; None keeps nothing.
    """
    from importlib.metadata import version

    check_whole(session, tasks, data, questions)
    batch_tokens = session.tuning.batch_tokens
    original = ScoredModel(session.loaded, session.replay)
    loaded, streamed = session.open_cut(checkpoint)
    cut = ScoredModel.whole(loaded) if streamed is None else ScoredModel(loaded, streamed)
    if streamed is None:
        cut.replay.attention = original.replay.attention
    models = {"original": original, "cut": cut}
    rows = benchmark(
        models,
        [t for t in tasks if t != WIKITEXT],
        data=data,
        questions=questions,
        but=but,
        batch_tokens=batch_tokens,
        kept=kept,
        progress=session.progress,
    )
    found: dict[str, Any] = {"left_out": len(but)} if but else {}
    if WIKITEXT in tasks:
        found["wikitext2"] = text_scores(
            {name: model.loaded for name, model in models.items()},
            data,
            questions,
            batch_tokens=batch_tokens,
            progress=session.progress,
        )
    return BenchmarksFile(rows=rows, engine=f"lm_eval {version('lm_eval')}", **found)
