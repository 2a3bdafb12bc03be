"""Run block i of a model on any hidden states: the recorded call of each block, replayed.

transformers blocks take masks, position embeddings and caches that differ by layer. Nothing
of that is rebuilt here: the model runs once with its blocks stubbed, what each block was
called with is recorded, and block i is later called with the same arguments and other hidden
states. So everything below works for any architecture whose blocks pass one residual stream
on, and a state whose first removed block is i can reuse the hidden states that entered i.
"""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isingcut.data.tokens import TokenSet
from isingcut.models.architectures.families import stop_rescaling
from isingcut.models.device import BatchLimit, synchronise
from isingcut.models.first_pass import BlockCall, learn_outputs
from isingcut.models.memory import allowance
from isingcut.models.parts import Resident, Weights
from isingcut.models.processes import ALONE, Processes
from isingcut.models.text_alone import text_model


class _StackReached(Exception):
    """Raised by the last stub: what comes after the blocks is not needed when recording."""


class Replay:
    """The blocks of one model, callable one at a time.

    Args:
        model: a causal language model; it is put in evaluation mode.
        blocks: its removable blocks, in order.
        device: where it computes; None takes that of its parameters.
        store: its weights; None: they are in memory.

    Attributes:
        text: what of the model is given token ids (`text_alone.py`).
        bytes_per_token: of the residual stream, at its widest.
        attention: how measurements compute attention; None keeps what was loaded.
        threads: with how many threads at most; None: with those that torch takes.
        limit: tokens that are computed at a time, as far as the memory is known to hold them.
        processes: that hold the same model and share its measurements.
        plain_head: what `compute.head` found of the output map, once it has looked.

    Raises:
        ArchitectureError: a block does not take and return one residual stream.
    """

    streamed: ClassVar[bool] = False
    """Whether blocks are read from disk when they are run; then work goes block by block."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        device: torch.device | None = None,
        store: Weights | None = None,
    ) -> None:
        self.model = model.eval()
        stop_rescaling(model)
        self.blocks = list(blocks)
        self.device = device or next(model.parameters()).device
        self.store = store or Resident()
        self.attention: str | None = None
        self.threads: int | None = None
        self.limit = BatchLimit(self.device)
        self.processes: Processes = ALONE
        self.plain_head: bool | None = None
        self.text = text_model(model)
        outputs = learn_outputs(self.text, self.blocks, self.device)
        self.bytes_per_token, self._rest = outputs.bytes_per_token, outputs.rest

    def __len__(self) -> int:
        return len(self.blocks)

    def identity(self) -> dict[str, Any]:
        """What tells this model from others, cheaply, for the fingerprint of a journal."""
        parameters = list(self.model.parameters())
        config = getattr(self.model, "config", None)
        return {
            "model": config.to_dict() if config is not None else None,
            # Of every parameter: a fine-tune may share its first ones with its base.
            "starts": [p.flatten()[:8].float().tolist() for p in parameters if not p.is_meta],
            "dtype": str(parameters[0].dtype),
            **({"attention": self.attention} if self.attention else {}),
        }

    def stream_bytes(self, batch: TokenSet) -> int:
        """Bytes of the residual stream of a batch at one place."""
        return int(batch.input_ids.numel()) * self.bytes_per_token

    def room(self, batch: TokenSet) -> int:
        """Bytes that hidden states kept between blocks may take, beside the work on one batch.

        Of a model in memory on the CPU that is not watched.
        """
        if self.device.type == "cpu":
            return sys.maxsize
        return allowance("", self.device).left

    def record(self, input_ids: Tensor) -> Recording:
        """Record how each block is called for ``input_ids`` (B, T); no block is run."""
        calls: list[BlockCall] = []
        last = len(self.blocks) - 1

        def stub(i: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                call = BlockCall.split(args, kwargs, i)
                calls.append(call)
                if i == last:
                    raise _StackReached
                assert call.hidden is not None
                return self._as_output(i, call.hidden)

            return forward

        ids = input_ids.to(self.device)
        stubs = [stub(i) for i in range(len(self.blocks))]
        with self._replaced(stubs), contextlib.suppress(_StackReached):
            self.text(input_ids=ids, use_cache=False)
        entered = calls[0].hidden
        assert entered is not None
        for call in calls:
            call.hidden = None
        return Recording(self, ids, entered, calls)

    def latency(self, length: int = 128, repeats: int = 5) -> list[float]:
        """Seconds that each block takes for one sequence of ``length`` tokens (median)."""
        ids = torch.zeros((1, length), dtype=torch.long, device=self.device)
        rounds = []
        with torch.inference_mode():
            recording = self.record(ids)
            for _ in range(repeats + 1):
                stream, times = recording.entered, []
                for i in range(len(self)):
                    began = time.perf_counter()
                    stream = recording.block(i, stream)
                    synchronise(self.device)
                    times.append(time.perf_counter() - began)
                rounds.append(times)
        # The first round warms up.
        return [statistics.median(per_block) for per_block in zip(*rounds[1:], strict=True)]

    def tail(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        """Logits (B, T, V) from the residual stream (B, T, D) that leaves the last block."""

        def stub(i: int) -> Callable[..., Any]:
            return lambda *args, **kwargs: self._as_output(i, hidden)

        with self._replaced([stub(i) for i in range(len(self.blocks))]):
            logits: Tensor = self.text(input_ids=input_ids, use_cache=False).logits
        return logits

    def _as_output(self, i: int, hidden: Tensor) -> Any:
        rest = self._rest[i]
        return hidden if rest is None else (hidden, *rest)

    @contextlib.contextmanager
    def _replaced(self, forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
        """Swap every block's `forward`; an instance attribute set by others (hooks) comes back."""
        before = [b.__dict__.get("forward") for b in self.blocks]
        try:
            for block, forward in zip(self.blocks, forwards, strict=True):
                block.__dict__["forward"] = forward
            yield
        finally:
            for block, old in zip(self.blocks, before, strict=True):
                if old is None:
                    del block.__dict__["forward"]
                else:
                    block.__dict__["forward"] = old


class Recording:
    """The calls of all blocks for one micro-batch.

    Attributes:
        input_ids: (B, T) int64.
        entered: hidden states (B, T, D) that enter block 0.
    """

    def __init__(
        self, replay: Replay, input_ids: Tensor, entered: Tensor, calls: list[BlockCall]
    ) -> None:
        self._replay, self._calls = replay, calls
        self.input_ids, self.entered = input_ids, entered

    def block(self, i: int, hidden: Tensor) -> Tensor:
        """Hidden states (B, T, D) after block ``i``, from those before it."""
        output = self._calls[i].repeat(self._replay.blocks[i], hidden)
        out: Tensor = output if isinstance(output, Tensor) else output[0]
        return out

    def logits(self, stream: Tensor, sample: int) -> Tensor:
        """Logits (T, V) of one sample of the batch, from its stream (T, D) after the blocks.

        One sample at a time, so that the logits of a whole batch never exist at once.
        """
        return self._replay.tail(stream[None], self.input_ids[sample : sample + 1])[0]


def reuse_freed_memory() -> None:
    """Let glibc keep freed buffers instead of handing them back to the kernel.

    Every block allocates activations of the same few sizes. By default glibc maps each one
    anew, and the kernel clears its pages again: about a third of the time on a CPU. Does
    nothing on other C libraries.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
