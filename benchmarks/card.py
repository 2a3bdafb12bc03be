"""Find the card memory that each job needs, in multiples of the weights, on fake cards.

    python benchmarks/card.py [--only card_run_untied card_heal_lora ...] [--dir DIR]

Models have 32 narrow blocks of random weights in bfloat16 and texts have few tokens, so that
weights dominate; W is the bytes of the weights. Four blocks of each model do little, so that the
run removes these: four neighbours, or four apart. A bisection finds the smallest budget at which a
job completes: a resident run with its patch tuned and its speed measured; the same over two and
four cards, per card; a run without a quarter of the blocks, all apart, with at least half of the
layers tuned that a roomy card tunes, and the bytes of a micro-batch of this tuning; a streamed run,
and the largest part of its model; LoRA next to its teacher; training of all weights, relative to
the bytes that the refusal on a smaller card names. Adapters of
rank 1 are as small a share of the weights for a width of 256 as rank 16 for 4,096. The cards are
fake (`benchmarks/cards.py`); memory that they do not simulate is not counted.
Finished figures are kept in DIR. Ends with one line `name: value` per figure.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

import isingcut
from cards import Card, fake_cards
from isingcut.errors import InputError, IsingcutError
from isingcut.evaluation import prompts, speed
from isingcut.formats.architectures.blocks import find_stack, stack_modules
from isingcut.formats.cutting.checkpoint import excise
from isingcut.healing.heal import heal
from isingcut.healing.patch.ridge import bytes_of
from isingcut.healing.repairs import linear
from isingcut.healing.repairs import tuned as tuning
from isingcut.measure.splitting import bytes_of_backward
from isingcut.memory import is_memory_exhausted
from isingcut.models import verify
from isingcut.models.device import allowance
from isingcut.models.load import load
from isingcut.models.streaming import replay as streamed
from isingcut.models.streaming.store import Store
from isingcut.options.declaration import options_from
from isingcut.options.heal import HealConfig
from isingcut.runs.stages import Stage
from isingcut.testing.tiny import tiny_model, tiny_tokenizer

BLOCKS = 32
NEIGHBOURS = (14, 15, 16, 17)
APART = (6, 13, 20, 27)
QUARTER = tuple(range(2, 32, 4))
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "head_dim": 64,
}
BROAD = 4096
"""Inputs of an MLP's last layer whose moments take more memory than the weights."""
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "untied": ("llama", {**WIDE, "tie_word_embeddings": False}),
    "tied": ("llama", {**WIDE, "tie_word_embeddings": True}),
    "moe": ("qwen3_moe", {**WIDE, "moe_intermediate_size": 256, "mlp_only_layers": []}),
    "hybrid": (
        "bamba",
        {**WIDE, "head_dim": None, "mamba_n_heads": 16, "mamba_d_head": 32}
        | {"attn_layer_indices": list(range(3, 32, 4))},
    ),
}
RESIDENT: dict[str, Any] = {"energy": "fisher", "effort": "", "stream": "off"}
RUNS = tuple(FAMILIES)
FAMILIES["broad"] = ("llama", {**WIDE, "intermediate_size": BROAD})


def short() -> contextlib.ExitStack:
    """Reduce repeats that change no peak, because operations on a fake card are slow."""
    stack = contextlib.ExitStack()
    timed = vars(speed.speed)["__wrapped__"].__kwdefaults__
    stack.enter_context(mock.patch.dict(timed, new_tokens=2, repeats=1))
    for module in (prompts, verify):
        stack.enter_context(mock.patch.object(module, "NEW_TOKENS", 3))
    # The slack of streaming is more than such a model takes.
    stack.enter_context(mock.patch.object(streamed, "_SLACK", 0))
    return stack


def checkpoint(folder: Path, family: str, quiet: tuple[int, ...]) -> Path:
    """Return the folder of a model whose blocks ``quiet`` do least; write it if it is missing."""
    if folder.exists():
        return folder
    kind, changes = FAMILIES[family]
    model: Any = tiny_model(kind, num_hidden_layers=BLOCKS, **changes)
    with torch.no_grad():
        for i, block in enumerate(stack_modules(model)):
            for module in block.modules():
                weight = getattr(module, "weight", None)
                if weight is not None and weight.ndim == 2 and len(weight) == 256:
                    weight.mul_(0.004 if i in quiet else 0.3)
    return save(model, folder)


def save(model: Any, folder: Path) -> Path:
    """Write a model in bfloat16 and its tokenizer."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def weights(folder: Path) -> int:
    """Return W, the bytes of the weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def text(folder: Path) -> Path:
    """Write a text of short, distinct lines and return its path."""
    path = folder / "text.txt"
    lines = (
        f"{i * 7919 % 1000} of {i * 104729 % 9973} are {i % 13}" for i in range(2000)
    )
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return path


def options(place: Path, model: Path, cards: list[Card]) -> dict[str, Any]:
    """Return the options of a run that is reduced to few tokens and states."""
    return {
        "model": model,
        "calibration": text(place),
        "remove": 4,
        "effort": "3",
        "samples": 4,
        "rank_samples": 4,
        "report_samples": 4,
        "random_states": 0,
        "states": 2,
        "length": 16,
        "patch_tokens": 64,
        "device": ",".join(str(card.device) for card in cards),
        "dtype": "bfloat16",
    }


def run(
    place: Path, model: Path, budget: float, count: int = 1, **more: Any
) -> dict[str, Any]:
    """Run on cards of ``budget`` W each; return choice, results, and largest peak of each stage.

    Raises:
        Exception: the run did not complete.
    """
    weight = weights(model)
    found = dict[str, float]()
    begin = Stage.__call__
    layers = list[int]()
    choose = tuning.choose_layers

    def chosen(*given: Any) -> Any:
        fitting = choose(*given)
        layers.append(len(fitting))
        return fitting

    out = place / "run"
    shutil.rmtree(out, ignore_errors=True)
    with short(), fake_cards(count, int(budget * weight)) as cards:

        def measured(self: Stage[Any], *given: Any) -> Any:
            for card in cards:
                card.reset_peak()
            try:
                return begin(self, *given)
            finally:
                peaks = (round(card.peak / weight, 3) for card in cards)
                found[self.name] = max(found.get(self.name, 0.0), *peaks)

        patched = mock.patch.object(tuning, "choose_layers", chosen)
        with patched, mock.patch.object(Stage, "__call__", measured):
            try:
                isingcut.run(out=out, **options(place, model, cards) | more)
            finally:
                gc.collect()
    record, whole, evaluation = (
        json.loads((out / f"{name}.json").read_text())
        for name in ("model/isingcut", "run", "evaluation")
    )
    tuned = record["patch"].get("tuning") or {}
    return {
        "removed": record["removed"],
        "kl": evaluation["kl"],
        "resident": not any(
            stage.get("streamed") for stage in whole["stages"].values()
        ),
        "patched": bool(record["patch"]["changed"]),
        "maps": record["patch"]["maps"],
        "tuned": "left_out" not in tuned,
        "layers": layers[-1] if layers else 0,
        "timed": "decode_tokens_per_second" in evaluation["before"],
        "peaks": found,
    }


def smallest(
    job: Callable[[float], Any], *wanted: str, low: float = 1.0, high: float = 1.8
) -> float:
    """Return the smallest budget at which a job completes with all ``wanted`` results, by
    bisection; infinity if the largest budget is too small."""

    def within(budget: float) -> bool:
        try:
            found = job(budget)
        except Exception as error:
            if not (isinstance(error, IsingcutError) or is_memory_exhausted(error)):
                raise
            say(f"  {budget:.2f}: {str(error)[:150]}")
            return False
        good = all(found[name] for name in wanted)
        say(f"  {budget:.2f}: {'completes' if good else 'not all'} {found}")
        return good

    if not within(high):
        return float("inf")
    # The precision, in W.
    while high - low > 0.05:
        middle = (low + high) / 2
        low, high = (low, middle) if within(middle) else (middle, high)
    return high


def run_budget(
    place: Path,
    family: str = "untied",
    quiet: tuple[int, ...] = NEIGHBOURS,
    count: int = 1,
) -> float:
    """Return the smallest budget of a resident run, in W per card."""
    model = checkpoint(place / f"{family}-{quiet[1]}", family, quiet)
    job = partial(run, place, model, count=count, stream="off")
    wanted = ("resident", "patched", "tuned", "timed")
    return smallest(job, *wanted, low=1 / count, high=1.8 / count**0.5)


def quarter_budget(place: Path) -> tuple[float, float]:
    """Return the smallest budget of a run without a quarter of the blocks, and the bytes of a
    micro-batch of its tuning, both in W."""
    model = checkpoint(place / f"untied-{QUARTER[1]}", "untied", QUARTER)
    fixed = RESIDENT | {"remove": 8, "must_remove": ",".join(map(str, QUARTER))}

    job: Callable[[float], Any] = partial(run, place, model, **fixed)
    roomy = job(3.0)["layers"]

    def with_half(budget: float) -> Any:
        found = job(budget)
        return found | {"half": 2 * found["layers"] >= roomy}

    wanted = ("resident", "patched", "tuned", "timed", "half")
    backward = bytes_of_backward(load(model, dtype="bfloat16", device="cpu").replay)
    sample = options(place, model, [])["length"] * backward / weights(model)
    return smallest(with_half, *wanted), sample


def fit_local(place: Path) -> tuple[float, ...]:
    """Return the memory of a fit in W, and the budget of two runs which is below it: one with the
    fit in host memory, and one whose host has no room for it either.

    Raises:
        AssertionError: a run was demoted to streaming, or did not name its lesser patch.
    """
    model = checkpoint(place / "broad", "broad", NEIGHBOURS)
    budget = 1.6
    share = bytes_of(BROAD, WIDE["hidden_size"]) / weights(model)
    assert share > budget, share
    limited = RESIDENT | {
        "must_remove": ",".join(map(str, NEIGHBOURS)),
        # As many tokens that their rows take more memory than the moments.
        "patch_tokens": BROAD // 2 + 256,
        "length": 64,
        "patch": "linear",
    }
    for room, maps in ((math.inf, "reads"), (share * weights(model) / 2, "writes")):

        def limit(text: str, device: torch.device, room: float = room) -> Any:
            left = allowance(text, device).left
            return SimpleNamespace(
                left=min(left, room) if device.type == "cpu" else left
            )

        with mock.patch.object(linear, "allowance", limit):
            found = run(place, model, budget, **limited)
        say(f"  {found}")
        assert found["resident"], found
        assert found["maps"] == maps, found
    return share, budget


def streamed_budget(place: Path, family: str) -> tuple[float, float]:
    """Return the smallest budget of a streamed run and its model's largest part, both in W."""
    model = checkpoint(place / f"{family}-{NEIGHBOURS[1]}", family, NEIGHBOURS)
    store = Store(model, torch.bfloat16, torch.device("cpu"))
    part = store.largest / weights(model)
    job = partial(run, place, model, stream="on", memory_limit="100%")
    return smallest(job, "patched", low=part), part


def write_models(
    folder: Path, blocks: int = BLOCKS, removed: Sequence[int] = range(12, 20)
) -> Path:
    """Write `original` in bfloat16 and `cut` without some blocks (default: a quarter), once."""
    if not (folder / "cut").exists():
        model = tiny_model(
            "llama", hidden_size=256, intermediate_size=512, num_hidden_layers=blocks
        )
        save(model, folder / "original")
        state = find_stack(model).remove(removed)
        excise(folder / "original", state, folder / "cut")
        record = json.dumps({"removed": state.blocks, "of": blocks})
        (folder / "cut" / "isingcut.json").write_text(record)
    return folder


def heal_on_card(folder: Path, budget: int | None, **changes: Any) -> int:
    """Heal on a card of ``budget`` bytes, few tokens in two micro-batches; return peak bytes."""
    settings = {
        "max_steps": 2,
        "save_steps": 2,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
    }
    given = {
        "student": folder / "cut",
        "teacher": folder / "original",
        "text": text(folder),
        "out": folder / "healed",
        "length": 8,
        "report_samples": 2,
        "samples": 4,
        "trainer": settings,
        "patch": "none",
        "dtype": "bfloat16",
        "device": "lazy:0",
        **changes,
    }
    with short(), fake_cards(budget=budget) as (card,):
        try:
            heal(options_from(HealConfig, given, "card"))
        finally:
            for name in ("healed", ".healed.healing"):
                shutil.rmtree(folder / name, ignore_errors=True)
        return card.peak


def lora_budget(place: Path) -> float:
    """Return the smallest card for LoRA next to its teacher, in W of the original."""
    folder = write_models(place / "heal")
    size = weights(folder / "original")
    return smallest(lambda b: heal_on_card(folder, int(b * size), method="lora:1"))


def full_budget(place: Path) -> float:
    """Return the smallest card to train all weights, relative to the bytes a refusal names."""
    folder = write_models(place / "heal")
    said = ""
    try:
        heal_on_card(folder, 4 * weights(folder / "original"), method="full")
    except InputError as refusal:
        said = str(refusal)
    takes = 1e9 * float(re.findall(r"takes (\S+) GB", said)[0])
    return smallest(
        lambda b: heal_on_card(folder, int(b * takes), method="full"),
        low=0.8,
        high=1.25,
    )


JOBS: dict[str, Callable[[Path], Any]] = {
    **{f"cards_{n}_run": partial(run_budget, count=n) for n in (2, 4)},
    "card_run_quarter": quarter_budget,
    "card_fit_local": fit_local,
    "card_heal_lora": lora_budget,
    "card_heal_full": full_budget,
}
for family in RUNS:
    runs = partial(run_budget, family=family)
    JOBS |= {
        f"card_run_{family}": runs,
        f"card_run_scattered_{family}": partial(runs, quiet=APART),
        f"card_run_streamed_{family}": partial(streamed_budget, family=family),
    }


def say(words: str) -> None:
    """Print a message on the progress to stderr."""
    print(words, file=sys.stderr, flush=True)


def main() -> None:
    """Measure the missing figures and print all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(JOBS), choices=JOBS)
    parser.add_argument("--dir", type=Path, default=Path("card-work"))
    chosen = parser.parse_args()
    chosen.dir.mkdir(parents=True, exist_ok=True)
    file = chosen.dir / "figures.json"
    figures: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for name in chosen.only:
        if name not in figures:
            say(name)
            figures[name] = JOBS[name](chosen.dir)
            file.write_text(json.dumps(figures, indent=1))
    for name, value in figures.items():
        shown = value if isinstance(value, list | tuple) else [value]
        print(f"{name}: {' '.join(f'{v:.3g}' for v in shown)}")


if __name__ == "__main__":
    main()
