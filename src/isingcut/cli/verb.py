"""Shared parts of the verbs: options, `--json`, `--quiet`, warnings, reopening a run folder.

A verb is a function in `verbs`, decorated with `verb`. It returns an `Output`, which is printed
here as text or JSON; no verb prints by itself.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from typer.core import TyperCommand

from isingcut.console.printing import convert_write_errors, printable, say
from isingcut.console.progress import silent, terminal
from isingcut.errors import InputError
from isingcut.files.inputs import user_path
from isingcut.files.results import without_infinities
from isingcut.options.config import RunConfig
from isingcut.options.declaration import (
    Kind,
    Options,
    flag,
    from_yaml,
    plain_type,
    read_options,
)
from isingcut.options.parsed import BlockList

if TYPE_CHECKING:
    from isingcut.files.store import Store

app = typer.Typer(
    name="isingcut",
    help="Remove the right blocks from a large language model.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="YAML file with these options."),
]

Blocks = Annotated[
    str | None,
    typer.Option(
        "--blocks",
        metavar="LIST",
        help="Use these blocks instead of the chosen ones: 3,4,9 or 5-8.",
    ),
]
WHOLE = "Whole runs"
STAGES = "Single stages"
RESULT = "Use the result"
LOOK = "Look things up"
"""The groups of verbs in `isingcut --help`."""

TOGETHER: set[str] = set()
"""The verbs that run in all processes of a launcher."""

OF_RUN = (
    "--model",
    "remove",
    "budget",
    "device",
    "cards_per_process",
    "stream",
    "memory_limit",
    "trust_remote_code",
    "overwrite",
)
"""Options of the verbs that work on a finished energy and need the model."""


_PANELS = {
    "Start with these": "remove budget out calibration quick effort heal tasks device memory_limit "
    "config overwrite",
    "What to remove": "units keep must_remove",
    "Text": "samples length rank_samples report_samples seed",
    "Model and machine": "cards_per_process dtype attention batch_tokens stream trust_remote_code",
    "Choosing": "energy compare_energies solver states random_states choose",
    "Repair": "patch patch_tokens patch_share healing drop_mtp",
    "Judging": "data questions prompts",
}
"""The options of a run, grouped under the headings of its help."""
_LONG = 15
"""A verb with more options than this lists them under headings."""


@dataclass(frozen=True)
class Output:
    """The result of a verb.

    Args:
        data: the keys of `--json` (documented in docs/cli.md); ``verb`` and ``warnings`` are added.
        show: prints the result as text.
        brief: the line that `--quiet` prints; may be empty.
        warnings: each is printed once, to stderr.
    """

    data: Mapping[str, Any]
    show: Callable[[], None]
    brief: str = ""
    warnings: Sequence[str] = ()


class _Command(TyperCommand):
    """Accept `--heal` without a value as `--heal all`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = []
        for word, after in pairwise([*args, ""]):
            alone = word == "--heal" and not after[:1].isdigit() and after != "all"
            words.append("--heal=all" if alone else word)
        return super().parse_args(ctx, words)


def verb(
    *names: str,
    group: str,
    name: str | None = None,
    of: type[Options] = RunConfig,
    together: bool = False,
) -> Callable[[Callable[..., Output]], Callable[..., Output]]:
    """Turn a handler into a verb of the command line, with options of a configuration class.

    Args:
        names: fields of ``of``. Only typed options are passed, so that a file or a run folder can
            supply the others before the default does. A name with dashes in front (``--model``)
            becomes an option even if the field is a positional argument.
        group: a heading of `isingcut --help`.
        name: the verb, if it differs from the function's name.
        of: the class that declares the options.
        together: whether the verb runs in all processes of a launcher, or in rank 0 only.

    The handler gets its options as keyword arguments. A parameter ``progress`` gets the
    terminal's progress, or a silent one with `--quiet`.
    """

    def decorate(handler: Callable[..., Output]) -> Callable[..., Output]:
        called = name or handler.__name__
        if together:
            TOGETHER.add(called)
        own = inspect.signature(handler, eval_str=True).parameters
        parameters = [
            p.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for p in own.values()
            if p.name != "progress" and p.kind != inspect.Parameter.VAR_KEYWORD
        ]
        parameters += [_parameter(of, n) for n in names]
        if of is RunConfig and len(names) > _LONG:
            parameters = _in_panels(parameters)

        @functools.wraps(handler)
        def command(as_json: bool, quiet: bool, **typed: Any) -> None:
            options = [n.removeprefix("--") for n in names]
            given = {k: v for k in options if (v := typed.pop(k)) is not None}
            # Check them before the verb starts.
            typed |= read_options(of, given)
            for key, value in typed.items():
                typed[key] = user_path(value) if isinstance(value, Path) else value
            if "progress" in own:
                typed["progress"] = silent if quiet else terminal
            # Libraries may print to stdout, which must contain nothing but the JSON.
            aside = sys.stderr if as_json else sys.stdout
            try:
                with contextlib.redirect_stdout(aside):
                    output = handler(**typed)
            except KeyboardInterrupt:
                say("isingcut: interrupted; run the same command again to resume")
                raise typer.Exit(130) from None
            _print_output(called, output, as_json=as_json, quiet=quiet)

        output = list(
            inspect.signature(_print_output, eval_str=True).parameters.values()
        )
        signature = inspect.Signature(parameters + output[2:])
        command.__signature__ = signature  # type: ignore[attr-defined]
        app.command(called, cls=_Command, rich_help_panel=group)(command)
        return handler

    return decorate


def _parameter(of: type[Options], flag_or_name: str) -> inspect.Parameter:
    """Return the command-line parameter of an option."""
    name = flag_or_name.removeprefix("--")
    kind: Any = plain_type(of, name)
    numeric = f"<{kind.__name__}>" if kind in (int, float) else None
    # The declaration reads numbers, so that they are written alike everywhere.
    kind = str if numeric else kind
    f = of.__dataclass_fields__[name]
    info: Any
    if f.metadata["argument"] and name == flag_or_name:
        info = typer.Argument(help=f.metadata["help"], metavar=flag(f))
    else:
        default = "" if f.default in ("", None, False) else f" (default: {f.default})"
        called = flag_or_name if name != flag_or_name else flag(f)
        info = typer.Option(
            called,
            help=f.metadata["help"] + default,
            metavar=f.metadata["metavar"] or numeric,
        )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, info],
    )


def _in_panels(parameters: Sequence[inspect.Parameter]) -> list[inspect.Parameter]:
    """Sort the parameters in the order of `_PANELS`, each option under its heading."""
    headings = {name: panel for panel, ns in _PANELS.items() for name in ns.split()}
    for parameter in parameters:
        info = get_args(parameter.annotation)[1]
        if isinstance(info, typer.models.OptionInfo):
            info.rich_help_panel = headings[parameter.name]
    order = ["model", *headings]
    return sorted(parameters, key=lambda parameter: order.index(parameter.name))


def _print_output(
    called: str,
    output: Output,
    *,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print the result as one JSON document.",
            rich_help_panel="Output",
        ),
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet",
            help="Print no progress and no tables.",
            rich_help_panel="Output",
        ),
    ] = False,
) -> None:
    """Print an output; the keyword arguments are options of every verb."""
    warnings = list(dict.fromkeys(output.warnings))
    with convert_write_errors():
        if as_json:
            document = without_infinities(
                {"verb": called, **output.data, "warnings": warnings}
            )
            print(json.dumps(document, indent=1, allow_nan=False))
        elif quiet:
            if output.brief:
                print(printable(output.brief))
        else:
            output.show()
    for warning in warnings:
        say(f"isingcut: warning: {warning}")


def collect(kind: type[Kind], config: Path | None, options: Mapping[str, Any]) -> Kind:
    """Combine the options from a config file and from the command line, which wins."""
    return kind(**{**(from_yaml(kind, config) if config else {}), **options})


def reopen(
    directory: Path, options: Mapping[str, Any], *, several: bool = False
) -> tuple[Store, RunConfig]:
    """Open a run folder, and combine its options with those typed now, which win.

    A budget typed without --remove replaces the folder's --remove. A --remove typed for a folder
    that has only a budget replaces the budget.

    Args:
        several: allow a range of removals.

    Raises:
        InputError: neither the folder nor the command line has --remove or --budget.
    """
    from isingcut.files.store import Store
    from isingcut.runs.folder import read_config

    typed = dict(options)
    folder = Store.open(directory, overwrite=bool(typed.get("overwrite")))
    folder.typed_solver = typed.get("solver")
    config = read_config(folder)
    if typed.get("budget") and not typed.get("remove"):
        typed["remove"] = ""
    elif typed.get("remove"):
        config = config.at(typed["remove"])
    config = config.replace(**typed).validate()
    if not config.removal:
        raise InputError(f"{directory} was made without --remove; add --remove M")
    if not several and config.remove.is_range:
        raise InputError(
            f"expected one removal, got {config.remove}; choose one with --remove M"
        )
    return folder, config


def reopen_at(
    directory: Path, options: Mapping[str, Any], blocks: str | None
) -> tuple[Store, RunConfig, list[int] | None]:
    """Open a run folder; return it, its options and the blocks of `--blocks` (None: the chosen).

    Without `--remove`, the number of blocks in `--blocks` is removed.
    """
    from isingcut.runs import constraints

    if blocks is None:
        return (*reopen(directory, options), None)
    try:
        named = BlockList(blocks).numbers
    except InputError as e:
        raise InputError(f"--blocks: {e}") from e
    if not named:
        raise InputError("--blocks is empty; write for example 3,4,9")
    removal = options.get("remove") or len(named)
    folder, config = reopen(directory, {**options, "remove": removal})
    if config.remove.counts and config.remove.counts[0] != len(named):
        raise InputError(
            f"--remove {config.remove} is not the number of --blocks; omit --remove"
        )
    # Illegal blocks are named as they were typed, before the model is loaded.
    only = config.replace(keep="", must_remove=blocks)
    constraints.removal_rows(folder.run.blocks, only)
    return folder, config, named


def removal_at(
    directory: Path, options: dict[str, Any], alone: bool
) -> tuple[Store, Path]:
    """Return the run and the folder of a removal; a folder `remove-SPEC` in a run selects it."""
    from isingcut.files.store import Store
    from isingcut.runs import solving

    # The parent of "." is ".".
    whole = Path(os.path.abspath(directory))
    of_run = Store.exists(directory)
    if not of_run and directory.is_dir() and whole.name.startswith("remove-"):
        if alone and (options.get("remove") or options.get("budget")):
            raise InputError(
                f"{directory} is the folder of one removal; to select another by --remove or "
                f"--budget, give the run folder, {whole.parent}"
            )
        return Store.open(whole.parent), whole
    folder, config = reopen(directory, options, several=True)
    return folder, solving.require(folder, config, "")
