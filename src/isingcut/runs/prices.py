"""The costs of one model, which each stage estimates its time and memory from.

One block of each kind and the output head are timed on a micro-batch. `isingcut plan` reads only
these, so that it takes seconds even for a model far larger than memory; a run times the model that
it has loaded. Each estimate is this time multiplied by a number of passes.
"""

import math
import time
from functools import partial

import numpy as np
import torch

from isingcut.data.tokens import TokenSet
from isingcut.energies.base import Price
from isingcut.energies.search import Target
from isingcut.evaluation.prompts import PROMPTS
from isingcut.files.runs import BlockList
from isingcut.formats.architectures.blocks import text_config
from isingcut.models.compute.divergence import CHUNK_ELEMENTS
from isingcut.models.compute.head import Comparison, OutputHead
from isingcut.models.device import allowance
from isingcut.models.replay import BLOCK_STREAMS, EMBED, HEAD, Replay
from isingcut.models.streaming.replay import StreamedReplay
from isingcut.models.streaming.store import Store
from isingcut.options.config import RunConfig
from isingcut.options.machine import BATCH_TOKENS
from isingcut.runs.checks import prompts_of
from isingcut.runs.constraints import TIMED_TOKENS, describe_blocks, removal_rows
from isingcut.runs.context import Context, check_by_config
from isingcut.runs.folder import each_removal
from isingcut.runs.stages import Estimate

# Bytes per second of a disk, for a run whose weights are in memory.
_DISK = 2e9
RESIDENT = 1.54
"""Memory of a run on a card in multiples of the weights, without a quarter of the blocks that lie
apart; measured by `benchmarks/card.py`."""
# Tokens of the longest answer of a chat model, within a factor of 4.
_ANSWER = 256
# Float32 copies of a chunk of logits: two models, their difference, a gradient.
_LOGIT_COPIES = 4


class Prices:
    """The costs of the energies and stages of one model: a timed pass, times the number of passes.

    Args:
        blocks: the blocks of a run that has begun.

    Attributes:
        latency: (N,) seconds per token of each block.
        once: seconds per token of the output head and the loss.
        answers: seconds of the original's answers to the prompts of an evaluation.
        reading: seconds per byte of weights, read from disk and converted.
    """

    def __init__(
        self,
        context: Context,
        config: RunConfig,
        blocks: BlockList | None = None,
    ) -> None:
        self.config = config
        self.streamed = context.streaming
        self.weights = context.weights
        self.dtype = context.torch_dtype
        device = torch.device(context.device.split(",")[0])
        self.reading = 1 / _DISK
        self.memory = allowance(config.memory_limit, device)
        self.largest = 0
        tokens = config.batch_tokens or BATCH_TOKENS
        if blocks is None:
            inspected = check_by_config(context, config, needed=False)
        if blocks is not None and not self.streamed:
            tokens = context.batch_tokens
            replay = context.replay
        else:
            store = Store(
                context.source,
                self.dtype,
                device,
                config.memory_limit,
                trust_remote_code=config.trust_remote_code,
            )
            replay = StreamedReplay(store)
            self.memory = store.memory
            # Keep the parts in memory, so that the timing below includes no reading.
            parts: list[int | str] = [EMBED, HEAD, 0]
            self.reading = sum(map(store.keep, parts)) / sum(map(store.size, parts))
            self.largest = store.largest
        vocabulary = text_config(replay.model).vocab_size
        longest = getattr(text_config(replay.model), "max_position_embeddings", None)
        length = min(config.length, tokens, longest or config.length)
        rows = tokens // length
        # Random tokens, so that routers spread them over the experts as in real text.
        ids = np.random.default_rng(0).integers(vocabulary, size=(rows, length))
        batch = TokenSet.from_rows(ids.tolist())
        self.batch = batch.positions
        self.latency = [s / self.batch for s in replay.latency(length, rows=rows)]
        self.once = _time_head(replay, batch) / self.batch
        # The prompts are answered together, a token at a time.
        step = sum(replay.latency(1, rows=len(PROMPTS))) + len(PROMPTS) * self.once
        self.answers = _ANSWER * step * (1 + len(prompts_of(config)) / len(PROMPTS))
        self.n = len(replay)
        self.logits = vocabulary * self.dtype.itemsize
        self.stream = replay.bytes_per_token
        self.room = replay.room(batch) if self.streamed else 0
        # Bytes per token for a backward pass: half of the working memory of a block.
        self.graph = self.n * BLOCK_STREAMS // 2 * self.stream
        # By default, a fifth of the blocks is removed.
        self.remove = max(1, self.n // 5)
        if blocks is None:
            timing = config.budget.part("latency")
            timed_for = timing.context if timing else 0
            timed = timed_for or min(TIMED_TOKENS, longest or TIMED_TOKENS)
            seconds = [timed * s for s in self.latency]
            size = inspected.other_bytes + sum(b.bytes for b in inspected.stack.blocks)
            blocks = describe_blocks(
                inspected.stack,
                inspected.rows,
                inspected.parameters,
                size,
                seconds,
                timed_for,
            )
            # A step of decoding is divided among the blocks like a pass.
            for block, each in zip(blocks.blocks, self.latency, strict=True):
                block.decode_seconds = each
            speed = config.budget.part("speed")
            blocks.decode_seconds = self.forward
            blocks.decoded_tokens = speed.context if speed else 0
        self.whole = blocks.total_bytes
        if config.removal:
            last = each_removal(config)[-1]
            self.remove = Target(last.removal, removal_rows(blocks, last)).size
        in_blocks = sum(b.bytes for b in blocks.blocks)
        self.left = 1 - in_blocks / self.whole * self.remove / self.n

    @property
    def forward(self) -> float:
        """The seconds per token of a forward pass."""
        return sum(self.latency) + self.once

    def beside_weights(self) -> int:
        """Return the bytes of a card that a run needs in addition to `RESIDENT` times the weights.

        They hold a sample of the tuning, and the logits of a micro-batch with a chunk in float32.
        """
        sample = self.config.length * self.graph
        logits = self.batch * self.logits + _LOGIT_COPIES * 4 * CHUNK_ELEMENTS
        return int(sample + logits)

    def estimate(
        self, samples: int = 0, tokens: float = 0, reads: float = 0, work: float = 0
    ) -> Estimate:
        """Estimate forward passes over tokens, and reads of all weights; ``work`` in bytes."""
        seconds = tokens * self.forward + reads * self.reading * self.weights
        return Estimate("", samples, seconds, self._weights_in_memory() + work)

    def _weights_in_memory(self) -> float:
        """Return the bytes of the process with its weights, or with two buffers if streamed."""
        return self.memory.used + (2 * self.largest if self.streamed else self.weights)

    def measurement(self, samples: int, price: Price) -> Estimate:
        """Estimate a measurement, in memory or streamed."""
        tokens = samples * self.config.length
        # With streaming, blocks run forward once more in the backward pass.
        again = price.gradients and self.streamed
        seconds = tokens * (price.passes * sum(self.latency) + price.heads * self.once)
        seconds += again * tokens * self.forward
        if self.streamed:
            # Reading overlaps with computing if enough hidden states fit; otherwise the disk is the
            # limit. Every block is read in the forward and in the backward pass.
            reading = self.reading * self.weights
            streams = 2 * (self.n + 1) if price.gradients else price.heads
            sweeps = math.ceil(tokens * streams * self.stream / self.room)
            seconds = max(seconds, sweeps * reading) + reading
            return Estimate("", samples, price.seconds or seconds, self.memory.total)
        kept = (BLOCK_STREAMS + self.n + 1) * self.stream
        work = self.logits + (self.graph if price.gradients else kept)
        memory = self._weights_in_memory() + self.batch * work
        return Estimate("", samples, price.seconds or seconds, memory)


def _time_head(replay: Replay, batch: TokenSet) -> float:
    """Return the seconds of the output head and the loss on a micro-batch."""
    seconds = []
    with torch.inference_mode():
        recording = replay.record(batch.input_ids)
        stream = recording.move_to_block(len(replay) - 1, recording.entered)
        logits = partial(OutputHead(replay).logits, recording, stream, batch)
        original = Comparison(logits(), batch)
        for _ in range(3):
            began = time.perf_counter()
            original.sum_samples([original.compare(logits())])
            seconds.append(time.perf_counter() - began)
    return min(seconds)
