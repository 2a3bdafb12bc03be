"""Zero-shot accuracy of many states on multiple-choice tasks and LAMBADA, prefixes shared.

The conventions are those of lm-evaluation-harness. A choice is scored by the log-likelihood of
its tokens given the context; `acc` takes the highest sum, `acc_norm` the highest sum over the
number of characters of the choice. WinoGrande is scored by partial evaluation: the sentence
after the blank, given the sentence up to it with each name filled in. LAMBADA is right where
greedy decoding gives the last word. Context and continuation are tokenised together and cut
where the context's own tokens end.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from _merging import Merged
from _quality_bench import Bench
from _quality_judge import Chosen
from _quality_store import Part, Price
from isingcut.data.encoder import Encoder
from isingcut.data.tokens import TokenSet
from isingcut.files.journal import Journal
from isingcut.files.writing import fingerprint
from isingcut.ising.states import Floats, states_of
from isingcut.measure.work import Work
from isingcut.models.replay import Replay, reuse_freed_memory

FILES = {
    "arc_easy": "arc_easy/test_sub500.jsonl",
    "hellaswag": "hellaswag/val_sub500.jsonl",
    "piqa": "piqa/val_sub500.jsonl",
    "winogrande": "winogrande/dev_sub500.jsonl",
    "lambada": "lambada/test_sub500.jsonl",
}
METRIC = {"hellaswag": "acc_norm"}
"""What is usually reported for a task, where that is not `acc`."""

_HEAD_ROWS = 128


@dataclass(frozen=True)
class Question:
    """Pairs of context and continuation, and which continuation is right."""

    pairs: tuple[tuple[str, str], ...]
    answer: int
    lengths: tuple[int, ...]


def questions(task: str, records: Sequence[dict[str, Any]]) -> list[Question]:
    """The questions of a task in the form the harness has them."""
    found = []
    for r in records:
        if task == "lambada":
            context, _, word = r["text"].rpartition(" ")
            found.append(Question(((context, f" {word}"),), 0, (1,)))
            continue
        choices = [str(c) for c in r["choices"]]
        if task == "winogrande":
            before, _, after = r["context"].partition("_")
            pairs = [(before + c, f" {after.strip()}") for c in choices]
        elif task == "hellaswag":
            pairs = [(r["context"], f" {c}") for c in choices]
        else:
            pairs = [(f"Question: {r['context']}\nAnswer:", f" {c}") for c in choices]
        lengths = tuple(max(1, len(c)) for c in choices)
        found.append(Question(tuple(pairs), int(r["answer"]), lengths))
    return found


def encoded(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], int]:
    """Token ids of both together, and how many of them are the continuation's."""
    stripped = context.rstrip()
    continuation, context = context[len(stripped) :] + continuation, stripped

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    start = Encoder(tokenizer).start
    whole = start + ids(context + continuation)
    held = len(start) + len(ids(context))
    # A tokenizer may merge the last of the context with the first of the continuation.
    return whole, max(1, len(whole) - held)


def continuation_scores(
    replay: Replay,
    rows: Sequence[tuple[list[int], int]],
    states: npt.NDArray[np.bool_],
    work: Work,
    description: str = "scoring",
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Log-likelihood of each row's last tokens under each state, and whether they are greedy.

    Args:
        rows: R pairs of token ids and the number of them, at the end, that count.
        states: (S, N) bool.

    Returns:
        (S, R) nats, and (S, R) bool: every counted token is the most likely one.
    """
    reuse_freed_memory()
    tokens = TokenSet.from_rows([ids for ids, _ in rows])
    order = np.lexsort(states.T[::-1])
    sums = np.zeros((2, len(states), len(rows)))
    identity = {
        **replay.identity(),
        "rows": [[ids, k] for ids, k in rows],
        "states": np.packbits(states).tolist(),
        "shape": list(states.shape),
        "batch_tokens": work.batch_tokens,
    }
    kept = Journal(work.journal, fingerprint(identity))
    batches = tokens.batches(work.batch_tokens)
    with work.progress(description, len(batches)) as bar, torch.inference_mode():
        for b, batch in enumerate(batches):
            found = kept.get(str(b))
            if found is None:
                counted = [rows[int(r)][1] for r in batch.index]
                found = _batch(replay, batch, counted, states, order)
                kept.put(str(b), found)
            sums[:, :, batch.index.numpy()] = found
            bar.advance(1)
    return sums[0], sums[1] == 1


def _batch(
    replay: Replay,
    batch: TokenSet,
    counted: Sequence[int],
    states: npt.NDArray[np.bool_],
    order: npt.NDArray[np.int64],
) -> Floats:
    """(2, S, B) log-likelihoods and greedy flags of one micro-batch, prefixes shared."""
    n = len(replay)
    recording = replay.record(batch.input_ids)
    stream: list[Tensor] = [recording.entered] * (n + 1)
    lengths = batch.mask.sum(1).tolist()
    # Position t predicts token t + 1.
    where = [
        (s, t)
        for s, (length, k) in enumerate(zip(lengths, counted, strict=True))
        for t in range(length - 1 - k, length - 1)
    ]
    sample = torch.tensor([s for s, _ in where])
    position = torch.tensor([t for _, t in where])
    labels = batch.input_ids[sample, position + 1].to(replay.device)
    out = np.zeros((2, len(states), batch.samples))
    start, previous = 0, states[order[0]]
    for place in order:
        removed = states[place]
        if place != order[0]:
            differ = np.flatnonzero(removed != previous)
            start = int(differ[0]) if len(differ) else n
        for i in range(start, n):
            stream[i + 1] = stream[i] if removed[i] else recording.block(i, stream[i])
        previous = removed
        chosen = stream[n][sample, position]
        likely, best = _heads(replay, chosen, labels)
        np.add.at(out[0, place], sample.numpy(), likely)
        greedy = np.ones(batch.samples)
        np.minimum.at(greedy, sample.numpy(), best)
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


def grade(
    items: Sequence[Question], scores: Floats, greedy: npt.NDArray[np.bool_]
) -> dict[str, npt.NDArray[np.bool_]]:
    """Right or wrong by question, under `acc` and, for multiple choice, `acc_norm`.

    Args:
        scores, greedy: (R,) over the pairs of all questions in order.
    """
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    at = 0
    for q in items:
        part = scores[at : at + len(q.pairs)]
        if len(q.pairs) == 1:
            right["acc"].append(bool(greedy[at]))
        else:
            right["acc"].append(int(np.argmax(part)) == q.answer)
            right["acc_norm"].append(int(np.argmax(part / np.array(q.lengths))) == q.answer)
        at += len(q.pairs)
    return {name: np.array(values) for name, values in right.items() if values}


def accuracy_parts(bench: Bench, chosen: dict[str, Chosen]) -> list[Part]:
    """One part a task, for what has not been scored there yet."""
    parts = []
    for task in bench.options.tasks:
        seen = {
            row["key"]
            for _, part in bench.store.under(f"accuracy/{task}")
            for row in part["states"]
        }
        fresh = [chosen[key] for key in sorted(chosen) if key not in seen]
        if fresh:
            parts.append(_part(bench, task, fresh))
    return parts


METHODS = 12
"""Distinct states expected from all methods at one number of removals."""


def accuracy_expected(bench: Bench, known: int) -> list[Price]:
    """The price of scoring the states that are still to be chosen."""
    left = METHODS * len(bench.options.accuracy_remove) + 1 - known
    if left <= 0:
        return []
    tokens = sum(sum(len(ids) for ids, _ in _rows(bench, task)[1]) for task in bench.options.tasks)
    return [Price(tokens, 0.45 * left, 0.1 * left)]


def _rows(bench: Bench, task: str) -> tuple[list[Question], list[tuple[list[int], int]]]:
    """The questions of a task and the token rows of all their pairs."""
    path = bench.data / FILES[task]
    lines = path.read_text(encoding="utf-8").splitlines()[: bench.options.questions]
    items = questions(task, [json.loads(line) for line in lines])
    tokenizer = bench.loaded.tokenizer
    return items, [encoded(tokenizer, c, k) for q in items for c, k in q.pairs]


def _part(bench: Bench, task: str, chosen: list[Chosen]) -> Part:
    items, rows = _rows(bench, task)
    states = [c for c in chosen if c.merges is None]
    merged = [c for c in chosen if c.merges is not None]

    def make(journal: Path) -> dict[str, Any]:
        def score(group: list[Chosen], path: Path) -> list[dict[str, Any]]:
            removed = states_of(bench.n, [c.removed for c in group])
            words = f"{task}: {len(group)} models"
            found = continuation_scores(bench.replay, rows, removed, bench.work(path), words)
            return [_graded(items, c.key, *one) for c, *one in zip(group, *found, strict=True)]

        graded = score(states, journal) if states else []
        for k, c in enumerate(merged):
            with Merged(bench.replay, c.merges):
                graded += score([c], journal.with_name(f"{journal.name}-{k}"))
        return {"task": task, "questions": len(items), "states": graded}

    tokens = sum(len(ids) for ids, _ in rows)
    passes = sum(bench.n - len(c.removed) for c in states) / bench.n * 0.6 + len(merged)
    heads = len(chosen) * sum(k for _, k in rows) / tokens
    name = f"accuracy/{task}/{fingerprint([c.key for c in chosen])}"
    return Part(name, make, (Price(tokens, passes, heads),))


def _graded(
    items: Sequence[Question], key: str, scores: Floats, greedy: npt.NDArray[np.bool_]
) -> dict[str, str]:
    right = grade(items, scores, greedy)
    return {"key": key, **{name: _bits(values) for name, values in right.items()}}


def _bits(right: npt.NDArray[np.bool_]) -> str:
    return "".join("1" if r else "0" for r in right)
