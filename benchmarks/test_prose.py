"""Tests of the count of prose words and of the check against the limits."""

from pathlib import Path

import pytest

import words

PAGE = """# A heading

<!-- table -->
Generated words.
<!-- end of table -->
One [two
three](page.md) `four.five six`. ![No
picture](a.svg) Seven!

    no code
| no | table |

- Eight:

      no code

  nine
- Ten
"""


def test_only_prose_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [" ".join(sentence) for sentence in words.sentences(PAGE)]
    assert found == ["One two three `fourfive six`.", "Seven!", "Eight:", "nine", "Ten"]

    monkeypatch.setattr(words, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(PAGE)
    (tmp_path / "docs" / "experiments.md").write_text("word " * 36)
    words.main()
    (tmp_path / "docs" / "page.md").write_text("word " * 36)
    with pytest.raises(SystemExit, match="longest_sentence_docs; shorten"):
        words.main()
    shown = capsys.readouterr().out
    assert (
        "words_readme: 9\nmean_sentence_readme: 1.8\nlongest_sentence_docs: 5\n"
        in shown
    )
    assert "docs/page.md: 36 words: word" in shown
