"""A mixture of texts has its shares of tokens, and all properties of a single text."""

import re
from pathlib import Path

import pytest

from calibrating import (
    COUNTS,
    SIZES,
    calibrate,
    chats,
    decoded,
    refused,
    sentences,
    write_texts,
)
from isingcut.data import corpora, healing_text
from isingcut.data.calibration import OpenText
from isingcut.data.healing_text import to_fit
from isingcut.data.mixture import Part, parts_of
from isingcut.evaluation.quality import quality
from isingcut.files.cuts import CutRecord, PatchedCut, PatchRecord
from isingcut.files.evaluations import EvaluationFile, PartScores, Perplexity
from isingcut.files.healings import HealingFile
from isingcut.healing.repairs.tuned import split_samples
from isingcut.report.rows import evaluation_rows, healing_rows
from isingcut.report.words import healing_warnings, paragraphs, patch_warnings
from run_files import healing, text_scores
from shared import (
    CalibrationError,
    HealConfig,
    StageFileError,
    cells,
    parametrize,
    refuses,
    write_jsonl,
)
from tiny import Calibration, TextSampler, tiny_model

MANY = {**SIZES, "samples": 40, "rank_samples": 12, "report_samples": 12}


def numbered(path, word, count=200):
    return write_texts(path, (f"{word}{i}. " * 4 for i in range(count)))


@pytest.fixture
def two_texts(tmp_path):
    """Two files of numbered documents, `a.jsonl` with "<" and `b.jsonl` with "["."""
    return [numbered(tmp_path / f"{n}.jsonl", w) for n, w in ("a<", "b[")]


def tokens_of(tokens, name):
    return int(tokens.mask[tokens.rows_by_part[name]].sum())


def found_in(tokenizer, pattern, *token_sets):
    """Return what a pattern finds in the decoded texts."""
    texts = (text for tokens in token_sets for text in decoded(tokenizer, tokens))
    return set(re.findall(pattern, " ".join(texts)))


# what is a mixture ----------------------------------------------------------------------


def test_shares_add_up_and_files_are_called_by_their_names(tmp_path):
    (tmp_path / "b").mkdir()
    one, two = (tmp_path / name for name in ("a.txt", "b/a.txt"))
    for file in (one, two):
        file.write_text("a")
    assert len(parts_of("wiki=0.33,self=0.33,python=0.33")) == 3
    found = parts_of(f"wiki=3,{one}=1")
    assert found == (Part("wiki", "wiki", 0.75), Part(str(one), "a.txt", 0.25))
    names = [part.name for part in parts_of(f"{one}=1,{two}=1")]
    assert names == ["a.txt (1)", "a.txt (2)"]


@parametrize(
    "name, source, parts",
    [
        ("wiki=1,self=1", "wiki=1,self=1", ["wiki=1,self=1"]),
        ("a=b.txt", "other=1,a=b.txt=2", ["other", "a=b.txt"]),
    ],
)
def test_a_file_of_that_name_is_no_mixture_and_can_be_a_part(
    tmp_path, monkeypatch, name, source, parts
):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("a")
    assert [part.source for part in parts_of(source)] == parts


MISTAKES = """
wiki=0.5,self :: its part 'self' is not
wiki=half,self=1 :: its part 'wiki=half' is not
wiki=0,self=1 :: its part 'wiki=0' is not
wiki=-1 :: its part 'wiki=-1' is not
wiki=nan :: its part 'wiki=nan' is not
wiki=1,=1 :: its part '=1' is not
wiki=1e308,self=1e308 :: too large or too unequal
wiki=1e-200,self=1e200 :: too large or too unequal
wiki=1,wiki=1 :: names 'wiki' twice
wiki=0.5,self=0.4 :: sum to 0.9; write shares that sum to 1
"""


@parametrize("source, words", cells(MISTAKES))
def test_what_is_no_mixture_either_names_the_part(source, words):
    with refuses(words, CalibrationError):
        corpora.check(source)


def test_every_beginning_has_the_shares_and_the_order_no_period():
    parts = [Part("a", "a", 0.75), Part("b", "b", 0.25)]
    texts = [OpenText(part, {}, [iter([[1] * 16] * 400)]) for part in parts]
    found = [i for i, _ in TextSampler(None, 16, 0).draw(texts, 0, "energy", 400)[0]]
    for end in range(8, 400):
        assert abs(sum(found[:end]) - end / 4) <= 1.5
    for first in range(4):
        every_fourth = found[first::4]
        assert 0.1 < sum(every_fourth) / len(every_fourth) < 0.5


# calibration ----------------------------------------------------------------------------


def test_every_split_holds_the_shares_of_tokens(tmp_path, tokenizer):
    documents = numbered(tmp_path / "a.jsonl", "river")
    source = f"{documents}=0.6,{write_jsonl(tmp_path / 'chat.jsonl', chats(200))}=0.4"
    found = calibrate(source, tokenizer, **MANY)
    sizes = {"energy": 40, "rank": 12, "report": 12}
    assert {k: s.samples for k, s in found.splits.items()} == sizes
    for tokens in found.splits.values():
        assert set(tokens.parts) == {"a.jsonl", "chat.jsonl"}
        share = tokens_of(tokens, "a.jsonl") / int(tokens.mask.sum())
        assert abs(share - 0.6) <= 16 / int(tokens.mask.sum())
        for text, part in zip(decoded(tokenizer, tokens), tokens.parts, strict=True):
            assert ("river" in text or "." in text) == (part == "a.jsonl")
    assert calibrate(source, tokenizer, **MANY).sha256 == found.sha256
    assert calibrate(source, tokenizer, **MANY, seed=1).sha256 != found.sha256
    more = calibrate(source, tokenizer, **{**MANY, "samples": 50})
    for name in ("rank", "report"):
        assert more.splits[name].input_ids.equal(found.splits[name].input_ids)


def test_no_document_is_in_two_splits_whichever_part_it_is_from(tmp_path, tokenizer):
    names = [f"<{i}>{'abcdefgh'[i % 8] * 12}</{i}>" for i in range(30)]
    # The second text is a copy of the first, with other white space.
    first = write_texts(tmp_path / "a.jsonl", names)
    second = write_texts(tmp_path / "b.jsonl", (f" {t}\n" for t in names))
    for seed in range(4):
        owners = {}
        found = calibrate(f"{first}=1,{second}=1", tokenizer, seed=seed)
        for name, tokens in found.splits.items():
            for part, own in tokens.rows_by_part.items():
                for i in found_in(tokenizer, r"<(\d+)>", tokens.select(own)):
                    owners.setdefault(i, set()).add((name, part))
        assert len(owners) > 3
        assert all(len(found) == 1 for found in owners.values())


def test_text_of_the_model_can_be_a_part(tmp_path, tokenizer):
    documents = numbered(tmp_path / "a.jsonl", "river")
    found = calibrate(f"{documents}=1,self=1", tokenizer, model=tiny_model("llama"))
    assert {k: s.samples for k, s in found.splits.items()} == COUNTS
    assert found.splits["rank"].parts.count("self") in (1, 2)
    assert [part["kind"] for part in found.meta["parts"]] == ["documents", "generated"]


FAILING = r"""
a.jsonl=1,missing.txt=1 :: part 'missing.txt' of the mixture: the
a.jsonl=1,b.jsonl=1 :: part 'b.jsonl' .*b.jsonl is too short
a.jsonl=1,chat.jsonl=3 :: part 'chat.jsonl' .* gives 0 .* 75% of 5 are ne
a.jsonl=1,no-such-set-at-all/x:y=1 :: part 'no-such-set-at-all/x:y'
"""


@parametrize("parts, words", cells(FAILING))
@pytest.mark.usefixtures("offline")
def test_a_part_that_fails_is_named(tmp_path, tokenizer, monkeypatch, parts, words):
    monkeypatch.chdir(tmp_path)
    numbered(tmp_path / "a.jsonl", "river")
    write_texts(tmp_path / "b.jsonl", ["a river"])
    write_jsonl(tmp_path / "chat.jsonl", chats(3))
    refused(parts, tokenizer, words)
    with refuses("a mixture of 2 texts needs as many report samples"):
        calibrate("a.jsonl=1,chat.jsonl=1", tokenizer, report_samples=1)


def test_parts_are_kept_in_the_file_and_checked(tmp_path, tokenizer, two_texts):
    built = calibrate("{}=1,{}=1".format(*two_texts), tokenizer)
    path = tmp_path / "calibration.safetensors"
    built.save(path)
    found = Calibration.load(path)
    assert (found.sha256, found.source) == (built.sha256, built.source)
    assert dict(found.meta) == dict(built.meta)
    for name, split in built.splits.items():
        assert found.splits[name].parts == split.parts
    for bad in ([0] * 4, [0] * 4 + [2], [0] * 4 + ["a"], None):
        parts = {**built.meta["part_of_sample"], "energy": bad}
        meta = {**built.meta, "part_of_sample": parts}
        Calibration(built.splits, built.source, meta).save(path)
        with refuses("calibration.safetensors is damaged: ", StageFileError):
            Calibration.load(path)


# figures by part ------------------------------------------------------------------------


def test_the_quality_of_the_parts_adds_up(tokenizer, two_texts):
    tokens = calibrate("{}=3,{}=1".format(*two_texts), tokenizer, **MANY).splits[
        "report"
    ]
    first, second = (tiny_model("llama", seed=seed) for seed in (0, 1))
    found = quality(first, second, tokens)
    assert sum(part.tokens for part in found.parts.values()) == tokens.tokens
    kl = sum(part.kl * part.tokens for part in found.parts.values())
    assert kl / tokens.tokens == pytest.approx(found.kl)
    alone = quality(first, second, tokens.select(tokens.rows_by_part["a.jsonl"]))
    assert alone.parts == {}
    assert dict(found.parts["a.jsonl"].after) == pytest.approx(dict(alone.after))
    rows = evaluation_rows(EvaluationFile.model_construct(last="cut", **dict(found)))
    # Values by part come right after those of the whole, before sizes.
    keys = [row.key for row in rows]
    assert keys[2:5] == ["kl", "a.jsonl: perplexity", "a.jsonl: kl"]
    assert keys.index("b.jsonl: kl") < keys.index("blocks")
    assert rows[4].plain("cut") == f"{alone.kl:.4f}"


def test_a_state_that_ruins_one_part_is_warned_of():
    measured = {
        "wiki": (0.3, 0.01),
        "maths": (0.9, 0.2),
        "code": (0.9, 0.04),
        "one sample": (0.81, None),
    }
    both = {
        k: Perplexity.model_validate(text_scores(20.0)) for k in ("before", "after")
    }
    parts = {
        k: PartScores.model_construct(kl=v, kl_se=se, **both)
        for k, (v, se) in measured.items()
    }
    mixed = EvaluationFile.model_construct(kl=0.4, last="patched", parts=parts, **both)
    code, one = paragraphs("part_warnings", mixed)
    assert code.startswith("on code the patched model's KL is 0.9000 ± 0.0400,")
    assert one.startswith("on one sample the patched model's KL is 0.8100,")
    assert "more than 2 times the 0.4000 of all text" in code
    mixed.parts = {}
    assert paragraphs("part_warnings", mixed) == []
    mixed.after = Perplexity(**text_scores(19.0))
    (low,) = paragraphs("part_warnings", mixed)
    assert "below the original's (19.00, original 20.00): that is no gain" in low


def test_a_healing_that_makes_one_part_worse_is_warned_of():
    def scores(kl, **error):
        return text_scores(
            20 * kl, kl=kl, kl_se=0.01, original_perplexity=15.0, **error
        )

    document = healing([], [4, 5], 6) | {
        "before": {**scores(0.9), "parts": {"wiki": scores(1.0), "code": scores(0.8)}},
        "after": {**scores(0.6), "parts": {"wiki": scores(0.5), "code": scores(0.85)}},
    }
    found = HealingFile.model_validate(document)
    assert healing_warnings(found) == [
        "on code the model got worse: KL 0.8000 ± 0.0100 (perplexity 16.00) before, 0.8500 ± "
        "0.0100 (perplexity 17.00) after; give that text more weight, or heal less"
    ]
    # The table calls it noise.
    document["after"]["parts"]["code"] = scores(0.85, kl_change_se=0.03)
    noisy = HealingFile.model_validate(document)
    assert healing_warnings(noisy) == []
    rows = {row.key: row for row in healing_rows(found)}
    assert rows["code: kl"].way == "0.0000 → 0.8500"
    assert rows["wiki: perplexity"].plain("healed") == "10.00"


# healing --------------------------------------------------------------------------------


def test_healing_keeps_the_shares_and_leaves_out_what_was_measured_on(
    tmp_path, tokenizer
):
    documents = numbered(tmp_path / "a.jsonl", "<", 400)
    said = (f"({i}) the river " + "ran " * (i % 5) for i in range(300))
    messages = [{"messages": [{"role": "user", "content": text}]} for text in said]
    talk = write_jsonl(tmp_path / "chat.jsonl", messages)
    (tmp_path / "c.txt").write_text("".join(sentences(300)))
    source = f"{documents}=2,{talk}=1,{tmp_path / 'c.txt'}=1"
    used = calibrate(source, tokenizer, length=32, samples=12, report_samples=3)
    sampler = TextSampler(tokenizer, 48, 0, used=used)
    found = healing_text.build(source, sampler, samples=40, report_samples=12)
    for tokens in (found.train, found.report):
        for name, share in (("a.jsonl", 0.5), ("chat.jsonl", 0.25)):
            found_share = tokens_of(tokens, name) / int(tokens.mask.sum())
            assert found_share == pytest.approx(share, abs=0.1)
    held = [*used.splits.values(), found.report, found.train]
    for pattern in (r"<(\d+)\. <\1", r"\((\d+)\) the", r"Document (\d+):"):
        seen = [found_in(tokenizer, pattern, tokens) for tokens in held]
        assert sum(map(len, seen)) > 10
        # A document of the running text may end one range and begin the next.
        for i, one in enumerate(seen):
            for other in seen[:i]:
                assert len(one & other) <= (pattern[0] == "D")


@parametrize("typed, seed", [("", 0), ("other/../", 0), ("", 1)])
def test_healing_by_one_part_of_what_was_measured_on_leaves_that_out(
    tmp_path, tokenizer, two_texts, typed, seed
):
    (tmp_path / "other").mkdir()
    used = calibrate("{}=1,{}=1".format(*two_texts), tokenizer)
    measured = found_in(tokenizer, r"<(\d+)\.", *used.splits.values())
    source = f"{tmp_path}/{typed}a.jsonl"
    sampler = TextSampler(tokenizer, 48, seed, used=used)
    found = healing_text.build(source, sampler, samples=None, report_samples=2)
    assert len(measured) > 4
    assert not measured & found_in(tokenizer, r"<(\d+)\. <", found.train, found.report)


def test_what_a_calibration_left_is_read_on_in_its_shares(tmp_path, tokenizer):
    documents = numbered(tmp_path / "a.jsonl", "<")
    few = numbered(tmp_path / "b.jsonl", "[", 60)
    used = calibrate(f"{documents}=1,{few}=1", tokenizer)
    own = used.splits["energy"].samples
    found, record = to_fit(used, TextSampler(tokenizer, 0, 0), 100_000)
    assert (record.searched, record.short) == (own, "the source has no more")
    further = found.select(range(own, found.samples))
    assert further.input_ids.shape[1] == 16
    for mark in ("<", r"\["):
        pattern = rf"{mark}(\d+)\."
        numbers = found_in(tokenizer, pattern, further)
        assert len(numbers) > 10
        assert not numbers & found_in(tokenizer, pattern, *used.splits.values())
    text = "".join(decoded(tokenizer, further))
    assert abs(text.count("<") - text.count("[")) < 0.2 * text.count("[")


def test_a_patch_of_a_narrow_text_is_fitted_on_a_share_of_the_default_text(
    tmp_path, tokenizer, monkeypatch, stub
):
    documents = numbered(tmp_path / "a.jsonl", "<")
    used = calibrate(documents, tokenizer)
    (measured,) = decoded(tokenizer, used.splits["report"].select([0]))
    # One article is a document of the calibration, which the patch must not see.
    known = next(
        text
        for text in (f"<{i}. " * 4 for i in range(200))
        if text.strip()[:8] in measured
    )
    articles = [known, *(f"#{i}# " * 9 for i in range(300))]
    monkeypatch.setitem(corpora.PACKAGED, "wiki", lambda: iter(articles))
    monkeypatch.setitem(
        corpora.PACKAGED, "python", lambda: (f"@{i}@ " * 9 for i in range(300))
    )
    stub(healing_text, "has_wiki", True)
    stub(corpora, "_wiki_file", None)
    found, record = to_fit(used, TextSampler(tokenizer, 0, 0), 4000, share=0.25)
    assert (record.source, record.unmixed) == ("a.jsonl + 75% wiki, 25% python", "")
    assert record.mixed == pytest.approx(1000, abs=16)
    assert record.tokens == pytest.approx(4000, abs=32)
    text = " ".join(decoded(tokenizer, found))
    assert text.count("#") == pytest.approx(3 * text.count("@"), rel=0.2)
    assert known.strip() not in text
    # Held out of the tuning is one sample in eight of both texts.
    assert "#" in " ".join(decoded(tokenizer, split_samples(found)[1]))
    for source, share in ((documents, 0.0), (f"{documents}=0.5,wiki=0.5", 0.25)):
        own = calibrate(source, tokenizer)
        assert (
            to_fit(own, TextSampler(tokenizer, 0, 0), 4000, share=share)[1].mixed == 0
        )
    moved = tmp_path / "a.jsonl"
    text = moved.read_bytes()
    moved.unlink()
    _, record = to_fit(used, TextSampler(tokenizer, 0, 0), 4000, share=0.25)
    assert (record.mixed, record.unmixed[:22]) == (0, "the source was changed")
    moved.write_bytes(text)
    stub(healing_text, "has_wiki", False)
    _, record = to_fit(used, TextSampler(tokenizer, 0, 0), 4000, share=0.25)
    assert record.mixed == 0
    assert corpora.WIKI_PACKAGE in record.unmixed
    (warning,) = patch_warnings(card_with(record))
    assert warning.startswith(
        "the patch was fitted on your text alone and may harm other text"
    )


def card_with(text):
    """Return the record of a cut whose patch was fitted on a text."""
    cut = PatchedCut(removed=[3], block=2, layer="down")
    patch = PatchRecord(unpatched=[], changed=True, cuts=[cut], text=text)
    return CutRecord(removed=[3], of=6, patch=patch)


def test_a_patch_leaves_the_report_text_of_the_healing_unseen(tokenizer, two_texts):
    source = "{}=1,{}=1".format(*two_texts)
    used = calibrate(source, tokenizer)
    sampler = TextSampler(tokenizer, 40, 3, used=used)
    text = healing_text.build(source, sampler, samples=None, report_samples=6)
    config = HealConfig(text=source, report_samples=6, length=40, seed=3)
    found, _ = to_fit(used, TextSampler(tokenizer, 0, 0), 3000, healing=config)
    fitted, unseen = (
        found_in(tokenizer, r"([<\[]\d+)\.", tokens) for tokens in (found, text.report)
    )
    assert len(unseen) > 6
    assert len(fitted) > 60
    # The last document of a sample may be cut within its number.
    assert len(fitted & unseen) <= 1


def test_healing_without_a_number_ends_with_the_part_that_ends_first(
    tmp_path, tokenizer
):
    documents = numbered(tmp_path / "a.jsonl", "river", 400)
    few = numbered(tmp_path / "b.jsonl", "s", 60)
    given = {"sampler": TextSampler(tokenizer, 48, 0), "report_samples": 4}
    found = healing_text.build(f"{documents}=1,{few}=1", samples=None, **given)
    more, less = (found.train.parts.count(f"{name}.jsonl") for name in "ab")
    assert less > 5
    assert abs(more - less) <= 1
    with refuses(
        r"part .b\.jsonl. of the mixture: .*b\.jsonl is too short: .* 50% of 200, from",
        CalibrationError,
    ):
        healing_text.build(f"{documents}=1,{few}=1", samples=200, **given)
    with refuses("part 'self' of the mixture: healing needs real", CalibrationError):
        healing_text.build(f"{documents}=1,self=1", samples=2, **given)
