"""The command line: one verb per stage, `run` for all of them, `demo`, and what looks things up.

The verbs live in `cli_*.py`, by group; a new verb is a function there with `cli_verb.verb`. The
options are generated from `config.RunConfig`, and nothing heavy is imported before a verb runs.

Exit codes: 0 done; 2 something to put right in the command, the files or the model, said in one
line; 130 interrupted; 1 an error of isingcut itself.
"""

from __future__ import annotations

import importlib
import sys
from typing import Annotated

import typer

from isingcut import __version__
from isingcut.cli_verb import app
from isingcut.crew import expected
from isingcut.errors import IsingcutError, RankError

__all__ = ["app", "main"]

# Each file adds its verbs to the application; the order is that of `isingcut --help`.
for _group in ("cli_run", "cli_states", "cli_models", "cli_heal", "cli_share", "cli_look"):
    importlib.import_module(f"isingcut.{_group}")


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


def _start() -> None:
    # Of a launcher's processes rank 0 alone reads the command line; healing trains on all alike.
    if expected() and "heal" not in sys.argv[1:2]:
        from isingcut.distributed import led

        led(app)
    else:
        app()


def main() -> None:
    """Entry point: errors become one line and an exit code."""
    debug = "--debug" in sys.argv
    try:
        _start()
    except RankError as e:
        if debug:
            raise
        if not e.reported:
            typer.echo(f"isingcut: {e}", err=True)
        sys.exit(e.code)
    except IsingcutError as e:
        if debug:
            raise
        typer.echo(f"isingcut: {e}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("isingcut: interrupted; the same command goes on from here", err=True)
        sys.exit(130)
    except Exception as e:
        if debug:
            raise
        words = " ".join(str(e).split())
        typer.echo(
            f"isingcut: internal error ({type(e).__name__}: {words}); this is a fault of isingcut: "
            f"please report it with the traceback of: isingcut --debug {' '.join(sys.argv[1:])}",
            err=True,
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
