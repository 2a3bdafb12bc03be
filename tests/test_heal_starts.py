"""What a healing starts from: a cut, patched or not, by whichever tool; what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from healings import curve, healed, models, options
from isingcut.errors import (
    ArchitectureError,
    InputError,
    ModelError,
    OutputExistsError,
)
from isingcut.files.documents import HealingFile
from isingcut.files.writing import read_json
from isingcut.healing.heal import heal
from isingcut.models.cutting.checkpoint import excise
from isingcut.models.load import load
from isingcut.report.words import healing_warnings

__all__ = ["healed", "models"]

ONCE = {"max_steps": 1}


def test_patch_and_distillation_together(models: Path, tmp_path: Path) -> None:
    out = heal(options(models, tmp_path / "out", {"max_steps": 2}, patch="linear"))
    found = read_json(out / "healing.json", "healing")
    assert found["patch"]["scores"]["kl"] < found["before"]["kl"]
    assert len(found["steps"]) == 2
    alone = heal(options(models, tmp_path / "alone", patch="linear", method="none"))
    other = read_json(alone / "healing.json", "healing")
    assert other["after"]["kl"] == pytest.approx(found["patch"]["scores"]["kl"], rel=1e-6)
    assert other["steps"] == []


def test_the_patch_is_the_default_once(models: Path, tmp_path: Path) -> None:
    default: dict[str, Any] = {"patch": None, "method": "none"}
    out = heal(options(models, tmp_path / "out", **default))
    found = read_json(out / "healing.json", "healing")
    assert found["options"]["patch"] == "tuned"
    assert [cut["removed"] for cut in found["patch"]["cuts"]] == [[2, 3]]
    # What is healed already is not the exact cut, which a patch is fitted for.
    with pytest.raises(InputError, match="is healed already, and a patch is fitted to the exact"):
        heal(options(models, tmp_path / "never", student=str(out), patch="linear"))
    again = heal(options(models, tmp_path / "again", ONCE, student=str(out), patch=None))
    further = read_json(again / "healing.json", "healing")
    assert (further["start"], further["options"]["patch"]) == ("healed", "none")
    assert "patch" not in further


def test_where_nothing_can_be_patched_healing_goes_on(models: Path, tmp_path: Path) -> None:
    headless = tmp_path / "headless"
    record = json.dumps({"removed": [0], "of": 6})
    excise(models / "teacher", [0], headless, extra_files={"isingcut.json": record})
    given: dict[str, Any] = {"training": ONCE, "student": str(headless)}
    out = heal(options(models, tmp_path / "out", **given, patch=None))
    found = read_json(out / "healing.json", "healing")
    # This text is made of ten words, and its tokens are letters.
    unpatched, alike = healing_warnings(HealingFile.model_validate(found))
    assert unpatched.startswith("not patched: block 0 is removed")
    assert "of the report text stands in another split too" in alike
    assert (len(found["steps"]), found["options"]["patch"]) == (1, "none")
    for asked in ({"patch": "linear"}, {"patch": None, "method": "none"}):
        with pytest.raises(ArchitectureError, match="block 0 is removed"):
            heal(options(models, tmp_path / "no", **given, **asked))


def test_weights_that_are_no_cut_any_more_are_distilled_unpatched(
    models: Path, tmp_path: Path
) -> None:
    student = tmp_path / "trained"
    trained = load(models / "student", dtype="float32", device="cpu")
    with torch.no_grad():
        trained.model.lm_head.weight.mul_(1.01)
    trained.model.save_pretrained(student)
    for name in ("isingcut.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(models / "student" / name, student / name)
    out = heal(options(models, tmp_path / "out", ONCE, student=str(student), patch=None))
    found = read_json(out / "healing.json", "healing")
    assert "patch" not in found
    assert "logits" in found["unpatched"][0]["reason"]


def test_a_cut_by_another_tool_is_recognised_by_its_weights(
    models: Path, healed: Path, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign"
    shutil.copytree(models / "student", foreign, ignore=shutil.ignore_patterns("isingcut.json"))
    out = heal(options(models, tmp_path / "out", student=str(foreign)))
    assert curve(out) == curve(healed)
    found = read_json(out / "healing.json", "healing")
    assert (found["removed"], found["of"]) == ([2, 3], 6)
    again = heal(options(models, tmp_path / "again", ONCE, student=str(out)))
    assert read_json(again / "healing.json", "healing")["removed"] == [2, 3]


def test_other_weights_are_not_taken_for_a_cut(models: Path, tmp_path: Path) -> None:
    merged = load(models / "student", dtype="float32", device="cpu")
    with torch.no_grad():
        next(iter(merged.model.get_submodule("model.layers.2").parameters())).mul_(1.5)
    merged.model.save_pretrained(tmp_path / "merged")
    merged.tokenizer.save_pretrained(tmp_path / "merged")
    with pytest.raises(InputError, match="its block 2 is no block of teacher behind its block 1"):
        heal(options(models, tmp_path / "a", student=str(tmp_path / "merged")))
    (tmp_path / "merged" / "isingcut.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="no readable record of a cut"):
        heal(options(models, tmp_path / "b", student=str(tmp_path / "merged")))
    with pytest.raises(InputError, match="is no checkpoint"):
        heal(options(models, tmp_path / "c", student=str(tmp_path)))


def test_what_is_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="last:5: the cut model has 4 blocks"):
        heal(options(models, tmp_path / "a", method="last:5"))
    with pytest.raises(InputError, match="lacks no block of teacher"):
        heal(options(models, tmp_path / "b", student=str(models / "teacher")))
    with pytest.raises(InputError, match="a model of 6 blocks, but the teacher"):
        heal(options(models, tmp_path / "c", teacher=str(models / "student")))
    with pytest.raises(InputError, match="student, which this command reads"):
        heal(options(models, models / "student"))
    with pytest.raises(OutputExistsError):
        heal(options(models, tmp_path))
    blown = {"learning_rate": 10.0, "warmup_steps": 0, "weight_decay": 1e35}
    with pytest.raises(ModelError, match=r"set a lower learning_rate .*, here 10"):
        heal(options(models, tmp_path / "d", blown))
    for bad in ({"method": "qlora"}, {"method": "last:0"}, {"method": "none"}):
        with pytest.raises(InputError):
            options(models, tmp_path / "e", **bad).validate()
