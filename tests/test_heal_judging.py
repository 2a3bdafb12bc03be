"""A healing ends if a domain gets worse, and a candidate's if it is behind another one's."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from healings import (
    Killed,
    curve,
    flags_of,
    healed,
    killing,
    models,
    options,
    result,
    shapes,
    stored,
)
from isingcut.files.healings import HealingCheck, HealingFile, HealingStop
from isingcut.healing import heal as home
from isingcut.healing.heal import heal
from isingcut.healing.job import Domains
from isingcut.healing.training import train
from isingcut.measure.losses import difference
from isingcut.report.words import healing_warnings
from ranks import run, type_in
from shared import parametrize, read_document
from tiny import TokenSet, load

__all__ = ["healed", "models"]

EIGHT = {"max_steps": 8}
TEXT = TokenSet.from_rows([[1] * 11] * 8, parts=["a", "b"] * 4)


def check(step, a, b, noise=0.0):
    """Return a check with KL a and b on two parts; noise raises early samples, lowers late ones."""
    each = np.repeat(np.array([1, 1, -1, -1]) * noise, 2)
    return HealingCheck(step=step, kl_sums=(10 * (np.tile([a, b], 4) + each)).tolist())


def test_a_difference_is_paired():
    for first, second, wanted in (
        (check(0, 1, 1, 9), check(0, 2, 2, 9), (1, 0)),
        (check(0, 1, 1), check(0, 1, 1, 2), (0, 2 / np.sqrt(7))),
    ):
        found = difference(first.kl_sums, second.kl_sums, np.full(8, 10))
        assert found == pytest.approx(wanted, abs=1e-12)


def test_a_part_that_gets_worse_ends_a_healing():
    judge = Domains(TEXT)
    start = check(0, 1, 1)
    better = check(5, 0.5, 0.9)
    found = judge.verdict([start, better, check(10, 0.2, 1.2)])
    assert found.kept == 5
    words = "on b the model got worse, KL 1.0000 before, 0.9000 and then 1.2000"
    assert words in found.why
    # An earlier check that was worse than the start is not kept either.
    none = judge.verdict([start, check(5, 0.5, 1.1), check(10, 0.2, 1.2)])
    assert none.kept == 0
    assert "no step is kept: on b the model got worse" in none.why
    for checks in (
        # Still better than at the start, within the noise, or at once.
        [better, check(10, 0.2, 0.95)],
        [better, check(10, 0.2, 1.2, noise=3)],
        [check(5, 3, 3)],
        # Worse than at the start, but getting better.
        [check(5, 3, 3), check(10, 2, 2)],
    ):
        assert judge.verdict([start, *checks]) is None
    whole = Domains(TokenSet.from_rows([[1] * 11] * 8)).verdict(
        [start, better, check(10, 2, 2)]
    )
    assert "are kept: the model got worse" in whole.why


class Stops(Domains):
    """Ends every training at its third check."""

    def verdict(self, checks):
        assert [c.step for c in checks] == [0, 2, 4, 6][: len(checks)]
        return HealingStop(why="enough", kept=2) if len(checks) == 3 else None


def kl_of(healing, number):
    """Return the KL of a check."""
    return sum(healing.checks[number].kl_sums) / healing.report_tokens


def test_checks_are_the_divergence_on_text_held_out(healed):
    found = result(healed)
    assert [c.step for c in found.checks] == [0, 2, 4]
    assert kl_of(found, 0) == pytest.approx(found.before.kl, rel=1e-4)
    assert kl_of(found, 2) == pytest.approx(found.after.kl, rel=1e-3)
    assert "stopped" not in found


def test_the_weights_of_the_check_before_are_kept(models, tmp_path, monkeypatch):
    monkeypatch.setattr(home, "Domains", Stops)
    out = heal(options(models, tmp_path / "out", EIGHT))
    found = result(out)
    assert found.stopped == {"why": "enough", "kept": 2}
    assert len(curve(out)) == 4
    # The kept model is the one at step 2 in a schedule of eight steps.
    assert found.after.kl == pytest.approx(kl_of(found, 1), rel=1e-3)
    record = read_document(out / "healing.json", HealingFile)
    assert "enough" in healing_warnings(record)
    # The same after a kill between two checks, and after one right behind a check.
    for after in (3, 4):
        config = options(models, tmp_path / f"again{after}", EIGHT)
        with pytest.raises(Killed):
            heal(config, progress=killing(after))
        heal(config)
        assert stored(Path(config.out)) == stored(out)


def test_a_training_that_was_for_the_worse_leaves_what_it_began_with(
    models, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        Stops,
        "verdict",
        lambda self, checks: HealingStop(why="no", kept=0) if checks[2:] else None,
    )
    monkeypatch.setattr(home, "Domains", Stops)
    out = heal(options(models, tmp_path / "out", EIGHT))
    assert stored(out) == stored(models / "student")
    found = result(out)
    assert found.stopped == {"why": "no", "kept": 0}
    assert found.after.kl == found.before.kl


def _stopped(*arguments):
    home.Domains = Stops
    type_in(*arguments)


def test_two_processes_stop_together(models, tmp_path):
    config = options(
        models, tmp_path / "out", {**EIGHT, "per_device_train_batch_size": 1}
    )
    words = ("--debug", "heal", config.student, *flags_of(config))
    run([0, 0], tmp_path / "said", _stopped, *words)
    found = result(tmp_path / "out")
    assert (found.processes, found.stopped.kept) == (2, 2)
    assert found.after.kl == pytest.approx(kl_of(found, 1), rel=1e-3)


def _trains(dies, *arguments):
    """Run the command line in one of two processes; kill rank 1 after the step ``dies``."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Only rank 0's processor is fast in bfloat16.
    torch.cpu.get_capabilities = lambda: {"amx_bf16": os.environ["RANK"] == "0"}
    end = train.Watch.on_step_end

    def step(watch, args, state, control, **rest):
        end(watch, args, state, control, **rest)
        assert (
            "--dtype=auto" not in arguments or watch.job.teacher.dtype == torch.bfloat16
        )
        if state.global_step == dies and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    train.Watch.on_step_end = step
    type_in("--debug", "heal", *arguments)


@parametrize(
    "trainer, more, exact",
    [
        ({}, {}, 1e-6),
        ({"fsdp": True}, {}, 1e-6),
        # Half of the rounding of bfloat16, 2**-8.
        ({"fsdp": True}, {"dtype": "auto"}, 2e-3),
        ({"fsdp": True}, {"method": "lora:4"}, 1e-6),
    ],
)
def test_two_processes_train_as_one_does(
    models, healed, tmp_path, trainer, more, exact
):
    """Each has half of a batch, and half of the model if it is sharded; also after a kill."""
    half = {"dtype": "bfloat16"} if "dtype" in more else {}
    one = (
        heal(options(models, tmp_path / "one", **{**more, **half})) if more else healed
    )
    config = options(
        models, tmp_path / "out", {"per_device_train_batch_size": 1, **trainer}, **more
    )
    words = (config.student, *flags_of(config))
    run([1, -signal.SIGKILL], tmp_path / "said", _trains, 3, *words)
    assert "isingcut: the 2 processes lost contact (" in (tmp_path / "said").read_text()
    sharded = list(
        tmp_path.glob(".out.healing/trainer/checkpoint-2/pytorch_model_fsdp.bin")
    )
    assert len(sharded) == bool(trainer)
    run([0, 0], tmp_path / "said", _trains, 0, *words)
    found = result(tmp_path / "out")
    assert found.processes == 2
    for mine, theirs in zip(found.steps, curve(one), strict=True):
        assert mine.tokens == theirs["tokens"]
        # The loss of the first step is not rounded even in half precision.
        rel = exact if mine.step > 1 else 1e-6
        assert mine.loss == pytest.approx(theirs["loss"], rel=rel)
    assert shapes(tmp_path / "out") == shapes(one)
    first, second = (
        load(f, dtype="float32").model.state_dict() for f in (one, tmp_path / "out")
    )
    torch.testing.assert_close(second, first, rtol=1e-3, atol=min(10 * exact, 1e-2))


def test_two_processes_patch_as_one_does(models, tmp_path):
    one = heal(options(models, tmp_path / "one", method="none", patch="linear"))
    config = options(models, tmp_path / "two", method="none", patch="linear")
    run([0, 0], tmp_path / "said", heal, config)
    assert stored(one) == stored(tmp_path / "two")
