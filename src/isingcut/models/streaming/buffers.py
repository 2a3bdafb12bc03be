"""Two buffers for the parts of models: one in use, the other filled by a thread meanwhile."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

import torch
from torch import Tensor

from isingcut.models.device import device_module, synchronise


class Fillable(Protocol):
    """One part of one model."""

    size: int

    def fill(self, buffer: Tensor) -> None:
        """Read the part into host memory. Called by the reading thread."""

    def install(self, memory: Tensor) -> None:
        """Let the model use the part, which lies in ``memory`` on its device."""

    def remove(self) -> None:
        """Let the model forget the part."""


class _Buffer:
    """Memory for one part: on a GPU also a pinned copy in host memory, copied asynchronously."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._module, self._device = device_module(device), device
        self.host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.memory = self.host
        if self._module is not None:
            self.memory = torch.empty(size, dtype=torch.uint8, device=device)
            self._stream = self._module.Stream(device)
        self._copied: Any = None
        self._used: Any = None

    def load(self, part: Fillable) -> None:
        """Fill from the files. Called by the reading thread."""
        if self._copied is not None:
            # The copy that went out of the pinned memory last must be through.
            self._copied.synchronize()
        part.fill(self.host)
        if self._module is not None:
            with self._module.stream(self._stream):
                if self._used is not None:
                    # What was computed with the part before this one still reads the memory.
                    self._stream.wait_event(self._used)
                self.memory[: part.size].copy_(self.host[: part.size], non_blocking=True)
                self._copied = self._module.Event()
                self._copied.record(self._stream)

    def arrive(self) -> None:
        """What is computed from now on waits for the copy."""
        if self._copied is not None:
            self._module.current_stream(self._device).wait_event(self._copied)

    def leave(self) -> None:
        """Mark the end of what was computed with the part."""
        if self._module is not None:
            self._used = self._module.Event()
            self._used.record(self._module.current_stream(self._device))


class Buffers:
    """Two buffers and the thread that fills them; models that are run in turn share them.

    Args:
        size: bytes of the largest part.
        device: where parts are used.

    Attributes:
        reading: seconds that the thread has read, and of these on a processor.
        stalled: seconds that computing has waited for a part.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self._buffers: list[_Buffer] = []
        self._held: list[Fillable | None] = [None, None]
        self._recent = 1
        self._pending: tuple[Fillable, int, Future[None]] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="isingcut-reader")
        self.reading = self.reading_cpu = self.stalled = 0.0

    def holds(self, part: Fillable) -> bool:
        """Whether a part is installed."""
        return any(held is part for held in self._held)

    def memory_of(self, part: Fillable) -> Tensor:
        """The buffer that holds a part, which is installed."""
        return self._buffers[next(i for i, held in enumerate(self._held) if held is part)].memory

    def take(self, part: Fillable) -> None:
        """Install a part; the one taken before it stays, an older one goes."""
        for index, held in enumerate(self._held):
            if held is part:
                self._recent = index
                return
        if self._pending is None or self._pending[0] is not part:
            self._settle()
            self._submit(part)
        assert self._pending is not None
        _, index, future = self._pending
        began = time.perf_counter()
        future.result()
        self.stalled += time.perf_counter() - began
        self._pending = None
        self._buffers[index].arrive()
        # A gradient may use the part after a measurement in inference mode has read it.
        with torch.inference_mode(False):
            part.install(self._buffers[index].memory)
        self._held[index], self._recent = part, index

    def expect(self, part: Fillable) -> None:
        """Start to read a part into the buffer that is not in use; what was there goes."""
        if self.holds(part) or (self._pending is not None and self._pending[0] is part):
            return
        self._settle()
        self._submit(part)

    def clear(self) -> None:
        """Remove what is installed and free the memory; it comes back when next needed."""
        self._settle()
        for index in range(2):
            self._drop(index)
        # A copy may still be on its way into memory that is about to be given away.
        synchronise(self.device)
        self._buffers.clear()

    def _submit(self, part: Fillable) -> None:
        if not self._buffers:
            with torch.inference_mode(False):
                self._buffers = [_Buffer(self.size, self.device) for _ in range(2)]
        index = 1 - self._recent
        self._drop(index)
        buffer = self._buffers[index]

        def load() -> None:
            began, cpu = time.perf_counter(), time.thread_time()
            buffer.load(part)
            self.reading += time.perf_counter() - began
            self.reading_cpu += time.thread_time() - cpu

        self._pending = (part, index, self._thread.submit(load))

    def _settle(self) -> None:
        """Let a part that is being read, and is not wanted after all, come in and be forgotten.

        Its failure is forgotten with it: a checkpoint may be renamed once its proof is done.
        """
        if self._pending is not None:
            if not self._pending[2].cancel():
                wait([self._pending[2]])
            self._pending = None

    def _drop(self, index: int) -> None:
        held = self._held[index]
        if held is not None:
            self._buffers[index].leave()
            held.remove()
            self._held[index] = None
