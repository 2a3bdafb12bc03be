"""Splits are disjoint, deterministic and honest about padding; bad text gets one clear line."""

import pytest
import torch

from calibrating import COUNTS, SIZES, refused, sentences, write_jsonl
from isingcut.data.calibration import Calibration, build
from isingcut.errors import InputError
from isingcut.testing.tiny import tiny_tokenizer

# plain text ---------------------------------------------------------------------------


def test_txt_is_packed_into_consecutive_disjoint_ranges(tmp_path, tokenizer):
    text = "".join(sentences(40))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    found = build(str(tmp_path / "a.txt"), tokenizer, **SIZES)
    assert {k: s.samples for k, s in found.splits.items()} == COUNTS
    order = ("report", "rank", "energy")
    joined = torch.cat([found.splits[name].input_ids.flatten() for name in order])
    expected = tokenizer(text, add_special_tokens=False).input_ids
    assert joined.tolist() == expected[: len(joined)]
    assert all(bool(s.mask.all()) for s in found.splits.values())


def test_a_tokenizer_that_sets_bos_has_it_in_every_packed_sample(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    (tmp_path / "a.txt").write_text("".join(sentences(40)), encoding="utf-8")
    found = build(str(tmp_path / "a.txt"), tokenizer, **SIZES)
    for tokens in found.splits.values():
        assert (tokens.input_ids[:, 0] == tokenizer.bos_token_id).all()
        assert (tokens.input_ids[:, 1:] != tokenizer.bos_token_id).all()


def test_a_byte_order_mark_is_no_text(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("".join(sentences(40)), encoding="utf-8-sig")
    (tmp_path / "b.txt").write_text("".join(sentences(40)), encoding="utf-8")
    first, second = (build(str(tmp_path / f"{n}.txt"), tokenizer, **SIZES) for n in "ab")
    assert first.sha256 == second.sha256


# documents ----------------------------------------------------------------------------


def test_no_document_nor_its_duplicate_is_in_two_splits(tmp_path, tokenizer):
    texts = [f"<{i}>" + "abcdefgh"[i % 8] * 30 + f"</{i}>" for i in range(30)]
    spaced = [t.replace(">", "> ") for t in texts]
    copies = [t.replace(">", ">   ") for t in texts]
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in [*spaced, *copies, *spaced]])
    found = build(source, tokenizer, **SIZES)
    owners = {}
    for name, tokens in found.splits.items():
        stream = tokenizer.decode(tokens.input_ids.flatten())
        for i in range(30):
            if f"<{i}>" in stream:
                owners.setdefault(str(i), set()).add(name)
    assert owners
    assert all(len(names) == 1 for names in owners.values())


def test_order_follows_the_seed_and_report_ignores_the_energys_samples(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in sentences(60)])
    first = build(source, tokenizer, **SIZES)
    assert build(source, tokenizer, **SIZES).sha256 == first.sha256
    assert build(source, tokenizer, **{**SIZES, "seed": 1}).sha256 != first.sha256
    more = build(source, tokenizer, **{**SIZES, "samples": 9})
    for name in ("report", "rank"):
        assert torch.equal(more.splits[name].input_ids, first.splits[name].input_ids)


def test_one_long_document_is_split_by_ranges(tmp_path, tokenizer):
    text = "".join(sentences(30))
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text}, {"text": text}])
    found = build(source, tokenizer, **SIZES)
    assert found.meta["documents"] == 1
    streams = [text.index(tokenizer.decode(s.input_ids.flatten())) for s in found.splits.values()]
    assert len(set(streams)) == 3


def test_documents_that_would_have_to_be_shared_are_too_few(tmp_path, tokenizer):
    records = [{"text": str(i) * 45} for i in range(4)]
    message = refused(write_jsonl(tmp_path / "a.jsonl", records), tokenizer, "too short")
    assert "no document may be in two splits, found 7;" in message


# bad files ----------------------------------------------------------------------------


def test_exactly_enough_text_is_enough(tmp_path, tokenizer):
    file = tmp_path / "a.txt"
    file.write_text("x" * 160, encoding="utf-8")
    assert build(str(file), tokenizer, **SIZES).splits["energy"].tokens == 5 * 15
    file.write_text("x" * 159, encoding="utf-8")
    refused(str(file), tokenizer, "samples of 16 tokens were asked for, found 9;")


def test_counts_and_length_are_checked(tokenizer):
    with pytest.raises(InputError, match="length"):
        build("wiki", tokenizer, **{**SIZES, "length": 1})
    with pytest.raises(InputError, match="rank"):
        build("wiki", tokenizer, **{**SIZES, "rank_samples": 0})


# files --------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("".join(sentences(40)), encoding="utf-8")
    built = build(str(tmp_path / "a.txt"), tokenizer, **SIZES)
    built.save(tmp_path / "calibration.safetensors")
    return built, tmp_path / "calibration.safetensors"


def test_saved_and_loaded_are_the_same(saved):
    built, path = saved
    found = Calibration.load(path)
    assert found.sha256 == built.sha256
    assert found.source == built.source
    assert dict(found.meta) == dict(built.meta)
