"""How much memory of a card a job needs, in multiples of the weights, on cards with a ledger.

    python benchmarks/card.py [--only run,streamed,verbs,...] [--families llama,...] [--dir DIR]

Models of 32 narrow blocks in bfloat16, random, with few tokens, so that weights dominate; W is the
bytes of the weights. Four blocks of each model do little, so that the run removes these: four
neighbours, or four apart. By halving, the smallest budget at which a job completes, resident, with
its patch tuned and its speed measured. The cards are fake (`benchmarks/cards.py`), and what they
cannot see counts nothing here. Finished figures are kept in DIR and not measured again.
Ends with one line `name: value` per figure.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import card_heal
import isingcut
from cards import Card, fake_cards
from isingcut.cli import main as command_line
from isingcut.errors import IsingcutError
from isingcut.evaluation import quality, speed
from isingcut.memory import is_memory_exhausted
from isingcut.models.architectures.blocks import find_stack, stack_modules
from isingcut.models.cutting.verify import verify
from isingcut.models.streaming import replay as streamed
from isingcut.runs.folder import RunFolder
from isingcut.testing.tiny import tiny_model, tiny_tokenizer

NEIGHBOURS, APART = (14, 15, 16, 17), (6, 13, 20, 27)
BUDGETS = (0.3, 0.6, 0.9, 1.05, 1.2, 1.5, 2.0, 3.0)
STEP = 0.05
"""How exactly a smallest budget is found, in W."""
WIDE = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "head_dim": 64}
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


@contextlib.contextmanager
def short() -> Iterator[None]:
    """Few repeats where a repeat changes no peak: an operation on a fake card is slow."""
    changed = [
        (speed.speed.__wrapped__.__kwdefaults__, {"new_tokens": 2, "repeats": 1}),
        (quality.before_and_after.__kwdefaults__, {"new_tokens": 3}),
        (verify.__kwdefaults__, {"new_tokens": 3}),
    ]
    before = [dict(defaults) for defaults, _ in changed]
    slack = streamed._SLACK
    for defaults, values in changed:
        defaults.update(values)
    # More than such a model takes.
    streamed._SLACK = 0
    try:
        yield
    finally:
        streamed._SLACK = slack
        for (defaults, _), values in zip(changed, before, strict=True):
            defaults.update(values)


def checkpoint(
    folder: Path, family: str, quiet: tuple[int, ...], blocks: int = 32, scale: float = 0.004
) -> Path:
    """A model in which the blocks ``quiet`` do least, written once."""
    if folder.exists():
        return folder
    kind, changes = FAMILIES[family]
    model: Any = tiny_model(kind, num_hidden_layers=blocks, **changes)
    with torch.no_grad():
        for i, block in enumerate(stack_modules(model, find_stack(model))):
            for module in block.modules():
                weight = getattr(module, "weight", None)
                writes = weight is not None and weight.ndim == 2 and len(weight) == 256
                if writes:
                    weight.mul_(scale if i in quiet else 0.3)
    model.to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def weights(folder: Path) -> int:
    """W."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def text(folder: Path) -> Path:
    """Text of short, unlike lines."""
    path = folder / "text.txt"
    if not path.exists():
        lines = (f"{i * 7919 % 1000} of {i * 104729 % 9973} are {i % 13}" for i in range(400))
        path.write_text("\n\n".join(lines), encoding="utf-8")
    return path


def options(place: Path, model: Path, card: Card) -> dict[str, Any]:
    """Of a run that is a default one but for its few tokens."""
    return {
        "model": str(model),
        "calibration": str(text(place)),
        "remove": 4,
        "effort": "3",
        "samples": 4,
        "rank_samples": 4,
        "report_samples": 4,
        "random_states": 0,
        "states": 2,
        "length": 16,
        "patch_tokens": 64,
        "device": str(card.device),
        "dtype": "bfloat16",
    }


def peaks(card: Card, found: dict[str, float], weight: int) -> Callable[[], None]:
    """Record the peak of each stage from now on; gives what ends it."""
    stage = RunFolder.stage

    def measured(self: RunFolder, name: str, *rest: Any, **more: Any) -> Any:
        card.reset_peak()
        try:
            return stage(self, name, *rest, **more)
        finally:
            found[name] = max(found.get(name, 0.0), card.peak / weight)

    RunFolder.stage = measured  # type: ignore[method-assign]

    def end() -> None:
        RunFolder.stage = stage  # type: ignore[method-assign]

    return end


def run(place: Path, model: Path, budget: float | None, **more: Any) -> dict[str, Any]:
    """A run on a card of so many W: what it chose and gave, and its stages' peaks.

    Raises:
        Exception: it did not complete.
    """
    weight, found = weights(model), dict[str, float]()
    out = place / "run"
    shutil.rmtree(out, ignore_errors=True)
    with short(), fake_cards(budget=None if budget is None else int(budget * weight)) as (card,):
        end = peaks(card, found, weight)
        try:
            isingcut.run(out=str(out), **options(place, model, card) | more)
        finally:
            end()
            gc.collect()
    record = json.loads((out / "model" / "isingcut.json").read_text())
    stages = json.loads((out / "run.json").read_text())["stages"]
    evaluation = json.loads((out / "evaluation.json").read_text())
    tuned = record["patch"].get("tuning") or {}
    return {
        "removed": record["removed"],
        "kl": evaluation["kl"],
        "streamed": any(stage.get("streamed") for stage in stages.values()),
        "patched": bool(record["patch"]["changed"]),
        "tuned": "left_out" not in tuned,
        "timed": "decode_tokens_per_second" in evaluation["before"],
        "peaks": {name: round(peak, 3) for name, peak in found.items()},
    }


def completes(job: Callable[[float], dict[str, Any]], *wanted: str) -> Callable[[float], bool]:
    """Whether a job completes within a budget, with all that is wanted of it."""

    def within(budget: float) -> bool:
        try:
            found = job(budget)
        except Exception as error:
            if not (isinstance(error, IsingcutError) or is_memory_exhausted(error)):
                raise
            say(f"  {budget:.2f} W: {str(error)[:150]}")
            return False
        good = not found["streamed"] and all(found[name] for name in wanted)
        say(f"  {budget:.2f} W: {'completes' if good else 'not all'} {found}")
        return good

    return within


def smallest(within: Callable[[float], bool], low: float = 1.0, high: float = 1.8) -> float:
    """The smallest budget, by halving; infinite where the largest is too small."""
    if not within(high):
        return float("inf")
    while high - low > STEP:
        middle = (low + high) / 2
        low, high = (low, middle) if within(middle) else (middle, high)
    return high


def smallest_of(place: Path, family: str, quiet: tuple[int, ...], *wanted: str) -> float:
    """Of a resident run."""
    model = checkpoint(place / f"{family}-{quiet[1]}", family, quiet)
    return smallest(completes(lambda b: run(place, model, b, stream="off"), *wanted))


def smallest_streamed(place: Path, family: str) -> tuple[float, float]:
    """Of a streamed run, and the largest part of its model, both in W."""
    model = checkpoint(place / f"{family}-{NEIGHBOURS[1]}", family, NEIGHBOURS)
    _, store, _ = streamed.open_model(
        model, dtype=torch.bfloat16, device=torch.device("cpu"), trust_remote_code=False
    )
    part = store.largest / weights(model)

    def within(budget: float) -> bool:
        found: dict[str, Any] = {}

        def job(b: float) -> dict[str, Any]:
            found.update(run(place, model, b, stream="on", memory_limit="100%"))
            return {**found, "streamed": False}

        return completes(job, "patched")(budget)

    return smallest(within, low=part), part


def verbs(place: Path) -> tuple[int, int]:
    """All verbs within each budget: internal errors, and results unlike those without a limit."""
    # What these blocks do is far above the rounding of bfloat16.
    model = checkpoint(place / "small", "untied", (5, 6, 7, 8), blocks=12, scale=0.1)
    weight, data = weights(model), text(place)
    errors = unlike = 0
    expected: dict[str, Any] = {}
    for budget in (None, *BUDGETS):
        out = place / "verbs"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for limit in (budget, None):
            size = None if limit is None else int(limit * weight)
            with short(), fake_cards(budget=size) as (card,):
                for line in commands(model, data, out, card):
                    code, said = typed(line)
                    if code not in (0, 2) or (code == 2 and (limit is None or lines(said) != 1)):
                        errors += 1
                        say(f"  {limit} W: {' '.join(line[:2])}: exit {code}: {said[-300:]}")
        found = results(out)
        expected = expected or found
        alike = all(like(value, expected[name]) for name, value in found.items())
        unlike += not alike
        say(f"  {budget} W: {'as without a limit' if alike else f'{found} for {expected}'}")
    return errors, unlike


def commands(model: Path, data: Path, out: Path, card: Card) -> Iterator[list[str]]:
    """Each verb that reads a model, on the files of one run."""
    small = {**options(data.parent, model, card), "random_states": 30}
    del small["model"]
    one, healed = str(out / "run"), out / "healed"

    def line(verb: str, *words: str) -> list[str]:
        """A verb with those of the options that it has."""
        known = {parameter.name for parameter in command_line._program.commands[verb].params}
        # The effort of a healing is its time; these are two steps.
        known -= {"effort"} if verb == "heal" else set()
        given = [f"--{k.replace('_', '-')}={v}" for k, v in small.items() if k in known]
        return [verb, *words, *given]

    yield line("inspect", str(model))
    yield line("plan", str(model))
    yield line("energy", str(model), f"--out={one}")
    yield line("run", str(model), f"--out={one}")
    yield line("baseline", "sleb", one)
    yield line("excise", one)
    if not healed.exists():
        heal = ["--method=lora", "--effort=2ktokens", f"--text={data}", f"--out={healed}"]
        yield line("heal", f"{one}/model", f"--teacher={model}", *heal)
    yield line("report", one)


def typed(line: list[str]) -> tuple[int, str]:
    """Exit code of a command, and what it said on standard error."""
    said, before = io.StringIO(), sys.argv
    sys.argv = ["isingcut", *line]
    code: Any = 0
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            command_line.main()
    except SystemExit as e:
        code = e.code or 0
    finally:
        sys.argv = before
        gc.collect()
    return int(code), said.getvalue()


def lines(said: str) -> int:
    """Lines that say what was wrong."""
    return sum(line.startswith("isingcut: ") for line in said.splitlines())


def results(out: Path) -> dict[str, Any]:
    """The blocks, the losses of the cut and, where its patch was tuned, of what came of it.

    A streamed model's patch is not tuned, and says so: its figures are of another model.
    """

    def read(name: str) -> dict[str, Any]:
        path = out / name
        return json.loads(path.read_text()) if path.exists() else {}

    evaluation = read("run/evaluation.json")
    tuning = read("run/model/isingcut.json").get("patch", {}).get("tuning") or {}
    found = {
        "removed": read("run/candidates.json").get("chosen", {}).get("removed"),
        "cut": evaluation.get("cut", {}).get("kl"),
    }
    if "left_out" not in tuning:
        found["patched"] = evaluation.get("kl")
        found["healed"] = read("healed/healing.json").get("after", {}).get("kl")
    return found


def like(one: Any, other: Any) -> bool:
    """Equal, or equal to the rounding of bfloat16."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= 0.05 * abs(other)
    return bool(one == other)


def say(words: str) -> None:
    """Show how far it is."""
    print(words, file=sys.stderr, flush=True)


def main() -> None:
    """Measure what is missing and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="run,scattered,streamed,heal,verbs")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--dir", type=Path, default=Path("card-work"))
    chosen = parser.parse_args()
    place: Path = chosen.dir
    place.mkdir(parents=True, exist_ok=True)
    file = place / "figures.json"
    figures: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def once(name: str, make: Callable[[], Any]) -> None:
        if name not in figures:
            say(name)
            figures[name] = make()
            file.write_text(json.dumps(figures, indent=1))

    jobs: dict[str, Callable[[str], None]] = {
        "run": lambda f: once(
            f"card_run_{f}",
            lambda: smallest_of(place, f, NEIGHBOURS, "patched", "tuned", "timed"),
        ),
        "scattered": lambda f: once(
            f"card_run_scattered_{f}",
            lambda: smallest_of(place, f, APART, "patched", "tuned", "timed"),
        ),
        "streamed": lambda f: once(f"card_run_streamed_{f}", lambda: smallest_streamed(place, f)),
    }
    for name in chosen.only.split(","):
        if name == "verbs":
            once("card_internal_errors", lambda: verbs(place))
        elif name == "heal":
            once("card_heal_lora", lambda: card_heal.lora_budget(place / "heal"))
            once("card_heal_full", lambda: card_heal.full_budget(place / "heal"))
        else:
            for family in chosen.families.split(","):
                jobs[name](family)
    for name in ("card_run", "card_run_scattered"):
        values = [v for k, v in figures.items() if k.removeprefix(f"{name}_") in FAMILIES]
        if values:
            print(f"{name}: {max(values):.2f}")
    for name, value in figures.items():
        shown = value if isinstance(value, list | tuple) else [value]
        print(f"{name}: {' '.join(f'{v:.3g}' for v in shown)}")


if __name__ == "__main__":
    main()
