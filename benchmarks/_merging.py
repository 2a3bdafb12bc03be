"""Blocks merged into one on the live model, exactly undone afterwards; and what that costs.

    theta_b  <-  theta_b + sum_k (theta_k - theta_b)

over the other blocks k of a group, b its first: the parameter differences are added to the
first block and the others are left out. Source: arXiv 2502.19159 (sliding-window merging).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from isingcut.console.progress import Progress, silent
from isingcut.data.calibration import TokenSet
from isingcut.errors import ArchitectureError, InputError
from isingcut.measure.losses import Measurement
from isingcut.models.compute.head import OutputHead, comparison
from isingcut.models.replay import Replay, reuse_freed_memory
from isingcut.options.types import BATCH_TOKENS


def check_mergeable(replay: Replay) -> None:
    """Refuse a model whose neighbouring blocks cannot be added parameter by parameter.

    Raises:
        ArchitectureError: two neighbours have other parameters or share some, a parameter is
            not stored as plain numbers, or the blocks are read from disk one at a time.
    """
    if replay.streamed:
        raise ArchitectureError(
            "merging needs the weights of several blocks at once; pass --stream off on a machine "
            "that can hold the model"
        )
    tensors = [_tensors(block) for block in replay.blocks]
    for i, (here, after) in enumerate(itertools.pairwise(tensors)):
        for name in sorted({*here, *after}):
            a, b = here.get(name), after.get(name)
            if a is None or b is None or a.shape != b.shape:
                shapes = [None if t is None else list(t.shape) for t in (a, b)]
                why = f"{name} is {shapes[0]} in the one and {shapes[1]} in the other"
            elif not a.is_floating_point():
                why = f"{name} is stored as {a.dtype}, whose differences mean nothing"
            elif a.data_ptr() == b.data_ptr() and a.numel():
                why = f"{name} is the same tensor in both"
            else:
                continue
            raise ArchitectureError(
                f"blocks {i} and {i + 1} cannot be merged by adding parameter differences: {why}; "
                "use a baseline that removes blocks"
            )


class Merged:
    """Context in which the blocks of a model are merged; may be entered again and again.

    The merged parameters are computed once, in float32, and put in place of the first block's;
    on leaving, the original tensors themselves come back, so that not a bit has changed. Which
    blocks to leave out is for the caller: see `removed`.

    Args:
        replay: the model's blocks.
        merges: groups of two blocks or more; the differences are added into the first.

    Attributes:
        removed: (N,) bool, the blocks that are merged away.

    Raises:
        InputError: a group is too small, or a block is unknown or in two groups.
    """

    def __init__(self, replay: Replay, merges: Sequence[Sequence[int]]) -> None:
        check_groups(len(replay), merges)
        self.removed = np.zeros(len(replay), dtype=bool)
        self._swaps: list[tuple[Tensor, Tensor, Tensor]] = []
        for base, *others in merges:
            self.removed[others] = True
            added = [_tensors(replay.blocks[k]) for k in others]
            for name, live in _tensors(replay.blocks[base]).items():
                self._swaps.append((live, live.data, _sum(live, [a[name] for a in added])))

    def __enter__(self) -> Merged:
        for live, _, merged in self._swaps:
            live.data = merged
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for live, original, _ in self._swaps:
            live.data = original


def check_groups(n: int, merges: Sequence[Sequence[int]]) -> None:
    """Refuse groups that are no merge of ``n`` blocks.

    Raises:
        InputError: a group is too small, or a block is unknown or in two groups.
    """
    named = [i for group in merges for i in group]
    if any(len(group) < 2 for group in merges) or len(set(named)) < len(named):
        raise InputError(
            "expected groups of two blocks or more, no block twice; got "
            f"{[list(group) for group in merges]}"
        )
    unknown = [i for i in named if not 0 <= i < n]
    if unknown:
        raise InputError(f"there is no block {unknown[0]}; expected 0 to {n - 1}")


def measure_merged(
    replay: Replay,
    tokens: TokenSet,
    merges: Sequence[Sequence[int]],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress = silent,
    description: str = "measuring the merged model",
) -> Measurement:
    """KL(original || merged) and NLL of one merged model, as `measure` has them of a state.

    Args:
        tokens: m samples.
        merges: groups of blocks, see `Merged`; at least one.

    Returns:
        Measurement of one row: its state marks the blocks that are merged away.
    """
    merged = Merged(replay, merges)
    n, start = len(replay), min(group[0] for group in merges)
    kept = [i for i in range(start, n) if not merged.removed[i]]
    sums = np.zeros((3, tokens.samples))
    batches, head = tokens.batches(batch_tokens), OutputHead(replay)
    reuse_freed_memory()
    with (
        progress(description, (n + len(kept)) * len(batches)) as bar,
        torch.inference_mode(),
    ):
        for batch in batches:
            recording = replay.record(batch.input_ids)
            stream = fork = recording.entered
            for i in range(n):
                fork = stream if i == start else fork
                stream = recording.block(i, stream)
            original = comparison(head, recording, stream, batch)
            stream = fork
            with merged:
                for i in kept:
                    stream = recording.block(i, stream)
            rows = batch.index.numpy()
            sums[:2, rows] = original.compare(stream)
            sums[2, rows] = original.nll
            bar.advance(n + len(kept))
    counts: npt.NDArray[np.int64] = tokens.predicted.sum(1).numpy().astype(np.int64)
    return Measurement(
        states=merged.removed[None],
        kl_sums=sums[:1],
        nll_sums=sums[1:2],
        original_nll_sums=sums[2],
        counts=counts,
        blocks_run=n + len(kept),
        blocks_unshared=n + int((~merged.removed).sum()),
    )


def _tensors(block: nn.Module) -> dict[str, Tensor]:
    """A block's live parameters and persistent buffers by name; whole numbers only as parameters.

    Buffers of whole numbers (counters, index tables) are no weights and stay as they are.
    """
    parameters = dict(block.named_parameters())
    return {
        name: tensor
        for name, tensor in block.state_dict(keep_vars=True).items()
        if name in parameters or tensor.is_floating_point()
    }


def _sum(base: Tensor, others: Sequence[Tensor]) -> Tensor:
    """base + sum (other - base), in float32, as a tensor like ``base``."""
    with torch.no_grad():
        start = base.detach().float()
        total = start.clone()
        for other in others:
            total += other.detach().float() - start
        return total.to(base.dtype)
