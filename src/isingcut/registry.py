"""A registry of the parts in a sub-package, its room. A part is a class in a file of its own.

The file `energies/empirical_fisher.py` has the energy `empirical-fisher`. Its `__all__` has
exactly one name: the part. A part is imported on first use. Packages outside
isingcut add parts through an entry point in the group `isingcut.<room>`; a program adds one
at run time with `register`.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from isingcut.errors import (
    InputError,
    IsingcutError,
    UnknownNameError,
    one_line,
    suggest,
)

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


@dataclass
class Registry:
    """The parts of one room, by name.

    Args:
        package: name of the package with the parts; its last word is the room.
        noun: word for one part in messages, for example ``"energy"``.
        choices: names, such as ``"auto"``, for which a run chooses the part.
    """

    package: str
    noun: str
    choices: tuple[str, ...] = ()
    _registered: dict[str, Any] = field(default_factory=dict)

    @property
    def room(self) -> str:
        """The sub-package with the parts, for example ``"energies"``."""
        return self.package.rpartition(".")[2]

    def _files(self) -> dict[str, str]:
        package = importlib.import_module(self.package)
        return {
            info.name.replace("_", "-"): f"{self.package}.{info.name}"
            for info in pkgutil.iter_modules(package.__path__)
            if not (info.ispkg or info.name == "base" or info.name.startswith("_"))
        }

    def _entry_points(self) -> dict[str, EntryPoint]:
        # Imported here because `--help` does not need it.
        from importlib.metadata import entry_points

        return {e.name: e for e in entry_points(group=f"isingcut.{self.room}")}

    def names(self) -> list[str]:
        """Return all names, sorted, without importing a part."""
        return sorted(
            {*self._files(), *self._entry_points(), *self._registered, *self.choices}
        )

    def register(self, name: str, part: Any) -> None:
        """Add ``part`` for this process under a new name.

        Raises:
            InputError: the name is taken.
        """
        if name in self.names():
            raise InputError(
                f"{self.noun} {name!r} is already registered; choose another name"
            )
        self._registered[name] = part

    def check(self, name: str) -> None:
        """Check that there is a part called ``name``, without importing it.

        Raises:
            UnknownNameError: as `get`.
        """
        if name in self.choices or name not in self.names():
            self.get(name)

    def get(self, name: str) -> Any:
        """Import and return the part called ``name``.

        Raises:
            UnknownNameError: no such part. The message suggests the nearest name and lists all.
            InputError: the part is in a plug-in that cannot be imported.
        """
        # A name passed in Python may be anything.
        name = str(name)
        if name in self._registered:
            return self._registered[name]
        files = self._files()
        if name in files:
            module = importlib.import_module(files[name])
            (exported,) = module.__all__
            return getattr(module, exported)
        entry_points = self._entry_points()
        if name in entry_points:
            return self._load(entry_points[name])
        if name in self.choices:
            raise UnknownNameError(
                f"{name!r} lets a run choose; here, name one {self.noun}"
            )
        hint = suggest(name, self.names())
        raise UnknownNameError(f"unknown {self.noun} {name!r}{hint}")

    def _load(self, entry_point: EntryPoint) -> Any:
        try:
            return entry_point.load()
        except IsingcutError:
            raise
        except (Exception, SystemExit) as e:
            plug_in = entry_point.dist.name if entry_point.dist else entry_point.value
            kind = type(e).__name__
            raise InputError(
                f"the {self.noun} {entry_point.name!r} comes from the plug-in {plug_in}, which "
                f"cannot be imported ({kind}: {one_line(e).removeprefix(f'{kind}: ')}); "
                f"repair or remove that plug-in, or choose another {self.noun}"
            ) from e
