"""Stage `benchmarks`: both models of a run on the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isingcut.errors import InputError
from isingcut.evaluation.scores import benchmark, forget_scores
from isingcut.evaluation.wikitext import text_scores
from isingcut.files.writing import read_json, write_json
from isingcut.models.load import load
from isingcut.runs.cutting import product
from isingcut.runs.folder import RunFolder
from isingcut.runs.session import Session


def benchmarks(
    session: Session,
    folder: RunFolder,
    tasks: Sequence[str],
    removed: Sequence[int] | None = None,
    *,
    data: Path | None = None,
    questions: int | None = None,
) -> dict[str, Any]:
    """Stage `benchmarks`: `benchmarks.json`, both models on the same questions.

    Args:
        tasks: task names, see `scores.benchmark`; ``wikitext2`` is its perplexity.
        removed: the cut model is the one without these blocks, instead of the chosen one.
        data: folder of the questions; None uses the hub.
        questions: at most so many a task.
    """
    config = session.config
    checkpoint = product(folder, config, removed)
    made = folder.manifest["stages"].get(str(checkpoint.relative_to(folder.path)))
    if made is None or not checkpoint.exists():
        raise InputError(f"there is no {checkpoint}; excise (and heal) first")
    options = {
        "model": made["fingerprint"],
        "tasks": list(tasks),
        "questions": questions,
        "data": data is not None,
    }

    def make(path: Path) -> None:
        session.tuned(folder)
        work = checkpoint.with_name(".benchmarks")
        content = score_both(session, checkpoint, tasks, data=data, questions=questions, kept=work)
        write_json(path, "benchmarks", content)
        forget_scores(work, tasks)

    return folder.stage(
        "benchmarks",
        checkpoint.with_name("benchmarks.json"),
        options,
        make,
        lambda path: read_json(path, "benchmarks"),
    )


def score_both(
    session: Session,
    checkpoint: Path,
    tasks: Sequence[str],
    *,
    data: Path | None = None,
    questions: int | None = None,
    kept: Path | None = None,
) -> dict[str, Any]:
    """The content of `benchmarks.json`: the session's model and a checkpoint cut from it.

    Args:
        tasks: as in `benchmarks`, known to the harness.
        kept: folder of what is scored already; None keeps nothing.
    """
    from importlib.metadata import version

    loaded, batch_tokens = session.loaded, session.tuning.batch_tokens
    trusted = session.config.trust_remote_code
    cut = load(checkpoint, **loaded.place, trust_remote_code=trusted)
    models = {"original": loaded, "cut": cut}
    rows = benchmark(
        models,
        [t for t in tasks if t != "wikitext2"],
        data=data,
        questions=questions,
        batch=max(1, batch_tokens // 128),
        kept=kept,
        progress=session.progress,
    )
    content: dict[str, Any] = {"rows": rows, "engine": f"lm_eval {version('lm_eval')}"}
    if "wikitext2" in tasks:
        content["wikitext2"] = text_scores(
            models, data, questions, batch_tokens=batch_tokens, progress=session.progress
        )
    return content
