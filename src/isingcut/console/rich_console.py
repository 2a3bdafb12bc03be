"""The rich console that tables, lines and bars are printed on."""

import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from isingcut.console.printing import ASCII, printable

_NARROWEST = 40
_PIPE = 160


class _Literal(Console):
    """A console that never interprets text as markup."""

    def render_str(self, text: str, **how: Any) -> Text:
        # Escape before the layout, so that column widths fit the printed text.
        legible = printable(text).encode(self.encoding, ASCII).decode(self.encoding)
        return super().render_str(legible, **how)


def console(*, stderr: bool = False) -> Console:
    """Return the console for tables and lines.

    Without a terminal it is wide, so that no table in a file or pipe is cut off.
    """
    stream = sys.stderr if stderr else sys.stdout
    own = _Literal(file=stream, markup=False, emoji=False)
    own.width = max(own.width, _NARROWEST) if own.is_terminal else _PIPE
    return own
