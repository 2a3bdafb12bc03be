"""The sweep over all decoders of transformers: what it covers, and that it sees what is wrong."""

import pytest
from transformers.models.auto import modeling_auto

from sweep import conformance
from sweep.conformance import Entry, check_entry, entries
from sweep.shrink import tiny_configuration

LLAMA = Entry("llama", "AutoModelForCausalLM")


def test_every_decoder_of_transformers_is_there():
    found = entries()
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    images = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    assert len({entry.name for entry in found}) == len(found) == len(causal) + len(images)
    assert [e.name for e in entries(["gemma3"])] == ["gemma3", "gemma3 (image-text)"]


@pytest.mark.parametrize(
    ("model_type", "field", "kinds"),
    [
        ("gemma3_text", "layer_types", {"sliding_attention", "full_attention"}),
        ("deepseek_v3", "mlp_layer_types", {"dense", "sparse"}),
        ("zamba2", "layers_block_type", {"linear_attention", "hybrid"}),
        ("nemotron_h", "layers_block_type", {"linear_attention", "full_attention", "moe"}),
    ],
)
def test_a_tiny_configuration_keeps_every_kind_of_block(model_type, field, kinds):
    config = tiny_configuration(model_type)
    assert set(getattr(config, field, kinds)) >= kinds
    assert config.num_hidden_layers <= 8
    assert config.hidden_size == 64


def cut_another(source, removed, out, **options):
    """A wrong cut: blocks beside those that are to go."""
    return excise(source, [(i + 1) % 6 for i in removed], out, **options)


excise = conformance.excise


def test_a_wrong_cut_is_reported_as_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(conformance, "excise", cut_another)
    report = check_entry(LLAMA, tmp_path, states=1)
    assert report.outcome == "failed"
    assert "differs from the original" in report.reason


def test_what_a_library_raises_is_a_failure_and_what_we_refuse_is_none(tmp_path, monkeypatch):
    def broken(model):
        raise KeyError("expert_layer_period")

    with monkeypatch.context() as patch:
        patch.setattr(conformance, "find_stack", broken)
        report = check_entry(LLAMA, tmp_path / "a", states=1)
    assert (report.outcome, report.reason) == ("failed", "KeyError: 'expert_layer_period'")
    report = check_entry(Entry("diffllama", "AutoModelForCausalLM"), tmp_path / "b")
    assert report.outcome == "refused"
    assert "depends on the block number" in report.reason


def test_blocks_that_return_lists_are_measured(tmp_path):
    report = check_entry(Entry("openai-gpt", "AutoModelForCausalLM"), tmp_path, states=1)
    assert report.outcome == "passed", report.reason
