"""A healing ends where a domain gets worse, and a candidate's where it is behind another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from healings import Killed, curve, flags_of, killing, models, options, stored
from isingcut.data.tokens import TokenSet
from isingcut.files.documents import HealingFile
from isingcut.files.writing import read_document, read_json
from isingcut.healing import heal as home
from isingcut.healing.heal import heal
from isingcut.healing.judging import Domains, Race, Verdict, difference
from isingcut.healing.training.train import loss_at_the_end
from isingcut.report.words import healing_warnings, sentence
from ranks import join, launch, say_into, type_in

__all__ = ["models"]

EIGHT = {"max_steps": 8}
TEXT = TokenSet.from_rows([[1] * 11] * 8, parts=["a", "b"] * 4)


def check(step: int, a: float, b: float, noise: float = 0.0) -> dict[str, Any]:
    """KL a and b on the two parts; the first samples of both are above the last by the noise."""
    each = np.repeat(np.array([1, 1, -1, -1]) * noise, 2)
    return {"step": step, "kl_sums": (10 * (np.tile([a, b], 4) + each)).tolist()}


def test_a_difference_is_paired() -> None:
    counts = np.full(8, 10)
    mean, error = difference(check(0, 1, 1, 9)["kl_sums"], check(0, 2, 2, 9)["kl_sums"], counts)
    assert (mean, error) == (pytest.approx(1.0), pytest.approx(0.0, abs=1e-12))
    mean, error = difference(check(0, 1, 1)["kl_sums"], check(0, 1, 1, 2)["kl_sums"], counts)
    assert error == pytest.approx(2 / np.sqrt(7))


def test_a_part_that_gets_worse_ends_a_healing() -> None:
    judge = Domains(TEXT)
    start, better = check(0, 1, 1), check(5, 0.5, 0.9)
    found = judge.verdict([start, better, check(10, 0.2, 1.2)])
    assert found is not None
    assert found.kept == 5
    assert "on b the model got worse, KL 1.0000 before, 0.9000 and then 1.2000" in found.why
    # What was worse than in the beginning at the check before is not kept either.
    none = judge.verdict([start, check(5, 0.5, 1.1), check(10, 0.2, 1.2)])
    assert none is not None
    assert none.kept == 0
    assert "nothing of it is kept: on b the model got worse" in none.why
    # Not where it is better than in the beginning, not within the noise, and not at once.
    assert judge.verdict([start, better, check(10, 0.2, 0.95)]) is None
    assert judge.verdict([start, better, check(10, 0.2, 1.2, noise=3)]) is None
    assert judge.verdict([start, check(5, 3, 3)]) is None
    # A part that is worse than it was and gets better may go on.
    assert judge.verdict([start, check(5, 3, 3), check(10, 2, 2)]) is None
    whole = Domains(TokenSet.from_rows([[1] * 11] * 8)).verdict([start, better, check(10, 2, 2)])
    assert whole is not None
    assert "are kept: the model got worse" in whole.why


def test_a_candidate_far_behind_is_dropped() -> None:
    leader = [check(0, 1, 1), check(5, 0.5, 0.5, 1), check(10, 0.3, 0.3)]
    behind, near = [check(0, 2, 2), check(5, 0.9, 0.9, 1)], [check(5, 0.6, 0.5, 2)]
    found = Race(TEXT, leader).verdict(behind)
    assert found == Verdict("behind by 0.4000 ± 0.0000 nats at step 5")
    assert Race(TEXT, leader).verdict(behind[:1]) is None
    assert Race(TEXT, leader).verdict(near) is None
    assert Race(TEXT, leader).verdict([check(7, 9, 9)]) is None
    assert Race(TEXT, None).verdict(behind) is None


class Stops(Domains):
    """Ends every training at its third check."""

    def verdict(self, checks: Sequence[Mapping[str, Any]]) -> Verdict | None:
        assert [c["step"] for c in checks] == [0, 2, 4, 6][: len(checks)]
        return Verdict("enough", 2) if len(checks) == 3 else None


def test_checks_are_the_divergence_on_text_held_out(models: Path, tmp_path: Path) -> None:
    out = heal(options(models, tmp_path / "out"))
    found = read_json(out / "healing.json", "healing")
    assert [c["step"] for c in found["checks"]] == [0, 2, 4]
    kl = [sum(c["kl_sums"]) / found["report_tokens"] for c in found["checks"]]
    assert kl[0] == pytest.approx(found["before"]["kl"], rel=1e-4)
    assert kl[2] == pytest.approx(found["after"]["kl"], rel=1e-3)
    assert "stopped" not in found


def test_the_weights_of_the_check_before_are_kept(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(home, "Domains", Stops)
    out = heal(options(models, tmp_path / "out", EIGHT))
    found = read_json(out / "healing.json", "healing")
    assert found["stopped"] == {"why": "enough", "kept": 2}
    assert len(curve(out)) == 4
    # At the second step the model is what it was then, in a schedule of eight.
    kl = sum(found["checks"][1]["kl_sums"]) / found["report_tokens"]
    assert found["after"]["kl"] == pytest.approx(kl, rel=1e-3)
    record = read_document(out / "healing.json", HealingFile)
    assert "enough" in healing_warnings(record)
    assert "Enough." in sentence("healing_words", record)
    # The same where it was killed in between, and right behind the check.
    for after in (3, 4):
        config = options(models, tmp_path / f"again{after}", EIGHT)
        with pytest.raises(Killed):
            heal(config, progress=killing(after))
        heal(config)
        assert stored(Path(config.out)) == stored(out)


def test_a_training_that_was_for_the_worse_leaves_what_it_began_with(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Stops, "verdict", lambda self, checks: Verdict("no", 0) if checks[2:] else None
    )
    monkeypatch.setattr(home, "Domains", Stops)
    out = heal(options(models, tmp_path / "out", EIGHT))
    assert stored(out) == stored(models / "student")
    found = read_json(out / "healing.json", "healing")
    assert found["stopped"] == {"why": "no", "kept": 0}
    assert found["after"]["kl"] == found["before"]["kl"]


def test_the_last_loss_is_foretold_by_a_power_law() -> None:
    losses = [9.0, *(2.0 * step**-0.25 for step in range(2, 41))]
    assert loss_at_the_end(losses[:7], 40) is None
    assert loss_at_the_end(losses[:15], 80) is None
    # The first step, of the warm-up, has no say.
    assert loss_at_the_end(losses[:10], 40) == pytest.approx(losses[-1])
    assert loss_at_the_end([1.0, 1.0, *range(2, 12)], 20) is None


def _stopped(said: Path, *arguments: object) -> None:
    say_into(said)
    home.Domains = Stops  # type: ignore[misc]
    type_in(*arguments)


def test_two_processes_stop_together(models: Path, tmp_path: Path) -> None:
    config = options(models, tmp_path / "out", {**EIGHT, "per_device_train_batch_size": 1})
    flags = flags_of(config)
    said = tmp_path / "said"
    ranks, _store = launch(2, _stopped, said, "--debug", "heal", config.student, *flags)
    assert join(ranks) == [0, 0], said.read_text()
    found = read_json(tmp_path / "out" / "healing.json", "healing")
    assert (found["processes"], found["stopped"]["kept"]) == (2, 2)
    kl = sum(found["checks"][1]["kl_sums"]) / found["report_tokens"]
    assert found["after"]["kl"] == pytest.approx(kl, rel=1e-3)
