"""The processes of a distributed training: which one writes, and waiting for each other."""

from __future__ import annotations

from typing import Any

from isingcut.options.healing import HealConfig


class Processes:
    """This process among those that `torchrun` or `accelerate launch` started; often the only one.

    Args:
        config: without a training there is one process, and nothing of accelerate is needed;
            the device ``"cpu"`` keeps a machine's GPUs out of it.
    """

    def __init__(self, config: HealConfig) -> None:
        self._state: Any = None
        if config.method == "none":
            return
        import torch
        from accelerate import PartialState

        gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
        self._state = PartialState(cpu=config.device == "cpu" or not gpu)

    @property
    def main(self) -> bool:
        """This process writes and shows progress."""
        return self._state is None or bool(self._state.is_main_process)

    @property
    def size(self) -> int:
        """Number of processes."""
        return 1 if self._state is None else int(self._state.num_processes)

    def wait(self) -> None:
        """Until all processes are here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    def of_main(self, flag: bool) -> bool:
        """What the main process found, for all of them; each must ask."""
        if self._state is None:
            return flag
        import torch
        from accelerate.utils import broadcast

        told: Any = torch.tensor([int(flag)], device=self._state.device)
        return bool(broadcast(told).item())

    def part(self) -> None:
        """Leave the others, once nothing is left to do together."""
        if self._state is not None:
            self._state.destroy_process_group()
