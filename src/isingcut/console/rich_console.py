"""The rich console that tables, lines and bars are printed on."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from isingcut.console.printing import ASCII, printable

_NARROWEST, _UNLIMITED = 40, 160


class _Literal(Console):
    """A console that never reads text as markup."""

    def render_str(self, text: str, **how: Any) -> Text:
        # Escaped before the layout, so that columns fit the printed text.
        legible = printable(text).encode(self.encoding, ASCII).decode(self.encoding)
        return super().render_str(legible, **how)


def console(*, stderr: bool = False) -> Console:
    """Return the console for tables and lines.

    A pipe is wide, so that no table written to a file or another program is cut off.
    """
    stream = sys.stderr if stderr else sys.stdout
    own = _Literal(file=stream, stderr=stderr, markup=False, emoji=False)
    width = max(own.width, _NARROWEST) if own.is_terminal else _UNLIMITED
    return _Literal(file=stream, stderr=stderr, markup=False, emoji=False, width=width)
