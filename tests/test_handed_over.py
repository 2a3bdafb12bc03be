"""A loaded model and a list of texts give the same as the folder and the file; both are freed."""

import gc
import warnings

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from transformers import AutoModelForCausalLM, AutoTokenizer

import isingcut
from isingcut.data.mixture import find_object, register_texts
from shared import (
    OPTIONS,
    CalibrationError,
    InputError,
    ModelError,
    OutputExistsError,
    load_json,
    module_fixture,
    parametrize,
    refuses,
    write_jsonl,
)
from tiny import tiny_checkpoint

# Six blocks have fifteen states, too few to judge an energy, which no test here does.
pytestmark = pytest.mark.filterwarnings("ignore::isingcut.runs.api.PoorEnergyWarning")

TEXTS = [f"Document {i}: {i * 7919 % 1000} things happened." for i in range(40)]


@pytest.fixture(autouse=True)
def _quick(no_speed, monkeypatch, tmp_path):
    """Measure no speed, and make temporary folders where they can be counted."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))


@module_fixture
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("given")
    tiny_checkpoint("llama", base / "model")
    write_jsonl(base / "texts.jsonl", [{"text": t} for t in TEXTS])
    return base


@pytest.fixture
def loaded(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    return model, AutoTokenizer.from_pretrained(folder / "model")


def prune(model, **options):
    return isingcut.prune(model, 2, **{**OPTIONS, "calibration": TEXTS, **options})


def energies(run):
    return [(state.removed, state.energy, state.kl) for state in run.candidates]


def test_the_same_result_as_from_the_folder_and_the_file(folder, loaded, tmp_path):
    model, tokenizer = loaded
    # transformers records outputs with hooks, which remain.
    model(torch.zeros((1, 2), dtype=torch.long), output_hidden_states=True)
    assert model.model.layers[0]._forward_hooks
    before = {k: v.clone() for k, v in model.state_dict().items()}
    file = folder / "texts.jsonl"
    named = prune(folder / "model", calibration=file, out=tmp_path / "a")
    given = prune(model, tokenizer=tokenizer, out=tmp_path / "b")
    # Not exactly: each run chooses by its own timings how it computes.
    for one, other in zip(energies(given), energies(named), strict=True):
        assert one[0] == other[0]
        assert one[1:] == pytest.approx(other[1:], rel=1e-3, abs=1e-5)
    theirs, ours = (load_json(tmp_path / k / "run.json").provenance for k in "ab")
    assert theirs.model.sha256 == ours.model.sha256
    assert theirs.calibration.sha256 == ours.calibration.sha256
    assert ours.model.name.startswith("LlamaForCausalLM in memory (")
    assert ours.calibration.source.startswith("40 texts in memory (")
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_the_copy_lives_as_long_as_the_run(loaded, tmp_path):
    model, tokenizer = loaded
    run = prune(model, tokenizer=tokenizer, out=tmp_path / "run")
    assert list((tmp_path / "temporary").iterdir())
    assert (run.save(tmp_path / "smaller") / "config.json").is_file()
    del run
    gc.collect()
    assert not list((tmp_path / "temporary").iterdir())


def test_the_same_list_goes_on_and_another_is_another_source(
    folder, tmp_path, monkeypatch
):
    def listed(texts):
        return prune(folder / "model", calibration=texts, out=tmp_path / "run")

    first = energies(listed(TEXTS))
    with monkeypatch.context() as patch:
        patch.setattr("isingcut.runs.measuring.build", None)
        assert energies(listed(tuple(TEXTS))) == first
        assert energies(isingcut.open_run(tmp_path / "run")) == first
    with refuses(r"made with other options .calibration: was 40", OutputExistsError):
        listed(TEXTS[:-1])


def test_texts_no_longer_in_memory_are_named():
    with register_texts(["a", "b"]) as name:
        assert find_object(name) == ["a", "b"]
        with register_texts(("a", "b")) as again:
            assert again == name
        assert find_object(name) == ["a", "b"]
    with refuses(r"2 texts in memory .* was passed in Python"):
        find_object(name)
    assert find_object("my-text.txt") is None


@parametrize(
    "texts, words",
    [
        ([], "a list of strings, not empty; got \\[\\]"),
        (["a", 3], "a list of strings, not empty; got 3$"),
        ({"text": "a"}, "a list of strings, not empty; got {'text': 'a'}"),
        ((t for t in TEXTS), "a list of strings, not empty; got <generator"),
    ],
)
def test_bad_lists_of_texts(folder, tmp_path, texts, words):
    with refuses(words, CalibrationError):
        prune(folder / "model", calibration=texts, out=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def packed(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, inplace=True)


def hook(module, args, out=None):
    """Change nothing."""


BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True}
HOOKED = "has a hook or a replaced forward"
SPOILT = {
    "a hook": (
        lambda m: m.model.layers[2].mlp.register_forward_hook(hook),
        rf"model.layers.2.mlp .LlamaMLP. {HOOKED}",
    ),
    "another forward": (
        lambda m: setattr(m.model.layers[3].mlp, "forward", lambda x: 0 * x),
        rf"model.layers.3.mlp .LlamaMLP. {HOOKED}",
    ),
    "spread": (
        lambda m: add_hook_to_module(m.model.layers[1], AlignDevicesHook("cpu")),
        r"model.layers.1 .* load the model without device_map",
    ),
    "quantised": (
        lambda m: setattr(m.config, "quantization_config", BITS),
        "is quantised in memory.*give the folder or hub id",
    ),
    "offloaded": (lambda m: m.lm_head.to("meta"), "has weights that are not in memory"),
    "adapted": (
        lambda m: setattr(m, "_hf_peft_config_loaded", True),
        "has adapters, which",
    ),
    "packed": (packed, "is quantised in memory.*give the folder or hub id"),
    "unsavable": (
        lambda m: setattr(m, "save_pretrained", lambda folder: folder.absent),
        "saving the loaded model .* failed; .*no attribute 'absent'",
    ),
}


@parametrize("spoil, words", SPOILT.values(), ids=SPOILT)
def test_models_that_cannot_be_saved_whole(loaded, tmp_path, spoil, words):
    model, tokenizer = loaded
    spoil(model)
    with pytest.raises((InputError, ModelError), match=words):
        prune(model, tokenizer=tokenizer, out=tmp_path / "r")
    assert [p.name for p in tmp_path.iterdir()] == ["temporary"]
    assert not list((tmp_path / "temporary").iterdir())


def test_what_is_no_model_or_lacks_its_tokenizer(folder, loaded, tmp_path):
    model, tokenizer = loaded
    for given, own, words in (
        (model, None, r"prune\(model, tokenizer=...\)"),
        (model, "gpt2", "expected a transformers tokenizer, got str"),
        (torch.nn.Linear(2, 2), tokenizer, "a loaded transformers model, got Linear"),
        (str(folder / "model"), tokenizer, "tokenizer is only for a loaded model"),
    ):
        with refuses(words):
            prune(given, tokenizer=own, out=tmp_path / "r")
    with refuses("random-states must be 0 or at least 30"):
        prune(model, tokenizer=tokenizer, random_states=1)
    assert not list((tmp_path / "temporary").iterdir())
