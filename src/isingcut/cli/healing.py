"""Verbs that make a cut model better and judge it: `heal`, `evaluate`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isingcut.cli.verb import (
    OF_RUN,
    RESULT,
    STAGES,
    Answer,
    Blocks,
    ConfigFile,
    Folder,
    OneBased,
    given,
    reopen_at,
    verb,
)
from isingcut.errors import InputError
from isingcut.files.writing import check_output, locked, read_document, write_document
from isingcut.healing import RECORD
from isingcut.options.config import HealConfig, RunConfig
from isingcut.options.declaration import from_yaml

if TYPE_CHECKING:
    from isingcut.files.documents import BenchmarksFile


@verb(*HealConfig.__dataclass_fields__, group=RESULT, of=HealConfig, together=True)
def heal(progress: Any, config: ConfigFile = None, **options: Any) -> Answer:
    """Win back quality of a cut checkpoint: closed-form patch, then distillation.

    Interrupted? Type the same command again. Several processes:
    torchrun --nproc-per-node 2 -m isingcut heal ...

    Example: isingcut heal my-run/model --teacher smollm2 --out healed
    """
    from isingcut.cli.show_scores import show_healing
    from isingcut.files.documents import HealingFile
    from isingcut.healing.heal import heal as run_heal
    from isingcut.report.words import healing_warnings

    values = {**(from_yaml(HealConfig, config) if config else {}), **given(options)}
    folder = run_heal(HealConfig(**values), progress=progress, sources=[config] if config else [])
    if os.environ.get("RANK", "0") != "0":
        # Of several processes one has the last word.
        raise typer.Exit
    found = read_document(folder / RECORD, HealingFile)
    return Answer(
        {"checkpoint": str(folder), **found.content()},
        lambda: show_healing(found, folder),
        brief=str(folder),
        warnings=healing_warnings(found),
    )


@verb("skip_speed", *OF_RUN, group=STAGES)
def evaluate(
    directory: Folder,
    progress: Any,
    tasks: Annotated[
        str,
        typer.Option(
            help="Also benchmarks, comma-separated: tasks of lm-evaluation-harness; with --data "
            "our own (isingcut ls has them, and 'all'); or .jsonl files of questions."
        ),
    ] = "",
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder with the questions; without it, the hub's."),
    ] = None,
    questions: Annotated[
        int | None, typer.Option(min=1, help="At most so many questions a task.")
    ] = None,
    original: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="DIR is a checkpoint; compare it with this model."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --original: file for the benchmarks.")
    ] = None,
    blocks: Blocks = None,
    one_based: OneBased = False,
    **options: Any,
) -> Answer:
    """Compare the original and the final model: unseen text, speed, memory, benchmarks.

    Example: isingcut evaluate my-run --tasks arc_easy,piqa --data questions --questions 500
    """
    from isingcut.cli.show_scores import show_benchmarks, show_evaluation
    from isingcut.evaluation.questions import check_tasks
    from isingcut.report.words import patch_warnings
    from isingcut.runs import pipeline, stages
    from isingcut.runs.cutting import product
    from isingcut.runs.folder import MANIFEST

    names = _named(tasks, data, questions)
    if original is not None:
        if blocks is not None:
            raise InputError("--blocks names a state of a run; --original compares a checkpoint")
        if not names:
            raise InputError("--original compares benchmarks; name some with --tasks")
        scores, file = _of_checkpoint(directory, original, names, data, questions, out, options)
        return Answer(
            {"benchmarks": {"file": str(file), **scores.content()}},
            lambda: show_benchmarks(scores, file),
            brief=str(file),
        )
    if out is not None:
        raise InputError("--out goes with --original; a run folder keeps its benchmarks.json")
    if (directory / "config.json").is_file() and not (directory / MANIFEST).exists():
        raise InputError(
            f"{directory} is a checkpoint, not a run folder; to compare it with the model it was "
            "made from, add --original MODEL and --tasks"
        )
    names = check_tasks(names, data, questions) if names else []
    folder, config, removed = reopen_at(directory, options, blocks, one_based=one_based)
    if names:
        asked = {"tasks": ",".join(names), "data": str(data or ""), "questions": questions}
        config = config.replace(**asked)
    session = pipeline.session_of(folder, config, progress)
    found = stages.evaluate(session, folder, removed)
    target = product(folder, config, removed).parent
    answer: dict[str, Any] = {"file": str(target / "evaluation.json"), **found.content()}
    rows: BenchmarksFile | None = None
    if names:
        rows = stages.benchmarks(session, folder, removed)
        answer["benchmarks"] = {"file": str(target / "benchmarks.json"), **rows.content()}

    def show() -> None:
        last = found.last or ("healed" if (target / "healed").is_dir() else "cut")
        show_evaluation(found, last=last)
        if rows is not None:
            show_benchmarks(rows, target / "benchmarks.json", last=last)

    warnings = patch_warnings(found)
    return Answer(answer, show, brief=f"{found.kl:.4f}", warnings=warnings)


def _named(tasks: str, data: Path | None, questions: int | None) -> list[str]:
    """The tasks that were typed, not yet known to be any."""
    from isingcut.evaluation.questions import split_names

    names = split_names(tasks)
    if not names and (tasks or data is not None or questions is not None):
        raise InputError("--tasks names no benchmark, which --data and --questions are for")
    return names


def _of_checkpoint(
    folder: Path,
    original: str,
    names: list[str],
    data: Path | None,
    questions: int | None,
    out: Path | None,
    options: dict[str, Any],
) -> tuple[BenchmarksFile, Path]:
    """Compare a checkpoint that lies anywhere with the model it was made from."""
    from isingcut.evaluation.questions import check_tasks
    from isingcut.runs.session import Session
    from isingcut.runs.stages import score_both

    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is no checkpoint (no config.json in it)")
    file = out or folder.parent / f"{folder.name}-benchmarks.json"
    typed = given({k: v for k, v in options.items() if k not in ("remove", "budget")})
    asked = {"tasks": ",".join(names), "data": str(data or ""), "questions": questions}
    config = RunConfig(**{**typed, **asked, "model": original}).validate()
    sources: list[str | Path] = [folder, original, *([data] if data is not None else [])]
    check_output(file, overwrite=config.overwrite, sources=sources)
    # The harness takes seconds to say which tasks it knows.
    check_tasks(names, data, questions)
    with locked(file):
        content = score_both(Session(config), folder)
        write_document(file, content, seal=True)
    return content, file
