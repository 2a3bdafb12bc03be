"""Tests of the counts, of the check against the ceilings, and of packed lines."""

from pathlib import Path

import pytest

import house

SOURCE = (
    '"""Title."""\n\n# RunConfig\nx = [\n    1,\n]  # end\n'
    '"""What x is."""\n\n\ndef f():\n    "..."\n'
)


def test_counts_stay_below_their_ceilings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(house, "ROOT", tmp_path)
    for folder in ("src/isingcut/ising", "benchmarks", "studies/quality", "docs"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "part.py").write_text(SOURCE)
    (tmp_path / "src/isingcut/page.j2").write_text("one\ntwo\n")
    (tmp_path / "docs/page.md").write_text("# Three *plain* words\n")
    ceiling = {
        "code_tokens_package": 11,
        "code_tokens_studies": 22,
        "code_tokens_tests": 0,
        "shipped_lines_beside_python": 2,
        "words_docs": 4,
        "places_for_config": 1,
    }

    def check(**lower: int) -> None:
        lines = [f"{name} = {most}" for name, most in (ceiling | lower).items()]
        (tmp_path / "pyproject.toml").write_text(
            "[tool.isingcut.ceiling]\n" + "\n".join(lines) + "\n"
        )
        house.main()

    check()
    assert "code_tokens_studies: 22\n" in capsys.readouterr().out
    for name, most in ceiling.items():
        if most:
            with pytest.raises(
                SystemExit, match=f"{name} is {most}, the ceiling is {most - 1}"
            ):
                check(**{name: most - 1})


@pytest.mark.parametrize(
    "line, packed",
    [
        ("a, b = 1, f(2)", True),
        ("self.a, self.b = x, y", True),
        ("a, b = b, a", False),
        ("a, b = f()", False),
        ("total, at = total + 1, 0", False),
    ],
)
def test_a_line_that_assigns_independent_values_is_packed(
    line: str, packed: bool
) -> None:
    assert list(house.find_packed(line)) == [1] * packed
