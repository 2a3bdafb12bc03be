"""Verbs that make a smaller model and tell of it: `excise`, `report`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from isingcut.cli.verb import (
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
from isingcut.errors import InputError
from isingcut.files.inputs import user_path


@verb("patch", "patch_tokens", "keep_cut", *OF_RUN, group=STAGES)
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
    """Write the chosen state as a plain Hugging Face checkpoint, verified and patched.

    Examples: isingcut excise my-run --remove 8;
    isingcut excise my-run --blocks @from-a-paper.txt --one-based
    """
    from isingcut.cli.show import show_lines
    from isingcut.files.documents.states import CutRecord
    from isingcut.files.writing import read_document
    from isingcut.report.words import patch_warnings
    from isingcut.runs import cutting, patching, pipeline, solving

    folder, config, removed = reopen_at(directory, options, blocks, one_based=one_based)
    session = pipeline.session_of(folder, config, progress)
    if gguf is not None:
        gguf = user_path(gguf)
        cutting.check_gguf(session, folder, gguf)
    written = [patching.make_model(session, folder, removed)]
    packed: list[Any] = []
    if gguf is not None:
        file, packed = cutting.excise_gguf(session, folder, gguf, removed)
        written.append(file)
    data = {
        "removed": removed if removed is not None else solving.chosen_blocks(folder, config),
        "checkpoint": str(written[0]),
        "gguf": str(written[1]) if gguf is not None else None,
        "repacked": [dataclasses.asdict(t) for t in packed],
    }
    lines = [str(path) for path in written]
    lines += [
        f"{t.name}, patched: {t.was} -> {t.kind}, relative error {t.error:.2%}" for t in packed
    ]
    record = read_document(written[0] / "isingcut.json", CutRecord)
    remarks = [] if record.proof is None else record.proof.remarks
    warnings = [*remarks, *patch_warnings(record)]
    return Answer(data, lambda: show_lines(lines), brief=lines[0], warnings=warnings)


@verb("remove", "budget", "overwrite", group=STAGES)
def report(
    directories: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="A run folder; several are compared on one page."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The page of several runs (default: compare.html)."),
    ] = None,
    **options: Any,
) -> Answer:
    """Write report.html, report.md and report.json, or one page that compares several runs.

    Example: isingcut report my-run
    Example: isingcut report my-run other-run --out compare.html
    """
    if len(directories) > 1:
        return _compare(directories, out or Path("compare.html"), options)
    if out is not None:
        raise InputError("--out names the page that compares several runs; give two DIRs or more")
    from isingcut.cli.show import report_kb, show_lines
    from isingcut.runs import solving

    folder, config = reopen(directories[0], options)
    file = solving.report(folder, config.removal)
    page = file.with_suffix(".html")
    data = {"report": str(file), "html": str(page), "report_kb": report_kb(page)}
    lines = [str(page), str(file), f"report_kb: {data['report_kb']}"]
    return Answer(data, lambda: show_lines(lines), brief=str(file))


def _compare(directories: list[Path], out: Path, options: dict[str, Any]) -> Answer:
    """One page of several runs; a folder `remove-SPEC` inside a run stands for that removal."""
    from isingcut.cli.show import report_kb, show_lines
    from isingcut.report.write import write_comparison
    from isingcut.runs.manifest import MANIFEST

    places = []
    for directory in directories:
        inside = not (directory / MANIFEST).exists() and (directory.parent / MANIFEST).exists()
        folder, config = reopen(directory.parent if inside else directory, options)
        target = directory if inside else folder.target(config.removal)
        if not target.is_dir():
            raise InputError(
                f"{directory} has no results for --remove {config.removal}; "
                f"type: isingcut solve {directory} --remove {config.removal}"
            )
        places.append((folder.path, target))
    warnings = write_comparison(places, out, overwrite=bool(options.get("overwrite")))
    data = {
        "comparison": str(out),
        "folders": [str(target) for _, target in places],
        "report_kb": report_kb(out),
    }
    lines = [str(out), f"report_kb: {data['report_kb']}"]
    return Answer(data, lambda: show_lines(lines), brief=str(out), warnings=warnings)
