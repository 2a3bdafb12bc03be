"""The text `chat`: what a model writes itself, from the cache and without weights."""

from itertools import islice
from unittest.mock import Mock

import pytest

import isingcut
from calibrating import write_texts
from isingcut.data import chat, generation
from isingcut.data.chat import ChatWriter
from isingcut.data.generation import Sampling, generate_rows, prompt_ids
from isingcut.errors import CalibrationError
from shared import load_json, refuses
from tiny import tiny_checkpoint, tiny_model, tiny_tokenizer

SEVERAL = [2, *range(40, 56)]
"""With so many end tokens, a model with random weights ends most of its answers."""
TEMPLATES = {
    "system": "{{ '<|system|>be kind</s>' }}",
    "none": "",
    "reasoning": "{{ '<|system|>think</s>' if enable_thinking is not defined else '' }}",
    "tools": "{{ '<|system|>' ~ tools | tojson ~ '</s>' if tools else '' }}",
}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(chat, "ANSWER", 48)
    monkeypatch.setattr(chat, "QUESTION", 24)
    monkeypatch.setattr(chat, "_CHARACTERS", 60)
    monkeypatch.setattr(generation, "_STEP", 8)


def ending_model(family="llama", **changes):
    model = tiny_model(family, **changes)
    model.generation_config.eos_token_id = SEVERAL
    return model


def writer(model, cache=None, tokenizer=None):
    return ChatWriter(model, tokenizer or tiny_tokenizer(), lambda: "w", cache)


def test_conversations_are_kept_and_read_without_weights(tmp_path, monkeypatch):
    model = ending_model()
    whole = [*islice(writer(model)(0, 1.0), 60)]
    first = writer(model, tmp_path)
    assert [*islice(first(0, 1.0), 10)] == whole[:10]
    # Killed in the second batch.
    with monkeypatch.context() as patch:
        patch.setattr(ChatWriter, "_sample", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            _ = [*islice(first(0, 1.0), 60)]
    again = writer(model, tmp_path)
    assert [*islice(again(0, 1.0), 60)] == whole
    assert [*islice(again(1, 1.0), 9)] != whole[:9]
    bare = writer(model.to("meta"), tmp_path)
    assert [*islice(bare(0, 1.0), 40)] == whole[:40]
    with refuses("streamed model.*--stream off", CalibrationError):
        _ = [*islice(bare(0, 1.0), 200)]


@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_a_sampled_row_does_not_depend_on_its_batch(family):
    model = ending_model(family)
    tokenizer = tiny_tokenizer()
    ids = [prompt_ids(tokenizer, text) for text in ("hi", "a longer prompt", "x", "yy")]
    names = ["a", "b", "c", "d"]
    together = generate_rows(model, tokenizer, ids, 40, Sampling(names, 0.7))
    for x, name, found in zip(ids, names, together, strict=True):
        assert generate_rows(model, tokenizer, [x], 40, Sampling([name], 0.7)) == [
            found
        ]
    assert len({len(row) for row, _ in together}) > 1


@pytest.mark.parametrize("head", TEMPLATES.values(), ids=TEMPLATES)
def test_a_conversation_ends_with_the_end_of_its_turn(tmp_path, head):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = head + tokenizer.chat_template
    written = writer(ending_model(max_position_embeddings=512), None, tokenizer)
    sampler = isingcut.data.calibration.TextSampler(tokenizer, 16, 0, chat=written)
    built = isingcut.data.calibration.build(
        "chat", sampler, samples=8, rank_samples=2, report_samples=2
    )
    for tokens in built.splits.values():
        for row in tokens.rows:
            assert tokenizer.decode(row).endswith("</s>")
            assert tokenizer.decode(row).count("<|assistant|>") == 1
    counted = isingcut.data.calibration.build(
        "answers:chat", sampler, samples=8, rank_samples=2, report_samples=2
    )
    assert counted.splits["energy"].tokens < built.splits["energy"].tokens


def test_a_model_that_does_not_end_or_has_no_template_is_refused(monkeypatch):
    monkeypatch.setattr(chat, "ANSWER", 2)
    with refuses(r"ended only \d+ of 128 .*choose another text", CalibrationError):
        next(writer(tiny_model("llama"))(0, 1.0))
    bare = tiny_tokenizer()
    bare.chat_template = None
    with refuses("needs a model with a chat template", CalibrationError):
        next(writer(ending_model(), None, bare)(0, 1.0))


@pytest.mark.filterwarnings("ignore::isingcut.PoorEnergyWarning")
def test_a_run_is_chosen_patched_and_healed_on_its_own_chat(tmp_path):
    folder = tiny_checkpoint("llama", tmp_path / "model", max_position_embeddings=256)
    ending_model(max_position_embeddings=256).save_pretrained(folder)
    text = write_texts(tmp_path / "a.jsonl", (f"river{i}. " * 9 for i in range(300)))
    out = isingcut.run(
        model=str(folder),
        remove=2,
        out=str(tmp_path / "run"),
        calibration=f"{text}=0.5,chat=0.5",
        samples=8,
        length=32,
        rank_samples=4,
        report_samples=4,
        random_states=0,
        patch_tokens=1024,
        heal="2000tokens",
        tasks="",
    )
    parts = load_json(out / "run.json").provenance.calibration.splits["energy"].parts
    assert parts["chat"].tokens > 0
    assert load_json(out / "healed/healing.json").tokens_seen > 1000
