"""What a run was measured on is what it is: a text or weights that change are noticed."""

import os

import pytest
from arena import Row
from heal_rows import heal

from isingcut.files.journal import Journal
from isingcut.files.writing import read_json

OPTIONS = (
    "--calibration text.txt --length 16 --samples 3 --rank-samples 3 --report-samples 3 "
    "--dtype float32"
)
CHANGED = "text.txt was changed since it was measured on; restore the old text"


def gone(arena):
    arena.text.rename(arena.here / "away")


def back_but_changed(arena):
    """As long as the text was, in other words."""
    arena.text.write_text((arena.here / "away").read_text(encoding="utf-8").swapcase())


def test_a_text_that_was_changed_is_not_read_on(arena):
    calibration = arena.run / "calibration.safetensors"
    measured = calibration.read_bytes()
    run = f"run model --remove 2 {OPTIONS} --random-states 30 --patch-tokens 1000 --out run"
    made = {"code": 0, "makes": ("run/*",)}
    arena.try_row(Row("the text is gone", run, "", gone, **made))
    arena.try_row(Row("it is another", run, CHANGED, back_but_changed))
    # Nobody names the text here: as where it is gone, the patch is fitted on what was measured.
    excise = "excise run --blocks 2,3 --overwrite --patch-tokens 1000"
    arena.try_row(Row("a cut", excise, **made))
    record = read_json(arena.run / "model" / "isingcut.json", "removal")
    fitted = record["patch"]["text"]
    assert fitted["samples"] == fitted["searched"]
    assert CHANGED in fitted["short"]
    assert calibration.read_bytes() == measured
    energy = f"energy model --remove 2 {OPTIONS} --out run --overwrite"
    arena.try_row(Row("measured anew", energy, **made))
    assert calibration.read_bytes() != measured


def overwritten(path):
    """The same size and header, another weight in the middle."""
    with path.open("r+b") as f:
        f.seek(os.path.getsize(path) // 2)
        f.write(b"\0\0\0\0")


@pytest.mark.parametrize(
    "command",
    [f"energy {{model}} {OPTIONS} --out {{here}}/new", "rank run --overwrite --random-states 31"],
)
def test_weights_that_are_overwritten_while_they_are_measured(arena, monkeypatch, command):
    put = Journal.put

    def late(journal, key, row):
        overwritten(arena.model / "model.safetensors")
        put(journal, key, row)

    monkeypatch.setattr(Journal, "put", late)
    line = "the weights in .*model changed while they were read"
    made = ("new*", "run/*", "model/model.safetensors")
    arena.try_row(Row("overwritten", command, line, makes=made))
    place = arena.here / "new" if command.startswith("energy") else arena.run
    name = "hamiltonian.safetensors" if command.startswith("energy") else "candidates.json"
    assert not (place / name).exists()
    assert not list(place.glob("*.journal*"))
    assert not (read_json(place / "run.json", "run")["stages"].get(name) or {}).get("done")


@pytest.mark.parametrize("place", ["model", "run/model"])
def test_weights_that_are_overwritten_while_they_are_healed(arena, monkeypatch, place):
    from isingcut.healing.training.train import Watch

    end = Watch.on_step_end

    def late(watch, *arguments, **rest):
        overwritten(arena.here / place / "model.safetensors")
        end(watch, *arguments, **rest)

    monkeypatch.setattr(Watch, "on_step_end", late)
    line = f"the weights in .*/{place} changed while they were read"
    arena.try_row(Row("overwritten", heal(), line, makes=(f"{place}/model.safetensors",)))
