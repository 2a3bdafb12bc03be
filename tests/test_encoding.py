"""Chats through their template and texts in pieces: the tokens that the tokenizer itself gives."""

import copy
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrating import SIZES, chats, decoded, refused, sentences, write_jsonl
from isingcut.data import text_files
from isingcut.data import tokens as encoder
from isingcut.data.calibration import build
from isingcut.data.conversations import render_chat
from isingcut.data.tokens import Encoder
from isingcut.errors import CalibrationError, ModelError
from isingcut.testing.tiny import tiny_model, tiny_tokenizer

# chats --------------------------------------------------------------------------------


def test_each_conversation_is_one_sample_through_the_template(tmp_path, tokenizer):
    records = chats(12)
    found = build(write_jsonl(tmp_path / "a.jsonl", records), tokenizer, **SIZES)
    rendered = {
        tokenizer.decode(
            tokenizer(
                tokenizer.apply_chat_template(r["messages"], tokenize=False),
                add_special_tokens=False,
            ).input_ids[:16]
        )
        for r in records
    }
    texts = [t for s in found.splits.values() for t in decoded(tokenizer, s)]
    assert len(texts) == len(set(texts)) == 10
    assert set(texts) <= rendered
    assert any(not bool(s.mask.all()) for s in found.splits.values())


def test_conversations_equal_within_the_kept_length_count_once(tmp_path, tokenizer):
    start = "the same long beginning "
    records = [{"messages": [{"role": "user", "content": start + str(i)}]} for i in range(30)]
    message = refused(write_jsonl(tmp_path / "a.jsonl", records), tokenizer, "too short")
    assert "were asked for, found 1;" in message


def test_messages_need_a_chat_template(tmp_path):
    bare = tiny_tokenizer()
    bare.chat_template = None
    refused(write_jsonl(tmp_path / "a.jsonl", chats(12)), bare, "no chat template")


def test_what_a_template_refuses_is_one_line():
    own = tiny_tokenizer()
    own.chat_template = "{{ messages[1].content }}{{ raise_exception('roles\nalternate') }}"
    with pytest.raises(ModelError, match=r"refuses these messages \(.*\)$") as caught:
        render_chat(own, [{"role": "user", "content": "a"}])
    assert "\n" not in str(caught.value)
    own.chat_template = "{{ messages[0].content }}{{ add_generation_prompt }}"
    found = render_chat(own, [{"role": "user", "content": "a"}], add_generation_prompt=True)
    assert found == "aTrue"


# pieces -------------------------------------------------------------------------------


def test_long_texts_are_cut_at_white_space_and_lose_nothing(tokenizer, monkeypatch):
    text = "".join(sentences(40)) + "x" * 500
    whole = Encoder(tokenizer)(text)
    monkeypatch.setattr(encoder, "LONGEST", 100)
    monkeypatch.setattr(encoder, "_NEAR", 30)
    pieces = list(encoder.split_text(text))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 100
    assert all(p[0] == " " or "x" in p for p in pieces[1:])
    assert Encoder(tokenizer)(text) == whole
    assert Encoder(tokenizer)(text, 150) == whole[:150]
    assert list(encoder.split_text("")) == [""]
    assert list(encoder.split_text(text[:100])) == [text[:100]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(alphabet="ab \n\r\u00e9", max_size=40), max_size=30),
    st.integers(1, 60),
    st.integers(50, 90),
)
def test_a_text_comes_in_whole_lines_and_loses_nothing(parts, piece, longest):
    """Lines within the bound come as `readlines` gives them, longer ones in bounded pieces."""
    text = "".join(parts)
    with (
        tempfile.TemporaryDirectory() as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        path = Path(folder) / "a.txt"
        path.write_text(text, encoding="utf-8", newline="")
        patch.setattr(text_files, "_PIECE", piece)
        patch.setattr(text_files, "LONGEST", longest)
        found = list(text_files.text_file(path, "a.txt").pieces())
        expected = []
        with path.open(encoding="utf-8", newline="") as file:
            while lines := file.readlines(piece):
                expected.append("".join(lines))
    assert "".join(found) == text
    if all(len(line) < longest for line in text.splitlines(keepends=True)):
        assert found == expected
    else:
        assert max(map(len, found)) <= piece + 2 * longest


def test_only_as_much_is_read_as_the_samples_need(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "a.txt").write_text("".join(sentences(40)) * 20 + "\0", encoding="utf-8")
    monkeypatch.setattr(text_files, "LONGEST", 1000)
    monkeypatch.setattr(text_files, "_PIECE", 1000)
    build(str(tmp_path / "a.txt"), tokenizer, **SIZES)
    with pytest.raises(CalibrationError, match="NUL"):
        build(str(tmp_path / "a.txt"), tokenizer, **{**SIZES, "samples": 10**4})


def test_a_padding_token_beyond_the_embedding_pads_with_another(tokenizer):
    model = tiny_model("llama")
    assert Encoder(tokenizer, model).pad == tokenizer.pad_token_id
    wider = copy.deepcopy(tokenizer)
    wider.add_special_tokens({"pad_token": "<filling>"})
    assert wider.pad_token_id == 262
    assert Encoder(wider, model).pad == 0
    assert Encoder(wider).pad == 262
    with pytest.raises(CalibrationError, match=r"'<filling>' with number 262, but .* 262 rows"):
        Encoder(wider, model)("a <filling>")
    model.resize_token_embeddings(263)
    assert 262 in Encoder(wider, model)("a <filling>")
