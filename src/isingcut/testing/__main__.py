"""`python -m isingcut.testing KIT`: run one conformance kit and print its figures."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import isingcut.testing


def main() -> int:
    """Run the kit named first on the command line with the further arguments."""
    kits = [
        info.name
        for info in pkgutil.iter_modules(isingcut.testing.__path__)
        if hasattr(importlib.import_module(f"isingcut.testing.{info.name}"), "main")
        and not info.name.startswith("_")
    ]
    if len(sys.argv) < 2 or sys.argv[1] not in kits:
        print(f"usage: python -m isingcut.testing KIT [...]; kits: {', '.join(kits)}")
        return 2
    kit = importlib.import_module(f"isingcut.testing.{sys.argv[1]}")
    return int(kit.main(sys.argv[2:]))


if __name__ == "__main__":
    sys.exit(main())
