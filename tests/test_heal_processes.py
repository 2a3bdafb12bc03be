"""Several processes heal one student."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from healings import curve, flags_of, healed, models, options, stored
from isingcut.files.writing import read_json
from isingcut.healing.heal import heal
from isingcut.models.load import load
from isingcut.options.config import HealConfig
from ranks import join, launch, say_into, type_in

__all__ = ["healed", "models"]


def _types(said: Path, *arguments: object) -> None:
    """The command line, in one of the processes of a launcher."""
    say_into(said)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    type_in(*arguments)


def test_two_processes_train_as_one_does(models: Path, healed: Path, tmp_path: Path) -> None:
    """Same global batch, half of it in each of two gloo processes."""
    config = options(models, tmp_path / "out", {"per_device_train_batch_size": 1})
    flags = flags_of(config)
    said = tmp_path / "said"
    ranks, _store = launch(2, _types, said, "--debug", "heal", config.student, *flags)
    assert join(ranks) == [0, 0], said.read_text()
    found = read_json(tmp_path / "out" / "healing.json", "healing")
    assert found["processes"] == 2
    for mine, theirs in zip(found["steps"], curve(healed), strict=True):
        assert mine["tokens"] == theirs["tokens"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    one, two = (load(f, dtype="float32").model.state_dict() for f in (healed, tmp_path / "out"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)


def test_two_processes_patch_as_one_does(models: Path, tmp_path: Path) -> None:
    one = heal(options(models, tmp_path / "one", method="none", patch="linear"))
    config, said = options(models, tmp_path / "two", method="none", patch="linear"), tmp_path / "s"
    ranks, _store = launch(2, _heals, said, config)
    assert join(ranks) == [0, 0], said.read_text()
    assert stored(one) == stored(tmp_path / "two")


def _heals(said: Path, config: HealConfig) -> None:
    say_into(said)
    heal(config)


def _two_minds(config: HealConfig, dtypes: Path, said: Path) -> None:
    """Heal, where only rank 0's trial finds bfloat16 faster; which dtype the teacher has."""
    from isingcut.healing import heal as home
    from isingcut.models import device

    say_into(said)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    rank = os.environ["RANK"]
    device._bfloat16_is_faster = lambda: rank == "0"  # type: ignore[assignment]
    torch.cpu.get_capabilities = lambda: {"avx512_bf16": True}

    def noted(folder: Path, **options: Any) -> Any:
        loaded = load(folder, **options)
        if str(folder).endswith("teacher"):
            dtypes.with_suffix(f".{rank}").write_text(str(loaded.dtype))
        return loaded

    home.load = noted  # type: ignore[assignment]
    home.heal(config)


def test_processes_heal_in_the_dtype_that_the_main_one_picks(models: Path, tmp_path: Path) -> None:
    config = options(models, tmp_path / "out", {"max_steps": 1}, dtype="auto")
    said = tmp_path / "said"
    ranks, _store = launch(2, _two_minds, config, tmp_path / "dtype", said)
    assert join(ranks) == [0, 0], said.read_text()
    picked = {(tmp_path / f"dtype.{rank}").read_text() for rank in (0, 1)}
    assert picked == {"torch.bfloat16"}
