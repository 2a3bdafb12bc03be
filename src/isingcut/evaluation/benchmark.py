"""Both models on the same benchmark tasks; what is scored is kept until all of it is.

tasks by name -> scores of both models, or those kept -> paired comparison, task by task
"""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isingcut.console.progress import Part, Progress, silent
from isingcut.errors import InputError, StageFileError
from isingcut.evaluation.paired import compare_scores
from isingcut.evaluation.questions import Prepared, called, prepare_task
from isingcut.evaluation.scores import ARRAYS, Asked, Scores, score
from isingcut.files.documents.scores import TaskRow
from isingcut.files.journal import discard
from isingcut.files.writing import fingerprint, read_json
from isingcut.measure.work import Work
from isingcut.models.sources import model_identity
from isingcut.options.types import BATCH_TOKENS

if TYPE_CHECKING:
    from isingcut.models.load import LoadedModel


def benchmark(
    models: Mapping[str, Asked],
    tasks: Sequence[str],
    *,
    data: Path | None = None,
    questions: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    but: Collection[str] = (),
    kept: Path | None = None,
    progress: Progress = silent,
) -> list[TaskRow]:
    """Rows of `benchmarks.json`: the second model against the first, task by task.

    Args:
        models: two, by name; rows call them ``original`` and ``cut``.
        tasks: local task names, or with no ``data`` any task of the harness, or files of questions.
        data: folder of the local tasks' questions; None uses the hub.
        questions: at most so many a task.
        batch_tokens: tokens computed at a time.
        but: questions to leave out, by their `question_key`.
        kept: folder for what is finished, so that an interrupted call goes on.

    Raises:
        InputError: as `questions.check_tasks`, or a task without a score by question.
    """
    assert len(models) == 2
    prepared = [prepare_task(name, data, questions) for name in tasks]
    left_out = frozenset(but)
    wanted = (lambda key: key not in left_out) if left_out else None
    rows = []
    with progress("benchmarks", 2 * len(prepared)) as bar:
        for task in prepared:
            pair = []
            for name, model in models.items():
                place, part = None, Part(bar, 1)
                if kept is not None:
                    place = place_of(kept, task, model.loaded, [questions, *sorted(left_out)])
                if place is not None and place.exists():
                    found = Scores.load(place)
                else:
                    work = Work(batch_tokens, part, journal_of(place))
                    found = score(model, task, work, wanted=wanted)
                    if place is not None:
                        keep(found, place)
                part.finish(f"{task.name}, {name}: {found.values.mean():.3f}")
                pair.append(found)
            rows.append(row(*pair))
    return rows


def row(original: Scores, cut: Scores) -> TaskRow:
    """One row of `benchmarks.json`.

    Raises:
        InputError: the two were not scored on the same questions.
    """
    if original.questions != cut.questions or original.metric != cut.metric:
        raise InputError(f"the two models were scored on different questions of {original.task}")
    found = compare_scores(original.values, cut.values)
    return TaskRow(
        task=original.task,
        metric=original.metric.removesuffix(",none"),
        shots=original.shots,
        original=found.first,
        original_se=found.first_se,
        cut=found.second,
        cut_se=found.second_se,
        difference=found.second - found.first,
        difference_low=found.low,
        difference_high=found.high,
        n=found.n,
        p_value=found.p_value,
        test=found.test,
        more_than_noise=found.more_than_noise,
    )


def place_of(kept: Path, task: Prepared, loaded: LoadedModel, asked: Any) -> Path:
    """Where the scores of one model on one task are kept.

    Args:
        asked: what else they depend on, JSON-able.
    """
    model = model_identity(loaded.folder)["sha256"]
    identity = fingerprint([task.name, task.source, model, str(loaded.dtype), asked, ARRAYS])
    return kept / f"{task.name}-{identity}.json"


def journal_of(place: Path | None) -> Path | None:
    """Of the scores that come there, while they are made."""
    return None if place is None else place.with_name(f"{place.name}.journal")


def keep(scores: Scores, place: Path) -> None:
    """Save them, after which their journal is not needed."""
    scores.save(place)
    discard(place.with_name(f"{place.name}.journal"))


def forget_scores(kept: Path, tasks: Sequence[str]) -> None:
    """Delete what is kept of tasks in a folder, and the folder where nothing else is in it."""
    for name in map(called, tasks):
        for path in kept.glob(f"{glob.escape(name)}-*.json.journal"):
            discard(path)
        for path in kept.glob(f"{glob.escape(name)}-*.json"):
            with contextlib.suppress(StageFileError):
                read_json(path, "scores")
                path.unlink()
    with contextlib.suppress(OSError):
        kept.rmdir()
