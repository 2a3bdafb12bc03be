"""Command-line options made from `RunConfig`'s fields: one home for every default and help."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from isingcut.options.config import RunConfig
from isingcut.options.declaration import flag

_TYPES = {"int": int, "bool": bool, "float": float}


def part_names(room: str) -> Callable[[str], list[str]]:
    """Shell completion of the names of one room's parts; imports none of them."""

    def complete(incomplete: str) -> list[str]:
        names: list[str] = importlib.import_module(f"isingcut.{room}").registry.names()
        return [name for name in names if name.startswith(incomplete)]

    return complete


def with_options(
    *names: str, repeat: tuple[str, ...] = (), of: type = RunConfig
) -> Callable[[Any], Any]:
    """Give a handler the named options of a configuration class as keyword parameters.

    An option left out on the command line arrives as None, so that a config file or a run
    folder can supply it before the default does. A name with dashes in front (``--model``) is an
    option here, whatever it is elsewhere.
    """
    fields = {f.name: f for f in dataclasses.fields(of)}

    def decorate(handler: Any) -> Any:
        own = inspect.signature(handler, eval_str=True).parameters.values()
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in own if p.kind != p.VAR_KEYWORD]
        for asked in names:
            name = asked.removeprefix("--")
            f = fields[name]
            base: Any = _TYPES.get(str(f.type).removesuffix(" | None"), str)
            info: Any
            if f.metadata["argument"] and name == asked:
                info = typer.Argument(help=f.metadata["help"], metavar=flag(f))
            else:
                shown = "" if f.default in ("", None, False) else f" (default: {f.default})"
                room = f.metadata["room"]
                info = typer.Option(
                    asked if name != asked else flag(f),
                    help=f.metadata["help"] + shown,
                    metavar=f.metadata["metavar"],
                    autocompletion=part_names(room) if room else None,
                )
            if name in repeat:
                base = list[base]
            parameters.append(
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=None,
                    annotation=Annotated[base | None, info],
                )
            )
        handler.__signature__ = inspect.Signature(parameters)
        return handler

    return decorate
