"""Write the table of stages in rooms.md, from their declarations.

python docs/make_rooms.py
"""

import re
from pathlib import Path

from isingcut.files.stages import NUMERICS, STAGES
from isingcut.options.config import RunConfig
from isingcut.options.declaration import options_of

PAGE = Path(__file__).with_name("rooms.md")


def page() -> str:
    """Return the page with the table of the declared stages."""
    rows = ["| stage | verb | writes | reads | options |", "|---|---|---|---|---|"]
    for name, stage in STAGES.items():
        reads = ", ".join(stage.reads)
        options = ", ".join(
            [*options_of(RunConfig, name), *(NUMERICS if stage.numerics else ())]
        )
        rows.append(
            f"| {name} | `{stage.verb}` | `{stage.file}` | {reads} | {options} |"
        )
    table = "\n".join(["<!-- stages -->", *rows, "<!-- end -->"])
    old = PAGE.read_text(encoding="utf-8")
    return re.sub("<!-- stages -->(?s:.*)<!-- end -->", table, old)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
