"""Plans: what is counted, what is timed, what is advised, and that nothing is written."""

import dataclasses
import itertools
import json
import os
import sys

import numpy as np
import pytest
import torch

from isingcut.cli import main as cli
from isingcut.data.tokens import TokenSet
from isingcut.measure.losses import measure
from isingcut.models.architectures import find_stack, stack_modules
from isingcut.models.load import load
from isingcut.models.replay import Replay
from isingcut.models.streaming.plan import EMBED, HEAD
from isingcut.models.streaming.replay import open_model
from isingcut.options.config import RunConfig
from isingcut.runs import advice, costs
from isingcut.runs.plan import make_plan
from isingcut.runs.probe import Stopwatch, Timings, probe
from isingcut.runs.some_blocks import SomeBlocks
from tiny import tiny_model

TIMINGS = Timings(
    blocks=(1.0, 2.0, 3.0, 4.0), entering=0.5, comparing=0.25, gradients=20.0,
    curvature={"hessian": 100.0, "gauss-newton": 50.0}, decoding=1.0, reading=0.1,
    saved_gradients=1000, saved_curvature=5000, noise=1.0, tokens=64, probed=(0,), attention=None,
)  # fmt: skip
SHAPE = costs.Shape(
    blocks=4, parts=(10, 10, 10, 10), outside=20, largest=10, stored=60, stored_blocks=(10,) * 4,
    stream=8, word=4, vocabulary=100, process=1000, allowed=10**9, streamed=False, length=16,
    batch_tokens=64,
)  # fmt: skip


def test_blocks_are_counted_as_a_measurement_runs_them():
    model = tiny_model("llama").requires_grad_(False)
    replay = Replay(model, stack_modules(model, find_stack(model)))
    n = len(replay)
    ran = np.zeros(n, dtype=int)

    def count(i):
        return lambda module, args, output: ran.__setitem__(i, ran[i] + 1)

    handles = [b.self_attn.register_forward_hook(count(i)) for i, b in enumerate(replay.blocks)]
    states = np.concatenate([costs.pairs(n), costs.random_states(n, 3, 9)])
    found = measure(replay, TokenSet.from_rows([[1, 2, 3, 4]]), states)
    for handle in handles:
        handle.remove()
    assert costs.visits(states).tolist() == ran.tolist()
    assert costs.visits(states).sum() == found.blocks_run


def test_a_measurement_costs_its_blocks_heads_and_texts():
    states = np.array([[1, 0, 0, 0], [1, 1, 0, 0]], dtype=bool)
    # The original runs all four; the states run 1, 2, 3 and 2, 3.
    each = (1 + 2 + 3 + 4) + (2 + 3 + 4) + (3 + 4) + 0.5 + 3 * 0.25
    assert costs.measured(SHAPE, TIMINGS, states, 5).seconds == pytest.approx(5 * 16 * each)
    assert costs.first_derivatives(SHAPE, TIMINGS, 5).seconds == pytest.approx(5 * 16 * 20.5)
    assert costs.second_derivatives(SHAPE, TIMINGS, "hessian", 5).seconds == 5 * 16 * 100.5


def test_a_search_with_the_price_of_all_pairs_costs_what_they_cost():
    states = costs.pairs(4)
    passes = costs.visits(states).sum() / 4
    found = costs.searched(SHAPE, TIMINGS, passes, 5)
    assert found.seconds == pytest.approx(costs.measured(SHAPE, TIMINGS, states, 5).seconds)


def test_where_streams_do_not_fit_the_disk_sets_the_pace():
    slow = dataclasses.replace(TIMINGS, reading=1e6)
    little = dataclasses.replace(SHAPE, streamed=True, allowed=1)
    states = costs.pairs(4)
    streams = 5 * 16 * (len(states) + 3) * 8
    sweeps = streams  # One byte of room each.
    reading = 1e6 * SHAPE.weights
    found = costs.measured(little, slow, states, 5)
    assert found.seconds == pytest.approx(sweeps * reading + reading)
    much = dataclasses.replace(SHAPE, streamed=True)
    quick = costs.measured(much, dataclasses.replace(TIMINGS, reading=0.0), states, 5)
    assert quick.seconds == costs.measured(SHAPE, TIMINGS, states, 5).seconds
    assert quick.memory == much.allowed


def test_some_blocks_are_those_of_the_whole_model(llama):
    model, store, _ = open_model(llama, dtype=torch.float32, device=torch.device("cpu"))
    for part in (EMBED, 0, 3, HEAD):
        store.keep(part)
    some = SomeBlocks(model, store, [0, 3])
    loaded = load(llama, dtype="float32", device="cpu").model
    whole = Replay(loaded, stack_modules(loaded, find_stack(loaded)))
    ids = torch.arange(10, 22).view(2, 6)
    with torch.inference_mode():
        a, b = some.record(ids), whole.record(ids)
        torch.testing.assert_close(a.entered, b.entered, rtol=0, atol=0)
        for mine, number in ((0, 0), (1, 3)):
            torch.testing.assert_close(
                a.block(mine, a.entered), b.block(number, b.entered), rtol=0, atol=0
            )
        torch.testing.assert_close(
            a.logits(a.entered[1], 1), b.logits(b.entered[1], 1), rtol=0, atol=0
        )
    absent = stack_modules(model, find_stack(model))[1]
    assert all(p.is_meta for p in absent.parameters())
    assert len(some.first(1)) == 1


def test_timings_are_of_one_call_each(llama):
    """With a clock that counts, every call takes one second."""
    ticks = itertools.count()
    model, store, _ = open_model(llama, dtype=torch.float32, device=torch.device("cpu"))
    n = len(find_stack(model))
    found = probe(model, store, 16, 64, attention="sdpa", clock=lambda: float(next(ticks)))
    assert found.tokens == 64
    assert found.blocks == (1 / 64,) * n
    assert found.comparing == found.entering == 1 / 64
    # A gradient and the head's part of it take as long: so the blocks take nothing.
    assert found.gradients == 1 / 64
    assert found.decoding == pytest.approx(n / len(found.probed) + 1)
    assert set(found.curvature) == {"hessian", "gauss-newton"}
    assert found.saved_curvature > found.saved_gradients > 0
    assert found.noise == 1.0


def test_a_stopwatch_takes_the_fastest_round():
    times = iter([0, 9, 0, 3, 0, 2, 0, 4])
    # A first call of nine seconds is long: one more round, and no more.
    assert Stopwatch(torch.device("cpu"), lambda: next(times)).fastest(lambda: None) == 3
    times = iter([0, 1, 0, 3, 0, 2, 0, 4])
    watch = Stopwatch(torch.device("cpu"), lambda: next(times))
    assert watch.fastest(lambda: None) == 2
    assert watch.noise == 2


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
    assert [s["name"] for s in found["stages"]] == ["load", "rank", "excise", "evaluate"]
    # As given for one energy, as each energy's own otherwise: here for all, as a run would.
    assert {e["samples"] for e in found["energies"]} == {8}
    assert found["command"].startswith(f"isingcut run {llama} --remove 2 --samples 8 --length 16")
    assert found["remove"] == 2


def test_streamed_plans_say_what_needs_the_whole_model(llama):
    plan = make_plan(RunConfig(model=str(llama), remove="2", length=16, stream="on"))
    by_name = {e.name: e for e in plan.energies}
    assert plan.streamed
    assert "memory" in by_name["hessian"].impossible
    assert by_name["pairwise"].seconds > 0


@pytest.mark.parametrize(
    ("seconds", "remove", "energy", "words"),
    [
        ({"refined": 100, "pairwise": 200}, "6", "refined", []),
        ({"refined": 100, "pairwise": 200}, "", "pairwise", []),
        ({"refined": 200_000, "pairwise": 100}, "6", "pairwise", []),
        ({"refined": 100_000, "pairwise": 200_000}, "6", "refined", ["--effort", "7h"]),
        ({"refined": 1e7, "pairwise": 2e7}, "6", "fisher", []),
        ({"refined": 1e7, "pairwise": 2e7}, "", "fisher", []),
    ],
)
def test_advice_is_the_best_that_ends_in_an_evening(seconds, remove, energy, words):
    config = RunConfig(model="a model", remove=remove, length=128, stream="on")
    found = advice.advise(config, seconds, 600)
    assert found.energy == energy
    start = ["isingcut", "run"] if remove else ["isingcut", "energy"]
    removal = ["--remove", remove] if remove else []
    typed = [*start, "'a model'", *removal, "--length", "128", "--stream", "on"]
    typed += ["--energy", energy, *words, "--out", "'a model-run'"]
    assert found.command == " ".join(typed)


def test_impossible_removals_are_refused_in_one_line(llama, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["isingcut", "plan", str(llama), "--remove", "99"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("isingcut: --remove must be from 1 to")
