"""The residual stream between blocks, for every micro-batch: in memory, or in a scratch file."""

from __future__ import annotations

import tempfile
from io import BufferedRandom
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isingcut.errors import CheckpointError
from isingcut.files.writing import clear_os_errors


class Boundaries:
    """Tensors by key, put once and taken once; what does not fit goes to a file.

    The file is written and read plainly: pages of a memory map count as the process's memory.
    It has no name, so that a killed run leaves nothing behind.

    Args:
        room: bytes to keep in memory.
        folder: where the file is made; None takes the system's folder for temporary files.
    """

    def __init__(self, room: int, folder: Path | None = None) -> None:
        self._room, self._folder = room, folder
        self._memory: dict[object, Tensor] = {}
        self._where: dict[object, tuple[int, Tensor]] = {}
        self._file: BufferedRandom | None = None
        self._end = 0
        self.spilled = 0

    def put(self, key: object, value: Tensor) -> None:
        """Keep a tensor.

        Raises:
            InputError: the disk of the scratch file is full.
        """
        size = value.numel() * value.element_size()
        if size <= self._room:
            self._room -= size
            self._memory[key] = value
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
        plain = value.detach().contiguous().cpu()
        with clear_os_errors(self._folder or Path(tempfile.gettempdir())):
            self._file.seek(self._end)
            self._file.write(_bytes_of(plain))
        self._where[key] = (self._end, torch.empty_like(value, device="meta"))
        self._end += size
        self.spilled += size

    def get(self, key: object, device: torch.device) -> Tensor:
        """A tensor that was put; it stays."""
        if key in self._memory:
            return self._memory[key]
        start, like = self._where[key]
        value = torch.empty(like.shape, dtype=like.dtype)
        assert self._file is not None
        self._file.seek(start)
        view = _bytes_of(value)
        if self._file.readinto(view) != len(view):
            raise CheckpointError("the scratch file of hidden states ended early")
        return value.to(device)

    def take(self, key: object, device: torch.device) -> Tensor:
        """A tensor that was put; it is forgotten."""
        value = self.get(key, device)
        if self._memory.pop(key, None) is not None:
            self._room += value.numel() * value.element_size()
        else:
            del self._where[key]
        return value

    def close(self) -> None:
        """Give the file back."""
        if self._file is not None:
            self._file.close()


def _bytes_of(value: Tensor) -> memoryview:
    plain: Any = value.view(-1).view(torch.uint8).numpy()
    return memoryview(plain)
