"""Verbs that make or judge a smaller model: `excise`, `evaluate`, `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from isingcut.cli_verb import (
    OF_RUN,
    STAGES,
    Answer,
    Blocks,
    Folder,
    OneBased,
    reopen,
    reopen_at,
    verb,
)


@verb(*OF_RUN, group=STAGES)
def excise(
    directory: Folder,
    progress: Any,
    blocks: Blocks = None,
    one_based: OneBased = False,
    gguf: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also cut this GGUF of the same model, to model.gguf."),
    ] = None,
    **options: Any,
) -> Answer:
    """Write the chosen state as a plain Hugging Face checkpoint, and verify it.

    Examples: isingcut excise my-run --remove 8;
    isingcut excise my-run --blocks @from-a-paper.txt --one-based
    """
    from isingcut import pipeline, stages
    from isingcut.show import show_lines

    folder, config, removed = reopen_at(directory, options, blocks, one_based=one_based)
    session = pipeline.session_of(folder, config, progress)
    written = [stages.excise(session, folder, removed)]
    if gguf is not None:
        written.append(stages.excise_gguf(folder, config, gguf, removed))
    data = {
        "removed": removed if removed is not None else stages.chosen_blocks(folder, config),
        "checkpoint": str(written[0]),
        "gguf": str(written[1]) if gguf is not None else None,
    }
    lines = [str(path) for path in written]
    return Answer(data, lambda: show_lines(lines), brief=lines[0])


@verb(*OF_RUN, group=STAGES)
def evaluate(directory: Folder, progress: Any, **options: Any) -> Answer:
    """Compare the original and the cut model on text that nothing was chosen on.

    Example: isingcut evaluate my-run --remove 8
    """
    from isingcut import pipeline, stages
    from isingcut.show import show_evaluation

    folder, config = reopen(directory, options)
    session = pipeline.session_of(folder, config, progress)
    found = stages.evaluate(session, folder)
    file = folder.target(config.removal) / "evaluation.json"
    body = {k: v for k, v in found.items() if k not in ("format", "version")}
    return Answer(
        {"file": str(file), **body}, lambda: show_evaluation(found), brief=f"{found['kl']:.4f}"
    )


@verb("remove", group=STAGES)
def report(directory: Folder, **options: Any) -> Answer:
    """Write report.md and report.json from the folder's files.

    Example: isingcut report my-run
    """
    from isingcut import stages
    from isingcut.show import show_lines

    folder, config = reopen(directory, options)
    file = stages.report(folder, config.removal)
    data = {"report": str(file)}
    return Answer(data, lambda: show_lines([str(file)]), brief=str(file))
