"""Texts that states of one model write: a few prompts at a time, each text kept as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from isingcut.files.journal import Journal
from isingcut.files.writing import fingerprint
from isingcut.ising.states import States
from isingcut.measure.splitting import halve_to_fit
from isingcut.measure.work import Work
from isingcut.models.replay import Replay

Prompt = tuple[tuple[int, ...], dict[str, Any]]
"""Token ids, and how the text behind them is written, JSON-able."""
Writer = Callable[[Sequence[int]], Sequence[str]]
"""The texts behind some prompts, named by their positions, all written together."""

MICRO_BATCHES = 4
"""Whose tokens the prompts of one go may fill: a step takes hardly longer for more texts."""


class Generations:
    """The texts of several states of one model, in a journal.

    Args:
        replay: the model's blocks.
        states: (S, N) bool.
        work: how much is written together; finished texts are kept in its journal.
        description: of the bar that is shown meanwhile.
    """

    def __init__(
        self, replay: Replay, states: States, work: Work, description: str = "writing"
    ) -> None:
        self.replay, self.states, self.work, self.description = replay, states, work, description

    def of(self, state: int, prompts: Sequence[Prompt], write: Writer) -> list[str]:
        """One state's texts; those that the journal has are not written again.

        Args:
            prompts: the same for each of the states.
            write: has the state write.
        """
        told = {"prompts": [[*p] for p in prompts], "states": np.packbits(self.states).tolist()}
        kept = Journal(self.work.journal, fingerprint({**self.replay.identity(), **told}))
        keys = [f"{state}/{i}" for i in range(len(prompts))]
        left = [i for i, key in enumerate(keys) if kept.get(key) is None]
        with self.work.progress(self.description, len(prompts)) as bar:
            bar.advance(len(prompts) - len(left))
            for some in _together(prompts, left, MICRO_BATCHES * self.work.batch_tokens):
                texts = halve_to_fit(self.replay.limit, some, write)
                for i, text in zip(some, texts, strict=True):
                    kept.put(keys[i], np.array([*text.encode()], dtype=np.float64))
                bar.advance(len(some))
        return [_text(kept.get(key)) for key in keys]


def _text(row: npt.NDArray[np.float64] | None) -> str:
    """What a row of the journal says, a number for each byte."""
    assert row is not None
    return bytes(row.astype(np.uint8)).decode()


def _together(prompts: Sequence[Prompt], left: Sequence[int], most: int) -> Iterator[list[int]]:
    """Positions of prompts written alike, long ones first, as many at a time as fit padded."""
    alike: dict[str, list[int]] = {}
    for i in left:
        alike.setdefault(fingerprint(prompts[i][1]), []).append(i)
    for group in alike.values():
        order = sorted(group, key=lambda i: -len(prompts[i][0]))
        while order:
            count = max(1, most // max(1, len(prompts[order[0]][0])))
            yield order[:count]
            order = order[count:]
