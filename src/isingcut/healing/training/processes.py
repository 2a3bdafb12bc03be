"""The processes of a distributed training: which one writes, and waiting for each other."""

from __future__ import annotations

from typing import Any


class Processes:
    """This process among those that `torchrun` or `accelerate launch` started; often the only one.

    Args:
        device: the option; ``"cpu"`` keeps a machine's GPUs out of it.
    """

    def __init__(self, device: str = "auto") -> None:
        import torch
        from accelerate import PartialState

        cpu = device == "cpu" or not (
            torch.cuda.is_available() or torch.backends.mps.is_available()
        )
        self._state: Any = PartialState(cpu=cpu)

    @property
    def main(self) -> bool:
        """This process writes and shows progress."""
        return bool(self._state.is_main_process)

    @property
    def size(self) -> int:
        """Number of processes."""
        return int(self._state.num_processes)

    def wait(self) -> None:
        """Until all processes are here."""
        self._state.wait_for_everyone()

    def of_main(self, flag: bool) -> bool:
        """What the main process found, for all of them; each must ask."""
        import torch
        from accelerate.utils import broadcast

        told: Any = torch.tensor([int(flag)], device=self._state.device)
        return bool(broadcast(told).item())

    def part(self) -> None:
        """Leave the others, once nothing is left to do together."""
        self._state.destroy_process_group()
