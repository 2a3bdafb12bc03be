"""The verb that hands a result on: `push` to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from isingcut.cli.verb import RESULT, Answer, reopen, verb


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
