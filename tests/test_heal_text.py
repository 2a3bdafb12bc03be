"""The text of healing shares no document with what it reports on or was measured on."""

from __future__ import annotations

import json

import pytest

from healings import WORDS, write_text
from isingcut.data.healing_text import build
from isingcut.errors import CalibrationError
from isingcut.testing.tiny import tiny_tokenizer


def test_no_document_is_trained_on_and_reported(tmp_path):
    from isingcut.data.calibration import build as calibrate

    source, tokenizer = str(write_text(tmp_path / "text.jsonl", 80)), tiny_tokenizer()
    used = calibrate(
        source, tokenizer, samples=4, rank_samples=2, report_samples=2, length=32, seed=3
    )
    found = build(source, tokenizer, samples=None, report_samples=3, length=48, seed=3, used=used)

    def numbers(rows):
        text = " ".join(tokenizer.decode(row) for row in rows)
        return {w for w in text.replace(".", " ").split() if w.isdigit()}

    train, report = numbers(found.train.input_ids), numbers(found.report.input_ids)
    taken = set().union(*(numbers(s.input_ids) for s in used.splits.values()))
    # Numbers cut in two at a sample's end could meet by chance; whole ones are nearly all.
    assert len(report) >= 2
    assert len(train) > 20
    assert not {n for n in train if len(n) == 2} & {n for n in report | taken if len(n) == 2}
    assert found.train.input_ids.shape[1] == 48
    with pytest.raises(CalibrationError, match="too short"):
        build(source, tokenizer, samples=900, report_samples=2, length=48, seed=3)


def test_conversations_of_a_calibration_are_left_out(tmp_path):
    from isingcut.data.calibration import build as calibrate

    path = tmp_path / "chat.jsonl"
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"{w} {i}?"},
                {"role": "assistant", "content": f"{i} times {w}"},
            ]
        }
        for i, w in enumerate(WORDS * 2)
    ]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    tokenizer = tiny_tokenizer()
    used = calibrate(
        str(path), tokenizer, samples=3, rank_samples=2, report_samples=2, length=64, seed=0
    )
    found = build(
        str(path), tokenizer, samples=None, report_samples=2, length=64, seed=0, used=used
    )
    rows = [tuple(r) for t in (found.train, found.report) for r in t.input_ids.tolist()]
    assert len(rows) == len(set(rows)) == len(lines) - 7
