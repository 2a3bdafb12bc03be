"""Texts that cut states write: against the harness, a few prompts at a time, and a kill."""

import json

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from isingcut.console.progress import terminal
from isingcut.evaluation.answers import MICRO_BATCHES, Generations
from isingcut.evaluation.harness import Harness
from isingcut.evaluation.questions import prepare_task
from isingcut.evaluation.scores import Asked, score_states
from isingcut.ising.states import states_of
from isingcut.measure.work import Work
from isingcut.models.architectures import find_stack, skipped
from isingcut.models.load import load

REMOVED = [(), (1,), (0, 4)]
HOW = {"until": ["old"], "do_sample": False, "max_gen_toks": 12}
PROMPTS = ["the cat sat", "a mat", "stone " * 9, "old town rain " * 5, "rain", "a mat and a stone"]


@pytest.fixture(scope="module")
def model(shared):
    folder = shared.checkpoint(seed=3, max_position_embeddings=512)
    return Asked.whole(load(folder, dtype="float32", device="cpu"))


def requests():
    how = [{**HOW, "max_gen_toks": 12 + 4 * (i % 2)} for i in range(len(PROMPTS))]
    asked = zip(PROMPTS, how, strict=True)
    return [Instance("generate_until", {}, each, i) for i, each in enumerate(asked)]


def written(model, work, state=0):
    texts = Generations(model.replay, states_of(len(model.replay), REMOVED), work)
    stack = find_stack(model.loaded.model)

    def write(prompts, some):
        with skipped(model.loaded.model, stack, REMOVED[state]):
            return texts.of(state, prompts, some)

    return Harness(model.loaded, lambda rows: [], write).generate_until(requests())


def kill_after(goes, monkeypatch):
    """Once, after so many; returns how many texts each writes."""
    counts, generate = list[int](), HFLM._model_generate

    def killed(self, context, **rest):
        if len(counts) == goes:
            counts.append(0)
            raise KeyboardInterrupt
        counts.append(len(context))
        return generate(self, context, **rest)

    monkeypatch.setattr(HFLM, "_model_generate", killed)
    return counts


def gsm8k(folder, count):
    (folder / "gsm8k").mkdir(parents=True)
    for name, size in (("test", count), ("train", 8)):
        records = [
            {"context": f"What is {i} plus 1?", "solution": f"It is {i + 1}.", "answer": str(i + 1)}
            for i in range(size)
        ]
        lines = "".join(json.dumps(r) + "\n" for r in records)
        (folder / "gsm8k" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.mark.parametrize("state", range(len(REMOVED)))
def test_texts_are_the_harness_s(model, state):
    plain = HFLM(pretrained=model.loaded.model, tokenizer=model.loaded.tokenizer, batch_size=2)
    with skipped(model.loaded.model, find_stack(model.loaded.model), REMOVED[state]):
        expected = plain.generate_until(requests(), disable_tqdm=True)
    assert written(model, Work(16), state) == expected
    assert any(expected)


def test_prompts_of_one_go_fit_some_micro_batches(model, monkeypatch):
    went, generate = list[torch.Size](), HFLM._model_generate

    def seen(self, context, **rest):
        went.append(context.shape)
        return generate(self, context, **rest)

    monkeypatch.setattr(HFLM, "_model_generate", seen)
    written(model, Work(10))
    assert sum(count for count, _ in went) == len(PROMPTS)
    assert any(count > 1 for count, _ in went)
    # A prompt that is longer is written by itself.
    assert all(count == 1 or count * length <= MICRO_BATCHES * 10 for count, length in went)
    assert max(length for _, length in went) > MICRO_BATCHES * 10 / 2


def test_a_killed_run_goes_on_at_the_texts_that_are_left(model, tmp_path, monkeypatch):
    work = Work(10, journal=tmp_path / "texts.journal")
    whole = [written(model, Work(10), state) for state in (0, 1)]
    counts = kill_after(5, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        [written(model, work, state) for state in (0, 1)]
    assert [written(model, work, state) for state in (0, 1)] == whole
    assert sum(counts) == 2 * len(PROMPTS)


def test_how_far_the_writing_is_is_seen(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("isingcut.console.progress.QUIET_SECONDS", 0.0)
    task = prepare_task("gsm8k", gsm8k(tmp_path, 2))
    found = score_states(model, task, REMOVED[:2], Work(64, terminal))
    assert [s.metric for s in found] == ["exact_match,flexible-extract"] * 2
    said = capsys.readouterr().err.splitlines()
    assert all(line.startswith("gsm8k: ") for line in said)
    assert len(said) >= 4
