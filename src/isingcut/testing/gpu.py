"""Checks of isingcut on a GPU, in about a quarter of an hour.

    python -m isingcut.testing gpu                      the checks, on cuda
    python -m isingcut.testing gpu --only agree,run     some of them

The checks use tiny random models, in float32 if numbers are compared. The program prints a table
and `gpu_checks_failed: N`, and writes a file that can be attached to an issue. The exit code is 1
if a check failed, 2 without a GPU or for an unknown check.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import SkipTest

import numpy as np
import torch

import isingcut
from isingcut.data.tokens import TokenSet
from isingcut.errors import IsingcutError
from isingcut.files.provenance import versions
from isingcut.files.writing import atomic_file
from isingcut.healing.heal import heal as healing
from isingcut.measure.gradients import gate_gradients
from isingcut.measure.losses import measure
from isingcut.models import placement
from isingcut.models.device import device_module, pick_device, synchronise
from isingcut.models.load import load
from isingcut.models.replay import Replay
from isingcut.models.streaming.replay import load_streamed
from isingcut.testing.tiny import tiny_checkpoint, tiny_model

CLOSE = 1e-4
"""Largest relative difference between a CPU and a GPU in float32."""


class Place:
    """The inputs of the checks.

    Attributes:
        device: GPU to check.
        folder: folder for files.
        model: tiny checkpoint of 8 blocks.
        text: file with a text to measure on.
    """

    def __init__(self, device: torch.device, folder: Path) -> None:
        self.device = device
        self.folder = folder
        self.model = tiny_checkpoint("llama", folder / "model", num_hidden_layers=8)
        letters = np.random.default_rng(0).choice(
            list("abcdefghijklmnopqrstuvwxyz"), (9000, 6)
        )
        self.text = folder / "text.txt"
        self.text.write_text(
            " ".join("".join(word) for word in letters), encoding="utf-8"
        )

    def options(self, **more: Any) -> dict[str, Any]:
        """Return the options of a short run."""
        return {
            "model": str(self.model),
            "calibration": str(self.text),
            "device": str(self.device),
            "samples": 8,
            "length": 32,
            "rank_samples": 4,
            "report_samples": 4,
            "random_states": 30,
            "states": 5,
            "patch_tokens": 512,
            **more,
        }

    def run(self, name: str, **more: Any) -> Path:
        """Carry out a short run in a new folder, and return the folder."""
        out = self.folder / name
        isingcut.run(out=str(out), remove=2, **self.options(**more))
        return out


def replay_on(*devices: torch.device, family: str = "llama") -> Replay:
    """Make a tiny model on a device, or placed over several, and return its blocks."""
    model: Any = tiny_model(family, num_hidden_layers=8).requires_grad_(False)
    placement.connect(model, placement.place(model, devices))
    return Replay(model)


def tokens() -> TokenSet:
    """Make samples of unequal lengths."""
    rng = np.random.default_rng(0)
    return TokenSet.from_rows(
        [rng.integers(8, 200, n).tolist() for n in (31, 24, 31, 17)]
    )


def states() -> Any:
    """Make states (6, 8)."""
    return np.random.default_rng(1).random((6, 8)) < 0.3


def close(found: Any, expected: Any, most: float = CLOSE) -> str:
    """Check that numbers are close, relative to the largest, and describe their difference.

    Raises:
        AssertionError: the numbers are not close.
    """
    found = np.asarray(found)
    expected = np.asarray(expected)
    off = float(np.abs(found - expected).max() / np.abs(expected).max())
    assert off <= most, (
        f"differs by {off:.1e} of its size, at most {most:.0e} is expected"
    )
    return f"differs by {off:.1e}" if off else "equal bits"


def compare(found: Replay, expected: Replay) -> str:
    """Compare losses and gradients of a model on two devices."""
    kl = [measure(replay, tokens(), states()).kl for replay in (found, expected)]
    rows = [gate_gradients(replay, tokens()) for replay in (found, expected)]
    return f"losses: {close(kl[0], kl[1])}; gradients: {close(rows[0], rows[1])}"


def agree(place: Place) -> str:
    """Compare losses and gradients of the GPU with those of the CPU, of two families."""
    lines = []
    for family in ("llama", "qwen3_moe"):
        found, expected = (
            replay_on(device, family=family)
            for device in (place.device, torch.device("cpu"))
        )
        lines.append(f"{family}: {compare(found, expected)}")
    return "; ".join(lines)


def run(place: Place) -> str:
    """Check that a default run, from text to report, chooses the same blocks as on the CPU."""
    chosen = []
    for device in (str(place.device), "cpu"):
        out = place.run(
            f"run-{device.replace(':', '-')}", dtype="float32", device=device
        )
        found = json.loads((out / "candidates.json").read_bytes())["chosen"]
        chosen.append((found["removed"], found["kl"]))
    assert chosen[0][0] == chosen[1][0], f"GPU {chosen[0]}, CPU {chosen[1]}"
    return f"blocks {chosen[0][0]}; KL: {close(chosen[0][1], chosen[1][1])}"


def half(place: Place) -> str:
    """Run in the default dtype of the GPU."""
    out = place.run("run-auto")
    found = json.loads((out / "evaluation.json").read_bytes())
    speed = found["before"].get("decode_tokens_per_second")
    return f"{found['dtype']}, KL {found['kl']:.4f}, decodes {speed:.0f} tokens/s"


def streamed(place: Place) -> str:
    """Check that a streamed model gives the losses of the model in memory to the last bit.

    Gradients are only close: backward passes on GPUs add in no fixed order.
    """
    given: dict[str, Any] = {"dtype": "float32", "device": str(place.device)}
    resident = load(place.model, **given).replay
    other = load_streamed(place.model, **given).replay
    close(
        measure(other, tokens(), states()).kl,
        measure(resident, tokens(), states()).kl,
        0.0,
    )
    return close(gate_gradients(other, tokens()), gate_gradients(resident, tokens()))


def twice(place: Place) -> str:
    """Check that gradients are reproducible."""
    replay = replay_on(place.device)
    first, second = (gate_gradients(replay, tokens()) for _ in range(2))
    return close(second, first)


def two_cards(place: Place) -> list[torch.device]:
    """Return the first two GPUs.

    Raises:
        SkipTest: there are fewer.
    """
    count = device_module(place.device).device_count()
    if count < 2:
        raise SkipTest(f"needs two GPUs, there is {count}")
    return [torch.device(place.device.type, i) for i in range(2)]


def placed(place: Place) -> str:
    """Compare losses and gradients of a model placed over two GPUs with those on one."""
    cards = two_cards(place)
    return compare(replay_on(*cards), replay_on(cards[0]))


def placed_run(place: Place) -> str:
    """Check that a run over two GPUs, healed with LoRA, agrees with one on a single GPU."""
    names = list(map(str, two_cards(place)))
    found = []
    given: dict[str, Any] = {
        "dtype": "float32",
        "skip_speed": True,
        "batch_tokens": 256,
    }
    given |= {"heal": "all", "healing": {"method": "lora", "trainer": {"max_steps": 4}}}
    for device in (",".join(names), names[0]):
        folder = f"cards-{device.replace(':', '-').replace(',', '-')}"
        out = place.run(folder, device=device, **given)
        found.append(json.loads((out / "healing.json").read_bytes()))
    return f"healed KL: {close(*(record['after']['kl'] for record in found))}"


def processes(place: Place) -> str:
    """Check that two processes with a GPU each write the same files as one."""
    if two_cards(place)[0].type != "cuda":
        raise SkipTest("needs CUDA")
    given = place.options(
        dtype="float32",
        device="cuda",
        batch_tokens=64,
        attention="sdpa",
        energy="pairwise",
    )
    del given["model"]
    files = []
    for size in (1, 2):
        out = place.folder / f"ranks-{size}"
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={size}"]
        command = ["-m", "isingcut", "energy", str(place.model), f"--out={out}"]
        command += [f"--{k.replace('_', '-')}={v}" for k, v in given.items()]
        done = subprocess.run(
            [sys.executable, *launcher, *command],
            capture_output=True,
            text=True,
            check=False,
        )
        assert not done.returncode, done.stderr[-500:]
        files.append((out / "hamiltonian.safetensors").read_bytes())
    assert files[0] == files[1], "the files differ"
    return "equal files"


def heal(place: Place) -> str:
    """Check that every healing method trains and writes a verified checkpoint."""
    out = place.run("to-heal", patch="none", skip_speed=True)
    lines = []
    for method in ("lora", "full"):
        healed = healing(
            student=str(out / "model"),
            teacher=str(place.model),
            out=str(place.folder / f"healed-{method.replace(':', '-')}"),
            text=str(place.text),
            method=method,
            trainer={"max_steps": 4},
            length=32,
            device=str(place.device),
        )
        record = json.loads((healed / "healing.json").read_bytes())
        lines.append(
            f"{method}: KL {record['before']['kl']:.3f} to {record['after']['kl']:.3f}"
        )
    return "; ".join(lines)


def crowded(place: Place) -> str:
    """Check that a run completes while another process uses nearly all memory."""
    module = device_module(place.device)
    free = module.mem_get_info(place.device)[0]
    taken = torch.empty(
        max(0, int(free) - 2**29), dtype=torch.uint8, device=place.device
    )
    synchronise(place.device)
    try:
        place.run("crowded", skip_speed=True)
    finally:
        size = taken.numel()
        del taken
        module.empty_cache()
    return f"with {size / 1e9:.1f} GB in use"


CHECKS: dict[str, Callable[[Place], str]] = {
    check.__name__: check
    for check in (
        agree,
        run,
        half,
        streamed,
        twice,
        placed,
        placed_run,
        processes,
        heal,
        crowded,
    )
}


def carry_out(device: torch.device, names: Sequence[str]) -> list[dict[str, Any]]:
    """Run the named checks in order; return outcome, seconds and message of each."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="isingcut-gpu-") as folder:
        place = Place(device, Path(folder))
        for name in names:
            began = time.monotonic()
            row = {"check": name, "outcome": "passed", "traceback": ""}
            try:
                words = CHECKS[name](place)
            except SkipTest as e:
                row["outcome"] = "skipped"
                words = str(e)
            except Exception as e:
                row |= {"outcome": "failed", "traceback": traceback.format_exc()}
                plain = isinstance(e, IsingcutError | AssertionError)
                words = " ".join((str(e) if plain else repr(e)).split())
            took = time.monotonic() - began
            print(
                f"{row['outcome']:8} {took:6.1f} s  {name:10} {words[:150]}", flush=True
            )
            rows.append({**row, "seconds": took, "words": words})
    return rows


def main(arguments: Sequence[str]) -> int:
    """Run the checks, write the results file, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m isingcut.testing gpu")
    parser.add_argument("--device", default="cuda", help="cuda, or cuda:N")
    parser.add_argument("--only", default=",".join(CHECKS), help="names of checks")
    parser.add_argument(
        "--out", type=Path, default=Path("isingcut-gpu.json"), help="the file"
    )
    options = parser.parse_args(list(arguments))
    names = options.only.split(",")
    if unknown := [name for name in names if name not in CHECKS]:
        print(f"unknown check {unknown[0]!r}; known: {', '.join(CHECKS)}")
        return 2
    try:
        device = pick_device(options.device)
        card = getattr(device_module(device), "get_device_name", str)(device)
        print(f"{card}, torch {torch.__version__}")
        # Opened before the checks, so that a place that cannot be written costs none.
        with atomic_file(options.out) as file:
            rows = carry_out(device, names)
            content = {"card": card, "versions": versions(), "checks": rows}
            file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except IsingcutError as e:
        print(e)
        return 2
    failed = sum(row["outcome"] == "failed" for row in rows)
    print(f"written to {options.out}: attach it to an issue")
    print(f"gpu_checks_failed: {failed}")
    return int(failed > 0)
