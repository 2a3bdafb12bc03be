"""The command line: one verb per stage, `run` for all stages, `demo`, and look-up verbs.

Verbs are functions in `verbs`, decorated with `verb`. Their options are generated from
`config.RunConfig`, and nothing heavy is imported before a verb runs.

Exit codes: 0 success; 2 a problem with the command, the files or the model, explained in one
line; 130 interrupted; 1 an error of isingcut itself.
"""

import contextlib
import importlib
import itertools
import os
import signal
import sys
import traceback
from typing import Annotated, Any

import typer

from isingcut.cli.verb import TOGETHER, app
from isingcut.console.printing import prepare, say, unwritable
from isingcut.errors import InputError, IsingcutError, RankError
from isingcut.files.provenance import __version__
from isingcut.files.writing import os_error_words
from isingcut.memory import convert_memory_errors
from isingcut.processes import (
    convert_contact_errors,
    is_launched,
    launched_rank,
    post_failure,
    read_failure,
)

__all__ = ["app", "main"]

# Typer bundles click or builds on it; the class has no public name in either.
_CommandLineError: Any = next(
    c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException"
)


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Show the version."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show a traceback on errors.")
    ] = False,
) -> None:
    del version, debug


# Importing the verbs adds them to the application, in the order of `isingcut --help`.
importlib.import_module("isingcut.cli.verbs")

_program: Any = typer.main.get_command(app)


def _run() -> None:
    """Run the command line; usage errors become `InputError`."""
    try:
        with convert_memory_errors(), convert_contact_errors():
            code = _program(prog_name="isingcut", standalone_mode=False)
    except _CommandLineError as e:
        if type(e).__name__ == "NoArgsIsHelpError":
            e.show()
            sys.exit(2)
        context = getattr(e, "ctx", None)
        verb = context.command_path if context else "isingcut"
        words = e.format_message().rstrip(".")
        raise InputError(f"{words}; see {verb} --help") from e
    if code:
        sys.exit(code)


def _outcome() -> tuple[int, str]:
    """Run the command; return its exit code and the error message."""
    # Options before the verb; the rest is not checked here.
    before = list(itertools.takewhile(lambda word: word.startswith("-"), sys.argv[1:]))
    verb = "".join(sys.argv[len(before) + 1 :][:1])
    debug = "--debug" in before
    if launched_rank() and verb not in TOGETHER:
        return 0, ""
    try:
        _run()
    except SystemExit as e:
        # Click exits like this when its output is a closed pipe.
        unread = isinstance(e.__context__, BrokenPipeError)
        return (0 if unread else int(e.code or 0)), ""
    except (KeyboardInterrupt, typer.Abort):
        return 130, "interrupted; run the same command again to resume"
    except Exception as e:
        if debug:
            traceback.print_exc(file=sys.__stderr__ if launched_rank() else None)
        code, words = _describe_error(e)
        if is_launched() and not isinstance(e, RankError):
            post_failure(code, words)
        return code, words
    return 0, ""


def _describe_error(error: Exception) -> tuple[int, str]:
    """Return the exit code for an error, and one line about it."""
    if isinstance(error, RankError):
        return error.code, "" if launched_rank() else str(error)
    if isinstance(error, IsingcutError):
        return 2, str(error)
    if isinstance(error, OSError):
        return 2, os_error_words(error)
    words = " ".join(str(error).split())
    given = " ".join(word for word in sys.argv[1:] if word != "--debug")
    return 1, (
        f"internal error ({type(error).__name__}: {words}); this is a bug of isingcut: please "
        f"report it with the traceback of: isingcut --debug {given}"
    )


def _report_signal(number: int, frame: object) -> None:
    """Print the reason for a launcher's signal, which the launcher does not report, and exit."""
    failure = read_failure()
    words = "stopped by a signal; launchers send one when another process has ended; "
    say(f"isingcut: {failure or words + 'run the same command again to resume'}")
    # Exit at once: a library's callback may swallow an exception raised here.
    os._exit(failure.code if failure else 128 + number)


def main() -> None:
    """Run the command line as a program: errors become one line and an exit code."""
    prepare()
    if launched_rank():
        with (
            open(os.devnull, "w", encoding="utf-8") as nothing,
            contextlib.redirect_stdout(nothing),
            contextlib.redirect_stderr(nothing),
        ):
            code, _ = _outcome()
        sys.exit(code)
    if is_launched():
        signal.signal(signal.SIGTERM, _report_signal)
    # Kept because click replaces the stream.
    printed = sys.stdout
    code, words = _outcome()
    lost = unwritable(printed)
    if lost is not None and not isinstance(lost, BrokenPipeError):
        code = 2
        words = f"cannot write to standard output: {lost.strerror}"
    if is_launched():
        # The message is printed below; the signal handler would print it again.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if words:
        say(f"isingcut: {words}")
    unwritable(sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
