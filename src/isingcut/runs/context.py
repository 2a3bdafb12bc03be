"""The context of stages: the model (opened on first use), its blocks, and how it is computed."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch

from isingcut.console.printing import say
from isingcut.console.progress import Progress, silent
from isingcut.errors import ArchitectureError, InputError, ModelError
from isingcut.evaluation.speed import DECODED, time_decoding
from isingcut.files.cuts import CutRecord
from isingcut.files.results import read_document
from isingcut.files.runs import BlockList, Computed, ModelIdentity, Provenance
from isingcut.formats.architectures.blocks import (
    BlockStack,
    language_model,
    stack_modules,
    text_config,
)
from isingcut.formats.architectures.cuts import legality
from isingcut.formats.architectures.removed import Removed
from isingcut.formats.sources import (
    check_unchanged,
    find_gguf,
    model_identity,
    resolve,
    weights_stamp,
)
from isingcut.measure.splitting import choose_batch_tokens
from isingcut.measure.work import Work
from isingcut.models import device as devices
from isingcut.models import load as models
from isingcut.models.cache import copy_cache
from isingcut.models.device import (
    allowance,
    first_card,
    least_left,
    pick_device,
    weight_bytes,
)
from isingcut.models.inspect import Inspection, inspect_model
from isingcut.models.placement import devices_of, name_devices
from isingcut.models.replay import Replay
from isingcut.models.sharing import open_cut
from isingcut.models.streaming.replay import load_streamed
from isingcut.models.streaming.store import Buffers
from isingcut.options.choose import ChoiceOptions
from isingcut.options.machine import BATCH_TOKENS, MachineOptions
from isingcut.options.parsed import Budgets
from isingcut.processes import ALONE, Processes, local_rank
from isingcut.runs.constraints import (
    TIMED_TOKENS,
    describe_blocks,
    kept_and_dropped,
    removal_rows,
)
from isingcut.runs.folder import each_removal

# What another context of the same model needs no second time.
_FOUND = ("_resolved", "identity", "inspected")


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
    """The model of a job and how it is computed; everything is found on first use.

    It knows no folder, and nothing of it changes: another device or process is another context.

    Args:
        options: the model, and how it is computed.
        progress: shows progress.
        made: what the results so far were made with, among it the dtype that the run chose for
            `--dtype auto`, and the micro-batch on each device.
        processes: the processes that load the same model and measure together.
    """

    options: MachineOptions
    progress: Progress = silent
    made: Provenance | None = None
    processes: Processes = ALONE

    def _with(self, keep: Sequence[str] = _FOUND, **changes: Any) -> Self:
        """Return a context with other fields, and with what was found by these names."""
        other = dataclasses.replace(self, **changes)
        vars(other).update({k: v for k, v in vars(self).items() if k in keep})
        return other

    def alone(self) -> Self:
        """Return the context of the same loaded model for this process alone."""
        found = vars(self).keys() - {f.name for f in dataclasses.fields(self)}
        return self._with([*found - {"replay"}], processes=ALONE)

    def streamed(self) -> Self | None:
        """Return a context that streams the model from disk, or None if that is impossible."""
        if self.streaming or self.options.stream != "auto" or self.processes.size > 1:
            return None
        say("isingcut: out of memory; the model is streamed from disk from now on")
        return self._with(options=self.options.replace(stream="on"))

    def release(self) -> None:
        """Return the memory of a context that is gone to its device."""
        devices.BatchLimit(pick_device(self.options.device)).release()

    @cached_property
    def batch_tokens(self) -> int:
        """Tokens of a micro-batch: as requested, as chosen for this device before, or what fits."""
        requested = self.options.batch_tokens
        if self.streaming:
            return requested or BATCH_TOKENS

        def choose() -> int:
            known = self.made.computed if self.made else {}
            before = known.get(name_devices(self.replay))
            if before is not None and before.requested == requested:
                return before.batch_tokens
            limit = self.options.memory_limit
            room = least_left(devices_of(self.loaded.model), limit) // 2
            return requested or choose_batch_tokens(self.replay, room)

        return self.processes.decide(choose)

    @property
    def tuned(self) -> dict[str, Computed]:
        """The micro-batch of this device, by its name; empty if the model is streamed."""
        chosen = self.batch_tokens
        if self.streaming:
            return {}
        requested = self.options.batch_tokens
        record = Computed(requested=requested, batch_tokens=chosen)
        return {name_devices(self.replay): record}

    @cached_property
    def dtype(self) -> str:
        """The name of the dtype: as requested, as recorded, else chosen now."""
        if self.options.dtype == "auto" and self.made and self.made.dtype:
            return self.made.dtype
        return devices.dtype_name(self.options.dtype, self.options.device)

    @cached_property
    def _resolved(self) -> tuple[Path, Any]:
        trust = self.options.trust_remote_code
        place = resolve(
            self.options.model, trust_remote_code=trust, progress=self.progress
        )
        # A later change of the working folder must not move it.
        folder = place.absolute()
        return folder, weights_stamp(folder)

    @property
    def source(self) -> Path:
        """The model as a local Hugging Face folder."""
        return self._resolved[0]

    def check_model(self) -> None:
        """Raise if the model's weights changed since this context opened it."""
        check_unchanged(*self._resolved)

    @cached_property
    def identity(self) -> ModelIdentity:
        """Name and hash of the model, and the bytes of the file or files that the user has."""
        identity = model_identity(self.source) | {"name": self.options.model}
        if (packed := find_gguf(self.options.model)) is not None:
            identity["weight_bytes"] = packed.stat().st_size
        return ModelIdentity(**identity)

    @property
    def numerics(self) -> dict[str, Any]:
        """The options of the computation that a result depends on beyond rounding."""
        settings = {"dtype": self.dtype}
        if self.options.attention != "auto":
            settings["attention"] = self.options.attention
        return settings

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the weights once loaded."""
        return devices.pick_dtype(self.dtype, pick_device(self.options.device))

    @cached_property
    def weights(self) -> int:
        """The bytes of the weights once loaded."""
        return weight_bytes(self.source, self.torch_dtype)

    @cached_property
    def device(self) -> str:
        """The device, or several, separated by commas; a streamed model uses the first."""
        given = (self.options.memory_limit, self.options.cards_per_process)
        cards = devices.pick_devices(self.options.device, self.weights, *given)
        return ",".join(map(str, cards))

    @cached_property
    def streaming(self) -> bool:
        """Whether the blocks are streamed from disk.

        Raises:
            InputError: the memory limit cannot be parsed, or a device is not available.
        """
        places = map(torch.device, self.device.split(","))
        left = sum(allowance(self.options.memory_limit, place).left for place in places)
        wanted = self.options.stream
        return self.weights > left if wanted == "auto" else wanted == "on"

    @cached_property
    def loaded(self) -> models.LoadedModel:
        """The model: in memory, or without weights if streamed."""
        return self._open(self.source)

    def _open(self, folder: Path, buffers: Buffers | None = None) -> models.LoadedModel:
        """Open a checkpoint; if the model is streamed, with buffers of another one if given."""
        how: Any = {"dtype": self.dtype, "device": self.device}
        how["trust_remote_code"] = self.options.trust_remote_code
        how["split"] = self.options.units == "sublayers"
        if self.streaming:
            limit = self.options.memory_limit
            return load_streamed(folder, **how, memory_limit=limit, buffers=buffers)
        return models.load(folder, **how)

    def work(self, journal: Path | None = None) -> Work:
        """Return the settings for a measurement, with a journal if it has one."""
        return Work(self.batch_tokens, self.progress, journal)

    def open_cut(
        self, folder: Path, removed: Removed | None = None
    ) -> models.LoadedModel:
        """Open a cut of the model that shares its weights, see `sharing.open_cut`.

        Args:
            removed: its state; None: that in its record, or no removed block without a record.
        """
        if self.streaming:
            return self._open(folder, self.loaded.streamed.store.buffers)
        record = folder / "isingcut.json"
        if removed is None:
            known = record.is_file() and read_document(record, CutRecord).removed
            removed = self.stack.remove(known or [])
        return open_cut(self.loaded, removed, folder)

    @property
    def stack(self) -> BlockStack:
        """The model's blocks."""
        return self.loaded.stack

    @cached_property
    def inspected(self) -> Inspection:
        """What the model's configuration tells, before its weights are read."""
        return inspect_model(
            self.source,
            trust_remote_code=self.options.trust_remote_code,
            dtype=self.dtype,
            units=self.options.units,
        )

    @cached_property
    def replay(self) -> Replay:
        """The model's blocks, to run one at a time."""
        replay = self.loaded.replay
        replay.processes = self.processes
        given = self.options.attention
        replay.attention = None if given == "auto" else given
        return replay

    def describe_blocks(self, budget: Budgets) -> BlockList:
        """Describe blocks and legality rows for `run.json`, timed for a budget."""
        model = self.loaded.model
        legal = legality(model.config.to_dict(), self.stack)
        longest = getattr(text_config(model), "max_position_embeddings", None)
        asked = {n: b.context for n in ("latency", "speed") if (b := budget.part(n))}
        context = asked.get("latency", 0)
        most = int(longest or max([TIMED_TOKENS, *asked.values()]))
        for name, tokens in asked.items():
            if tokens > most:
                raise InputError(f"--budget {name}: the model has a context of {most}")
        seconds = self.replay.latency(context or min(TIMED_TOKENS, most))
        copy_cache(self.inspected.stack, self.stack)
        decoding = self._time_decoding(asked["speed"]) if "speed" in asked else {}
        parameters = list(model.parameters())
        size = sum(p.numel() * p.element_size() for p in parameters)
        return describe_blocks(
            self.stack,
            legal,
            sum(p.numel() for p in parameters),
            size,
            seconds,
            context,
        ).model_copy(update=decoding)

    def _time_decoding(self, context: int) -> dict[str, Any]:
        """Time decoding after a text of these tokens; return what `run.json` has of it."""
        if self.streaming:
            raise InputError(
                "--budget speed times the whole model, which is streamed from disk; raise "
                "--memory-limit, or give a budget of latency"
            )
        model = self.loaded.model
        blocks = stack_modules(model)
        each, whole = time_decoding(language_model(model), blocks, context or DECODED)
        for block, seconds in zip(self.stack.blocks, each, strict=True):
            block.decode_seconds = seconds
        return {"decoded_tokens": context, "decode_seconds": whole}

    def join(self, processes: Processes) -> Self:
        """Return the context of processes that measure together, with the settings of rank 0.

        Raises:
            InputError: several processes have the same GPU.
            ModelError: this process and rank 0 have different models.
        """
        if processes.size == 1:
            return self
        _use_own_card(self.options, processes)
        # Rank 0 chooses, because processes must not differ by free memory or by the speed of
        # bfloat16. The model is resolved first, so that each machine downloads it once.
        chosen = processes.decide(lambda: self._settings(processes.size))
        if local_rank() == 0:
            _ = self.identity
        processes.wait()
        if self.identity.sha256 != chosen.pop("sha256"):
            raise ModelError(
                f"{self.options.model!r} differs between this machine and that of rank 0; give "
                "every machine the same files"
            )
        if processes.rank == 0:
            # Alone after the measurements, it may still run out of memory and stream.
            chosen = {"memory_limit": chosen["memory_limit"]}
        shared = self.options.replace(**chosen)
        return self._with(options=shared, processes=processes)

    def _settings(self, size: int) -> dict[str, Any]:
        """Return the settings that all processes must share."""
        # Printed because a launcher with wrong options silently starts one process.
        if self.progress is not silent:
            say(f"{size} processes share the measurements")
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        device = pick_device(self.options.device)
        limit: str = self.options.memory_limit
        if device.type != "cuda" and local_size > 1 and not limit:
            # Each process gets its share of the memory.
            memory = allowance("", device)
            each = memory.used + memory.left // local_size
            limit = f"{each / 1e6:.0f}MB"
        limited = self._with(options=self.options.replace(memory_limit=limit))
        stream = "on" if limited.streaming else "off"
        own = {"sha256": self.identity.sha256, "dtype": self.dtype}
        return own | {"memory_limit": limit, "stream": stream}


def _use_own_card(options: MachineOptions, processes: Processes) -> None:
    """Make "cuda" without a number mean a GPU of this process, and check that no other has it."""
    device = options.device
    if device.startswith("cuda:"):
        raise InputError(
            f"--device {device} names GPUs for each of {processes.size} processes; give --device "
            "cuda, and each process uses its own (--cards-per-process)"
        )
    own = ""
    if device != "cpu" and torch.cuda.is_available():
        present = torch.cuda.device_count()
        number = first_card(present, options.cards_per_process) % present
        torch.cuda.set_device(number)
        own = f"{socket.gethostname()} {torch.cuda.get_device_properties(number).uuid}"
    cards = [card.decode() for card in processes.gather(own.encode())]
    for rank, card in enumerate(cards):
        if card and card in cards[:rank]:
            raise InputError(
                f"processes {cards.index(card)} and {rank} have the same GPU of "
                f"{card.partition(' ')[0]}; start one process per GPU, or all on the CPU "
                "(--device cpu)"
            )


def check_by_config(
    context: Context, config: ChoiceOptions, *, needed: bool
) -> Inspection:
    """Check the options against a model's configuration, before its weights are read.

    Args:
        context: only its model's configuration is read.
        needed: whether a removal is required.

    Raises:
        ArchitectureError: no state of this model can be cut.
        InputError: an impossible removal, a block that the model does not have, or samples longer
            than its positions.
        InfeasibleError: the constraints conflict, as far as known without the weights.
    """
    model = context.inspected
    if model.refusal:
        raise ArchitectureError(model.refusal)
    if model.unused:
        say(f"isingcut: warning: {models.explain_unused(model.unused)}")
    if needed or config.removal:
        blocks = describe_blocks(model.stack, model.rows, model.parameters, 0)
        if config.remove.is_range:
            # Check the end of a range first: thousands of impossible removals take long to build.
            last = config.replace(remove=config.remove.counts[-1])
            removal_rows(blocks, last, early=True)
        for one in each_removal(config):
            removal_rows(blocks, one, early=True)
    else:
        kept_and_dropped(len(model.stack), config)
    if model.positions is not None and config.length > model.positions:
        raise InputError(
            f"--length {config.length} is more than this model's {model.positions} positions; give "
            f"--length {model.positions} or less"
        )
    return model
