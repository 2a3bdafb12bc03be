"""Verbs about states: `solve`, `rank`, `baseline`."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from isingcut.cli.verb import OF_RUN, STAGES, Answer, Folder, part_names, reopen, verb
from isingcut.models.processes import Processes
from isingcut.options.config import RunConfig

_SOLVE = (
    *(f.name for f in dataclasses.fields(RunConfig) if f.metadata["stage"] == "solve"),
    "overwrite",
)


@verb(*_SOLVE, repeat=("remove",), group=STAGES)
def solve(directory: Folder, progress: Any, **options: Any) -> Answer:
    """Find the low-energy states of a measured Hamiltonian, for any number of removals.

    Example: isingcut solve my-run --remove 4 --remove 8 --remove 12
    """
    from isingcut.cli.show import show_spectrum
    from isingcut.ising.hamiltonian import Hamiltonian
    from isingcut.report.words import search_warnings
    from isingcut.runs import solving
    from isingcut.runs.removal import each_removal

    found = []
    for remove in options.pop("remove") or [None]:
        folder, asked = reopen(directory, {**options, "remove": remove})
        for config in each_removal(asked):
            with progress(f"solving for {config.removal}", 0) as bar:
                spectrum = solving.solve(folder, config)
                bar.advance(1, f"lowest energy {spectrum.energies[0]:.4g}")
            file = folder.target(config.removal) / "spectrum.json"
            found.append((config.removal, spectrum, file))

    def show() -> None:
        for removal, spectrum, file in found:
            show_spectrum(spectrum, removal, file)

    removals = [
        {"removal": removal, "file": str(file), **spectrum.to_dict()}
        for removal, spectrum, file in found
    ]
    meta = folder.load(folder.path / "hamiltonian.safetensors", Hamiltonian.load).meta
    return Answer(
        {"removals": removals},
        show,
        brief="\n".join(str(file) for *_, file in found),
        warnings=search_warnings(meta, [removal for removal, *_ in found]),
    )


@verb("random_states", "choose", "tasks", "data", "questions", *OF_RUN, group=STAGES, together=True)
def rank(directory: Folder, progress: Any, **options: Any) -> Answer:
    """Measure the candidates beside random states: the choice, and how good the energy is.

    Example: isingcut rank my-run --remove 8
    """
    from isingcut.cli.show import show_ranking
    from isingcut.report.words import ranking_warnings
    from isingcut.runs import pipeline, stages

    folder, config = reopen(directory, options)
    session = pipeline.session_of(folder, config, progress, Processes.join())
    found = stages.rank(session, folder)
    file = folder.target(config.removal) / "candidates.json"
    return Answer(
        {"file": str(file), **found.content()},
        lambda: show_ranking(found),
        brief=",".join(map(str, found.chosen.removed)),
        warnings=ranking_warnings(config.energy, found),
    )


@verb(*OF_RUN, group=STAGES, together=True)
def baseline(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A method; `isingcut ls` has all.",
            autocompletion=part_names("baselines"),
        ),
    ],
    directory: Folder,
    progress: Any,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="OPTION=VALUE", help="An option of the method; repeatable."),
    ] = None,
    **options: Any,
) -> Answer:
    """Let a published method choose on the run's text, and measure its choice for comparison.

    Example: isingcut baseline sleb my-run --remove 8 --set loss=kl
    """
    from isingcut.cli.show import show_baseline
    from isingcut.runs import comparison, pipeline

    # What was typed is looked at before the run folder is.
    comparison.baseline_part(name, settings or [])
    folder, config = reopen(directory, options)
    session = pipeline.session_of(folder, config, progress, Processes.join())
    found = comparison.compare(session, folder, name, settings or [])
    file = folder.target(config.removal) / f"baseline-{name}.json"
    return Answer(
        {"file": str(file), **found.content()},
        lambda: show_baseline(found, file),
        brief=str(file),
    )
