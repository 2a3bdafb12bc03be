"""Splits are disjoint, deterministic and honest about padding; bad text gets one clear line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from calibrating import COUNTS, SIZES, refused, sentences, write_jsonl
from isingcut.data import calibration
from isingcut.data.calibration import Calibration, build
from isingcut.errors import InputError, StageFileError
from isingcut.files.tensors import tensor_header
from isingcut.testing.tiny import tiny_tokenizer

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
