"""Install the parts of a model in its modules when they are needed, and remove them again.

There are two buffers: one is in use while a thread fills the other. Repeated reads come from the
operating system's page cache, as far as memory allows.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isingcut.errors import ArchitectureError
from isingcut.formats.architectures.blocks import (
    language_model,
    modules_of,
    stack_modules,
)
from isingcut.models.device import allowance, device_module
from isingcut.models.load import build_skeleton
from isingcut.models.replay import EMBED, HEAD, Part, Weights
from isingcut.models.streaming.reader import REST, Reader, StoredPart
from isingcut.models.sublayers import check_sublayers, split_layers


class _Buffer:
    """Memory for one part: host memory and, for a GPU, device memory that it is copied to."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._device = device
        self._module = device_module(device)
        self._host = torch.empty(
            size, dtype=torch.uint8, pin_memory=device.type == "cuda"
        )
        if self._module is not None:
            self._stream = self._module.Stream(device)
            self._copied = self._module.Event()
            self._memory = torch.empty(size, dtype=torch.uint8, device=device)
            # Earlier work of the main stream may still use this memory.
            self.leave()

    def load(self, part: StoredPart) -> Tensor:
        """Read a part and start to copy it to the device; runs in the reader thread.

        The copy goes on while the next part is read from disk into the other buffer.
        """
        if self._module is not None:
            # The last copy from the host memory, which this part overwrites.
            self._copied.synchronize()
        part.fill(self._host)
        if self._module is None:
            return self._host
        with self._module.stream(self._stream):
            self._stream.wait_event(self._used)
            self._memory[: part.size].copy_(self._host[: part.size], non_blocking=True)
            self._copied.record(self._stream)
        return self._memory

    def enter(self) -> None:
        """Let the work with the part wait for its copy."""
        if self._module is not None:
            self._module.current_stream(self._device).wait_event(self._copied)

    def leave(self) -> None:
        """Record an event after the work with the part, for which `load` waits."""
        if self._module is not None:
            self._used = self._module.Event()
            self._used.record(self._module.current_stream(self._device))


class Buffers:
    """Two buffers and the thread that fills them; models that run alternately can share them.

    Args:
        size: bytes of the largest part.
        device: device on which parts are used.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self.device = device
        self._buffers: list[_Buffer] = []
        self._installed: list[StoredPart | None] = [None, None]
        self._recent = 1
        self._pending: tuple[StoredPart, int, Future[Tensor]] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="isingcut-reader")

    @property
    def allocated(self) -> int:
        """Bytes of the buffers allocated so far."""
        return len(self._buffers) * self.size

    def holds(self, part: StoredPart) -> bool:
        """Whether a part is installed."""
        return part in self._installed

    def take(self, part: StoredPart) -> None:
        """Install a part; the previous one stays installed, an older one is removed."""
        if part in self._installed:
            self._recent = self._installed.index(part)
            return
        self.expect(part)
        assert self._pending is not None
        _, index, future = self._pending
        memory = future.result()
        self._pending = None
        self._buffers[index].enter()
        # A gradient may use the part after a measurement has read it in inference mode.
        with torch.inference_mode(False):
            part.install(memory)
        self._installed[index] = part
        self._recent = index

    def expect(self, part: StoredPart) -> None:
        """Start to read a part into the buffer that is not in use, after emptying this buffer."""
        if self.holds(part) or (self._pending is not None and self._pending[0] is part):
            return
        # A pending read that is not needed. Its error is discarded too: a checkpoint may be renamed
        # once its verification is done.
        if self._pending is not None and not self._pending[2].cancel():
            wait([self._pending[2]])
        if not self._buffers:
            with torch.inference_mode(False):
                self._buffers = [_Buffer(self.size, self.device) for _ in range(2)]
        index = 1 - self._recent
        buffer = self._buffers[index]
        installed = self._installed[index]
        if installed is not None:
            buffer.leave()
            installed.remove()
            self._installed[index] = None
        self._pending = (part, index, self._thread.submit(buffer.load, part))


class Store(Weights):
    """The weights of one model on disk, with one or two parts installed at a time.

    If a block, the embedding or the head is called while it is not installed, it is read first. So
    any forward pass without gradients works. `sweep` is faster if the order of parts is known,
    because it reads the next part meanwhile.

    Args:
        folder: folder of the checkpoint.
        dtype: dtype of the weights.
        device: device for the computation.
        memory_limit: as in `allowance`.
        buffers: buffers of another store, to share; then only one model may run at a time.
        split: as in `load`.

    Attributes:
        model: the model without weights; its modules have a ``forward`` or hooks that install
            parts.
        memory: memory limit of the process, and its use before any weight was read.

    Raises:
        ModelError: transformers cannot build the model, or the checkpoint does not fit it.
        InputError: the memory limit cannot be parsed.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        memory_limit: str = "",
        buffers: Buffers | None = None,
        *,
        trust_remote_code: bool = False,
        split: bool = False,
    ) -> None:
        self.memory = allowance(memory_limit, device)
        self.model = model = build_skeleton(
            folder, dtype, trust_remote_code=trust_remote_code
        )
        if split:
            split_layers(model)
        self.folder = folder
        self.device = device
        self.dtype = dtype
        self.reader = Reader(folder, model, dtype)
        blocks = stack_modules(model)
        self.order: list[Part] = [EMBED, *range(len(blocks)), HEAD]
        self._kept: set[Part] = set()
        self._parts = self.reader.parts
        self.largest = max(self._parts[part].size for part in self.order)
        self.weights = sum(self._parts[part].size for part in self.order)
        self.resident = self._parts[REST].size
        if buffers is None or buffers.size < self.largest or buffers.device != device:
            buffers = Buffers(self.largest, device)
        self.buffers = buffers
        # Not used memory: `StreamedReplay.room` counts the buffers for each model that shares them.
        used = self.memory.used - buffers.allocated
        self.memory = replace(self.memory, used=used)
        # Small tensors stay on the device: norms, position embeddings, and computed buffers.
        for module in model.modules():
            for leaf, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[leaf] = buffer.to(device)
        self.keep(REST)
        # Most parameters are on the meta device, but `model.device` is the computing one.
        family = type(model)
        place = {"device": property(lambda _: device), "__module__": family.__module__}
        model.__class__ = type(family.__name__, (family,), place)
        decoder = language_model(model)
        embedding = decoder.get_input_embeddings()
        modules: dict[Any, Part] = {embedding: EMBED}
        modules |= {m: i for i, block in enumerate(blocks) for m in modules_of(block)}
        for module, part in modules.items():
            module.__dict__["forward"] = self._on_demand(part, module.forward)
        opening = embedding.__dict__["forward"]

        def enter(module: Any, args: Any) -> None:
            # Llama 4 reads the device of the embedding's weight before it calls the embedding.
            if embedding.__dict__.get("forward") is opening:
                self.need(EMBED)

        for entered in {model, decoder}:
            entered.register_forward_pre_hook(enter)
        head = decoder.get_output_embeddings()
        if head is not None and self._parts[HEAD].size:
            # A hook, because other code temporarily replaces the head's ``forward``.
            head.register_forward_pre_hook(lambda module, args: self.need(HEAD))
        if split:
            check_sublayers(model)

    def sweep(self, order: Sequence[Part]) -> Iterator[Part]:
        """Install parts in this order, each for one iteration, while the next one is read."""
        for position, part in enumerate(order):
            self.buffers.take(self._parts[part])
            if position + 1 < len(order):
                self.buffers.expect(self._parts[order[position + 1]])
            yield part

    def hold(self, part: Part) -> None:
        """Install a part; the previous one, possibly another model's, stays installed."""
        self.buffers.take(self._parts[part])

    def keep(self, part: Part) -> float:
        """Install a part permanently, outside the buffers; return the seconds spent reading it."""
        stored = self._parts[part]
        host = torch.empty(stored.size, dtype=torch.uint8)
        began = time.perf_counter()
        stored.fill(host)
        seconds = time.perf_counter() - began
        stored.install(host.to(self.device))
        self._kept.add(part)
        return seconds

    def need(self, part: Part) -> None:
        """Install a part unless it is installed, and start to read the part after it.

        Raises:
            ArchitectureError: gradients are enabled; the graph would use weights removed later.
        """
        wanted = self._parts[part]
        if part in self._kept or self.buffers.holds(wanted):
            return
        if torch.is_grad_enabled():
            raise ArchitectureError(
                "a gradient through several blocks at once needs the whole model in memory; pass "
                "--stream off on a machine with enough memory"
            )
        self.buffers.take(wanted)
        after = self.order[(self.order.index(part) + 1) % len(self.order)]
        self.buffers.expect(self._parts[after])

    def count_sweeps(self) -> float:
        """Return how many times all weights were read from disk so far."""
        parts = [self._parts[part] for part in self.order]
        return sum(part.sweeps * part.size for part in parts) / self.weights

    def size(self, part: Part) -> int:
        """Return the bytes of one part in memory."""
        return self._parts[part].size

    def _on_demand(self, part: Part, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.need(part)
            return forward(*args, **kwargs)

        return run
