"""What a run was measured on is what it is: a text that changes is noticed."""

from arena import Row

from isingcut.files.writing import read_json

OPTIONS = (
    "--calibration text.txt --length 16 --samples 3 --rank-samples 3 --report-samples 3 "
    "--dtype float32"
)
CHANGED = "text.txt was changed since it was measured on; put the old text back"


def gone(arena):
    arena.text.rename(arena.here / "away")


def back_but_changed(arena):
    """As long as the text was, in other words."""
    arena.text.write_text((arena.here / "away").read_text(encoding="utf-8").swapcase())


def test_a_text_that_was_changed_is_not_read_on(arena):
    calibration = arena.run / "calibration.safetensors"
    measured = calibration.read_bytes()
    run = f"run model --remove 2 {OPTIONS} --random-states 30 --out run"
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
