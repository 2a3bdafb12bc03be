"""The parts of one model: installed where its modules look for them, and taken away again."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isingcut.errors import ArchitectureError
from isingcut.models.parts import EMBED, HEAD, Part, Reading
from isingcut.models.streaming.buffers import Buffers
from isingcut.models.streaming.plan import REST, PartPlan
from isingcut.models.streaming.reader import Reader, plan_views
from isingcut.models.text_alone import language_model


class Store:
    """The weights of one model on disk, of which a part or two are installed at a time.

    A block, the embedding or the head that is called while it is not installed is read first,
    so that any forward pass without gradients works; `sweep` does better, with the next part
    on its way.

    Args:
        folder: the checkpoint.
        model: its skeleton; its blocks, embedding and head get a ``forward`` of this store.
        blocks: paths of its block modules.
        dtype: of its weights.
        device: where it computes.
        buffers: another store's, to share; only one of the models is run at a time then.

    Raises:
        ModelError: the checkpoint does not fit the model.
    """

    def __init__(
        self,
        folder: Path,
        model: Any,
        blocks: Sequence[str],
        dtype: torch.dtype,
        device: torch.device,
        buffers: Buffers | None = None,
    ) -> None:
        self.folder, self.device, self.dtype = folder, device, dtype
        self.reader = Reader(folder, model, list(blocks), dtype)
        self.order: list[Part] = [EMBED, *range(len(blocks)), HEAD]
        self._kept: set[Part] = set()
        self._parts = {
            part: StoredPart(part, plan, self.reader, model)
            for part, plan in self.reader.plans.items()
        }
        self.largest = max(self._parts[part].size for part in self.order)
        self.weights = sum(self._parts[part].size for part in self.order)
        self.resident = self._parts[REST].size
        if buffers is None or buffers.size < self.largest or buffers.device != device:
            buffers = Buffers(self.largest, device)
        self.buffers = buffers
        self._settle_rest(model)
        _compute_on(model, device)
        modules: dict[Part, Any] = {i: model.get_submodule(p) for i, p in enumerate(blocks)}
        decoder = language_model(model)
        modules[EMBED] = decoder.get_input_embeddings()
        for part, module in modules.items():
            module.__dict__["forward"] = self._on_demand(part, module.forward)
        embedding, opening = modules[EMBED], modules[EMBED].__dict__["forward"]

        def enter(module: Any, args: Any) -> None:
            # Llama 4 asks for the device of the embedding's weight before it calls it.
            if embedding.__dict__.get("forward") is opening:
                self.need(EMBED)

        for entered in {model, decoder}:
            entered.register_forward_pre_hook(enter)
        head = decoder.get_output_embeddings()
        if head is not None and self._parts[HEAD].size:
            # A hook, because others put their own ``forward`` into the head and take it out.
            head.register_forward_pre_hook(lambda module, args: self.need(HEAD))

    def sweep(self, order: Sequence[Part]) -> Iterator[Part]:
        """Install parts in this order, each for one turn of the loop, the next read meanwhile."""
        for position, part in enumerate(order):
            self.buffers.take(self._parts[part])
            if position + 1 < len(order):
                self.buffers.expect(self._parts[order[position + 1]])
            yield part

    def hold(self, part: Part) -> None:
        """Install a part; the one installed before it, maybe another model's, stays."""
        self.buffers.take(self._parts[part])

    def keep(self, part: Part) -> float:
        """Install a part for good, beside the buffers; the seconds that reading it took."""
        found = self._parts[part]
        host = torch.empty(found.size, dtype=torch.uint8)
        began = time.perf_counter()
        found.fill(host)
        seconds = time.perf_counter() - began
        found.install(host.to(self.device))
        self._kept.add(part)
        return seconds

    def need(self, part: Part) -> None:
        """Install a part unless it is installed; the one that comes after it will be next.

        Raises:
            ArchitectureError: gradients are recorded: the graph would hold weights that go.
        """
        wanted = self._parts[part]
        if part in self._kept or self.buffers.holds(wanted):
            return
        if torch.is_grad_enabled():
            raise ArchitectureError(
                "a gradient through several blocks at once needs the whole model in memory; pass "
                "--stream off on a machine that can hold it"
            )
        self.buffers.take(wanted)
        after = self.order[(self.order.index(part) + 1) % len(self.order)]
        self.buffers.expect(self._parts[after])

    @property
    def in_place(self) -> bool:
        """Whether a CPU keeps all parts, which are then used where they are."""
        kept = all(self.buffers.keeps(self._parts[part]) for part in self.order)
        return kept and self.device.type == "cpu"

    def reading(self) -> Reading:
        """How often the weights were read so far."""
        parts = [self._parts[part] for part in self.order]
        disk = sum(part.misses * part.size for part in parts)
        memory = sum(part.hits * part.size for part in parts)
        return Reading(disk / self.weights, memory / self.weights)

    def size(self, part: Part) -> int:
        """Bytes of one part in memory."""
        return self._parts[part].size

    def like(self, part: Part) -> tuple[Any, ...]:
        """What two blocks of equal cost have in common: their tensors' names and shapes."""
        plan = self._parts[part].plan
        return tuple(
            (name.partition(f".{part}.")[2], plan.targets[target][0].shape)
            for name, target in sorted(plan.names.items())
        )

    def _on_demand(self, part: Part, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.need(part)
            return forward(*args, **kwargs)

        return run

    def _settle_rest(self, model: nn.Module) -> None:
        """What is small stays: norms, position embeddings, and buffers that no checkpoint has."""
        for module in model.modules():
            for leaf, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[leaf] = buffer.to(self.device)
        rest = self._parts[REST]
        host = torch.empty(rest.size, dtype=torch.uint8)
        rest.fill(host)
        rest.install(host.to(self.device))


class StoredPart:
    """One part of one model, for `Buffers`."""

    hits = misses = 0

    def __init__(self, part: Part, plan: PartPlan, reader: Reader, model: nn.Module) -> None:
        self.part, self.plan, self._reader = part, plan, reader
        self.size = plan.size
        self._homes: list[tuple[dict[str, Any], str, str, Any]] = []
        for name, target in plan.names.items():
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            home: dict[str, Any] = (
                module._parameters if leaf in module._parameters else module._buffers
            )
            empty = home[leaf]
            if not empty.is_meta:
                # A stored buffer, which the skeleton has computed like the others.
                empty = empty.to("meta")
                home[leaf] = empty
            self._homes.append((home, leaf, target, empty))

    def fill(self, buffer: Tensor) -> None:
        """Read the part into host memory."""
        self._reader.fill(self.part, buffer)

    def install(self, memory: Tensor) -> None:
        """Let the model use what lies in ``memory``."""
        views = plan_views(self.plan, memory)
        for home, leaf, target, empty in self._homes:
            value = views[target]
            is_parameter = isinstance(empty, nn.Parameter)
            home[leaf] = nn.Parameter(value, requires_grad=False) if is_parameter else value

    def remove(self) -> None:
        """Let the model forget it."""
        for home, leaf, _, empty in self._homes:
            home[leaf] = empty


def _compute_on(model: Any, device: torch.device) -> None:
    """Let ``model.device`` name where it computes: its parameters are mostly nowhere."""
    family = type(model)
    place = property(lambda self: device)
    model.__class__ = type(
        family.__name__, (family,), {"device": place, "__module__": family.__module__}
    )
