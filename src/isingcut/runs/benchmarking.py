"""Stage `benchmarks`: score the original and the smaller model on tasks.

The questions of tasks may also choose the state."""

from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from isingcut.console.progress import Part
from isingcut.errors import InputError
from isingcut.evaluation import benchmark
from isingcut.evaluation.failures import note_failure
from isingcut.evaluation.questions import Prepared, prepare_task, split_names
from isingcut.evaluation.scores import check_task, score_states
from isingcut.files import evaluations, states
from isingcut.files.results import fingerprint, read_document, write_document
from isingcut.measure.work import Work
from isingcut.options.judge import JudgeOptions
from isingcut.runs import solving
from isingcut.runs.checks import data_of
from isingcut.runs.context import Context
from isingcut.runs.cutting import product
from isingcut.runs.evaluating import write_scores
from isingcut.runs.stages import Inputs, Planned, Runner, stage


def check_models(context: Context, tasks: Sequence[Prepared]) -> None:
    """Check tasks against the model.

    Raises:
        InputError, ModelError: as `scores.check_task`, with the name of the task.
    """
    failed = dict[str, str]()
    for task in tasks:
        with note_failure(task.name, failed):
            check_task(context.loaded, task)
    if failed:
        raise failed_error(failed)


def failed_error(failed: Mapping[str, str]) -> InputError:
    """Return the error for tasks that cannot be scored."""
    return InputError("; ".join(f"{task}: {reason}" for task, reason in failed.items()))


def prepare_tasks(config: JudgeOptions) -> list[Prepared]:
    """Prepare the tasks of a run."""
    names = split_names(config.tasks)
    return [prepare_task(name, data_of(config), config.questions) for name in names]


def question_files(tasks: Sequence[Prepared], config: JudgeOptions) -> dict[str, Any]:
    """Return the questions of each task for a record: a hash of them, or of the hub."""
    return {
        task.name: {"files": task.source, "questions": config.questions}
        for task in tasks
    }


def last_blocks(size: int, count: int) -> list[int]:
    """Return the last ``count`` blocks of a stack of ``size``."""
    return list(range(size - count, size))


def choose_by_tasks(
    context: Context,
    tasks: Sequence[Prepared],
    seed: int,
    rows: Sequence[states.MeasuredState],
    kept: Path,
) -> tuple[int, states.ByTasks]:
    """Choose the best of a few candidates by half of the questions of tasks.

    Each candidate is the original with blocks skipped, so no checkpoint is written.

    Args:
        rows: the rows of `candidates.json`.
        kept: folder for journals.

    Returns:
        the index of the chosen row, and the record of the choice.
    """
    model = context.loaded
    last = last_blocks(len(context.stack), len(rows[0].removed))
    order = sorted(range(len(rows)), key=lambda i: rows[i].kl)
    best = [
        i
        for place, i in enumerate(order)
        if place < benchmark.CONTENDERS or rows[i].removed == last
    ]
    removed = [rows[i].removed for i in best]
    drawn = benchmark.draw_half({task.name: task.pool() for task in tasks}, seed)
    count = sum(map(len, drawn.values()))
    scores = []
    with context.progress(
        f"scoring {len(best)} candidates on {count} questions", count
    ) as bar:
        for task in tasks:
            keys = drawn[task.name]
            journal = benchmark.journal_of(kept, task, model, [*removed, *keys])
            part = Part(bar, len(keys))
            work = Work(context.batch_tokens, part, journal)
            wanted = frozenset(keys).__contains__
            scores.append(score_states(model, task, removed, work, wanted=wanted))
            part.finish(task.name)
    position, by_tasks = benchmark.choose_by_questions(removed, drawn, scores)
    return best[position], by_tasks


def _plan(runner: Runner, config: Any, removed: Sequence[int] | None = None) -> Planned:
    """Plan the scores on the options' tasks, beside those on other tasks.

    Args:
        removed: the blocks of another state than the chosen one.
    """
    folder = runner.folder
    checkpoint = product(folder, config, removed)
    made = folder.record(checkpoint)
    ranked = folder.target(config.removal) / "candidates.json"
    chosen = (
        folder.find_finished(ranked)
        and folder.load(ranked, solving.load_candidates).by_tasks
    )
    # Questions that were used for the choice must not be used to score it.
    but = chosen.questions if chosen else []
    file = checkpoint.with_name("benchmarks.json")
    left_out = fingerprint(but) if but else None
    tasks = prepare_tasks(config)
    asked = question_files(tasks, config)
    before = folder.find_record(file)
    known = before.options.content() if before and file.is_file() else {}
    of = {"model": made.fingerprint, "left_out": left_out, **runner.context.numerics}
    scored = known.pop("tasks", {})
    earlier = None
    if scored and known == of:
        earlier = read_document(file, evaluations.BenchmarksFile)
        asked = {name: scored[name] for name in earlier.tasks if name in scored} | asked
    values = {"left_out": left_out, "tasks": asked, "but": but}
    return Planned(file, {**values, "prepared": tasks, "earlier": earlier})


def _check(context: Context, config: JudgeOptions, blocks: object) -> None:
    check_models(context, prepare_tasks(config))


@stage(
    "benchmarks",
    partial(read_document, model=evaluations.BenchmarksFile),
    plan=_plan,
    check=_check,
)
def benchmarks(context: Context, inputs: Inputs, options: Any, out: Path) -> None:
    kept = inputs.place / ".benchmarks"
    checkpoint = inputs.find("product")
    scores = _score_both(
        context, options.prepared, checkpoint, but=options.but, kept=kept
    )
    if options.earlier is not None:
        scores.add(options.earlier)
    write_document(out, scores)


def benchmark_checkpoint(
    config: Any, checkpoint: Path, out: Path | None = None
) -> tuple[evaluations.BenchmarksFile, Path]:
    """Score a checkpoint in any folder, or a GGUF file, and its original on the options' tasks.

    Arguments and result are those of `evaluating.evaluate_checkpoint`.

    Raises:
        InputError, ModelError: as `check_models` and `write_scores`, or no task could be scored.
        OutputExistsError: as `write_scores`.
    """

    def score(folder: Path) -> evaluations.BenchmarksFile:
        scores = _score_both(Context(config), prepare_tasks(config), folder)
        if not scores.rows:
            raise failed_error(scores.failed)
        return scores

    return write_scores(config, checkpoint, out, "benchmarks", score)


def _score_both(
    context: Context,
    tasks: Sequence[Prepared],
    checkpoint: Path,
    *,
    but: Sequence[str] = (),
    kept: Path | None = None,
) -> evaluations.BenchmarksFile:
    """Score the original model and a checkpoint cut from it, for `benchmarks.json`.

    Args:
        but: keys of questions to leave out.
        kept: folder for journals; None keeps nothing.
    """
    check_models(context, tasks)
    work = context.work()
    cut = context.open_cut(checkpoint)
    models = {"original": context.loaded, "cut": cut}
    if not cut.streamed:
        cut.replay.attention = context.replay.attention
    rows, failed = benchmark.benchmark(models, tasks, work, but=but, kept=kept)
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    template = context.loaded.tokenizer.chat_template
    scores = evaluations.BenchmarksFile(
        rows=rows, engine=f"lm_eval {version('lm_eval')}", seed=DEFAULT_OTHER_SEED
    )
    if template and any(task.chat for task in tasks):
        scores.template_sha = fingerprint(template)
    if but:
        scores.left_out = len(but)
    if failed:
        scores.failed = failed
    return scores
