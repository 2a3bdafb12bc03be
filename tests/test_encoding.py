"""Chats through their template and texts in pieces: the tokens that the tokenizer itself gives."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrating import SIZES, chats, decoded, refused, sentences, write_jsonl
from isingcut.data import encoder, text_files
from isingcut.data.calibration import build
from isingcut.data.chat_templates import Renderer
from isingcut.data.encoder import Encoder
from isingcut.errors import CalibrationError, ModelError
from isingcut.testing.tiny import tiny_model, tiny_tokenizer

# chats --------------------------------------------------------------------------------


def test_each_conversation_is_one_sample_through_the_template(
    tmp_path: Path, tokenizer: Any
) -> None:
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


def test_conversations_equal_within_the_kept_length_count_once(
    tmp_path: Path, tokenizer: Any
) -> None:
    start = "the same long beginning "
    records = [{"messages": [{"role": "user", "content": start + str(i)}]} for i in range(30)]
    message = refused(write_jsonl(tmp_path / "a.jsonl", records), tokenizer, "too short")
    assert "need 10 different conversations of up to 16 tokens, found 1 (16 tokens)" in message


def test_messages_need_a_chat_template(tmp_path: Path) -> None:
    bare: Any = tiny_tokenizer()
    bare.chat_template = None
    refused(write_jsonl(tmp_path / "a.jsonl", chats(12)), bare, "no chat template")


def test_a_template_that_refuses_says_where(tmp_path: Path) -> None:
    strict: Any = tiny_tokenizer()
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    refused(
        write_jsonl(tmp_path / "a.jsonl", chats(12)), strict, r"line \d+: .*roles must alternate"
    )


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ bos_token }}{% for m in messages %}{{ m.role | upper }}{{ loop.index }}"
        "{% generation %}{{ m.content | trim }}{% endgeneration %}{% endfor %}",
        "{% for m in messages if m.content is string %}{{ m | tojson }}{% break %}{% endfor %}",
        "{{ messages | length }}{{ strftime_now('%Y')[:2] }}{{ tools }}{{ add_generation_prompt }}",
    ],
)
def test_the_renderer_is_the_tokenizers_own_method(template: str | None) -> None:
    """Whatever a template uses of transformers' environment; values beyond JSON included."""
    own: Any = tiny_tokenizer()
    own.chat_template = template or own.chat_template
    with Renderer(own) as render:
        for content in ("plain", " \u00e9\U0001f600 ", "</s>", None):
            messages = [
                {"role": "user", "content": content, "when": datetime(2024, 1, 2)},
                {"role": "assistant", "content": "y", "tool_calls": [{"a": (1, 2.5, True)}]},
            ]
            for options in ({}, {"add_generation_prompt": True}):
                try:
                    expected = own.apply_chat_template(messages, tokenize=False, **options)
                except jinja2.TemplateError as e:
                    with pytest.raises(ModelError, match=re.escape(str(e))):
                        render(messages, **options)
                else:
                    assert render(messages, **options) == expected


def test_one_process_renders_a_whole_corpus_and_ends_with_it(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    popen = subprocess.Popen
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: made.append(popen(*a, **k)) or made[-1])
    build(write_jsonl(tmp_path / "a.jsonl", chats(40)), tokenizer, **SIZES)
    assert len(made) == 1
    assert made[0].returncode is not None


def test_the_process_that_renders_loads_no_torch() -> None:
    code = (
        "import sys, isingcut.data.chat_child, transformers.tokenization_utils_base as t;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_tokenizer_class_with_a_method_of_its_own_is_called() -> None:
    class Own(type(tiny_tokenizer())):  # type: ignore[misc]
        def apply_chat_template(self, messages: Any, **_: Any) -> str:
            if len(messages) > 1:
                raise ZeroDivisionError("too many")
            return "mine"

    own = tiny_tokenizer()
    own.__class__ = Own
    with Renderer(own) as render:
        assert render([{"role": "user", "content": "a"}]) == "mine"
        with pytest.raises(ModelError, match=r"refuses these messages .too many"):
            render([{}, {}])


# pieces -------------------------------------------------------------------------------


def test_long_texts_are_cut_at_white_space_and_lose_nothing(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(sentences(40)) + "x" * 500
    whole = Encoder(tokenizer)(text)
    monkeypatch.setattr(encoder, "LONGEST", 100)
    monkeypatch.setattr(encoder, "_NEAR", 30)
    pieces = list(encoder.pieces(text))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 100
    assert all(p[0] == " " or "x" in p for p in pieces[1:])
    assert Encoder(tokenizer)(text) == whole
    assert Encoder(tokenizer)(text, 150) == whole[:150]
    assert list(encoder.pieces("")) == [""]
    assert list(encoder.pieces(text[:100])) == [text[:100]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(alphabet="ab \n\r\u00e9", max_size=40), max_size=30),
    st.integers(1, 60),
    st.integers(50, 90),
)
def test_a_text_comes_in_whole_lines_and_loses_nothing(
    parts: list[str], piece: int, longest: int
) -> None:
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


def test_only_as_much_is_read_as_the_samples_need(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("".join(sentences(40)) * 2000 + "\0", encoding="utf-8")
    monkeypatch.setattr(text_files, "LONGEST", 1000)
    build(str(tmp_path / "a.txt"), tokenizer, **SIZES)
    with pytest.raises(CalibrationError, match="NUL"):
        build(str(tmp_path / "a.txt"), tokenizer, **{**SIZES, "samples": 10**7})


def test_a_padding_token_beyond_the_embedding_pads_with_another(tokenizer: Any) -> None:
    model: Any = tiny_model("llama")
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
