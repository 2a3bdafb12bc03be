"""Both models on the same benchmark tasks; answers are journalled until all of them are there.

tasks by name -> scores of both models -> paired comparison, task by task
"""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isingcut.console.progress import Part, Progress, silent
from isingcut.data.encoder import Encoder
from isingcut.data.tokens import TokenSet
from isingcut.errors import InputError, ModelError
from isingcut.evaluation.paired import compare_scores
from isingcut.evaluation.quality import quality
from isingcut.evaluation.questions import Prepared, articles, prepare_task, short_name
from isingcut.evaluation.scores import Asked, Scores, score
from isingcut.files.documents import TaskRow, TextScores
from isingcut.files.writing import fingerprint
from isingcut.measure.work import Work
from isingcut.models.architectures import text_config
from isingcut.models.sources import model_identity
from isingcut.options.config import BATCH_TOKENS

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
        kept: folder for journals, so that an interrupted call goes on.

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
                depends = [questions, *sorted(left_out)]
                journal = None if kept is None else journal_of(kept, task, model.loaded, depends)
                part = Part(bar, 1)
                found = score(model, task, Work(batch_tokens, part, journal), wanted=wanted)
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
    metric = original.metric.removesuffix(",none")
    return TaskRow(task=original.task, metric=metric, shots=original.shots, **dict(found))


def journal_of(kept: Path, task: Prepared, loaded: LoadedModel, depends: Any) -> Path:
    """The journal of one model's answers to one task.

    Args:
        kept: its folder.
        depends: what else the answers depend on, JSON-able.
    """
    model = model_identity(loaded.folder)["sha256"]
    identity = fingerprint([task.name, task.source, model, str(loaded.dtype), depends])
    return kept / f"{task.name}-{identity}.journal"


def forget_scores(kept: Path, tasks: Sequence[str]) -> None:
    """Delete the journals of tasks in a folder, and the folder where nothing else is in it."""
    for name in map(short_name, tasks):
        for path in kept.glob(f"{glob.escape(name)}-*.journal"):
            path.unlink()
    with contextlib.suppress(OSError):
        kept.rmdir()


def text_scores(
    models: Mapping[str, LoadedModel],
    data: Path | None,
    samples: int | None,
    *,
    batch_tokens: int = BATCH_TOKENS,
    length: int = 1024,
    progress: Progress = silent,
) -> TextScores:
    """Perplexity of both models on WikiText-2's raw test text, and their paired comparison.

    The articles are joined and cut into windows of ``length`` tokens, each read on its own; the
    last, short one is left out.

    Args:
        data: folder with `wikitext2/test_raw.jsonl`, one article a line.
        samples: at most so many windows.

    Raises:
        InputError: as `articles`, or shorter than one window.
    """
    assert data is not None
    original, cut = models.values()
    longest = getattr(text_config(original.model), "max_position_embeddings", None)
    size = min(length, int(longest or length))
    windows = _windows(articles(data), original, size, samples)
    try:
        found = quality(original.model, cut.model, windows, batch_tokens, progress=progress)
    except ModelError as e:
        raise ModelError(f"wikitext2: {e}") from e
    return TextScores(
        samples=windows.samples,
        tokens=windows.tokens,
        original=found.before,
        cut=found.after,
        kl=found.kl,
        kl_se=found.kl_se,
    )


def _windows(texts: Sequence[str], loaded: LoadedModel, length: int, most: int | None) -> TokenSet:
    encode = Encoder(loaded.tokenizer, loaded.model)
    ids, prefix = encode("\n".join(texts)), encode.start
    body = length - len(prefix)
    starts = range(0, len(ids) - body + 1, body)
    rows = [prefix + ids[i : i + body] for i in starts][:most]
    if not rows:
        raise InputError(f"WikiText-2's text is shorter than one window of {length} tokens")
    return TokenSet.from_rows(rows)
