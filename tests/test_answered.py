"""Which answers the original could have given, and the user's own prompts."""

import contextlib
import math
from functools import partial
from pathlib import Path

import pytest
import torch

from isingcut.data.conversations import read_prompts
from isingcut.data.generation import generate_rows, prompt_ids
from isingcut.evaluation import prompts
from isingcut.evaluation.answers import rate_answers
from isingcut.files.evaluations import Endings
from shared import (
    OPTIONS,
    InputError,
    ModelError,
    load_json,
    parametrize,
    refuses,
    write_jsonl,
)
from tiny import (
    Work,
    load_tiny,
    replay_of,
    streamed,
    tiny_checkpoint,
    tiny_model,
    tiny_tokenizer,
)

ENDS = [2, *range(40, 56)]
QUESTIONS = [f"question {i} of {i * i}" for i in range(20)]


def sharp(family="llama"):
    """Return a model that is sure of its answers and ends them."""
    model = tiny_model(family)
    model.generation_config.eos_token_id = ENDS
    with torch.no_grad():
        model.get_output_embeddings().weight *= 40
    return model


def likelihood(model, prompt, answer):
    """Return the mean log-likelihood of an answer and its end, from one plain pass."""
    said = answer[0] + answer[1]
    ids = torch.tensor([[*prompt, *said]])
    with torch.no_grad():
        logs = model(ids).logits[0].float().log_softmax(-1)
    first = len(prompt) - 1
    return sum(float(logs[first + t, i]) for t, i in enumerate(said)) / len(said)


def test_only_what_the_original_could_say_is_answered():
    model = sharp()
    ids = [prompt_ids(tiny_tokenizer(), text) for text in QUESTIONS]
    asked = [x[0].tolist() for x in ids]
    own = generate_rows(model, tiny_tokenizer(), ids, 24)
    ended = [bool(end) for _, end in own]
    assert 5 < sum(ended) < 20
    others = {
        "itself": own,
        "empty": [([], [2])] * 20,
        "polite": [([9, 8, 7, 6, 5], [2])] * 20,
        "looping": [(row[:8] * 3, [2]) for row, _ in own],
        "of another prompt": [own[i - 1] for i in range(20)],
        "not ended": [(row or [9], []) for row, _ in own],
    }
    for name, answers in others.items():
        rate = partial(rate_answers, replay_of(model), asked, own, answers)
        pairs = rate(Work(64))
        found = Endings(pairs=pairs)
        for k in (0, 7):
            expected = likelihood(model, asked[k], answers[k])
            assert pairs[k].after.likelihood == pytest.approx(expected, rel=1e-4)
        if name == "itself":
            assert found.answered("after") == found.answered("before") == ended
        else:
            assert sum(found.answered("after")) <= 2, name


@parametrize("likely, repeated, counts", [
    (-1.0 - math.log(2) + 1e-9, 0.2, True),
    (-1.0 - math.log(2) - 1e-9, 0.0, False),
    (-1.0, 0.21, False),
])  # fmt: skip
def test_a_half_of_the_likelihood_and_a_fifth_of_repetition_are_enough(
    likely, repeated, counts
):
    fair = {"tokens": 9, "ended": True, "repeated": 0.0, "likelihood": -1.0}
    other = {**fair, "likelihood": likely, "repeated": repeated}
    pair = {"before": fair, "after": other}
    old = {side: {**of, "likelihood": None} for side, of in pair.items()}
    found = Endings(pairs=[pair, old])
    assert found.answered("after") == [counts]
    assert found.answered("before") == [True]
    # An original that repeats itself sets the bound.
    worse = {"before": {**fair, "repeated": 0.3}, "after": other}
    assert (
        Endings(pairs=[pair, worse]).answered("after") == [counts or likely == -1] * 2
    )


def test_a_streamed_original_rates_as_one_in_memory_and_a_kill_loses_nothing(
    tmp_path, llama, spy
):
    asked = [[5, 6, 7], [8] * 20, [9]]
    answers = [([11, 12, 13], [2]), ([], [2]), ([30] * 12, [])]
    given = (asked, answers, answers[::-1])
    expected = rate_answers(load_tiny(llama).replay, *given, Work(16))
    work = Work(16, journal=tmp_path / "likelihoods.journal")
    found = rate_answers(streamed(llama), *given, work)
    for one, other in zip(expected, found, strict=True):
        assert one.after.likelihood == pytest.approx(other.after.likelihood, rel=1e-4)
    calls = spy(type(streamed(llama)), "record", lambda *_: 1)
    assert rate_answers(streamed(llama), *given, work) == found
    assert not calls


def test_a_killed_evaluation_keeps_the_finished_answers(tmp_path, monkeypatch, spy):
    monkeypatch.setattr(prompts, "NEW_TOKENS", 12)
    first, second = (
        load_tiny(tiny_checkpoint("llama", tmp_path / str(seed), seed=seed))
        for seed in (0, 1)
    )
    whole = prompts.compare_answers(first, second, Work(64))
    work = Work(64, journal=tmp_path / "evaluation.journal")
    calls = spy(prompts, "generate_rows", stop=6)
    for _ in range(2):
        with contextlib.suppress(KeyboardInterrupt):
            found = prompts.compare_answers(first, second, work)
    # What is finished is not written again.
    assert prompts.compare_answers(first, second, work) == found == whole
    assert len(calls) == 8


# the user's prompts -----------------------------------------------------------------------


def test_prompts_are_lines_or_conversations(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("What is it?\n\n  Why?  \n")
    user = {"role": "user", "content": "Why?"}
    assert read_prompts("a", text) == [[{**user, "content": "What is it?"}], [user]]
    system = {"role": "system", "content": "Be kind."}
    answer = {"role": "assistant", "content": "So."}
    file = write_jsonl(
        tmp_path / "a.jsonl",
        [
            {"messages": [system, user, answer]},
            {"messages": [user, answer, user]},
            {"text": "Why?"},
        ],
    )
    assert read_prompts("a", Path(file)) == [
        [system, user],
        [user, answer, user],
        [user],
    ]


@pytest.mark.usefixtures("no_speed")
def test_a_run_answers_the_users_prompts_first(llama, text, tmp_path, typed, refusal):
    file = tmp_path / "mine.txt"
    file.write_text("hello\nhi\n")
    out = tmp_path / "run"
    options = {**OPTIONS, "remove": 2, "prompts": file, "random_states": 0}
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in options.items()]
    typed("run", llama, "--calibration", text, "--out", out, *flags)

    def answers():
        return load_json(out / "evaluation.json").answers

    found = answers()
    assert found.own == 2
    assert [pair.prompt for pair in found.pairs[:2]] == ["hello", "hi"]
    page = (out / "report.md").read_text()
    assert page.index("```text\nhello") < page.index("```text\nhi")
    card = (out / "model/README.md").read_text()
    assert "**Chat.** answered: " in card
    # Further prompts replace nothing; others would.
    file.write_text("hello\nhi\nwhy\n")
    typed("evaluate", out, "--prompts", file)
    assert answers().own == 3
    file.write_text("hello\nwhy\n")
    assert "--overwrite" in refusal("evaluate", out, "--prompts", file)
    assert answers().own == 3
    # Without the option, those of the record stay, also when the file is gone.
    file.unlink()
    (out / "evaluation.json").unlink()
    typed("evaluate", out)
    assert answers().own == 3


def test_prompts_that_leave_no_room_are_refused(llama, monkeypatch):
    monkeypatch.setattr(prompts, "NEW_TOKENS", 8)
    loaded = load_tiny(llama)
    long = [{"role": "user", "content": "word " * 400}]
    with refuses(r"prompt 2 of --prompts has \d+ tokens; an answer takes", InputError):
        prompts.check_prompts(loaded, [[{"role": "user", "content": "hi"}], long])
    loaded.tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with refuses(r"refuses these messages \(.*no system", ModelError):
        prompts.check_prompts(loaded, [long])
