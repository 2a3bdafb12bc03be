"""`python -m isingcut.testing KIT`: run one conformance kit and print its figures."""

import importlib
import sys

KITS = ("gpu", "solvers")

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in KITS:
        print(f"usage: python -m isingcut.testing KIT [...]; kits: {', '.join(KITS)}")
        sys.exit(2)
    sys.exit(
        importlib.import_module(f"isingcut.testing.{sys.argv[1]}").main(sys.argv[2:])
    )
