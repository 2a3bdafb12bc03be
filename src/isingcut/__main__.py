"""Entry point of `python -m isingcut`, `torchrun -m isingcut` and `accelerate launch -m`."""

from isingcut.cli.main import main

main()
