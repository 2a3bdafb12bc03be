"""A plug-in that cannot be imported is blamed where it was named, and harms nothing else."""

import json

import pytest
from arena import Row, call

from isingcut.energies import registry
from isingcut.errors import InputError

ROOMS = ("energies", "solvers", "baselines")
CONTENTS = {
    "raises": ("1 / 0", "ZeroDivisionError: division by zero"),
    "ends": ("raise SystemExit('bye')", "SystemExit: bye"),
    "imports": ("import zorp_zorp", "ModuleNotFoundError: No module named 'zorp_zorp'"),
    "empty": ("", "AttributeError: .*no attribute 'Part'"),
}
BLAMED = r"'{name}' comes from the plug-in their-parts, which cannot be imported \({words}"


@pytest.fixture(autouse=True)
def plugins(tmp_path, monkeypatch):
    """An installed package with broken parts in every room."""
    metadata = tmp_path / "their_parts-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: their-parts\nVersion: 1.0\n", encoding="utf-8")
    for name, (content, _) in CONTENTS.items():
        (tmp_path / f"theirs_{name}.py").write_text(content, encoding="utf-8")
    parts = "\n".join(f"{name} = theirs_{name}:Part" for name in CONTENTS)
    groups = "\n".join(f"[isingcut.{room}]\n{parts}" for room in ROOMS)
    (metadata / "entry_points.txt").write_text(groups, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize("name", CONTENTS)
def test_a_broken_plugin_that_is_named_is_blamed(arena, name):
    line = BLAMED.format(name=name, words=CONTENTS[name][1])
    arena.try_row(Row("solve", f"solve {{run}} --solver {name}", line))
    run = "run {model} --remove 2 --calibration {text} --out {here}/new"
    arena.try_row(Row("run", f"{run} --energy {name}", line))
    with pytest.raises(InputError, match=line):
        registry.get(name)


def test_a_broken_plugin_that_nobody_named_harms_nothing(arena):
    code, out, err = call(["ls", "--json"])
    assert code == 0, err
    found = json.loads(out)
    assert all({*CONTENTS} <= {*found[room]} for room in ROOMS)
    arena.try_row(Row("solve", "solve {run} --remove 3", code=0, makes=("run/*",)))
    again = "run model --calibration text.txt --remove 2 --out run --dtype float32 --length 16"
    sizes = "--samples 3 --rank-samples 3 --report-samples 3 --random-states 30 --patch-tokens 1000"
    arena.try_row(Row("run", f"{again} {sizes}", code=0, makes=("run/*",)))
