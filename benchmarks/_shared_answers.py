"""Likelihoods of answers under many states at once: prefixes shared, equal beginnings run once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from isingcut.data.tokens import TokenSet
from isingcut.evaluation.harness import Harness
from isingcut.evaluation.questions import Prepared
from isingcut.evaluation.scores import Scores, asked
from isingcut.files.journal import Journal
from isingcut.files.writing import fingerprint
from isingcut.ising.states import Floats
from isingcut.measure.work import Work
from isingcut.models.replay import Replay, reuse_freed_memory

Row = tuple[Sequence[int], int]
"""Token ids, two or more, and the number of them, at the end, that count."""
Scales = Mapping[int, Tensor]
"""What the stream (D,) is multiplied by behind a removed block, by that block."""

_HEAD_ROWS = 128


def continuation_scores(
    replay: Replay,
    rows: Sequence[Row],
    states: npt.NDArray[np.bool_],
    work: Work,
    description: str = "scoring",
    scales: Sequence[Scales] = (),
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Log-likelihood of each row's last tokens under each state, and whether they are greedy.

    Rows that differ in their last token alone, as the letters of one question do, run once.

    Args:
        rows: R of them.
        states: (S, N) bool.
        scales: of each state; none of any where it is empty.

    Returns:
        (S, R) nats, and (S, R) bool: every counted token is the most likely one.
    """
    reuse_freed_memory()
    places: dict[tuple[int, ...], list[int]] = {}
    for r, (ids, _) in enumerate(rows):
        places.setdefault(tuple(ids[:-1]), []).append(r)
    asked = list(places.values())
    tokens = TokenSet.from_rows([list(ids) for ids in places])
    paths = [_path(s, scales[k] if scales else {}) for k, s in enumerate(states)]
    sums = np.zeros((2, len(states), len(rows)))
    identity = {
        **replay.identity(),
        "rows": [[list(ids), k] for ids, k in rows],
        "paths": [[[b, t.tolist()] for b, t in path] for path in paths],
        "batch_tokens": work.batch_tokens,
    }
    kept = Journal(work.journal, fingerprint(identity))
    batches = tokens.batches(work.batch_tokens)
    with work.progress(description, len(batches)) as bar, torch.inference_mode():
        for b, batch in enumerate(batches):
            here = [asked[int(i)] for i in batch.index]
            found = kept.get(str(b))
            if found is None:
                found = _batch(replay, batch, [[rows[r] for r in group] for group in here], paths)
                kept.put(str(b), found)
            sums[:, :, [r for group in here for r in group]] = found
            bar.advance(1)
    return sums[0], sums[1] == 1


_Path = list[tuple[bool, Tensor]]
"""Of each block whether it is removed, and what the stream behind it is multiplied by (empty:
nothing)."""


def _path(removed: npt.NDArray[np.bool_], scales: Scales) -> _Path:
    return [(bool(r), scales.get(i, torch.empty(0))) for i, r in enumerate(removed)]


def _parts_at(one: _Path, two: _Path) -> int:
    """The first block at which two paths differ; their number where none."""
    for i, ((a, s), (b, t)) in enumerate(zip(one, two, strict=True)):
        if a != b or not torch.equal(s, t):
            return i
    return len(one)


def _batch(
    replay: Replay, batch: TokenSet, groups: Sequence[Sequence[Row]], paths: Sequence[_Path]
) -> Floats:
    """(2, S, R) log-likelihoods and greedy flags of the rows of one micro-batch."""
    n = len(replay)
    recording = replay.record(batch.input_ids)
    stream: list[Tensor] = [recording.entered] * (n + 1)
    # Position t predicts token t + 1.
    where = [
        (s, t, ids[t + 1])
        for s, group in enumerate(groups)
        for ids, k in group
        for t in range(len(ids) - 1 - k, len(ids) - 1)
    ]
    owner = np.repeat(np.arange(sum(map(len, groups))), [k for group in groups for _, k in group])
    sample, position, label = (torch.tensor(column) for column in zip(*where, strict=True))
    label = label.to(replay.device)
    out = np.zeros((2, len(paths), sum(map(len, groups))))
    order = sorted(range(len(paths)), key=lambda p: [r for r, _ in paths[p]])
    for at, place in enumerate(order):
        path = paths[place]
        for i in range(_parts_at(path, paths[order[at - 1]]) if at else 0, n):
            gone, scale = path[i]
            stream[i + 1] = stream[i] if gone else recording.block(i, stream[i])
            if len(scale):
                stream[i + 1] = (stream[i + 1] * scale).to(stream[i].dtype)
        likely, best = _heads(replay, stream[n][sample, position], label)
        np.add.at(out[0, place], owner, likely)
        greedy = np.ones(out.shape[2])
        np.minimum.at(greedy, owner, best)
        out[1, place] = greedy
    return out


def _heads(replay: Replay, stream: Tensor, labels: Tensor) -> tuple[Floats, Floats]:
    """Log-likelihood of each label (K,) at its stream (K, D), and whether it is the likeliest.

    Only these rows pass through the head: the final norm and the head look at one position at
    a time.
    """
    likely, best = [], []
    for a in range(0, len(stream), _HEAD_ROWS):
        part, label = stream[a : a + _HEAD_ROWS], labels[a : a + _HEAD_ROWS]
        logits = replay.tail(part[None], label[None])[0].float()
        likely.append((logits.gather(1, label[:, None])[:, 0] - logits.logsumexp(-1)).double())
        best.append((logits.argmax(-1) == label).double())
    return torch.cat(likely).cpu().numpy(), torch.cat(best).cpu().numpy()


class Table(Harness):
    """A model of the harness that answers from a table, and without one notes what it is asked."""

    def __init__(self, loaded: Any) -> None:
        super().__init__(loaded, 1, None, "")
        self.rows: list[tuple[tuple[int, ...], int]] = []
        self.table: dict[tuple[tuple[int, ...], int], tuple[float, bool]] | None = None

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **rest: Any) -> Any:
        longest = self.max_length + 1
        rows = [(tuple((c + a)[-longest:]), len(a)) for _, c, a in requests]
        if self.table is None:
            self.rows += rows
            return [(0.0, False)] * len(rows)
        return [self.table[row] for row in rows]


def all_at_once(
    loaded: Any, task: Prepared, answers: Callable[[list[Any]], Any], count: int
) -> list[Scores]:
    """The harness's scores of so many models on a task without generation.

    Args:
        answers: of R rows (token ids, how many at the end are the answer), the (S, R)
            log-likelihoods and whether each answer is greedy, of all S models.
    """
    model = Table(loaded)
    asked(model, task)
    rows = list(dict.fromkeys(model.rows))
    likely, greedy = answers(rows)
    found = []
    for s in range(count):
        pairs = zip(likely[s].tolist(), greedy[s].tolist(), strict=True)
        model.table = dict(zip(rows, pairs, strict=True))
        found.append(asked(model, task))
    return found
