"""Two buffers for the parts of models: one in use, the other filled by a thread meanwhile.

Parts also stay in host memory, as many as a bound allows, as they are after conversion. From there
a GPU copies a part straight to its buffer (the memory is page-locked); a CPU uses it where it is.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cached_property
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from isingcut.models.device import device_module, synchronise


class Fillable(Protocol):
    """One part of one model.

    Attributes:
        size: bytes.
        hits: how often it was found in host memory.
        misses: how often it was read from its files.
    """

    size: int
    hits: int
    misses: int

    def fill(self, buffer: Tensor) -> None:
        """Read the part into host memory. Called by the reading thread."""

    def install(self, memory: Tensor) -> None:
        """Let the model use the part, which lies in ``memory`` on its device."""

    def remove(self) -> None:
        """Let the model forget the part."""


class _Buffer:
    """Memory for one part: in host memory, and on a GPU, where it is copied asynchronously."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._size, self._device, self._module = size, device, device_module(device)
        self._copied: Any = None
        if self._module is not None:
            self._stream = self._module.Stream(device)
            # Of the stream that fills it: freed while a copy is on its way, it cannot become
            # memory of the main stream before the copy is through.
            with self._module.stream(self._stream):
                self._memory = torch.empty(size, dtype=torch.uint8, device=device)
            # What the main stream was given so far may use the same memory.
            self.leave()

    @cached_property
    def _host(self) -> Tensor:
        return _host_memory(self._size, self._device)

    def load(self, part: Fillable, kept: Tensor | None) -> Tensor:
        """The part on its device, from where it is kept, else from its files. In the thread."""
        host = kept
        if host is None:
            if self._copied is not None:
                # The copy that went out of the host memory last must be through.
                self._copied.synchronize()
            host = self._host
            part.fill(host)
        if self._module is None:
            return host
        with self._module.stream(self._stream):
            # What was computed with the part before this one still reads the memory.
            self._stream.wait_event(self._used)
            self._memory[: part.size].copy_(host[: part.size], non_blocking=True)
            self._copied = self._module.Event()
            self._copied.record(self._stream)
        return self._memory

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
        bound: bytes of the parts that may stay in host memory. The first ones that fit do, and none
            makes room for another: in sweeps the least recently used part is needed next.
        reading: seconds that the thread has read.
        stalled: seconds that computing has waited for a part.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self.bound = 0
        self.reading = self.stalled = 0.0
        self._buffers: list[_Buffer] = []
        self._kept: WeakKeyDictionary[Fillable, Tensor] = WeakKeyDictionary()
        self._held: list[Fillable | None] = [None, None]
        self._recent = 1
        self._pending: tuple[Fillable, int, Future[Tensor]] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="isingcut-reader")

    def holds(self, part: Fillable) -> bool:
        """Whether a part is installed."""
        return any(held is part for held in self._held)

    def keeps(self, part: Fillable) -> bool:
        """Whether a part stays in host memory."""
        return part in self._kept

    def allocated(self) -> int:
        """Bytes of the device's memory that parts take: on a CPU those that stay."""
        self._settle()
        return self._kept_bytes() if self.device.type == "cpu" else len(self._buffers) * self.size

    def keep_at_most(self, bound: int) -> None:
        """Lower the bound of the parts that stay in host memory; those that came last go."""
        if bound < self.bound:
            self._settle()
            self.bound = bound
            while self._kept_bytes() > bound:
                self._kept.popitem()

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
        memory = future.result()
        self.stalled += time.perf_counter() - began
        self._pending = None
        self._buffers[index].arrive()
        # A gradient may use the part after a measurement in inference mode has read it.
        with torch.inference_mode(False):
            part.install(memory)
        self._held[index], self._recent = part, index

    def expect(self, part: Fillable) -> None:
        """Start to read a part into the buffer that is not in use; what was there goes."""
        if self.holds(part) or (self._pending is not None and self._pending[0] is part):
            return
        self._settle()
        self._submit(part)

    def clear(self) -> None:
        """Free the device's memory; it comes back when a part is next needed."""
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

        def load() -> Tensor:
            began = time.perf_counter()
            kept = self._kept.get(part)
            if kept is None:
                part.misses += 1
                if self._kept_bytes() + _bytes_of(part.size, self.device) <= self.bound:
                    kept = _host_memory(part.size, self.device)
                    part.fill(kept)
                    self._kept[part] = kept
            else:
                part.hits += 1
            memory = buffer.load(part, kept)
            self.reading += time.perf_counter() - began
            return memory

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

    def _kept_bytes(self) -> int:
        return sum(_bytes_of(len(kept), self.device) for kept in self._kept.values())


def _host_memory(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")


def _bytes_of(size: int, device: torch.device) -> int:
    """What that takes: torch rounds page-locked memory up to a power of two."""
    return 1 << (size - 1).bit_length() if device.type == "cuda" else size
