"""Answers of many states at once: against the harness, models asked one by one, and a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isingcut.console.progress import Part
from isingcut.evaluation.likelihoods import Answers, Row, answer_scores
from isingcut.evaluation.questions import prepare_task
from isingcut.evaluation.scores import Asked, score, score_states
from isingcut.ising.states import states_of
from isingcut.measure.work import Work
from isingcut.models import replay as replays
from isingcut.models.cutting.checkpoint import excise
from isingcut.models.load import load
from shared import Shared

WORDS = ("stone", "rain", "old town", "a mat", "the cat sat")
REMOVED = [(), (1,), (1, 3), (0, 4), (1, 3)]


@pytest.fixture(scope="module")
def model(shared: Shared) -> Asked:
    folder = shared.checkpoint(seed=3, max_position_embeddings=512)
    return Asked.whole(load(folder, dtype="float32", device="cpu"))


def some_rows() -> list[Row]:
    rng = np.random.default_rng(0)
    rows = []
    for before, after in [(30, 2), (30, 1), (9, 4), (22, 6), (25, 1), (1, 3)]:
        context = rng.integers(0, 40, before).tolist()
        # Some end with token 0, the padding's.
        answers = [rng.integers(0, 40, after).tolist(), [*rng.integers(0, 40, after).tolist(), 0]]
        answers += [[7] * after, [0, 0, 0]]
        rows += [((*context, *answer), len(answer)) for answer in answers]
    return rows


def test_likelihoods_are_the_harness_s(model: Asked) -> None:
    from lm_eval.models.huggingface import HFLM

    from isingcut.evaluation.harness import Harness

    loaded, rows = model.loaded, some_rows()
    # Longer than the model reads: both cut it on the left.
    rows.append((tuple(int(i) for i in np.random.default_rng(1).integers(0, 40, 700)), 3))
    requests = [(("", str(i)), list(ids[:-k]), list(ids[-k:])) for i, (ids, k) in enumerate(rows)]
    plain = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=4)
    answers = Answers(model.replay, states_of(len(model.replay), [()]), Work(128))
    ours = Harness(loaded, lambda asked: answers.of(0, asked))
    expected = plain._loglikelihood_tokens(requests, disable_tqdm=True)
    found = ours._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [best for _, best in found] == [best for _, best in expected]
    np.testing.assert_allclose([v for v, _ in found], [v for v, _ in expected], rtol=1e-5)


def test_answers_of_all_states_at_once_are_those_of_each_checkpoint(
    model: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.jsonl"
    questions = [
        {
            "context": f"{WORDS[k % 5]} {k}?",
            "choices": [*WORDS[k % 3 : k % 3 + 3]],
            "answer": k % 3,
        }
        for k in range(20)
    ]
    # Letters are one token each: their question runs once for all of them.
    questions += [
        {"context": f"{k} is", "choices": ["a", "b", "c"], "answer": k % 3} for k in range(10)
    ]
    path.write_text("".join(json.dumps(q) + "\n" for q in questions), encoding="utf-8")
    task = prepare_task(str(path), None)
    ran: list[int] = []
    block = replays.Recording.block

    def counted(self: Any, i: int, hidden: torch.Tensor) -> torch.Tensor:
        ran.append(hidden.shape[0])
        return block(self, i, hidden)

    monkeypatch.setattr(replays.Recording, "block", counted)
    found = score_states(model, task, REMOVED, Work(256))
    # Two states are the same, and the questions by letters run once: 20 of 3 answers, and 10.
    assert sum(ran) == (6 + 4 + 2 + 4) * 70
    monkeypatch.undo()
    for scores, blocks in zip(found, REMOVED, strict=True):
        one = model
        if blocks:
            cut = tmp_path / "-".join(map(str, blocks))
            if not cut.exists():
                excise(model.loaded.folder, blocks, cut)
            one = Asked.whole(load(cut, dtype="float32", device="cpu"))
        alone = score(one, task)
        assert scores.values.tolist() == alone.values.tolist()
        assert (scores.metric, scores.questions) == (alone.metric, alone.questions)
    assert len({tuple(s.values) for s in found}) > 1


def test_a_killed_measurement_goes_on(
    model: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, states = some_rows(), states_of(len(model.replay), REMOVED)
    whole = answer_scores(model.replay, rows, states, Work(64))
    work, record = Work(64, journal=tmp_path / "answers.journal"), replays.Replay.record
    batches: list[int] = []

    def killed(self: Any, ids: torch.Tensor) -> Any:
        batches.append(len(ids))
        if len(batches) == 4:
            raise KeyboardInterrupt
        return record(self, ids)

    monkeypatch.setattr(replays.Replay, "record", killed)
    with pytest.raises(KeyboardInterrupt):
        answer_scores(model.replay, rows, states, work)
    again = answer_scores(model.replay, rows, states, work)
    # What was finished before the kill ran once.
    assert sum(batches) - batches[3] == len({ids[:-1] for ids, _ in rows})
    for found, expected in zip(again, whole, strict=True):
        assert np.array_equal(found, expected)


def test_a_part_counts_its_share_of_a_bar() -> None:
    class Bar:
        def __init__(self) -> None:
            self.done, self.notes = 0.0, list[str]()

        def advance(self, steps: float = 1, note: str = "") -> None:
            self.done += steps
            self.notes.append(note)

    bar = Bar()
    part = Part(bar, 4)
    with part("first", 8) as inner:
        inner.advance(2)
    assert bar.done == 1
    # What is left is parted anew.
    with part("second", 2) as inner:
        inner.advance(1)
        assert bar.done == 2.5
        inner.advance(5)
    assert bar.done == 4
    part.finish("done")
    assert (bar.done, bar.notes) == (4, ["first", "second", "second", "done"])
