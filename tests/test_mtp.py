"""Layers for multi-token prediction through a whole run: kept, healed, dropped."""

import pytest

from healings import options, write_text
from isingcut.formats.checkpoints import Checkpoint, count_mtp_layers, is_mtp
from isingcut.healing.heal import heal
from shared import module_fixture, run_tiny, works
from sweep.mtp import add_mtp_layers
from tiny import excise, read_checkpoint, tiny_checkpoint, tiny_model

pytestmark = pytest.mark.usefixtures("no_speed")
OF_MTP = "model.layers.4."


@module_fixture
def source(tmp_path_factory):
    folder = tiny_checkpoint("deepseek_v3", tmp_path_factory.mktemp("mtp") / "teacher")
    add_mtp_layers(tiny_model("deepseek_v3"), folder)
    write_text(folder.parent / "text.jsonl", 80)
    return folder


def bytes_of(folder, start):
    """Return a block's bytes except experts, which transformers stores singly and merges again."""
    stored = {n: t for n, t in read_checkpoint(folder).items() if "experts" not in n}
    return {
        n.removeprefix(start): t.data()
        for n, t in stored.items()
        if n.startswith(start)
    }


def test_a_run_keeps_mtp_layers_or_drops_them_everywhere_and_says_so(
    source, text, tmp_path
):
    target = run_tiny(source, text, tmp_path / "run", remove=2, patch="linear")
    assert count_mtp_layers(Checkpoint.read(target / "model")) == 2
    assert bytes_of(target / "model", OF_MTP) == bytes_of(source, "model.layers.6.")
    kept = "ayers for multi-token prediction (MTP), which draft further tokens: 2, kept as they are"
    assert kept in (target / "model/README.md").read_text()
    for command in (["excise", "--patch=none", "--drop-mtp"], ["evaluate"], ["report"]):
        works(*command, target, "--overwrite")
    assert count_mtp_layers(Checkpoint.read(target / "model")) == 0
    assert not bytes_of(target / "model", OF_MTP)
    four = {"num_hidden_layers": 4, "num_nextn_predict_layers": 2}
    assert [is_mtp(f"model.layers.{i}.x", four) for i in range(3, 7)] == [
        False,
        True,
        True,
        False,
    ]
    said = "draft further tokens: 2, left out (--drop-mtp)"
    for file in ("report.md", "model/README.md"):
        assert said in (target / file).read_text()


def test_a_healing_keeps_mtp_layers(source, tmp_path):
    cut = source.parent / "student"
    excise(source, [2, 3], cut)
    healed = heal(options(source.parent, tmp_path / "healed", {"max_steps": 1}))
    assert bytes_of(healed, OF_MTP) == bytes_of(source, "model.layers.6.")
