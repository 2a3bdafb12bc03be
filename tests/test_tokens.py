"""Token sets and their batches: every sample once, little padding, the same batches every time."""

import copy
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrating import (
    calibrate,
    chats,
    decoded,
    refused,
    sentences,
    write_texts,
)
from isingcut.data import calibration, healing_text, text_files
from isingcut.data import tokens as encoder
from isingcut.data.tokens import Encoder, TokenSet, overlap
from isingcut.files.runs import CalibrationText
from isingcut.report.words import overlap_warnings, repeat_warnings
from shared import (
    CalibrationError,
    flags,
    load_json,
    parametrize,
    refuses,
    write_jsonl,
    write_words,
)
from tiny import TextSampler, tiny_model, tiny_tokenizer


def of_lengths(lengths):
    return TokenSet.from_rows([[i + 1] * length for i, length in enumerate(lengths)])


def test_large_batches_are_padded_by_an_eighth_at_most():
    lengths = np.random.default_rng(1).integers(2, 300, 400).tolist()
    batches = of_lengths(lengths).batches(2048)
    for batch in batches:
        shortest = int(batch.mask.sum(1).min())
        longest = batch.input_ids.shape[1]
        assert 8 * shortest >= 7 * longest or (batch.samples - 1) * longest < 256
    assert sum(b.input_ids.numel() for b in batches) < 1.1 * sum(lengths)


def test_few_short_samples_stay_one_batch_and_equal_lengths_fill_them():
    assert len(of_lengths([14, 9, 14, 3]).batches(1024)) == 1
    assert [b.samples for b in of_lengths([256] * 10).batches(1024)] == [4, 4, 2]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(1, 40))
def test_batches_hold_every_sample_once_and_no_useless_padding(lengths, limit):
    tokens = TokenSet.from_rows(
        [[10 * i + j for j in range(n)] for i, n in enumerate(lengths)]
    )
    batches = tokens.batches(limit)
    every = sorted(i for b in batches for i in b.index.tolist())
    assert every == list(range(len(lengths)))
    for batch in batches:
        width = batch.input_ids.shape[1]
        assert bool(batch.mask.any(0).all())
        assert batch.samples == 1 or batch.samples * width <= limit
        for row, i in enumerate(batch.index.tolist()):
            # The mask is of the first tokens, as every row counts up.
            ids = batch.input_ids[row][batch.mask[row]]
            assert ids.tolist() == [10 * i + j for j in range(lengths[i])]
    assert (
        sum(b.tokens for b in batches) == tokens.tokens == sum(n - 1 for n in lengths)
    )


def test_padding_is_on_the_right_and_never_predicted():
    tokens = TokenSet.from_rows([[5, 6, 7], [8], [9, 9]], pad=3)
    assert tokens.input_ids.tolist() == [[5, 6, 7], [8, 3, 3], [9, 9, 3]]
    assert tokens.predicted.tolist() == [[True, True], [False, False], [True, False]]
    assert tokens.tokens == 3
    part = tokens.select([2, 1])
    assert part.input_ids.tolist() == [[9, 9], [8, 3]]
    assert part.index.tolist() == [0, 1]


NGRAMS = {"samples": 4, "rank_samples": 4, "report_samples": 4, "length": 64}


def counted(tokens, others, size):
    """Return the same share by sets of tuples."""

    def grams(split):
        kept = split.mask if split.counted is None else split.counted
        return [
            tuple(row[i : i + size].tolist())
            for row, counts in zip(split.input_ids, kept, strict=True)
            for i in range(len(row) - size + 1)
            if counts[i + size - 1]
        ]

    seen = {gram for other in others for gram in grams(other)}
    own = grams(tokens)
    return sum(gram in seen for gram in own) / len(own)


@parametrize("length, size", [(16, 8), (40, 16), (70, 32)])
def test_the_share_is_that_of_a_plain_count(length, size):
    rng = np.random.default_rng(length)
    passage = rng.integers(0, 90, 40).tolist()

    def split(rows):
        found = []
        for _ in range(rows):
            row = rng.integers(0, 90, length).tolist()
            # At a random position in each row, cut off by the end of some rows.
            found.append([*row[: int(rng.integers(0, length))], *passage][:length])
        # Context that does not count.
        found[0] = [~i for i in found[0][: length // 2]] + found[0][length // 2 :]
        return TokenSet.from_rows(found)

    first = split(30)
    others = [split(9), split(20)]
    share = overlap(first, others)
    assert share == counted(first, others, size)
    assert 0.05 < share < 0.9


def test_samples_too_short_for_chance_share_nothing():
    same = TokenSet.from_rows([[1] * 15])
    assert overlap(same, [same]) == 0.0
    assert (
        overlap(TokenSet.from_rows([[1] * 16]), [TokenSet.from_rows([[1] * 3])]) == 0.0
    )


@pytest.fixture
def leaking(tmp_path):
    """A text in which one passage is repeated many times."""
    words = write_words(tmp_path / "words.txt").read_text()
    parts = [words[i : i + 150] + words[-90:] for i in range(0, 3000, 150)]
    path = tmp_path / "leaking.txt"
    path.write_text(" ".join(parts))
    return path


def test_a_run_warns_of_text_that_its_splits_share(
    leaking, llama, tmp_path, no_speed, typed
):
    out = tmp_path / "run"
    given = {"calibration": leaking, "out": out, "energy": "pairwise", **NGRAMS}
    further = {"remove": 1, "states": 3, "random_states": 30, "patch": "none"}
    for verb, options in {"energy": given, "run": given | further}.items():
        said = typed(verb, llama, *flags(options), "--quiet").err
        shares = load_json(out / "run.json").provenance.calibration.overlap
        assert shares.keys() == {"rank", "report"}
        assert 0.05 < shares.report < 0.5
        (line,) = [x for x in said.splitlines() if "another split" in x]
        assert line.startswith("isingcut: warning: ")
        assert f"{shares.report:.0%} of the report text is in another split too" in line


def test_text_from_a_template_is_called_known(llama, tmp_path, monkeypatch, typed):
    rows = [
        f"{i * 7919 % 99991} stir the pot {i * 10473 % 99991}" for i in range(1, 300)
    ]
    file = write_texts(tmp_path / "recipes.jsonl", rows)
    # The tiny models have 262 tokens.
    monkeypatch.setattr(calibration, "_BYTES", 100)
    given = {**NGRAMS, "calibration": file, "energy": "fisher", "samples": 9}
    given["out"] = tmp_path / "run"
    said = typed("energy", llama, *flags(given), "--quiet").err
    share = load_json(tmp_path / "run/run.json").provenance.calibration.repeats.report
    assert share > 0.2
    (line,) = [x for x in said.splitlines() if "known" in x]
    assert f"{share:.0%} of the report text repeats another split" in line


def test_ordinary_text_is_not_warned_of(finished):
    provenance = load_json(finished / "run.json").provenance
    assert provenance.calibration.overlap == {"rank": 0.0, "report": 0.0}
    assert overlap_warnings(provenance.calibration.overlap) == []
    assert overlap_warnings({"rank": 0.019}) == []
    (line,) = overlap_warnings({"rank": 0.02, "report": 0.16})
    assert line.startswith("2% of the rank text and 16% of the report text is in")
    known = {"rank": 0.0, "report": 0.0}
    text = CalibrationText(
        source="t", sha256="", splits={}, overlap=known, repeats={"report": 0.17}
    )
    assert repeat_warnings(text) == []
    text.repeats = {"rank": 0.21, "report": 0.34}
    (line,) = repeat_warnings(text)
    assert line.startswith(
        "21% of the rank text and 34% of the report text repeats another split"
    )


def test_a_healing_records_what_its_report_shares(leaking, tokenizer):
    text = healing_text.build(
        str(leaking), TextSampler(tokenizer, 64, 0), samples=20, report_samples=9
    )
    assert text.overlap == counted(text.report, [text.train], 32) > 0.1


# chats --------------------------------------------------------------------------------


def test_each_conversation_is_one_sample_through_the_template(tmp_path, tokenizer):
    records = chats(12)
    found = calibrate(write_jsonl(tmp_path / "a.jsonl", records), tokenizer)
    ids = (
        tokenizer.apply_chat_template(r["messages"], return_dict=False) for r in records
    )
    rendered = {tokenizer.decode(some[:16]) for some in ids}
    texts = [t for s in found.splits.values() for t in decoded(tokenizer, s)]
    assert len(texts) == len(set(texts)) == 10
    assert set(texts) <= rendered
    assert any(not bool(s.mask.all()) for s in found.splits.values())


def test_messages_need_a_chat_template(tmp_path):
    bare = tiny_tokenizer()
    bare.chat_template = None
    refused(write_jsonl(tmp_path / "a.jsonl", chats(12)), bare, "no chat template")


# pieces -------------------------------------------------------------------------------


def test_long_texts_are_cut_at_white_space_and_lose_nothing(tokenizer, monkeypatch):
    text = "".join(sentences(40)) + "x" * 500
    whole = Encoder(tokenizer)(text)
    monkeypatch.setattr(encoder, "LONGEST", 100)
    monkeypatch.setattr("isingcut.data.text_files._NEAR", 30)
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
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder) / "a.txt"
        path.write_text(text, newline="")
        patch.setattr(text_files, "_PIECE", piece)
        patch.setattr(text_files, "LONGEST", longest)
        found = list(text_files.read_text(path, "a.txt"))[1:]
        expected = []
        with path.open(newline="") as file:
            while lines := file.readlines(piece):
                expected.append("".join(lines))
    assert "".join(found) == text
    if all(len(line) < longest for line in text.splitlines(keepends=True)):
        assert found == expected
    else:
        assert max(map(len, found)) <= piece + 2 * longest


def test_only_as_much_is_read_as_the_samples_need(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "a.txt").write_text("".join(sentences(40)) * 20 + "\0")
    monkeypatch.setattr(text_files, "LONGEST", 1000)
    monkeypatch.setattr(text_files, "_PIECE", 1000)
    calibrate(str(tmp_path / "a.txt"), tokenizer)
    with refuses("NUL", CalibrationError):
        calibrate(str(tmp_path / "a.txt"), tokenizer, samples=10**4)


def test_a_padding_token_beyond_the_embedding_pads_with_another(tokenizer):
    model = tiny_model("llama")
    assert Encoder(tokenizer, model).pad == tokenizer.pad_token_id
    wider = copy.deepcopy(tokenizer)
    wider.add_special_tokens({"pad_token": "<filling>"})
    assert wider.pad_token_id == 262
    assert Encoder(wider, model).pad == 0
    assert Encoder(wider).pad == 262
    with refuses(r"'<filling>' with id 262, but .* 262 rows", CalibrationError):
        Encoder(wider, model)("a <filling>")
    model.resize_token_embeddings(263)
    assert 262 in Encoder(wider, model)("a <filling>")
