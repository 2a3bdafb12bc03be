"""The rich console that tables, lines and bars are printed on."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from isingcut.console.printing import ASCII, printable

_NARROWEST, _UNLIMITED = 40, 160


class _Literal(Console):
    """A console to which every text is only text."""

    def render_str(self, text: str, **how: Any) -> Text:
        # Before the layout, so that columns fit what is printed in the end.
        legible = printable(text).encode(self.encoding, ASCII).decode(self.encoding)
        return super().render_str(legible, **how)


def console(*, stderr: bool = False) -> Console:
    """Where tables and lines go.

    A pipe is never narrow: no table that goes to a file or another program is cut.
    """
    stream = sys.stderr if stderr else sys.stdout
    own = _Literal(file=stream, stderr=stderr, markup=False, emoji=False)
    width = max(own.width, _NARROWEST) if own.is_terminal else _UNLIMITED
    return _Literal(file=stream, stderr=stderr, markup=False, emoji=False, width=width)
