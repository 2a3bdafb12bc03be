"""Run block i of a model on any hidden states, by replaying the recorded call of each block.

transformers blocks take masks, position embeddings and caches that differ by layer. None of them
is rebuilt here. The model runs once with stubs for its blocks, and the arguments of each block are
recorded. Block i is later called with the same arguments and other hidden states. This works for
any architecture whose blocks pass on one residual stream. A state whose first removed block is i
can reuse the hidden states that entered block i.

A *part* is a block, the input embedding or the output head. The store of a streamed model has two
parts in memory at a time (`streaming.store`). `Weights` is the store of a model in memory, with the
same interface.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isingcut.data.tokens import TokenSet
from isingcut.errors import ArchitectureError
from isingcut.formats.architectures.blocks import (
    catch_text_errors,
    language_model,
    replace_forwards,
    stack_modules,
    stop_rescaling,
)
from isingcut.formats.libraries import convert_errors, quiet_transformers
from isingcut.formats.transformers_private import attention_of
from isingcut.memory import raise_if_exhausted
from isingcut.models.device import BatchLimit, least_left, synchronise
from isingcut.models.placement import move
from isingcut.processes import ALONE, Processes

Part = int | str
EMBED = "embed"
HEAD = "head"

# Memory of a running block besides its input, in multiples of the residual stream: queries, keys,
# values, three MLP tensors of four times the width, float32 norms, and all of it for backward.
BLOCK_STREAMS = 64


class Weights:
    """Store of a model whose weights are in memory, so that opening a part costs nothing."""

    def sweep(self, order: Sequence[Part]) -> Iterator[Part]:
        """Open parts in this order, each for one iteration of the loop."""
        return iter(order)


_NOT_ONE_AT_A_TIME = "such blocks can be cut, but not measured one at a time"


@dataclass
class BlockCall:
    """Recorded arguments of a block's call, without the hidden states, which are the first."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def split(
        cls, args: tuple[Any, ...], kwargs: dict[str, Any], i: int
    ) -> tuple[Tensor, BlockCall]:
        """Split the arguments of block ``i`` into the hidden states and the recorded call.

        Raises:
            ArchitectureError: the arguments have no hidden states in the expected place.
        """
        rest = dict(kwargs)
        hidden, *others = args or (rest.pop("hidden_states", None),)
        if not isinstance(hidden, Tensor):
            raise ArchitectureError(
                f"block {i} was called without hidden states as its first argument or as "
                "'hidden_states'; such a block cannot be replayed"
            )
        return hidden, cls(tuple(others), rest)

    def repeat(self, block: Callable[..., Any], hidden: Tensor) -> Any:
        """Call the block with the recorded arguments and other hidden states."""
        return block(hidden, *self.args, **self.kwargs)


def learn_outputs(
    model: Any, blocks: Sequence[nn.Module], device: torch.device
) -> tuple[list[tuple[Any, ...] | None], int]:
    """Run four tokens through a model and inspect the outputs of its blocks.

    Returns:
        for each block, its output tuple without the residual stream, or None if it returns only
        the stream; and the bytes of a token's residual stream, at its widest.

    Raises:
        ArchitectureError: the blocks do not pass on exactly one residual stream, or the model does
            not run on text alone.
    """
    ids = torch.zeros((1, 4), dtype=torch.long, device=device)
    called: list[nn.Module] = []
    streams: list[Tensor] = []
    rest: list[tuple[Any, ...] | None] = []
    # What blocks may hand on, by its id, with what stands in for it in a test.
    handed: dict[int, Any] = {}

    def watch(block: nn.Module) -> Callable[..., Any]:
        run = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            name = f"block {len(called)} ({type(block).__name__})"
            hidden, call = BlockCall.split(args, kwargs, len(called))
            called.append(block)
            for value in kwargs.values():
                if isinstance(value, MutableMapping):
                    handed.setdefault(id(value), copy.copy(value))
            before = streams[-1] if streams else hidden
            if hidden is not before and not torch.equal(hidden, before):
                raise ArchitectureError(
                    f"the model changes the residual stream before {name}: {_NOT_ONE_AT_A_TIME}"
                )
            output = run(*args, **kwargs)
            several = isinstance(output, (list, tuple))
            stream = output[0] if several and output else output
            if not isinstance(stream, Tensor):
                raise ArchitectureError(
                    f"{name} returns {type(output).__name__}; expected hidden states, or a tuple "
                    "that starts with them"
                )
            if stream.shape[:2] != ids.shape:
                raise ArchitectureError(
                    f"{name} passes on a stream of shape {list(stream.shape)}, expected (batch, "
                    f"tokens, width): {_NOT_ONE_AT_A_TIME}"
                )
            if _reads_another(run, hidden, call, stream, handed):
                raise ArchitectureError(
                    "blocks pass more than the residual stream to later blocks: "
                    + _NOT_ONE_AT_A_TIME
                )
            streams.append(stream)
            others = tuple(output[1:]) if several else None
            rest.append(others)
            handed.update((id(v), None) for v in others or () if isinstance(v, Tensor))
            return output

        return forward

    watching = replace_forwards(blocks, list(map(watch, blocks)))
    with torch.no_grad(), catch_text_errors(model), watching:
        model(input_ids=ids, use_cache=False)
    silent = [i for i, block in enumerate(blocks) if block not in called]
    if silent:
        raise ArchitectureError(
            f"text alone does not run the blocks {', '.join(map(str, silent))} (they may read "
            "images): such blocks can be cut, but not measured"
        )
    if len(called) != len(blocks):
        raise ArchitectureError(
            f"{len(blocks)} blocks were found, but a forward pass made {len(called)} calls of "
            "them; each must be called exactly once"
        )
    return rest, max(s[0, 0].numel() * s.element_size() for s in streams)


def _reads_another(
    run: Callable[..., Any],
    hidden: Tensor,
    call: BlockCall,
    stream: Tensor,
    handed: Mapping[int, Any],
) -> bool:
    """Whether a block uses what an earlier block returned next to the stream, or put into a mapping
    that all blocks receive.

    Some blocks receive such values and do not use them; in Gemma 4 the last block of each type
    writes into the mapping, even if no later block reads. So the block runs again without them.
    """

    def stand_in(value: Any) -> Any:
        return copy.copy(handed[id(value)]) if id(value) in handed else value

    if not any(id(v) in handed for v in (*call.args, *call.kwargs.values())):
        return False
    kwargs = {k: stand_in(v) for k, v in call.kwargs.items()}
    again = BlockCall(tuple(map(stand_in, call.args)), kwargs)
    try:
        output = again.repeat(run, hidden)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise_if_exhausted(error)
        return True
    return not torch.equal(
        output[0] if isinstance(output, (list, tuple)) else output, stream
    )


class Reached(Exception):
    """Raised by a stub, because the modules after it are not needed."""


class Replay:
    """The blocks of one model, to run one at a time.

    Args:
        model: a causal language model; it is put in evaluation mode.
        store: store of the weights; None if they are in memory.

    Attributes:
        places: the device of each block.
        text: the module that is run on token ids (`language_model`).
        bytes_per_token: bytes of one token's residual stream, at its widest.
        attention: attention implementation for measurements; None keeps the loaded one.
        limit: the largest micro-batch that is known to fit the memory.
        processes: processes that hold the same model and share the measurements.
        plain_head: whether the logits are the output of a linear layer; None before the test.

    Raises:
        ArchitectureError: a block does not take and return one residual stream.
    """

    streamed: ClassVar[bool] = False
    """Whether blocks are read from disk when they run; measurements then go block by block."""

    def __init__(
        self,
        model: Any,
        store: Weights | None = None,
    ) -> None:
        reuse_freed_memory()
        self.model = model.eval()
        stop_rescaling(model)
        for module in model.modules():
            config: Any = getattr(module, "config", None)
            if getattr(config, "output_router_logits", False):
                # Only for a loss in training; computing it fails if the blocks do not run.
                config.output_router_logits = False
        self.blocks = stack_modules(model)
        self.device: torch.device = model.device
        # A block that is streamed or has no weights takes the device of the input.
        self.places = [
            next((p.device for p in b.parameters() if not p.is_meta), self.device)
            for b in self.blocks
        ]
        self.store = store or Weights()
        self.attention: str | None = None
        self.limit = BatchLimit(self.device)
        self.processes: Processes = ALONE
        self.plain_head: bool | None = None
        self.text = language_model(model)
        self._rest, self.bytes_per_token = learn_outputs(
            self.text, self.blocks, self.device
        )

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def devices(self) -> int:
        """Number of devices that the blocks are on."""
        return len(set(self.places))

    def identity(self) -> dict[str, Any]:
        """Return values that identify this model, cheap to compute, for a journal's fingerprint."""
        parameters = list(self.model.parameters())
        config = getattr(self.model, "config", None)
        return {
            "model": config.to_dict() if config is not None else None,
            # Of every parameter: a fine-tuned model may share the first ones with its base.
            "starts": [
                p.flatten()[:8].float().tolist() for p in parameters if not p.is_meta
            ],
            "dtype": str(parameters[0].dtype),
            **({"attention": self.attention} if self.attention else {}),
        }

    def stream_bytes(self, batch: TokenSet) -> int:
        """Return the bytes of a batch's residual stream at one block boundary."""
        return int(batch.input_ids.numel()) * self.bytes_per_token

    def room(self, batch: TokenSet) -> int:
        """Return the bytes allowed for hidden states between blocks.

        They are not limited for a model in memory on the CPU. On several devices, the free bytes of
        the fullest device count for each.
        """
        if self.device.type == "cpu":
            return sys.maxsize
        return self.devices * least_left({self.device, *self.places})

    def record(self, input_ids: Tensor) -> Recording:
        """Record the call of each block for ``input_ids`` (B, T), without running the blocks."""
        calls: list[tuple[Tensor, BlockCall]] = []
        last = len(self.blocks) - 1

        def stub(i: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                calls.append(BlockCall.split(args, kwargs, i))
                if i == last:
                    raise Reached
                return self._as_output(i, calls[-1][0])

            return forward

        ids = input_ids.to(self.device)
        stubs = [stub(i) for i in range(len(self.blocks))]
        with replace_forwards(self.blocks, stubs), contextlib.suppress(Reached):
            self.text(input_ids=ids, use_cache=False)
        known: dict[Any, Tensor] = {}
        for (_, call), place in zip(calls, self.places, strict=True):
            call.args, call.kwargs = move((call.args, call.kwargs), place, known)
        return Recording(self, ids, calls[0][0], [call for _, call in calls])

    def latency(
        self, length: int = 128, repeats: int = 5, rows: int = 1
    ) -> list[float]:
        """Return the median seconds of each block on ``rows`` sequences of ``length`` tokens.

        Of blocks whose parameters have the same names and shapes, only the first one is timed.
        """
        kinds = [
            tuple((n, p.shape) for n, p in b.named_parameters()) for b in self.blocks
        ]
        examples = {kind: i for i, kind in reversed(list(enumerate(kinds)))}
        ids = torch.zeros((rows, length), dtype=torch.long, device=self.device)
        seconds: dict[Any, float] = {}
        with torch.inference_mode():
            recording = self.record(ids)
            for i in map(int, self.store.sweep(sorted(examples.values()))):
                times = []
                for _ in range(repeats + 1):
                    began = time.perf_counter()
                    recording.block(i, recording.entered)
                    synchronise(self.places[i])
                    times.append(time.perf_counter() - began)
                # The first run is a warm-up.
                seconds[kinds[i]] = statistics.median(times[1:])
        return [seconds[kind] for kind in kinds]

    def tail(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        """Compute logits (B, T, V) from the residual stream (B, T, D) after the last block."""

        outputs = [self._as_output(i, hidden) for i in range(len(self.blocks))]
        stubs = [lambda *_, out=out, **__: out for out in outputs]
        with replace_forwards(self.blocks, stubs):
            logits: Tensor = self.text(input_ids=input_ids, use_cache=False).logits
        return logits

    def _as_output(self, i: int, hidden: Tensor) -> Any:
        rest = self._rest[i]
        return hidden if rest is None else (hidden, *rest)


@dataclass(eq=False)
class Recording:
    """Recorded calls of all blocks for one micro-batch.

    Attributes:
        input_ids: (B, T) int64.
        entered: hidden states (B, T, D) that enter block 0.
    """

    replay: Replay
    input_ids: Tensor
    entered: Tensor
    calls: list[BlockCall]

    def move_to_block(self, i: int, hidden: Tensor) -> Tensor:
        """Return hidden states on the device of block ``i``, to combine them with its output."""
        return hidden.to(self.replay.places[i])

    def block(self, i: int, hidden: Tensor) -> Tensor:
        """Run block ``i`` on hidden states (B, T, D) and return those after it.

        In a model on several devices, each block moves its input to its own device.
        """
        output = self.calls[i].repeat(self.replay.blocks[i], hidden)
        out: Tensor = output if isinstance(output, Tensor) else output[0]
        return out

    def logits(self, stream: Tensor, sample: int) -> Tensor:
        """Compute the logits (T, V) of one sample from its stream (T, D) after the blocks.

        Samples are computed one at a time, so that logits of a whole batch never exist at once.
        """
        return self.replay.tail(stream[None], self.input_ids[sample : sample + 1])[0]


def reuse_freed_memory() -> None:
    """Let glibc keep freed buffers instead of handing them back to the kernel.

    Every block allocates activations of the same few sizes. By default glibc maps new memory for
    each one, and the kernel clears its pages. On a CPU this takes about a third of the run time.
    `BatchLimit.release` hands them back. With other C libraries, this function does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold = -1
        m_mmap_max = -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


@contextlib.contextmanager
def use_attention(replay: Replay) -> Iterator[None]:
    """Use the replay's attention implementation for measurements within the context.

    Raises:
        ArchitectureError: the model has no such implementation.
    """
    model = replay.model
    wanted = replay.attention
    before = attention_of(model)
    if wanted is None or wanted == before:
        yield
        return
    what = f"{type(model).__name__} cannot compute attention as {wanted!r}; choose another with "
    with quiet_transformers(), convert_errors(ArchitectureError, f"{what}--attention"):
        model.set_attn_implementation(wanted)
        if attention_of(model) != wanted:
            raise ValueError(f"it uses {before!r}")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
