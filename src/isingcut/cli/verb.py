"""What every verb shares: its options, `--json`, `--quiet`, its warnings, a reopened run folder.

A verb is a function in one of the files beside this one, decorated with `verb`. It returns an
`Output`; in which form that is printed is decided here, so that no verb prints by itself.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from typer.core import TyperCommand

from isingcut.console.printing import printable, printing, say
from isingcut.console.progress import silent, terminal
from isingcut.errors import InputError
from isingcut.files.inputs import user_path
from isingcut.files.writing import without_infinities
from isingcut.options.config import RunConfig
from isingcut.options.declaration import Options, flag, from_yaml, given_options, plain_type
from isingcut.options.spellings import BlockList

if TYPE_CHECKING:
    from isingcut.runs.folder import RunFolder

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
    Path | None, typer.Option("--config", metavar="FILE", help="YAML file with the same options.")
]

Blocks = Annotated[
    str | None,
    typer.Option(
        "--blocks",
        metavar="LIST",
        help="These blocks, not the chosen ones: 3,4,9 or 5-8, with commas, spaces or lines.",
    ),
]
OneBased = Annotated[bool, typer.Option("--one-based", help="The list of --blocks counts from 1.")]

WHOLE, STAGES, RESULT, LOOK = "Whole runs", "Single stages", "Use the result", "Look things up"
"""The groups of verbs in `isingcut --help`."""

TOGETHER: set[str] = set()
"""The verbs that all processes of a launcher carry out."""

OF_RUN = (
    "--model",
    "remove",
    "budget",
    "device",
    "stream",
    "memory_limit",
    "trust_remote_code",
    "overwrite",
)
"""Options of the verbs that work on a finished energy and need the model."""


_PANELS = {
    "Start with these": "remove budget out calibration quick effort heal tasks device memory_limit "
    "config overwrite",
    "What to remove": "keep drop",
    "Text": "samples length rank_samples report_samples seed",
    "Model and machine": "card dtype attention batch_tokens stream trust_remote_code",
    "Choosing": "energy also linear solver states diverse solve_seconds random_states choose",
    "Repair": "patch patch_tokens heal_options",
    "Judging": "data questions skip_speed",
}
"""The options of a run by the headings of its help, in order."""
_LONG = 15
"""A verb with more options than this shows them under headings."""


@dataclass(frozen=True)
class Output:
    """What a verb has to say.

    Args:
        data: the keys of `--json` (documented in docs/cli.md); ``verb`` and ``warnings`` come on
            top.
        show: prints it for people.
        brief: what `--quiet` leaves: one line, or nothing.
        warnings: what a user should know and do; each is printed once, to stderr.
    """

    data: Mapping[str, Any]
    show: Callable[[], None]
    brief: str = ""
    warnings: Sequence[str] = field(default=())


class _Command(TyperCommand):
    """Reads an option without an amount behind it as having its `bare` value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        bare = {flag(f): f.metadata["bare"] for f in fields(RunConfig) if f.metadata["bare"]}
        amounts = (after[:1].isdigit() or after in bare.values() for after in [*args[1:], ""])
        pairs = zip(args, amounts, strict=False)
        words = [w if given or w not in bare else f"{w}={bare[w]}" for w, given in pairs]
        return super().parse_args(ctx, words)


def part_names(room: str) -> Callable[[str], list[str]]:
    """Shell completion of the names of one room's parts; imports none of them."""

    def complete(incomplete: str) -> list[str]:
        names: list[str] = importlib.import_module(f"isingcut.{room}").registry.names()
        return [name for name in names if name.startswith(incomplete)]

    return complete


def verb(
    *names: str,
    group: str,
    repeat: tuple[str, ...] = (),
    name: str | None = None,
    of: type[Options] = RunConfig,
    together: bool = False,
) -> Callable[[Callable[..., Output]], Callable[..., Output]]:
    """Make a handler a verb of the command line, with the named options of a configuration class.

    Args:
        names: fields of ``of``; one left out on the command line arrives as None, so that a file
            or a run folder can supply it before the default does. A name with dashes in front
            (``--model``) is an option here, whatever it is elsewhere.
        group: one of the headings of `isingcut --help`.
        repeat: options among ``names`` that may be given several times; they arrive as lists.
        name: the verb, where it is not the function's name.
        of: the class whose fields the options are.
        together: whether all processes of a launcher carry the verb out; else it is rank 0's.

    The handler gets its options by keyword, and where it has a parameter ``progress`` the
    terminal's, or a silent one under `--quiet`.
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
        parameters += [_parameter(of, n, repeated=n in repeat) for n in names]

        @functools.wraps(handler)
        def command(as_json: bool, quiet: bool, **typed: Any) -> None:
            options = [n.removeprefix("--") for n in names]
            typed |= _checked(of, {k: typed[k] for k in options if typed[k] is not None}, repeat)
            typed |= {k: _at_home(v) for k, v in typed.items()}
            if "progress" in own:
                typed["progress"] = silent if quiet else terminal
            # A library that prints must not end up in the JSON.
            aside = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
            try:
                with aside:
                    output = handler(**typed)
            except KeyboardInterrupt:
                say("isingcut: interrupted; the same command goes on from here")
                raise typer.Exit(130) from None
            _print_output(called, output, as_json=as_json, quiet=quiet)

        if of is RunConfig and len(names) > _LONG:
            parameters = _in_panels(parameters)
        setattr(command, "__signature__", inspect.Signature([*parameters, *_OUTPUT]))  # noqa: B010
        app.command(called, cls=_Command, rich_help_panel=group)(command)
        return handler

    return decorate


def _parameter(of: type[Options], asked: str, *, repeated: bool) -> inspect.Parameter:
    """An option as the command line takes it."""
    name = asked.removeprefix("--")
    f = of.__dataclass_fields__[name]
    info: Any
    if f.metadata["argument"] and name == asked:
        info = typer.Argument(help=f.metadata["help"], metavar=flag(f))
    else:
        default = "" if f.default in ("", None, False) else f" (default: {f.default})"
        room = f.metadata["room"]
        called = asked if name != asked else flag(f)
        if plain_type(of, name) is bool and f.default is None:
            called += f"/--no-{called.removeprefix('--')}"
        info = typer.Option(
            called,
            help=f.metadata["help"] + default,
            metavar=f.metadata["metavar"],
            autocompletion=part_names(room) if room else None,
        )
    kind: Any = plain_type(of, name)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[(list[kind] if repeated else kind) | None, info],
    )


def _in_panels(parameters: Sequence[inspect.Parameter]) -> list[inspect.Parameter]:
    """The parameters in the order of `_PANELS`, each option under its heading."""
    headings = {name: panel for panel, names in _PANELS.items() for name in names.split()}
    for parameter in parameters:
        info = get_args(parameter.annotation)[1]
        if isinstance(info, typer.models.OptionInfo):
            info.rich_help_panel = headings[parameter.name]
    order = ["model", *headings]
    return sorted(parameters, key=lambda parameter: order.index(parameter.name))


def _checked(of: type[Options], typed: Mapping[str, Any], repeat: Sequence[str]) -> dict[str, Any]:
    """The typed options of a verb, each checked before the verb looks at anything."""
    found = given_options(of, {k: v for k, v in typed.items() if k not in repeat})
    for name in typed.keys() & {*repeat}:
        found[name] = [given_options(of, {name: value})[name] for value in typed[name]]
    return found


def _at_home(value: Any) -> Any:
    """A typed path, or several, with ``~`` for the home folder replaced."""
    if isinstance(value, list):
        return [_at_home(v) for v in value]
    return user_path(value) if isinstance(value, Path) else value


def _flag(name: str, option: str, help_: str) -> inspect.Parameter:
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=False,
        annotation=Annotated[bool, typer.Option(option, help=help_, rich_help_panel="Output")],
    )


_OUTPUT = (
    _flag("as_json", "--json", "Print one JSON document, for machines."),
    _flag("quiet", "--quiet", "No progress and no tables: one line at most."),
)


def _print_output(called: str, output: Output, *, as_json: bool, quiet: bool) -> None:
    warnings = list(dict.fromkeys(output.warnings))
    with printing():
        if as_json:
            document = without_infinities({"verb": called, **output.data, "warnings": warnings})
            print(json.dumps(document, indent=1, allow_nan=False))
        elif quiet:
            if output.brief:
                print(printable(output.brief))
        else:
            output.show()
    for warning in warnings:
        say(f"isingcut: warning: {warning}")


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were typed."""
    return {k: v for k, v in options.items() if v is not None}


def collect(config: Path | None, options: Mapping[str, Any]) -> RunConfig:
    """A run's options: those of a config file, with those typed on top."""
    values = from_yaml(RunConfig, config) if config else {}
    return RunConfig(**{**values, **given(options)})


def reopen(directory: Path, options: Mapping[str, Any]) -> tuple[RunFolder, RunConfig]:
    """A run folder, and its own options with those typed now on top.

    A budget typed without a number of blocks frees the number, also where the folder has one; a
    number typed for a folder that has only a budget takes its place.

    Raises:
        InputError: neither the folder nor the command line says how much is removed.
    """
    from isingcut.runs.folder import RunFolder

    typed = given(options)
    folder = RunFolder.open(directory, overwrite=bool(typed.get("overwrite")))
    folder.typed_solver = typed.get("solver")
    if typed.get("budget") and not typed.get("remove"):
        typed["remove"] = ""
    if typed.get("remove") and not typed.get("budget") and not folder.config.remove:
        typed["budget"] = ""
    config = folder.config.replace(**typed).validate()
    if not config.removal:
        raise InputError(f"{directory} was made without --remove; say how many blocks to remove")
    return folder, config


def reopen_at(
    directory: Path, options: Mapping[str, Any], blocks: str | None, *, one_based: bool = False
) -> tuple[RunFolder, RunConfig, list[int] | None]:
    """A run folder, its options, and the blocks named by `--blocks`, or None for the chosen ones.

    Without `--remove`, as many go as blocks are named.
    """
    from isingcut.runs.folder import RunFolder

    if blocks is None:
        return (*reopen(directory, options), None)
    try:
        typed = BlockList(blocks).numbers
    except InputError as e:
        raise InputError(f"--blocks: {e}") from e
    total = len(RunFolder.open(directory).run.blocks.blocks)
    named = [block - one_based for block in typed]
    if named[0] < 0 or named[-1] >= total:
        raise InputError(
            f"--blocks {','.join(map(str, typed))[:60]}: this model's blocks are numbered "
            f"{one_based:d} to {total - 1 + one_based}; --one-based is for lists that count from 1"
        )
    folder, config = reopen(directory, {**options, "remove": options.get("remove") or len(named)})
    return folder, config, named
