"""The demo: SmolLM2-135M loses 6 of 30 blocks, on a laptop, in minutes."""

from __future__ import annotations

from pathlib import Path

from isingcut import pipeline
from isingcut.config import RunConfig
from isingcut.files import read_json
from isingcut.progress import terminal
from isingcut.show import show_generation, show_run

CONFIG = RunConfig(
    model="smollm2",
    remove="6",
    out="demo-run",
    calibration="wiki",
    samples=8,
    length=128,
    rank_samples=16,
    report_samples=32,
    also="empirical-fisher",
)
"""Small samples: this is a demonstration, not a benchmark. The paper's energy, measured beside the
default, gets its full number of samples, because more of them cost it little."""


def demo(out: str | None = None, overwrite: bool = False) -> Path:
    """Run the demo and print its evidence.

    Returns:
        The run folder.
    """
    config = CONFIG.replace(out=out or CONFIG.out, overwrite=overwrite)
    target = pipeline.run(config, progress=terminal)
    show_run(target)
    show_generation(read_json(target / "evaluation.json", "evaluation")["generation"])
    return target
