"""Plans: what is timed, how often it is counted, what is advised, and that nothing is written."""

import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from isingcut.cli import main as cli
from isingcut.energies.pairwise import removals
from isingcut.measure.curvature import KINDS, gate_curvature
from isingcut.measure.gradients import gate_gradients
from isingcut.measure.losses import measure
from isingcut.models.architectures import find_stack, stack_modules
from isingcut.models.load import load
from isingcut.models.parts import EMBED, HEAD
from isingcut.models.replay import Replay
from isingcut.models.streaming.replay import open_model
from isingcut.options.config import RunConfig
from isingcut.runs.plan import advise, command, make_plan
from isingcut.runs.prices import Prices
from isingcut.runs.probe import Timings, only, probe, random_text

CPU = torch.device("cpu")
LENGTH = 16


class Operations(TorchDispatchMode):
    """Counts those of matrix products, forward and backward."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Without gradients to take, a linear map comes here whole.
        with self:
            found = func.decompose(*args, **(kwargs or {}))
        if found is not NotImplemented:
            return found
        found = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=found)
        return found


def whole(folder):
    model = load(folder, dtype="float32", device="cpu").model.requires_grad_(False)
    return Replay(model, stack_modules(model, find_stack(model)))


def timings(**given):
    return Timings(
        **(
            {"latency": (1.0,) * 4, "reading": 0.1, "blocks": 4.0, "once": 2.0, "saved": 0.0}
            | given
        )
    )


def prices(**given):
    """Of four blocks that take one second each, and a head of two."""
    found = object.__new__(Prices)
    vars(found).update(
        config=RunConfig(model="m", length=LENGTH, samples=5),
        timings=timings(),
        n=4, remove=2, weights=60, batch=64, logits=400, stream=8, streamed=False, room=0,
        memory=SimpleNamespace(used=1000, total=10**9),
        store=SimpleNamespace(largest=10, size=lambda part: 10, dtype=torch.float32),
        startup=1.0, left=0.5, stored=30, inner=6,
    )  # fmt: skip
    vars(found).update(given)
    return found


def test_parts_grow_to_what_the_whole_model_takes(llama, monkeypatch):
    """With a clock that counts operations, the parts of three blocks foretell those of all six."""
    monkeypatch.setattr("isingcut.runs.probe._BLOCKS", 3)
    model, store, _ = open_model(llama, dtype=torch.float32, device=CPU)
    with Operations() as ran:
        found = probe(model, store, LENGTH, 64, attention="eager", clock=lambda: ran.total)
    replay = whole(llama)
    replay.attention = "eager"
    text = random_text(replay.model, 4, LENGTH)

    def takes(run):
        with Operations() as own:
            run()
        return own.total / (4 * LENGTH)

    n = len(replay)
    none = np.zeros((0, n), dtype=bool)
    forward = takes(lambda: measure(replay, text, none, batch_tokens=64))
    states = takes(lambda: measure(replay, text, removals(n), batch_tokens=64))
    slopes = takes(lambda: gate_gradients(replay, text, batch_tokens=64))
    assert found.blocks + found.once == pytest.approx(forward, rel=0.01)
    assert min(found.blocks, found.once) > 0
    counted = prices(n=n, timings=found, config=RunConfig(model="m", length=LENGTH, samples=1))
    assert counted.energy("pairwise").seconds == pytest.approx(LENGTH * states, rel=0.01)
    assert counted.energy("fisher").low < LENGTH * slopes < counted.energy("fisher").high
    for kind in KINDS:
        rows = takes(lambda kind=kind: gate_curvature(replay, text, kind, batch_tokens=64))
        estimate = counted.energy(kind)
        assert estimate.low < LENGTH * rows < estimate.high, kind


def test_a_measurement_costs_its_blocks_heads_and_texts():
    counted = prices()
    # The original runs all four blocks; the states run what they do not share.
    states = np.array([[1, 0, 0, 0], [1, 1, 0, 0]], dtype=bool)
    each = (2 + 4) + (3 + 2) + 2 * 2
    assert counted._states("rank", states, 5).seconds == 5 * LENGTH * each
    assert counted.energy("fisher").seconds == pytest.approx(5 * LENGTH * 2.3 * 6)
    # A row for each block.
    assert counted.energy("hessian").seconds == pytest.approx(5 * LENGTH * 4 * (1.7 * 4 + 2.5 * 2))


def test_a_patch_costs_two_passes_and_its_maps_and_tuning_more():
    counted = prices()
    counted.config = counted.config.replace(patch_tokens=100)
    tuned = {stage.name: stage for stage in counted.stages()}["patch"].seconds
    counted.config = counted.config.replace(patch="linear")
    found = {stage.name: stage for stage in counted.stages()}
    # Four blocks of the original and two that are kept; read, written and read again.
    assert found["patch"].seconds == pytest.approx(100 * 1.5 * (4 + 2) + 3 * 0.5 * 0.1 * 60)
    # A pass of the original and its head, then those of the blocks behind the first cut.
    more = 100 * ((4 + 2) + 5.25 * (0.5 * 0.6 * 4 + 2 * 2))
    assert tuned - found["patch"].seconds == pytest.approx(more)
    evaluated = found["evaluate"].seconds
    counted.config = counted.config.replace(patch="none")
    without = {stage.name: stage for stage in counted.stages()}
    assert "patch" not in without
    assert evaluated - without["evaluate"].seconds == 32 * LENGTH * ((4 + 2) + 2 * 2)


def test_tuning_a_patch_takes_memory_for_two_blocks():
    counted = prices(weights=60_000)
    counted.config = counted.config.replace(patch_tokens=100)
    found = {stage.name: stage for stage in counted.stages()}["patch"].memory
    # 3,750 numbers a block, 20 bytes for each; both streams of the text.
    assert found == 1000 + 60_000 + 2 * 100 * 8 + 20 * 2 * 3750
    counted.config = counted.config.replace(patch="linear")
    assert {stage.name: stage for stage in counted.stages()}["patch"].memory < found


def test_a_budget_of_healing_buys_tokens_and_steps():
    counted = prices()
    assert counted.healing() is None
    assert "heal" not in {stage.name for stage in counted.stages()}
    counted.config = counted.config.replace(heal="30ktokens")
    found = counted.healing()
    # A third goes to candidates; two numbers wide, so that the rate is not lowered.
    assert (found["tokens"], found["trial_tokens"]) == (20_000, 10_000)
    assert (found["steps"], found["batch"], found["length"]) == (39, 2, 256)
    assert found["learning_rate"] == 1.5e-4
    # The original's four blocks and its head, then three times the half of them.
    each = (4 + 2) + 3 * (2 + 2)
    assert found["seconds"] == 30_000 * each
    stage = {stage.name: stage for stage in counted.stages()}["heal"]
    assert (stage.seconds, stage.samples) == (30_000 * each, 78)
    assert stage.memory == 1000 + 60 + 16 * 0.5 * 15
    counted.config = counted.config.replace(heal="2h", heal_top=0)
    found = counted.healing()
    assert (found["tokens"], found["trial_tokens"]) == (7200 // each, 0)
    stage = {stage.name: stage for stage in counted.stages()}["heal"]
    assert stage.low == stage.seconds == stage.high == pytest.approx(7200)
    counted.config = counted.config.replace(heal=True)
    stage = {stage.name: stage for stage in counted.stages()}["heal"]
    assert "a budget (--heal 10min) says how long" in stage.impossible
    assert counted.healing() is None


def test_a_search_costs_the_share_of_all_pairs_that_its_passes_are():
    counted = prices()
    pairs = counted.energy("pairwise").seconds
    counted.config = counted.config.replace(effort="3")
    three = counted.energy("refined").seconds
    counted.config = counted.config.replace(effort="6")
    assert counted.energy("refined").seconds == pytest.approx(2 * three)
    assert three < pairs
    counted.config = counted.config.replace(effort="2min")
    assert counted.energy("refined").seconds == 120


def test_where_streams_do_not_fit_the_disk_sets_the_pace():
    states = removals(4)
    # One byte of room each.
    sweeps = 5 * LENGTH * (len(states) + 1) * 8
    slow = prices(streamed=True, room=1, timings=timings(reading=1e6))
    assert slow.energy("pairwise").seconds == (sweeps + 1) * 1e6 * slow.weights
    quick = prices(streamed=True, room=10**9, timings=timings(reading=0.0))
    assert quick.energy("pairwise").seconds == prices().energy("pairwise").seconds
    assert quick.energy("pairwise").memory == quick.memory.total
    # Gradients read every block twice, and run it once more.
    once = prices(streamed=True, room=10**9).energy("fisher").seconds
    assert once == pytest.approx(5 * LENGTH * (2.3 * 6 + 4) + 0.1 * 60)


def test_a_few_blocks_are_those_of_the_whole_model(llama):
    model, store, _ = open_model(llama, dtype=torch.float32, device=CPU)
    for part in (EMBED, 0, 3, HEAD):
        store.keep(part)
    few, every = only(model, [0, 3], CPU), whole(llama)
    ids = torch.arange(10, 22).view(2, 6)
    with torch.inference_mode():
        a, b = few.record(ids), every.record(ids)
        assert torch.equal(a.entered, b.entered)
        for mine, number in ((0, 0), (1, 3)):
            assert torch.equal(a.block(mine, a.entered), b.block(number, b.entered))
        assert torch.equal(a.logits(a.entered[1], 1), b.logits(b.entered[1], 1))
    absent = stack_modules(model, find_stack(model))[1]
    assert all(p.is_meta for p in absent.parameters())
    assert len(only(model, [0], CPU)) == 1


def test_a_plan_for_every_energy_writes_nothing(llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv",
        ["isingcut", "plan", str(llama), "--remove", "2", "--length", "16", "--samples", "8",
         "--dtype", "float32", "--json"],
    )  # fmt: skip
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    found = json.loads(capsys.readouterr().out)
    assert os.listdir(tmp_path) == []
    names = [e["name"] for e in found["energies"]]
    assert names == [
        "empirical-fisher", "fisher", "gauss-newton", "hessian", "pairwise", "refined",
    ]  # fmt: skip
    for line in found["energies"] + found["stages"]:
        assert 0 < line["low"] <= line["seconds"] <= line["high"], line["name"]
        assert line["memory"] > 0
    assert [s["name"] for s in found["stages"]] == ["load", "rank", "excise", "patch", "evaluate"]
    # As given for one energy, as each energy's own otherwise: here for all, as a run would.
    assert {e["samples"] for e in found["energies"]} == {8}
    assert found["command"].startswith(f"isingcut run {llama} --remove 2 --samples 8 --length 16")
    assert found["remove"] == 2


def test_streamed_plans_say_what_needs_the_whole_model(llama):
    plan = make_plan(RunConfig(model=str(llama), remove="2", length=16, stream="on"))
    by_name = {e["name"]: e for e in plan["energies"]}
    assert plan["streamed"]
    assert "memory" in by_name["hessian"]["impossible"]
    assert by_name["pairwise"]["seconds"] > 0


@pytest.mark.parametrize(
    ("seconds", "remove", "energy", "effort"),
    [
        ({"refined": 100, "pairwise": 200}, "6", "refined", ""),
        ({"refined": 100, "pairwise": 200}, "", "pairwise", ""),
        ({"refined": 200_000, "pairwise": 100}, "6", "pairwise", ""),
        ({"refined": 100_000, "pairwise": 200_000}, "6", "refined", "7h"),
        ({"refined": 1e7, "pairwise": 2e7}, "6", "fisher", ""),
        ({"refined": 1e7, "pairwise": 2e7}, "", "fisher", ""),
    ],
)
def test_advice_is_the_best_that_ends_in_an_evening(seconds, remove, energy, effort):
    config = RunConfig(model="a model", remove=remove, length=128, stream="on")
    assert advise(config, seconds, 600)[:2] == (energy, effort)
    start = ["isingcut", "run"] if remove else ["isingcut", "energy"]
    removal = ["--remove", remove] if remove else []
    typed = [*start, "'a model'", *removal, "--length", "128", "--stream", "on"]
    typed += ["--energy", energy, *(["--effort", effort] if effort else [])]
    assert command(config, energy, effort) == " ".join([*typed, "--out", "'a model-run'"])


def test_impossible_removals_are_refused_in_one_line(llama, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["isingcut", "plan", str(llama), "--remove", "99"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("isingcut: --remove must be from 1 to")
