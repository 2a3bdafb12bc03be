"""Command-line options made from `RunConfig`'s fields: one home for every default and help."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from isingcut.config import RunConfig

_TYPES = {"int": int, "bool": bool, "float": float}


def part_names(room: str) -> Callable[[str], list[str]]:
    """Shell completion of the names of one room's parts; imports none of them."""

    def complete(incomplete: str) -> list[str]:
        names: list[str] = importlib.import_module(f"isingcut.{room}").registry.names()
        return [name for name in names if name.startswith(incomplete)]

    return complete


_COMPLETIONS: dict[str, Callable[[str], list[str]]] = {
    "energy": part_names("energies"),
    "also": part_names("energies"),
    "solver": part_names("solvers"),
}


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
            if f.metadata.get("argument") and name == asked:
                info = typer.Argument(help=f.metadata["help"], metavar=name.upper())
            else:
                shown = "" if f.default in ("", None, False) else f" (default: {f.default})"
                flag = "--" + name.replace("_", "-")
                info = typer.Option(
                    flag,
                    help=f.metadata["help"] + shown,
                    metavar=f.metadata.get("metavar"),
                    autocompletion=_COMPLETIONS.get(name),
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
