"""Cutting to one block gives a model like any other; nothing more can go from it."""

import pytest

from isingcut.files.writing import read_json
from isingcut.models.architectures.blocks import find_stack
from isingcut.models.cutting.checkpoint import excise, verify
from isingcut.models.inspect import inspect_model
from isingcut.testing.tiny import tiny_checkpoint, tiny_model
from shared import call


@pytest.mark.parametrize(
    ("family", "stays"),
    [("llama", 3), ("qwen2_moe", 1), ("gemma3", 5), ("mamba2", 0), ("nemotron_h", 2), ("gpt2", 0)],
)
def test_the_last_block_is_proven_and_found_again(family, stays, tmp_path):
    tiny_checkpoint(family, tmp_path / "source")
    model = tiny_model(family)
    kinds = find_stack(model).kinds
    removed = [i for i in range(len(kinds)) if i != stays]
    excise(tmp_path / "source", removed, tmp_path / "cut")
    assert verify(model, removed, tmp_path / "cut", new_tokens=4).distinguishes
    shown = inspect_model(tmp_path / "cut")
    assert shown.stack.kinds == (kinds[stays],)
    assert not shown.refusal


def test_a_run_down_to_one_block_is_patched_and_evaluated(text, tmp_path, no_speed, capsys):
    tiny_checkpoint("llama", tmp_path / "two", num_hidden_layers=2)
    out = tmp_path / "run"
    further = ["--calibration", text, "--samples", 4, "--length", 32, "--patch-tokens", 1000]
    assert call("run", tmp_path / "two", "--remove", 1, "--keep", 0, "--out", out, *further) == 0
    assert read_json(out / "model" / "isingcut.json", "removal")["patch"]["cuts"]
    evaluation = read_json(out / "evaluation.json", "evaluation")
    assert (evaluation["before"]["blocks"], evaluation["after"]["blocks"]) == (2, 1)
    capsys.readouterr()
    assert call("inspect", out / "model") == 0
    assert "its one block stays: none can be removed" in capsys.readouterr().out
    again = ["run", out / "model", "--out", tmp_path / "further", *further]
    for removal in (["--remove", 1], ["--budget", "params=10%"], []):
        assert call(*again, *removal) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith("has a single block, which must stay; use a deeper model")
