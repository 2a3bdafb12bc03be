"""`none`: the exact cut stays as it is."""

from dataclasses import dataclass
from typing import Any, ClassVar

from isingcut.files.cuts import PatchRecord
from isingcut.healing.repairs.base import Repaired

__all__ = ["Unchanged"]


@dataclass(frozen=True)
class Unchanged:
    """No repair."""

    passes: ClassVar[float] = 0.0
    trains: ClassVar[bool] = False

    def patch(self, *given: Any) -> Repaired:
        """Return no patches."""
        return Repaired([], PatchRecord(cuts=[], changed=False, unpatched=[]))
