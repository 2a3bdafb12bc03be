"""The command line: one verb per stage, `run` for all of them, `demo`, and `ls`.

The options are generated from `config.RunConfig`; nothing here has a default of its own, and
nothing heavy is imported before a verb runs.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from isingcut import __version__
from isingcut.cli_options import with_options
from isingcut.config import RunConfig, from_mapping, load_yaml
from isingcut.errors import InputError, IsingcutError

app = typer.Typer(
    name="isingcut",
    help="Remove the right blocks from a large language model.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.")]


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if v is not None}


_ALL = tuple(f.name for f in dataclasses.fields(RunConfig))
_MEASURE = tuple(
    f.name
    for f in dataclasses.fields(RunConfig)
    if f.metadata["stage"] in ("model", "calibration", "energy") or f.name in ("out", "overwrite")
)
_SOLVE = (
    *(f.name for f in dataclasses.fields(RunConfig) if f.metadata["stage"] == "solve"),
    "overwrite",
)
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="YAML file with the same options.")
]


def _collect(config: Path | None, options: dict[str, Any]) -> RunConfig:
    values = load_yaml(config) if config else {}
    return from_mapping({**values, **_given(options)}, str(config or "command line"))


@app.command()
@with_options(*_ALL)
def run(config: ConfigFile = None, **options: Any) -> None:
    """Measure, solve, rank, cut, evaluate and report.

    Example: isingcut run smollm2 --remove 6 --out my-run
    """
    from isingcut import pipeline
    from isingcut.progress import terminal
    from isingcut.show import show_run

    target = pipeline.run(_collect(config, options), progress=terminal)
    show_run(target)


@app.command()
@with_options(*_MEASURE)
def energy(config: ConfigFile = None, **options: Any) -> None:
    """Measure the Hamiltonian once; `solve` then answers every removal in seconds.

    Example: isingcut energy smollm2 --out my-run
    """
    from isingcut import pipeline
    from isingcut.progress import terminal

    folder = pipeline.energy(_collect(config, options), progress=terminal)
    typer.echo(f"{folder / 'hamiltonian.safetensors'}")
    typer.echo(f"next: isingcut solve {folder} --remove 4 --remove 8")


@app.command()
@with_options(*_SOLVE, repeat=("remove",))
def solve(directory: Folder, **options: Any) -> None:
    """Find the low-energy states of a measured Hamiltonian, for any number of removals.

    Example: isingcut solve my-run --remove 4 --remove 8 --remove 12
    """
    from isingcut import stages
    from isingcut.show import show_spectrum

    removals = options.pop("remove") or [None]
    for remove in removals:
        folder, config = _reopen(directory, {**options, "remove": remove})
        target = folder.target(config.removal)
        show_spectrum(stages.solve(folder, config), config.removal, target)


_OF_RUN = ("remove", "budget", "device", "trust_remote_code", "overwrite")


@app.command()
@with_options("random_states", "choose", *_OF_RUN)
def rank(directory: Folder, **options: Any) -> None:
    """Measure the candidates beside random states: the choice, and how good the energy is.

    Example: isingcut rank my-run --remove 8
    """
    from isingcut import pipeline, stages
    from isingcut.progress import terminal
    from isingcut.show import show_ranking

    folder, config = _reopen(directory, options)
    session = pipeline.session_of(folder, config, terminal)
    show_ranking(stages.rank(session, folder))


@app.command()
@with_options(*_OF_RUN)
def baseline(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A method; `isingcut ls` has all.")],
    directory: Folder,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="OPTION=VALUE", help="An option of the method; repeatable."),
    ] = None,
    **options: Any,
) -> None:
    """Let a published method choose on the run's text, and measure its choice for comparison.

    Example: isingcut baseline sleb my-run --remove 8 --set loss=kl
    """
    from isingcut import comparison, pipeline
    from isingcut.progress import terminal
    from isingcut.show import show_baseline

    folder, config = _reopen(directory, options)
    session = pipeline.session_of(folder, config, terminal)
    found = comparison.compare(session, folder, name, settings or [])
    show_baseline(found, folder.target(config.removal) / f"baseline-{name}.json")


@app.command()
@with_options(*_OF_RUN)
def excise(
    directory: Folder,
    blocks: Annotated[
        str | None, typer.Option(help="Cut these blocks, for example 3,4,9, not the chosen ones.")
    ] = None,
    gguf: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also cut this GGUF of the same model, to model.gguf."),
    ] = None,
    **options: Any,
) -> None:
    """Write the chosen state as a plain Hugging Face checkpoint, and verify it.

    Example: isingcut excise my-run --remove 8
    """
    from isingcut import pipeline, stages
    from isingcut.constraints import parse_indices
    from isingcut.progress import terminal

    if blocks is not None:
        wanted = parse_indices(blocks)
        options["remove"] = options.get("remove") or str(len(wanted))
    folder, config = _reopen(directory, options)
    session = pipeline.session_of(folder, config, terminal)
    removed = parse_indices(blocks) if blocks else None
    typer.echo(stages.excise(session, folder, removed))
    if gguf is not None:
        typer.echo(stages.excise_gguf(folder, config, gguf, removed))


@app.command()
@with_options(*_OF_RUN)
def evaluate(directory: Folder, **options: Any) -> None:
    """Compare the original and the cut model on text that nothing was chosen on.

    Example: isingcut evaluate my-run --remove 8
    """
    from isingcut import pipeline, stages
    from isingcut.progress import terminal
    from isingcut.show import show_evaluation

    folder, config = _reopen(directory, options)
    session = pipeline.session_of(folder, config, terminal)
    show_evaluation(stages.evaluate(session, folder))


@app.command()
@with_options("remove")
def report(directory: Folder, **options: Any) -> None:
    """Write report.md and report.json from the folder's files.

    Example: isingcut report my-run
    """
    from isingcut import stages

    folder, config = _reopen(directory, options)
    typer.echo(stages.report(folder, config.removal))


def _reopen(directory: Path, options: dict[str, Any]) -> tuple[Any, RunConfig]:
    """A run folder, and its own options with those given now on top."""
    from isingcut.runfolder import RunFolder

    given = _given(options)
    folder = RunFolder.open(directory, overwrite=bool(given.get("overwrite")))
    changed = {**dataclasses.asdict(folder.config), **given}
    config = from_mapping(changed, "command line").validate()
    if not config.removal:
        raise InputError(f"{directory} was made without --remove; say how many blocks to remove")
    return folder, config


@app.command()
@with_options("out", "overwrite")
def demo(**options: Any) -> None:
    """SmolLM2-135M loses 6 of its 30 blocks, with the evidence, in a few minutes.

    Example: isingcut demo
    """
    from isingcut.demo import demo as run_demo

    run_demo(**_given(options))


@app.command("inspect")
@with_options("model", "trust_remote_code")
def inspect_blocks(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
    **options: Any,
) -> None:
    """Show a model's blocks, what each costs and which states are legal, without its weights.

    Example: isingcut inspect smollm2
    """
    from isingcut.architectures.inspect import inspect_model
    from isingcut.model_sources import resolve
    from isingcut.show import show_inspection

    given = _given(options)
    trust = bool(given.get("trust_remote_code"))
    config = from_mapping(given, "command line").validate()
    found = inspect_model(resolve(config.model, trust_remote_code=trust), trust_remote_code=trust)
    show_inspection(found, as_json=as_json)


@app.command("ls")
def list_parts() -> None:
    """List the energies, the solvers and the baselines.

    Example: isingcut ls
    """
    from isingcut.baselines import registry as baselines
    from isingcut.energies import registry as energies
    from isingcut.solvers import registry as solvers

    for registry in (energies, solvers, baselines):
        typer.echo(f"{registry.room}: {', '.join(registry.names())}")


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.")] = False,
) -> None:
    del version, debug


def main() -> None:
    """Entry point: user errors become one line and exit code 2."""
    debug = "--debug" in sys.argv
    try:
        app()
    except IsingcutError as e:
        if debug:
            raise
        typer.echo(f"isingcut: {e}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("isingcut: interrupted; the same command goes on from here", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
