"""Plans: what is timed, how often it is counted, and that nothing is written."""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from rich.filesize import decimal
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from isingcut.cli import show
from isingcut.console.progress import terminal
from isingcut.energies import registry
from isingcut.energies.base import price_states
from isingcut.energies.pairwise import list_removals
from isingcut.files.store import Store
from isingcut.options.parsed import Budgets
from isingcut.runs import context as contexts
from isingcut.runs import measuring
from isingcut.runs import prices as pricing
from isingcut.runs.constraints import removal_rows
from isingcut.runs.folder import read_config
from isingcut.runs.measuring import price_energy
from isingcut.runs.pipeline import make_plan, price_stages
from isingcut.runs.prices import Prices
from shared import (
    InfeasibleError,
    InputError,
    RunConfig,
    flags,
    parametrize,
    refuses,
    run_tiny,
)
from tiny import (
    Context,
    Replay,
    StreamedReplay,
    Work,
    gate_gradients,
    in_memory,
    measure,
    random_tokens,
    tiny_checkpoint,
)

LENGTH = 16


class Operations(TorchDispatchMode):
    """Counter of the operations of matrix products, forward and backward."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Without gradients, a linear map arrives as one operation and has to be decomposed.
        with self:
            found = func.decompose(*args, **(kwargs or {}))
        if found is not NotImplemented:
            return found
        found = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=found)
        return found


def prices(**given):
    """Return prices for four blocks that take one second each, and a head that takes two."""
    made = object.__new__(Prices)
    vars(made).update(
        config=RunConfig(model="m", length=LENGTH, samples=5),
        latency=(1.0,) * 4, once=2.0, reading=0.1,
        n=4, remove=2, weights=60, batch=64, logits=400, stream=8, graph=100, streamed=False,
        room=0, memory=SimpleNamespace(used=1000, total=10**9),
        largest=10, dtype=torch.float32, left=0.5, answers=0.0,
    )  # fmt: skip
    vars(made).update(given)
    return made


def stage(counted, name):
    return {one.name: one for one in price_stages(counted)}.get(name)


def test_energies_take_the_passes_that_are_counted(llama):
    """Compare operations relative to a measurement, not seconds."""
    replay = in_memory(llama)
    replay.attention = "eager"
    n = len(replay)
    text = random_tokens([LENGTH] * 4)

    def operations(run):
        with Operations() as own:
            run()
        return own.total

    one = operations(
        lambda: measure(replay, text, np.zeros((0, n), bool), work=Work(64))
    )
    took = operations(lambda: gate_gradients(replay, text, work=Work(64)))
    for name in ("fisher", "empirical-fisher"):
        passes = registry.get(name)().price(n, []).passes
        assert passes / 2 < took / one < passes * 2, name


def test_a_measurement_costs_its_blocks_heads_and_texts():
    counted = prices()
    # The original runs all four blocks; the states run what they do not share.
    states = np.array([[1, 0, 0, 0], [1, 1, 0, 0]], dtype=bool)
    each = (2 + 4) + (3 + 2) + 2 * 2
    assert counted.measurement(5, price_states(states)).seconds == 5 * LENGTH * each
    assert price_energy(counted, "fisher").seconds == pytest.approx(
        5 * LENGTH * 2.5 * 6
    )


def test_an_evaluation_costs_answers_and_a_file_to_unpack(llama, stub):
    def seconds(**given):
        return stage(prices(**given), "evaluate").seconds

    text = 32 * LENGTH * 6
    assert seconds() == pytest.approx(3 * text + 0.1 * 60)
    # Both models answer, the second with half of the blocks.
    assert seconds(answers=10.0) - seconds() == pytest.approx(15)
    stub("isingcut.runs.evaluating.find_gguf", Path("m.gguf"))
    monstrous = {"weights": 4 * 10**7, "reading": 0.0}
    assert seconds(**monstrous) == pytest.approx(5 * text + 1)
    config = RunConfig(model=llama, length=LENGTH, remove=2)
    assert Prices(Context(config), config).answers > 0


def test_a_patch_costs_passes_over_its_text():
    counted = prices()
    # Half of the blocks are removed: a deep cut.
    counted.config = counted.config.replace(patch="none")
    assert stage(counted, "patch") is None
    ranked = stage(counted, "rank").seconds
    for patch, passes, trial in (("tuned", 4, 2), ("linear", 2, 1)):
        counted.config = counted.config.replace(patch_tokens=100, patch=patch)
        assert stage(counted, "patch").seconds == pytest.approx(100 * passes * 6)
        # The ranking patches candidates near the lowest.
        assert stage(counted, "rank").seconds == pytest.approx(ranked + 100 * trial * 6)
    # With the default text, about 44 states are patched and measured on 2,048 tokens each, and
    # share half of that. The original runs once.
    counted.config = counted.config.replace(patch_tokens=65536)
    tokens = 65536 + 2048 * (2 + (4 + 40) * counted.left)
    assert stage(counted, "rank").seconds == pytest.approx(ranked + tokens * 6)


def test_a_range_is_ranked_at_each_of_its_removals_and_cut_at_none():
    config = RunConfig(model="m", length=LENGTH, samples=5, patch="none")
    counted = prices(config=config, n=20, latency=(1.0,) * 20)

    def seconds():
        return stage(counted, "rank").seconds, price_energy(counted, "refined").seconds

    ranks, searches = zip(*(seconds() for counted.remove in (8, 9, 10)), strict=True)
    counted.config = counted.config.replace(remove="8..10")
    ranked, searched = seconds()
    assert ranked == pytest.approx(sum(ranks))
    assert searched > max(searches)
    assert [one.name for one in price_stages(counted)] == ["rank"]


def test_without_a_removal_the_energy_alone_is_counted(llama):
    options = {"length": 16, "samples": 3, "patch": "linear", "heal": "10min"}
    for remove, energy, stages in (("", "pairwise", 1), ("2", "refined", 6)):
        plan = make_plan(RunConfig(model=llama, remove=remove, **options))
        parts = [e for e in plan["energies"] if e["name"] == energy]
        parts += plan["stages"][:stages]
        seconds = sum(part["seconds"] for part in parts)
        assert (plan["energy"], plan["seconds"]) == (energy, pytest.approx(seconds))


def test_a_budget_of_healing_takes_its_tokens_or_its_time():
    counted = prices()
    assert stage(counted, "heal") is None
    # One pass of the original, and three of a model of half its size.
    each = 6 + 3 * 0.5 * 6
    counted.config = counted.config.replace(heal="20ktokens")
    healed = stage(counted, "heal")
    assert (healed.seconds, healed.samples) == (20_000 * each, 19)
    assert healed.memory == 1000 + 60 + 16 * 0.5 * 15 + 64 * 100
    counted.config = counted.config.replace(heal="2h")
    assert stage(counted, "heal").seconds == pytest.approx(7200)
    counted.config = counted.config.replace(heal=True)
    assert "set a limit with --heal 10min" in stage(counted, "heal").impossible
    counted.streamed = True
    counted.room = 1
    assert "whole model in memory" in stage(counted, "heal").impossible


def test_a_search_costs_its_passes_or_its_minutes():
    counted = prices()
    pairs = price_energy(counted, "pairwise").seconds
    counted.config = counted.config.replace(effort="3")
    three = price_energy(counted, "refined").seconds
    assert three < pairs
    counted.config = counted.config.replace(effort="6")
    assert price_energy(counted, "refined").seconds == pytest.approx(2 * three)
    counted.config = counted.config.replace(effort="2min")
    assert price_energy(counted, "refined").seconds == 120


def test_where_streams_do_not_fit_the_disk_sets_the_pace():
    states = list_removals(4)
    # With room for one byte, every byte takes a sweep.
    sweeps = 5 * LENGTH * (len(states) + 1) * 8
    slow = prices(reading=1e6, streamed=True, room=1)
    assert price_energy(slow, "pairwise").seconds == (sweeps + 1) * 1e6 * slow.weights
    quick = prices(reading=0.0, streamed=True, room=10**9)
    assert (
        price_energy(quick, "pairwise").seconds
        == price_energy(prices(), "pairwise").seconds
    )
    assert price_energy(quick, "pairwise").memory == quick.memory.total
    # Gradients run every block once more.
    once = price_energy(prices(streamed=True, room=10**9), "fisher").seconds
    assert once == pytest.approx(5 * LENGTH * 3.5 * 6 + 0.1 * 60)


@dataclass(frozen=True)
class Whole:
    """An energy that needs all blocks in memory and has no price."""

    default_samples: ClassVar[int] = 7
    streams: ClassVar[bool] = False


def test_an_energy_of_a_plug_in_is_planned_or_said_not_to_be(llama, monkeypatch):
    monkeypatch.setattr(registry, "_registered", {"whole": Whole})
    plan = make_plan(RunConfig(model=llama, length=16))
    known = ["empirical-fisher", "fisher", "pairwise", "refined", "whole"]
    assert [e["name"] for e in plan["energies"]] == known
    (own,) = (e for e in plan["energies"] if e["impossible"])
    keys = ("name", "samples", "impossible")
    assert [own[key] for key in keys] == ["whole", 7, "not estimated"]
    streamed = price_energy(prices(streamed=True, room=1), "whole")
    assert streamed.impossible == "needs the whole model in memory"


def test_a_plan_for_every_energy_writes_nothing(
    llama, tmp_path, monkeypatch, answer, capsys
):
    monkeypatch.chdir(tmp_path)
    given = {"remove": 2, "length": 16, "samples": 8, "dtype": "float32"}
    found = answer("plan", llama, *flags(given))
    assert os.listdir(tmp_path) == []
    names = [e.name for e in found.energies]
    assert names == ["empirical-fisher", "fisher", "pairwise", "refined"]
    for line in found.energies + found.stages:
        assert min(line.seconds, line.memory) > 0, line.name
    stages = [s.name for s in found.stages]
    assert stages == ["load", "rank", "cut", "patch", "evaluate"]
    # An explicit --samples applies to all energies; otherwise each has a default of its own.
    assert {e.samples for e in found.energies} == {8}
    assert found.remove == 2
    assert 0 < found.checkpoint < found.weights
    show.show_plan(found)
    beside = decimal(found.card_bytes)
    assert f"a run needs 1.54 x weights + {beside}" in capsys.readouterr().out


def test_a_streamed_model_of_two_kinds_is_planned_for_a_budget(tmp_path):
    folder = tiny_checkpoint("qwen2_moe", tmp_path / "m")
    plan = make_plan(
        RunConfig(model=folder, budget="latency=30%", length=16, stream="on")
    )
    assert plan["streamed"]
    assert 0 < plan["remove"] < plan["blocks"]
    assert not any(e["impossible"] for e in plan["energies"])


def test_a_time_to_save_is_planned_for_the_sequence_that_a_run_times(llama, stub):
    # All six blocks take the same time.
    stub(StreamedReplay, "latency", [1e-3] * 6)
    config = RunConfig(model=llama, length=16, batch_tokens=64)
    budget = f"latency={1e3 * 128 / 64 * 0.45 * 6:.12f}us"
    config = config.replace(budget=budget)
    assert Prices(Context(config), config).remove == 3


def test_blocks_are_timed_at_the_context_of_a_latency_budget(llama, monkeypatch):
    monkeypatch.setattr(Replay, "latency", lambda replay, length: [length] * 6)
    config = RunConfig(model=llama, budget="latency=200s@100")
    blocks = Context(config).describe_blocks(config.budget)
    assert removal_rows(blocks, config)[-1].coefficients.tolist() == [100] * 6
    with refuses("not timed for this context of latency"):
        removal_rows(blocks, config.replace(budget="latency=20%"))
    with refuses("has a context of"):
        Context(config).describe_blocks(Budgets("latency=9s@900k"))


def test_a_budget_of_speed_counts_the_measured_steps_of_decoding(llama, stub):
    # Six seconds of 20 are in blocks.
    stub(contexts, "time_decoding", ([1.0] * 6, 20.0))
    config = RunConfig(model=llama, budget="speed=25%@20")
    blocks = Context(config).describe_blocks(config.budget)
    row = removal_rows(blocks, config)[1]
    # A quarter faster, a fifth of 20 seconds less.
    assert row.coefficients.tolist() == [1] * 6
    assert row.rhs == pytest.approx(4)
    with refuses("largest possible is speed=33.3%@20$", InfeasibleError):
        removal_rows(blocks, config.replace(budget="speed=34%@20"))
    with refuses("not timed for this context of speed", InputError):
        removal_rows(blocks, config.replace(budget="speed=25%"))
    with refuses("has a context of", InputError):
        Context(config).describe_blocks(Budgets("speed=9%@900k"))
    with refuses("is streamed from disk; raise --memory-limit", InputError):
        Context(config.replace(stream="on")).describe_blocks(config.budget)
    config = config.replace(length=16, batch_tokens=64)
    assert Prices(Context(config), config).remove >= 1


def test_a_run_prices_its_stages_by_the_model_in_memory(
    finished, tmp_path, monkeypatch
):
    """A block takes a second for a token, the output head two."""
    monkeypatch.setattr(
        Replay, "latency", lambda replay, length, rows: [length * rows] * 6
    )
    monkeypatch.setattr(
        pricing, "_time_head", lambda replay, batch: 2 * batch.positions
    )
    monkeypatch.setattr(pricing, "Store", None)
    folder = Store.open(Path(shutil.copytree(finished, tmp_path / "run")))
    config = read_config(folder).replace(patch="none")
    found = Prices(Context(config), config, folder.run.blocks)
    assert (found.once, found.latency) == (2, [1] * 6)
    assert (found.batch, found.remove) == (64, 2)
    lines = measuring.energy.price(found) + price_stages(found)
    assert [line.name for line in lines] == [
        "refined", "empirical-fisher", "rank", "cut", "evaluate",
    ]  # fmt: skip


@parametrize("quick", [False, True])
def test_a_run_says_at_its_start_how_long_it_takes(
    llama, text, tmp_path, capsys, quick, fails
):
    fails("isingcut.runs.pipeline.measure_and_rank", KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(
            llama,
            text,
            tmp_path / "run",
            remove=2,
            quick=quick,
            heal=True,
            progress=terminal,
        )
    said = capsys.readouterr().err
    assert re.search(r"this run takes about \d+ \w+ here \((refined|rank|patch) ", said)
    assert "heal depends on the text; set a limit with --heal 10min" in said
    assert bool(re.search(r"; with --quick \d+ \w+$", said.strip())) == (not quick)
