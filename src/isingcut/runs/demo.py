"""The demo: SmolLM2-135M loses 6 of 30 blocks, on a laptop, in minutes."""

from __future__ import annotations

from pathlib import Path

from isingcut.console.progress import Progress, silent
from isingcut.options.config import RunConfig
from isingcut.runs import pipeline

CONFIG = RunConfig(
    model="smollm2",
    remove="6",
    out="demo-run",
    calibration="wiki",
    samples=16,
    length=128,
    rank_samples=16,
    report_samples=32,
    patch_tokens=16384,
    also="empirical-fisher",
)
"""Small samples: this is a demonstration, not a benchmark. The paper's energy, measured beside the
default, gets its full number of samples, because more of them cost it little."""


def demo(out: str | None = None, overwrite: bool = False, progress: Progress = silent) -> Path:
    """Run the demo.

    Returns:
        The run folder.
    """
    config = CONFIG.replace(out=out or CONFIG.out, overwrite=overwrite)
    return pipeline.run(config, progress=progress)
