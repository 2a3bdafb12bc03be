"""The sweep over all decoders of transformers: what it covers, and that it sees what is wrong."""

import signal

import pytest
from transformers.models.auto import modeling_auto

from sweep import __main__ as command
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


def test_an_unknown_model_type_is_named(capsys):
    assert command.main(["--all", "llama", "none-such"]) == 2
    assert "no causal or image-text model type 'none-such'" in capsys.readouterr().out


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
    assert "does not compute what the original does" in report.reason


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


def test_an_architecture_that_does_not_end_is_failed(monkeypatch, capsys):
    monkeypatch.setattr(command, "check_entry", hang)
    assert command.main(["--all", "llama", "--seconds", "0.2"]) == 1
    assert "llama: failed no result within 0.2 s" in capsys.readouterr().out


def hang(*args, **options):
    signal.pause()


def test_the_command_line_counts_outcomes_and_writes_them_to_a_page(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- outcomes -->\nold\n<!-- end of outcomes -->\nafter\n")
    monkeypatch.setattr(conformance, "excise", cut_another)
    arguments = ["--all", "llama", "diffllama", "--docs", str(page), "--states", "1"]
    assert command.main(arguments) == 1
    shown = capsys.readouterr().out
    assert "architectures_failed: 1" in shown
    assert "architectures_refused: 1" in shown
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| diffllama | refused |" in text
