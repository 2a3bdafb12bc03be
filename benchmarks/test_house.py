"""Tests of the count of code lines and of the check against the ceilings."""

from pathlib import Path

import pytest

import house

SOURCE = (
    '"""Title."""\n\n# Why.\nx = [\n    1,\n]  # end\n"""What x is."""\n\n\ndef f():\n    "..."\n'
)


def test_lines_are_held_below_the_ceiling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(house, "ROOT", tmp_path)
    for folder in ("src/isingcut/ising", "benchmarks", "studies/quality"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "part.py").write_text(SOURCE)
    ceiling = "[tool.isingcut.ceiling]\nisingcut = 4\ntests = 0\nbenchmarks = "
    (tmp_path / "pyproject.toml").write_text(f"{ceiling}8\n")
    house.main()
    (tmp_path / "pyproject.toml").write_text(f"{ceiling}7\n")
    with pytest.raises(SystemExit, match="8 code lines of benchmarks, the ceiling is 7: delete"):
        house.main()
    assert "      4  studies/quality\n" in capsys.readouterr().out
