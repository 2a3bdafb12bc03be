"""Conversations in which only the assistant's tokens count, from the template to the losses."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch.autograd.functional import jacobian

from calibrating import calibrate, decoded, refused, sentences, write_texts
from isingcut.data import corpora
from isingcut.data.conversations import mark_answers, render_chat, row_of
from isingcut.data.healing_text import to_fit
from isingcut.data.mixture import Part, describe_source, parts_of, places_in
from isingcut.data.tokens import Encoder, pieces
from isingcut.energies.empirical_fisher import EmpiricalFisher
from isingcut.evaluation.quality import quality
from isingcut.healing.job import keep_beginnings
from isingcut.healing.training.batches import batch_of
from isingcut.healing.training.student import install, split_head
from isingcut.measure.streams import one_pass
from isingcut.measure.work import identity
from isingcut.runs import pipeline
from shared import (
    OPTIONS,
    CalibrationError,
    ModelError,
    RunConfig,
    load_json,
    parametrize,
    refuses,
    write_jsonl,
)
from sweep.gates import gated_loss
from tiny import (
    Calibration,
    Hamiltonian,
    TextSampler,
    TokenSet,
    Work,
    in_memory,
    measure,
    plain_means,
    replay_of,
    states_of,
    streamed,
    tiny_checkpoint,
    tiny_model,
    tiny_tokenizer,
    without,
)


def talk(*contents):
    """Return messages of a user and an assistant in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def chat_file(path, count=60):
    return write_jsonl(
        path,
        [
            {"messages": talk(f"({i})?", f"yes{i}", "why?", f"no{i} ")}
            for i in range(count)
        ],
    )


def counted_text(tokenizer, tokens):
    assert tokens.counted is not None
    pairs = zip(tokens.input_ids, tokens.counted, strict=True)
    return [tokenizer.decode(ids[counts]) for ids, counts in pairs]


# what counts ----------------------------------------------------------------------------

# Like Qwen3's: earlier turns lose their reasoning, the last one always has a part for it.
DROPS_REASONING = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and loop.last %}"
    "<think>{{ m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content }}"
    "</think>{{ m.content.split('</think>')[-1].strip() }}"
    "{% else %}{{ m.content.split('</think>')[-1] | trim }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)
# Like Phi's: the text as a whole ends with a token of its own.
ENDS_ITSELF = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}<s>{% endif %}"
)


@parametrize(
    "template, messages, expected",
    [
        (None, talk("hi", "yes", "why", "no "), "yes</s>no </s>"),
        (None, talk("hi", "yes", "yes"), "yes</s>"),
        (None, talk("yes</s>", "yes", "q", " "), "yes</s>"),
        (
            None,
            [{"role": "assistant", "content": "hello"}, *talk("hi", "a")],
            "hello</s>a</s>",
        ),
        (None, talk("hi", "<think>so</think> yes"), "<think>so</think> yes</s>"),
        (DROPS_REASONING, talk("hi", "yes\n", "why", "no"), "yes</s>no</s>"),
        (
            DROPS_REASONING,
            talk("hi", "<think>a</think>\nyes", "why", "<think>b</think>no"),
            "yes</s>no</s>",
        ),
        (ENDS_ITSELF, talk("hi", "yes", "why", " no"), "yes</s>no</s><s>"),
        (ENDS_ITSELF, talk("hi", "yes", "why"), "yes</s>"),
    ],
)
def test_the_assistants_words_and_the_end_of_its_turns_count(
    template, messages, expected
):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    found = mark_answers(messages, partial(render_chat, tokenizer))
    assert found == tokenizer.apply_chat_template(messages, tokenize=False)
    tokens = TokenSet.from_rows([row_of(Encoder(tokenizer), found, 200)])
    assert decoded(tokenizer, tokens) == [found]
    assert counted_text(tokenizer, tokens) == [expected]
    assert tokens.tokens == len(tokenizer(expected).input_ids)


def test_a_token_over_the_edge_counts_where_an_answer_begins():
    """The tokenizer joins a word and the space before it, like those of many models."""
    words = ["user", "bot", " a", " b", ":", "\n", "\n\n"]

    def encode(text, most=None):
        return [words.index(w) for w in re.findall(r" ?\w+|:|\n+", text)]

    def render(messages):
        names = {"user": "\nuser", "assistant": "bot"}
        return "".join(f"{names[m['role']]}: {m['content']}\n" for m in messages)

    found = mark_answers(talk("a", "b", "a"), render)
    assert found == "\nuser: a\nbot: b\n\nuser: a\n"
    # The line break after the answer is one token with the next line break.
    assert [words[i] for i in row_of(encode, found, 100) if i >= 0] == [" b"]


def test_a_truncated_conversation_is_the_beginning_of_the_whole():
    tokenizer = tiny_tokenizer()
    messages = talk(*["a question", "yes"] * 20)
    found = mark_answers(messages, partial(render_chat, tokenizer))
    whole, part = (row_of(Encoder(tokenizer), found, most) for most in (1000, 60))
    assert part == whole[:60]


def test_answers_that_cannot_be_located_are_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    source = f"answers:{chat_file(tmp_path / 'chat.jsonl')}"
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content | replace('yes', 'y') }}{% endfor %}"
    )
    refused(
        source,
        tokenizer,
        r"chat\.jsonl line \d+: .* changes an assistant message, .*answers",
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    with refuses("a tool call or an image", ModelError):
        mark_answers([*talk("hi"), call], lambda messages: "")
    far = lambda text, most=None: [len(text)] * len(text)  # noqa: E731
    whole = mark_answers(
        talk("hi, hi, hi", "yes", "no"), lambda ms: "".join(m["content"] for m in ms)
    )
    with refuses("splits a truncated conversation differently", CalibrationError):
        row_of(far, whole, 100)


@parametrize("place", ["wiki", "python", "self"])
def test_a_named_text_has_no_answers(place):
    for source in (f"answers:{place}", f"wiki=1,answers:{place}=1"):
        with refuses(f"{place} has no conversations", CalibrationError):
            corpora.check(source)


def test_documents_and_running_text_have_no_answers(tmp_path, tokenizer):
    text = write_texts(tmp_path / "a.jsonl", sentences(40))
    (tmp_path / "a.txt").write_text("some text")
    for place in (text, tmp_path / "a.txt"):
        refused(f"answers:{place}", tokenizer, "has no conversations")


def test_a_source_with_answers_is_named_without_its_folder(tmp_path, monkeypatch):
    file = chat_file(tmp_path / "chat.jsonl")
    assert parts_of(f"wiki=1,answers:{file}=1")[1] == Part(
        f"answers:{file}", "answers:chat.jsonl", 0.5
    )
    assert describe_source(f"answers:{file}") == "answers:chat.jsonl"
    gone = f"{tmp_path}/gone/a.txt"
    assert (
        describe_source(gone) == describe_source(f"{tmp_path}/a=b,c/a.txt") == "a.txt"
    )
    assert (
        describe_source(f"{gone}=1,{tmp_path}/other/a.txt=1") == "50% a.txt, 50% a.txt"
    )
    assert describe_source("owner/name/configuration") == "owner/name/configuration"
    assert places_in(f"wiki=1,answers:{file}=1") == ["wiki", file]
    assert places_in("answers:-") == ["-"]
    monkeypatch.chdir(tmp_path)
    Path("answers:a.txt").write_text("a")
    assert places_in("answers:a.txt") == ["answers:a.txt"]


# token sets -----------------------------------------------------------------------------


def test_splits_keep_what_counts_on_disk_and_in_their_identity(
    llama, tmp_path, tokenizer
):
    file = chat_file(tmp_path / "chat.jsonl")
    plain, found = (
        calibrate(f"{word}{file}", tokenizer, length=40) for word in ("", "answers:")
    )
    for name, tokens in found.splits.items():
        assert torch.equal(tokens.input_ids, plain.splits[name].input_ids)
        for text in counted_text(tokenizer, tokens):
            assert re.fullmatch(r"yes(\d+)</s>no\1 </s>", text)
    assert found.sha256 != plain.sha256
    replay = in_memory(llama)
    one, other = (c.splits["energy"] for c in (plain, found))
    assert identity(replay, one) != identity(replay, other)

    found.save(tmp_path / "a.safetensors")
    again = Calibration.load(tmp_path / "a.safetensors")
    assert again.sha256 == found.sha256
    assert [t.tokens for t in again.splits.values()] == [
        t.tokens for t in found.splits.values()
    ]


def test_a_conversation_is_whole_or_ends_where_an_answer_ends(
    tmp_path, tokenizer, capfd, monkeypatch
):
    question = "a long question " * 3
    long = [{"messages": talk(f"{question}{i}", "yes")} for i in range(30)]
    file = write_jsonl(tmp_path / "chat.jsonl", long)
    # Longer than the samples of running text.
    used = calibrate(f"answers:{file}", tokenizer)
    assert used.splits["energy"].mask.sum(1).min() > 3 * 16
    monkeypatch.setattr("isingcut.data.calibration.WHOLE", 60)
    turns = [*talk("{}", "sure"), *talk(question, "yes")]
    both = [
        {"messages": [{**m, "content": m["content"].format(i)} for m in turns]}
        for i in range(60)
    ]
    found = calibrate(f"answers:{write_jsonl(tmp_path / 'a.jsonl', both)}", tokenizer)
    for row in found.splits["energy"].rows:
        assert tokenizer.decode(row[-5:]) == "sure</s>"
    assert not capfd.readouterr().err
    monkeypatch.setattr("isingcut.data.calibration.WHOLE", 16)
    words = (
        "30 conversations are longer than 16 tokens, and their answers end later; "
        "raise --length"
    )
    refused(f"answers:{file}", tokenizer, f"too short.*gives 0 .*needed; {words}$")
    file = write_jsonl(tmp_path / "both.jsonl", [*long, *both])
    calibrate(f"answers:{file}", tokenizer)
    words = words.replace("30", r"\d+")
    assert re.fullmatch(f"isingcut: .*: {words} to use them\n", capfd.readouterr().err)


def test_shares_are_of_the_tokens_that_count(tmp_path, tokenizer):
    file = chat_file(tmp_path / "chat.jsonl", 200)
    text = write_texts(tmp_path / "a.jsonl", (f"river{i}. " * 4 for i in range(200)))
    source = f"{text}=1,answers:{file}=1"
    used = calibrate(source, tokenizer, samples=60, length=40)
    split = used.splits["energy"]
    by_part = {
        name: split.select(rows).tokens for name, rows in split.rows_by_part.items()
    }
    assert by_part["answers:chat.jsonl"] / split.tokens == pytest.approx(0.5, abs=0.05)
    # A patch counts the same words.
    fitted, _ = to_fit(used, TextSampler(tokenizer, 0, 0), 4000)
    assert set(counted_text(tokenizer, fitted)[:60]) == set(
        counted_text(tokenizer, split)
    )


def test_pieces_and_beginnings_hold_something_that_counts(tokenizer):
    encode = Encoder(tokenizer)
    asked = [~i for i in encode("q" * 300)]
    tokens = TokenSet.from_rows(
        [asked + encode("a" * 50), encode("b" * 300)], parts=["x", "y"]
    )
    cut = pieces(tokens, 100)
    assert [tokenizer.decode(ids) for ids in cut.input_ids[:1]] == [
        "qqq" + "a" * 50 + "<pad>" * 47
    ]
    assert cut.parts == ("x", "y", "y", "y")
    few = keep_beginnings(tokens)
    assert few.predicted.sum(1).tolist() == [50, 255]
    assert few.parts == tokens.parts


# losses ---------------------------------------------------------------------------------


def some_answers():
    rng = np.random.default_rng(0)
    rows = [rng.integers(8, 200, k).tolist() for k in (14, 9, 12)]
    for row, spans in zip(rows, [[(3, 6), (10, 14)], [(5, 9)], [(0, 12)]], strict=True):
        for t in range(len(row)):
            if not any(a <= t < b for a, b in spans):
                row[t] = ~row[t]
    return TokenSet.from_rows(rows)


@parametrize("family", ["llama", "gemma2"])
def test_losses_are_those_of_the_answers_in_their_context(family, tmp_path):
    """Gemma 2 caps its logits, so they are computed sample by sample."""
    folder = tiny_checkpoint(family, tmp_path / "model")
    tokens = some_answers()
    replay = in_memory(folder)
    removed = [1, 3]
    cut = without(replay.model, removed)
    kl, nll = plain_means(replay.model, cut, tokens)
    states = states_of(len(replay), [removed])
    for model in (replay, streamed(folder)):
        found = measure(model, tokens, states, work=Work(30))
        assert found.kl[0] == pytest.approx(kl, rel=1e-4)
        assert found.nll[0] == pytest.approx(nll, rel=1e-4)
        assert found.counts.tolist() == [7, 4, 11]
    after = quality(replay.model, cut, tokens, Work(30))
    assert after.kl == pytest.approx(kl, rel=1e-4)
    assert after.after.nll == pytest.approx(nll, rel=1e-4)


def test_gradients_are_of_the_answers(llama):
    """The paper's energy is x A^T A x / m, with A the gradients of each sample's mean loss."""
    tokens = some_answers()
    replay = in_memory(llama)
    found = EmpiricalFisher(gate="block").measure(replay, tokens, Work())
    ones = torch.ones(len(replay))
    losses = [
        partial(gated_loss, replay, tokens.select([s]), ())
        for s in range(tokens.samples)
    ]
    a = np.array([jacobian(loss, ones).double().numpy() for loss in losses])
    states = states_of(len(replay), [(0,), (1, 3), (0, 2, 4)])
    expected = ((states @ a.T) ** 2).sum(1) / len(a)
    assert_allclose(found.energies(states), expected, rtol=1e-3)


def test_activations_are_compared_where_answers_are_predicted():
    replay = replay_of(tiny_model("llama"))
    alone = TokenSet.from_rows([[~1, ~2, 9, ~0, ~4]])
    whole = TokenSet.from_rows([[1, 2]])
    # Position 1 predicts the only counted token, and does not depend on the tokens after it.
    influence, angles = one_pass(replay, alone, Work())
    assert_allclose(angles, one_pass(replay, whole, Work())[1], rtol=1e-3, atol=1e-6)
    both = one_pass(replay, TokenSet.from_rows([[1]]), Work())[0]
    assert_allclose((both + influence) / 2, one_pass(replay, whole, Work())[0], 1e-3)


@parametrize("family, parts", [("llama", True), ("gemma2", False)])
def test_healing_learns_the_answers_in_their_context(family, parts):
    teacher = tiny_model(family)
    student = tiny_model(family, seed=1)
    assert (split_head(student) is not None) == parts
    tokens = some_answers()
    kl, _ = plain_means(teacher, student, tokens)
    install(student, student, teacher)
    batch = batch_of(tokens, range(3))
    assert int((batch.pop("labels") != -100).sum()) == tokens.tokens == 22
    with torch.no_grad():
        found = student(**batch)["loss"]
    assert float(found) == pytest.approx(22 * kl, rel=1e-4)


# a run ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_speed")
def test_a_run_counts_answers_from_the_search_to_the_healing(llama, tmp_path):
    chat = chat_file(tmp_path / "chat.jsonl")
    text = write_texts(tmp_path / "a.jsonl", sentences(200))
    trainer = {"per_device_train_batch_size": 2, "max_steps": 2}
    config = RunConfig(
        model=llama,
        out=tmp_path / "run",
        calibration=f"{text}=1,answers:{chat}=1",
        healing={"length": 40, "report-samples": 4, "trainer": trainer},
        remove="2",
        effort="6",
        heal=True,
        keep="0",
        **{**OPTIONS, "length": 40, "rank_samples": 4, "report_samples": 6},
    )
    run = pipeline.run(config)
    used = Calibration.load(run / "calibration.safetensors")
    report = used.splits["report"]
    found = load_json(run / "evaluation.json")
    assert found.tokens == report.tokens < int(report.mask[:, 1:].sum())
    assert set(found.parts) == {"a.jsonl", "answers:chat.jsonl"}
    for way in ("cut", "patched"):
        assert set(found[way].parts) == set(found.parts)
    energy = Hamiltonian.load(run / "hamiltonian.safetensors")
    assert energy.meta["tokens"] == used.splits["energy"].tokens
    healed = load_json(run / "healed/healing.json").after.parts
    assert set(healed) == set(found.parts)
    ranked = load_json(run / "candidates.json")
    rank = used.splits["rank"]
    counts = {k: rank.select(own).tokens for k, own in rank.rows_by_part.items()}
    for row in (*ranked.candidates, ranked.chosen):
        sums = [counts[k] * part["kl"] for k, part in row["parts"].items()]
        assert sum(sums) / rank.tokens == pytest.approx(row["kl"])
    kl = healed["answers:chat.jsonl"].kl
    for name, line in {
        "model": r"By part of that text: [\d.]+ ± [\d.]+ on a\.jsonl, .* on answers:chat",
        "healed": rf"\| answers:chat\.jsonl: KL to the original, .*{kl:.4f} ± .* \|\n",
    }.items():
        card = (run / name / "README.md").read_text()
        assert re.search(line, card)
        assert str(tmp_path) not in card
