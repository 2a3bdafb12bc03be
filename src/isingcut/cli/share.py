"""Verbs that hand a result on: `export` to other tools, `push` to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from isingcut.cli.verb import RESULT, Answer, Blocks, Folder, OneBased, reopen, reopen_at, verb
from isingcut.errors import InputError
from isingcut.files.inputs import user_path
from isingcut.files.outputs import check_output
from isingcut.files.writing import write_sealed


@verb("remove", "budget", "overwrite", group=RESULT)
def export(
    directory: Folder,
    mergekit: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write a mergekit passthrough recipe; - prints it."),
    ] = None,
    blocks: Blocks = None,
    one_based: OneBased = False,
    **options: Any,
) -> Answer:
    """Write a state for another tool, for example as a mergekit recipe.

    Example: isingcut export my-run --remove 8 --mergekit recipe.yaml
    """
    from isingcut.cli.show import show_lines
    from isingcut.runs import mergekit as recipes
    from isingcut.runs import solving

    if mergekit is None:
        raise InputError("say what to write: --mergekit FILE.yaml")
    folder, config, named = reopen_at(directory, options, blocks, one_based=one_based)
    removed = named if named is not None else solving.chosen_blocks(folder, config)
    total = len(folder.manifest["blocks"]["blocks"])
    config = config.replace(model=folder.model_places(config.model)[0])
    model, dtype, differing = recipes.mergekit_source(config, removed)
    recipe = recipes.mergekit_recipe(model, total, removed, dtype)
    if mergekit != "-":
        file = user_path(mergekit)
        check_output(file, overwrite=folder.overwrite, sources=folder.sources)
        write_sealed(file, recipe, ".yaml")
    warnings = []
    if differing:
        warnings.append(
            f"mergekit changes the number of blocks only, but without blocks "
            f"{','.join(str(b) for b in removed)} this model's {', '.join(differing)} must change "
            "too: its result may load and compute something else. isingcut excise writes the "
            "whole configuration"
        )
    shown = recipe.rstrip("\n") if mergekit == "-" else mergekit
    data = {"removed": removed, "file": None if mergekit == "-" else mergekit, "recipe": recipe}
    return Answer(data, lambda: show_lines([shown]), brief=shown, warnings=warnings)


@verb("remove", "budget", group=RESULT)
def push(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A run folder, or a checkpoint that was cut.")
    ],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    message: Annotated[str, typer.Option(metavar="TEXT", help="Commit message.")] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be uploaded, and upload nothing.")
    ] = False,
    **options: Any,
) -> Answer:
    """Upload the cut checkpoint to the Hugging Face Hub, with its model card.

    Example: isingcut push my-run me/my-model-cut --private
    """
    from rich.filesize import decimal

    from isingcut.cli.show import show_lines
    from isingcut.runs import interop_hub
    from isingcut.runs.cutting import product

    checkpoint = directory
    if not (directory / "isingcut.json").is_file():
        folder, config = reopen(directory, options)
        checkpoint = product(folder, config)
        folder.record(checkpoint)
        folder.check(checkpoint)
    data: dict[str, Any] = {
        "url": None,
        "repository": repository,
        "private": private,
        "folder": str(checkpoint),
        "files": interop_hub.listing(checkpoint, repository),
    }
    if dry_run:
        whole = sum(f["bytes"] for f in data["files"])
        shown = [
            *(f"{f['name']}: {decimal(f['bytes'])}" for f in data["files"]),
            f"{decimal(whole)} of {checkpoint} would go to {repository}; nothing was uploaded",
        ]
        return Answer(data, lambda: show_lines(shown), brief=shown[-1])
    url = interop_hub.push(checkpoint, repository, private=private, message=message)
    return Answer({**data, "url": url}, lambda: show_lines([url]), brief=url)
