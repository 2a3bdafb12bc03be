"""Stage `benchmarks`: score models on tasks, check the tasks of a run, and choose by them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from isingcut.console.progress import Part
from isingcut.errors import InputError
from isingcut.evaluation import benchmark
from isingcut.evaluation.questions import Prepared, prepare_task, split_names
from isingcut.evaluation.scores import score_states
from isingcut.files import evaluations, states
from isingcut.files.results import fingerprint, read_document, write_document
from isingcut.files.runs import BlockList
from isingcut.measure.work import Work
from isingcut.options.config import RunConfig
from isingcut.runs import solving
from isingcut.runs.checks import check_run_tasks, data_of
from isingcut.runs.cutting import product
from isingcut.runs.evaluating import open_scores
from isingcut.runs.folder import RunFolder
from isingcut.runs.session import Session
from isingcut.runs.stages import Making, Stage


def check_whole(session: Session, blocks: BlockList | None = None) -> None:
    """Raise if a task needs the whole model in memory, but the model is streamed.

    Raises:
        InputError: a task with generated answers.
    """
    config = session.config
    for name in split_names(config.tasks) if session.streaming else ():
        if prepare_task(name, data_of(config), config.questions).generates:
            raise InputError(
                f"{name} needs the whole model, which does not fit the memory limit; raise "
                "--memory-limit, or remove it from --tasks"
            )


def prepare_tasks(config: RunConfig) -> list[Prepared]:
    """Prepare the tasks of a run."""
    names = split_names(config.tasks)
    return [prepare_task(name, data_of(config), config.questions) for name in names]


def hashes_of(config: RunConfig) -> dict[str, Any]:
    """Return a stage option with the hash of each task's questions; empty if all are of the hub."""
    names = split_names(config.tasks)
    sources = (task.source for task in prepare_tasks(config))
    found = dict(zip(names, sources, strict=True))
    hashes = {name: source for name, source in found.items() if source != "hub"}
    return {"files": hashes} if hashes else {}


def last_blocks(size: int, count: int) -> list[int]:
    """Return the last ``count`` blocks of a stack of ``size``."""
    return list(range(size - count, size))


def choose_by_tasks(
    session: Session, rows: Sequence[states.MeasuredState], kept: Path
) -> tuple[int, states.ByTasks]:
    """Choose the best of a few candidates by half of the questions of the run's tasks.

    Each candidate is the original with blocks skipped, so no checkpoint is written.

    Args:
        rows: the rows of `candidates.json`.
        kept: folder for journals.

    Returns:
        the index of the chosen row, and the record of the choice.
    """
    config = session.config
    model = session.loaded
    tasks = prepare_tasks(config)
    last = last_blocks(len(session.stack), len(rows[0].removed))
    order = sorted(range(len(rows)), key=lambda i: rows[i].kl)
    best = [
        i
        for place, i in enumerate(order)
        if place < benchmark.CONTENDERS or sorted(rows[i].removed) == last
    ]
    removed = [rows[i].removed for i in best]
    drawn = benchmark.draw_half({task.name: task.pool() for task in tasks}, config.seed)
    count = sum(map(len, drawn.values()))
    scores = []
    with session.progress(
        f"scoring {len(best)} candidates on {count} questions", count
    ) as bar:
        for task in tasks:
            keys = drawn[task.name]
            journal = benchmark.journal_of(kept, task, model, [*removed, *keys])
            part = Part(bar, len(keys))
            work = Work(session.batch_tokens, part, journal)
            wanted = frozenset(keys).__contains__
            scores.append(score_states(model, task, removed, work, wanted=wanted))
            part.finish(task.name)
    position, found = benchmark.choose_by_questions(removed, drawn, scores)
    return best[position], found


def _benchmarks(
    session: Session, folder: RunFolder, removed: Sequence[int] | None = None
) -> Making:
    """Score both models on the options' tasks.

    Args:
        removed: the blocks of another state than the chosen one.
    """
    config = session.config
    checkpoint = product(folder, config, removed)
    made = folder.record(checkpoint)
    ranked = folder.target(config.removal) / "candidates.json"
    chosen = (
        folder.find_finished(ranked)
        and folder.load(ranked, solving.load_candidates).by_tasks
    )
    # Questions that were used for the choice must not be used to score it.
    but = chosen.questions if chosen else []
    options = {
        "model": made.fingerprint,
        "tasks": split_names(config.tasks),
        "questions": config.questions,
        "data": bool(config.data),
        **({"left_out": fingerprint(but)} if but else {}),
        **hashes_of(config),
    }
    work = checkpoint.with_name(".benchmarks")

    def make(path: Path) -> None:
        session.choose_tuning(folder)
        write_document(path, _score_both(session, checkpoint, but=but, kept=work))

    return folder, checkpoint.with_name("benchmarks.json"), options, make


benchmarks = Stage(
    "benchmarks",
    _benchmarks,
    partial(read_document, model=evaluations.BenchmarksFile),
    check=check_whole,
    journals=(".benchmarks/*.journal",),
)


def benchmark_checkpoint(
    config: RunConfig, checkpoint: Path, out: Path | None = None
) -> tuple[evaluations.BenchmarksFile, Path]:
    """Score a checkpoint in any folder, or a GGUF file, and its original on the options' tasks.

    Args:
        config: options, whose ``model`` is the original.
        out: the file for the scores, by default as `open_scores`.

    Returns:
        the scores, and the file that they were written to.

    Raises:
        InputError: as `check_run_tasks`.
        ModelError, OutputExistsError: as `open_scores`.
    """
    with open_scores(config, checkpoint, out, "benchmarks") as (folder, file):
        # The harness takes seconds to list its tasks.
        check_run_tasks(config)
        content = _score_both(Session(config), folder)
        write_document(file, content, seal=True)
    return content, file


def _score_both(
    session: Session,
    checkpoint: Path,
    *,
    but: Sequence[str] = (),
    kept: Path | None = None,
) -> evaluations.BenchmarksFile:
    """Score the session's model and a checkpoint cut from it, for `benchmarks.json`.

    Args:
        but: keys of questions to leave out.
        kept: folder for journals; None keeps nothing.
    """
    from importlib.metadata import version

    check_whole(session)
    config = session.config
    work = session.work()
    cut = session.open_cut(checkpoint)
    models = {"original": session.loaded, "cut": cut}
    if not cut.streamed:
        cut.replay.attention = session.replay.attention
    rows = benchmark.benchmark(models, prepare_tasks(config), work, but=but, kept=kept)
    found: dict[str, Any] = {"left_out": len(but)} if but else {}
    return evaluations.BenchmarksFile(
        rows=rows, engine=f"lm_eval {version('lm_eval')}", **found
    )
