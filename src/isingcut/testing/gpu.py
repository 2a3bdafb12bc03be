"""Checks of isingcut on a GPU, in about a quarter of an hour.

    python -m isingcut.testing gpu                                  the checks, on cuda
    python -m isingcut.testing gpu Checks.test_agree Checks.test_run    some of them

The checks use tiny random models, in float32 if numbers are compared. What the program prints can
be attached to an issue. The exit code is 1 if a check failed. Choose another GPU than the first
with CUDA_VISIBLE_DEVICES.
"""

import json
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import isingcut
from isingcut.data.tokens import TokenSet
from isingcut.files.provenance import versions
from isingcut.healing.heal import heal
from isingcut.measure.gradients import gate_gradients
from isingcut.measure.losses import measure
from isingcut.models import placement
from isingcut.models.device import device_module, pick_device, synchronise
from isingcut.models.load import load
from isingcut.models.replay import Replay
from isingcut.models.streaming.replay import load_streamed
from isingcut.testing.tiny import tiny_checkpoint, tiny_model

DEVICE = "cuda"
CLOSE = 1e-4
"""Largest relative difference between a CPU and a GPU in float32."""


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


def close(actual: Any, expected: Any, most: float = CLOSE) -> str:
    """Check that numbers are close, relative to the largest, and describe their difference.

    Raises:
        AssertionError: the numbers are not close.
    """
    actual = np.asarray(actual)
    expected = np.asarray(expected)
    off = float(np.abs(actual - expected).max() / np.abs(expected).max())
    assert off <= most, (
        f"differs by {off:.1e} of its size, at most {most:.0e} is expected"
    )
    return f"differs by {off:.1e}" if off else "equal bits"


def compare(actual: Replay, expected: Replay) -> str:
    """Compare losses and gradients of a model on two devices."""
    kl = [measure(replay, tokens(), states()).kl for replay in (actual, expected)]
    rows = [gate_gradients(replay, tokens()) for replay in (actual, expected)]
    return f"losses: {close(kl[0], kl[1])}; gradients: {close(rows[0], rows[1])}"


def read(file: Path) -> Any:
    """Read a results file."""
    return json.loads(file.read_bytes())


class Checks(unittest.TestCase):
    """The checks.

    Attributes:
        device: GPU to check.
        folder: folder for files.
        model: tiny checkpoint of 8 blocks.
        text: file with a text to measure on.
    """

    device: torch.device
    folder: Path
    model: Path
    text: Path

    @classmethod
    def setUpClass(cls) -> None:
        cls.device = pick_device(DEVICE)
        name = getattr(device_module(cls.device), "get_device_name", str)
        print(name(cls.device), json.dumps(versions()))
        place = tempfile.TemporaryDirectory(prefix="isingcut-gpu-")
        cls.addClassCleanup(place.cleanup)
        cls.folder = Path(place.name)
        cls.model = tiny_checkpoint("llama", cls.folder / "model", num_hidden_layers=8)
        letters = np.random.default_rng(0).choice(
            list("abcdefghijklmnopqrstuvwxyz"), (9000, 6)
        )
        cls.text = cls.folder / "text.txt"
        cls.text.write_text(
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

    def run_in(self, name: str, **more: Any) -> Path:
        """Carry out a short run in a new folder, and return the folder."""
        out = self.folder / name
        return isingcut.run(out=str(out), remove=2, **self.options(**more))

    def two_cards(self) -> list[torch.device]:
        """Return the first two GPUs; skip the check if there are fewer."""
        if device_module(self.device).device_count() < 2:
            self.skipTest("needs two GPUs")
        return [torch.device(self.device.type, i) for i in range(2)]

    def test_agree(self) -> None:
        """Compare losses and gradients of the GPU with those of the CPU, of two families."""
        devices = (self.device, torch.device("cpu"))
        for family in ("llama", "qwen3_moe"):
            actual, expected = (replay_on(d, family=family) for d in devices)
            print(family, compare(actual, expected))

    def test_run(self) -> None:
        """Check that a default run, from text to report, chooses the same blocks as on the CPU."""
        chosen = []
        for device in (str(self.device), "cpu"):
            name = f"run-{device.replace(':', '-')}"
            out = self.run_in(name, dtype="float32", device=device)
            state = read(out / "candidates.json")["chosen"]
            chosen.append((state["removed"], state["kl"]))
        assert chosen[0][0] == chosen[1][0], f"GPU {chosen[0]}, CPU {chosen[1]}"
        print(f"blocks {chosen[0][0]}; KL: {close(chosen[0][1], chosen[1][1])}")

    def test_streamed(self) -> None:
        """Check that a streamed model gives the losses of the model in memory to the last bit.

        Gradients are only close: backward passes on GPUs add in no fixed order.
        """
        given: dict[str, Any] = {"dtype": "float32", "device": str(self.device)}
        resident = load(self.model, **given).replay
        other = load_streamed(self.model, **given).replay
        kl = [measure(replay, tokens(), states()).kl for replay in (other, resident)]
        close(kl[0], kl[1], 0.0)
        rows = [gate_gradients(replay, tokens()) for replay in (other, resident)]
        print(close(rows[0], rows[1]))

    def test_twice(self) -> None:
        """Check that gradients are reproducible."""
        replay = replay_on(self.device)
        first, second = (gate_gradients(replay, tokens()) for _ in range(2))
        print(close(second, first))

    def test_placed(self) -> None:
        """Compare losses and gradients of a model placed over two GPUs with those on one."""
        cards = self.two_cards()
        print(compare(replay_on(*cards), replay_on(cards[0])))

    def test_placed_run(self) -> None:
        """Check that a run over two GPUs, healed with LoRA, agrees with one on a single GPU."""
        names = list(map(str, self.two_cards()))
        healed = []
        given: dict[str, Any] = {
            "dtype": "float32",
            "batch_tokens": 256,
            "heal": "all",
            "healing": {"method": "lora", "trainer": {"max_steps": 4}},
        }
        for device in (",".join(names), names[0]):
            folder = f"cards-{device.replace(':', '-').replace(',', '-')}"
            out = self.run_in(folder, device=device, **given)
            healed.append(read(out / "healing.json")["after"]["kl"])
        print(f"healed KL: {close(*healed)}")

    def test_processes(self) -> None:
        """Check that two processes with a GPU each write the same files as one."""
        if self.two_cards()[0].type != "cuda":
            self.skipTest("needs CUDA")
        given = self.options(
            dtype="float32",
            device="cuda",
            batch_tokens=64,
            attention="sdpa",
            energy="pairwise",
        )
        del given["model"]
        files = []
        for size in (1, 2):
            out = self.folder / f"ranks-{size}"
            launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={size}"]
            command = ["-m", "isingcut", "energy", str(self.model), f"--out={out}"]
            command += [f"--{k.replace('_', '-')}={v}" for k, v in given.items()]
            subprocess.run([sys.executable, *launcher, *command], check=True)
            files.append((out / "hamiltonian.safetensors").read_bytes())
        assert files[0] == files[1], "the files differ"

    def test_heal(self) -> None:
        """Check that every healing method trains and writes a verified checkpoint."""
        out = self.run_in("to-heal", patch="none")
        for method in ("lora", "full"):
            healed = heal(
                student=str(out / "model"),
                teacher=str(self.model),
                out=str(self.folder / f"healed-{method.replace(':', '-')}"),
                text=str(self.text),
                method=method,
                trainer={"max_steps": 4},
                length=32,
                device=str(self.device),
            )
            kl = [
                read(healed / "healing.json")[when]["kl"]
                for when in ("before", "after")
            ]
            print(f"{method}: KL {kl[0]:.3f} to {kl[1]:.3f}")

    def test_crowded(self) -> None:
        """Check that a run completes while another process uses nearly all memory."""
        module = device_module(self.device)
        free = int(module.mem_get_info(self.device)[0]) - 2**29
        taken = torch.empty(max(0, free), dtype=torch.uint8, device=self.device)
        synchronise(self.device)
        try:
            self.run_in("crowded")
        finally:
            size = taken.numel()
            del taken
            module.empty_cache()
        print(f"with {size / 1e9:.1f} GB in use")


def main(arguments: Sequence[str]) -> int:
    """Run the checks, and return the exit code."""
    words = ["python -m isingcut.testing gpu", *arguments]
    done = unittest.main(__name__, argv=words, verbosity=2, exit=False)
    return int(not done.result.wasSuccessful())
