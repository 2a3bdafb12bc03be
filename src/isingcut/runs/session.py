"""The shared state of a run's stages: the model (loaded on first use), its blocks and its rows."""

import contextlib
import dataclasses
import os
import socket
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from isingcut.console.printing import say
from isingcut.console.progress import Progress, silent
from isingcut.errors import ArchitectureError, InputError, ModelError
from isingcut.evaluation.speed import DECODED, time_decoding
from isingcut.files.cuts import CutRecord
from isingcut.files.results import read_document
from isingcut.files.runs import BlockList, Computed, ModelIdentity
from isingcut.formats.architectures.blocks import (
    BlockStack,
    find_stack,
    language_model,
    stack_modules,
    text_config,
)
from isingcut.formats.architectures.cuts import legality
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
from isingcut.options.config import BATCH_TOKENS, RunConfig
from isingcut.processes import ALONE, Processes, local_rank
from isingcut.runs.folder import RunFolder, each_removal
from isingcut.runs.solving import (
    TIMED_TOKENS,
    describe_blocks,
    kept_and_dropped,
    removal_rows,
)


@dataclasses.dataclass(eq=False)
class Session:
    """The model of a run, with the settings of its computation.

    Args:
        config: the run's options; only those about the model are used here.
        progress: shows progress.
        recorded: the dtype that the run chose for `--dtype auto` before, if any.
        processes: the processes that load the same model and measure together.
    """

    config: RunConfig
    progress: Progress = silent
    recorded: str | None = None
    processes: Processes = ALONE

    @contextlib.contextmanager
    def at(self, config: RunConfig) -> Iterator[None]:
        """Use other options for the stages within the context."""
        # Not a copy: it would keep the weights in memory after `make_room`.
        before = self.config
        self.config = config
        try:
            yield
        finally:
            self.config = before

    @cached_property
    def batch_tokens(self) -> int:
        """Tokens of a micro-batch of measurements, as requested, else the default.

        A run chooses the micro-batch for its device and records it (`choose_tuning`).
        """
        return self.config.batch_tokens or BATCH_TOKENS

    def choose_tuning(self, folder: RunFolder) -> None:
        """Set the attention, and the micro-batch: as recorded, or as requested, or what fits."""
        given = self.config.attention
        self.replay.attention = None if given == "auto" else given
        if self.streaming:
            return
        device = name_devices(self.replay)
        made = folder.run.provenance
        requested = self.config.batch_tokens

        def read_record() -> int:
            record = made.computed.get(device)
            if record is None or record.requested != requested:
                room = (
                    least_left(devices_of(self.loaded.model), self.config.memory_limit)
                    // 2
                )
                chosen = requested or choose_batch_tokens(self.replay, room)
                record = Computed(requested=requested, batch_tokens=chosen)
                made.computed = {**made.computed, device: record}
                folder.save()
            return record.batch_tokens

        self.batch_tokens = self.processes.decide(read_record)

    @cached_property
    def dtype(self) -> str:
        """The name of the dtype: as requested, as recorded, else chosen now."""
        if self.config.dtype == "auto" and self.recorded is not None:
            return self.recorded
        return devices.dtype_name(self.config.dtype, self.config.device)

    @cached_property
    def source(self) -> Path:
        """The model as a local Hugging Face folder."""
        trust = self.config.trust_remote_code
        place = resolve(
            self.config.model, trust_remote_code=trust, progress=self.progress
        )
        # A later change of the working folder must not move it.
        folder = place.absolute()
        self._stamp = weights_stamp(folder)
        return folder

    @cached_property
    def identity(self) -> ModelIdentity:
        """Name and hash of the model, and the bytes of the file or files that the user has."""
        identity = model_identity(self.source) | {"name": self.config.model}
        if (packed := find_gguf(self.config.model)) is not None:
            identity["weight_bytes"] = packed.stat().st_size
        return ModelIdentity(**identity)

    @property
    def numerics(self) -> dict[str, Any]:
        """The options of the computation that a result depends on beyond rounding."""
        settings = {"dtype": self.dtype}
        if self.config.attention != "auto":
            settings["attention"] = self.config.attention
        return settings

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the weights once loaded."""
        return devices.pick_dtype(self.dtype, pick_device(self.config.device))

    @cached_property
    def weights(self) -> int:
        """The bytes of the weights once loaded."""
        return weight_bytes(self.source, self.torch_dtype)

    @cached_property
    def device(self) -> str:
        """The device, or several, separated by commas; a streamed model uses the first."""
        given = (self.config.memory_limit, self.config.cards_per_process)
        cards = devices.pick_devices(self.config.device, self.weights, *given)
        return ",".join(map(str, cards))

    @cached_property
    def streaming(self) -> bool:
        """Whether the blocks are streamed from disk.

        Raises:
            InputError: the memory limit cannot be parsed, or a device is not available.
        """
        places = map(torch.device, self.device.split(","))
        left = sum(allowance(self.config.memory_limit, place).left for place in places)
        wanted = self.config.stream
        return self.weights > left if wanted == "auto" else wanted == "on"

    @cached_property
    def loaded(self) -> models.LoadedModel:
        """The model: in memory, or without weights if streamed."""
        return self._open(self.source)

    def _open(self, folder: Path, buffers: Buffers | None = None) -> models.LoadedModel:
        """Open a checkpoint; if the model is streamed, with buffers of another one if given."""
        how: Any = {"dtype": self.dtype, "device": self.device}
        how["trust_remote_code"] = self.config.trust_remote_code
        how["units"] = self.config.units
        if self.streaming:
            limit = self.config.memory_limit
            return load_streamed(folder, **how, memory_limit=limit, buffers=buffers)
        return models.load(folder, **how)

    def work(self, journal: Path | None = None) -> Work:
        """Return the settings for a measurement, with a journal if it has one."""
        return Work(self.batch_tokens, self.progress, journal)

    def attach(self, folder: RunFolder) -> None:
        """Let the stages of a run folder free memory and check the weights."""
        folder.session = self
        folder.progress = self.progress

    def check_model(self) -> None:
        """Raise if the model's weights changed since this session opened it."""
        check_unchanged(self.source, self._stamp)

    def make_room(self) -> bool:
        """Free memory by switching to streaming; return False if that is impossible."""
        if self.streaming or self.config.stream != "auto" or self.processes.size > 1:
            return False
        say("isingcut: out of memory; the model is streamed from disk from now on")
        # The model is opened again on the next use.
        for name in ("loaded", "replay"):
            self.__dict__.pop(name, None)
        devices.BatchLimit(pick_device(self.device)).release()
        self.streaming = True
        return True

    def open_cut(
        self, folder: Path, removed: Sequence[int] | None = None
    ) -> models.LoadedModel:
        """Open a cut of the session's model that shares its weights, see `sharing.open_cut`.

        Args:
            removed: its removed blocks; None: those in its record, or none without a record.
        """
        if self.streaming:
            return self._open(folder, self.loaded.streamed.store.buffers)
        record = folder / "isingcut.json"
        if removed is None:
            removed = (
                read_document(record, CutRecord).removed if record.is_file() else []
            )
        return open_cut(self.loaded, removed, folder)

    @cached_property
    def stack(self) -> BlockStack:
        """The model's blocks."""
        return find_stack(self.loaded.model)

    @cached_property
    def inspected(self) -> Inspection:
        """What the model's configuration tells, before its weights are read."""
        return inspect_model(
            self.source,
            trust_remote_code=self.config.trust_remote_code,
            dtype=self.dtype,
            units=self.config.units,
        )

    @cached_property
    def replay(self) -> Replay:
        """The model's blocks, to run one at a time."""
        replay = self.loaded.replay
        replay.processes = self.processes
        return replay

    def describe_blocks(self) -> BlockList:
        """Describe blocks and legality rows for `run.json`."""
        model = self.loaded.model
        legal = legality(model.config.to_dict(), self.stack)
        longest = getattr(text_config(model), "max_position_embeddings", None)
        budget = self.config.budget
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


def join_processes(session: Session, processes: Processes) -> None:
    """Share the session's measurements among all processes, with the settings of rank 0.

    Raises:
        InputError: several processes have the same GPU.
        ModelError: this process and rank 0 have different models.
    """
    if processes.size == 1:
        return
    session.processes = processes
    _use_own_card(session.config, processes)
    # Rank 0 chooses, because processes must not differ by free memory or by the speed of bfloat16.
    # The model is resolved first, so that each machine downloads or converts it once.
    chosen = processes.decide(lambda: _choices(session, processes.size))
    if local_rank() == 0:
        _ = session.identity
    processes.wait()
    if session.identity.sha256 != chosen.pop("sha256"):
        raise ModelError(
            f"{session.config.model!r} differs between this machine and that of rank 0; give every "
            "machine the same files"
        )
    if processes.rank:
        session.config = session.config.replace(**chosen)


def _choices(session: Session, size: int) -> dict[str, Any]:
    """Return the settings that all processes must share."""
    # Printed because a launcher with wrong options silently starts one process.
    if session.progress is not silent:
        say(f"{size} processes share the measurements")
    own = {"sha256": session.identity.sha256, "dtype": session.dtype}
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    device = pick_device(session.config.device)
    if device.type != "cuda" and local_size > 1 and not session.config.memory_limit:
        # Each process gets its share of the memory.
        memory = allowance("", device)
        each = memory.used + memory.left // local_size
        session.config = session.config.replace(memory_limit=f"{each / 1e6:.0f}MB")
    stream = "on" if session.streaming else "off"
    return own | {"memory_limit": session.config.memory_limit, "stream": stream}


def _use_own_card(config: RunConfig, processes: Processes) -> None:
    """Make "cuda" without a number mean a GPU of this process, and check that no other has it."""
    device = config.device
    if device.startswith("cuda:"):
        raise InputError(
            f"--device {device} names GPUs for each of {processes.size} processes; give --device "
            "cuda, and each process uses its own (--cards-per-process)"
        )
    own = ""
    if device != "cpu" and torch.cuda.is_available():
        present = torch.cuda.device_count()
        number = first_card(present, config.cards_per_process) % present
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


def check_by_config(session: Session, config: RunConfig, *, needed: bool) -> Inspection:
    """Check the options against a model's configuration, before its weights are read.

    Args:
        session: only its model's configuration is read.
        needed: whether a removal is required.

    Raises:
        ArchitectureError: no state of this model can be cut.
        InputError: an impossible removal, a block that the model does not have, or samples longer
            than its positions.
        InfeasibleError: the constraints conflict, as far as known without the weights.
    """
    model = session.inspected
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
