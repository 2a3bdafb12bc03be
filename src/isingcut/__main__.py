"""`python -m isingcut`, which is what `torchrun -m` and `accelerate launch -m` start."""

from isingcut.cli.main import main

main()
