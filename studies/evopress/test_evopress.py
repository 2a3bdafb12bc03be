"""The plug-in: its choices on a small stack, their price, and how it is found."""

from itertools import combinations

from isingcut_evopress import Evopress

from cards import fake_cards
from isingcut.baselines import registry
from isingcut.runs import pipeline
from isingcut.testing.tiny import tiny_model
from shared import OPTIONS, load_json, works
from test_baselines import LENGTH, WORK, check_choice, check_price, check_resumed
from tiny import measure, random_tokens, replay_of, states_of, tiny_replay

EVOLUTION = Evopress(generations=3, offspring=4, step_tokens=(LENGTH, 99), initial=4)


def test_it_finds_the_best_state_of_a_small_stack_also_on_a_card():
    pairs = list(combinations(range(6), 2))
    tokens = random_tokens()
    # All 14 other states are children of any parent, so that one generation finds the best.
    every = Evopress(generations=6, offspring=14, step_tokens=(99, 99), initial=2)
    replay = tiny_replay()
    kl = measure(replay, tokens, states_of(6, pairs)).kl
    found = every.choose(replay, tokens, 2, WORK, seed=0)
    assert found.removed == pairs[int(kl.argmin())]
    assert found.heads == 1 + 15
    with fake_cards() as (card,):
        there = replay_of(tiny_model("llama").to(card.device))
        assert every.choose(there, tokens, 2, WORK, seed=0) == found


def test_it_takes_the_published_number_of_generations():
    quick = Evopress(offspring=1, survivors=(1,), step_tokens=(1,), initial=1)
    found = quick.choose(tiny_replay(), random_tokens(), 2, WORK, seed=0)
    assert found.info["generations"] == 5  # the whole part of 2 * 4 / 1.5
    published = Evopress()
    assert (published.offspring, published.initial) == (32, 64)
    assert (published.survivors, published.step_tokens) == ((2, 1), (2048, 32768))


def test_its_choice_and_price_are_repeated_resumed_and_counted(tmp_path):
    check_choice(EVOLUTION, 1)
    check_resumed(EVOLUTION, tmp_path)
    check_price(EVOLUTION)


def test_an_installed_plug_in_is_found_and_compared(model, install, tmp_path):
    assert "evopress" not in registry.names()
    install()
    assert registry.get("evopress") is Evopress
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{i * i % 97}" for i in range(900)))
    run = tmp_path / "run"
    given = {**OPTIONS, "model": model, "calibration": text, "remove": "2", "out": run}
    pipeline.energy(**given)
    works("baseline", "evopress", run)
    assert len(load_json(run / "baseline-evopress.json").removed) == 2
