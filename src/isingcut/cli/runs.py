"""Verbs that do several stages at once: `run`, `energy`, `demo`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from isingcut.cli.verb import STAGES, WHOLE, Answer, ConfigFile, collect, given, verb
from isingcut.options.config import RunConfig

if TYPE_CHECKING:
    from pathlib import Path

_FIELDS = dataclasses.fields(RunConfig)
_ALL = tuple(f.name for f in _FIELDS)
# What a search looks near is said before anything is measured.
_NEAR = ("remove", "budget", "keep", "drop")
_MEASURE = tuple(
    f.name
    for f in _FIELDS
    if f.metadata["stage"] in ("model", "calibration", "energy")
    or f.name in ("out", "overwrite", *_NEAR)
)


@verb(*_ALL, group=WHOLE, together=True)
def run(progress: Any, config: ConfigFile = None, **options: Any) -> Answer:
    """Measure, solve, rank, cut, patch, evaluate and report.

    Example: isingcut run smollm2 --remove 6 --out my-run
    """
    from isingcut.runs import pipeline
    from isingcut.runs.removal import each_removal

    wanted = collect(config, options)
    target = pipeline.run(wanted, progress=progress)
    if len(each_removal(wanted)) == 1:
        return _finished(target)
    from isingcut.cli.show import curve_data, show_curve

    rows = curve_data(target)
    data = {"folder": str(target), "curve": rows}
    return Answer(data, lambda: show_curve(target), brief=str(target))


@verb("out", "overwrite", group=WHOLE, together=True)
def demo(progress: Any, **options: Any) -> Answer:
    """SmolLM2-135M loses 6 of its 30 blocks, with the evidence, in a few minutes.

    Example: isingcut demo
    """
    from isingcut.runs.demo import demo as run_demo

    return _finished(run_demo(**given(options), progress=progress), generation=True)


def _finished(target: Path, *, generation: bool = False) -> Answer:
    from isingcut.cli.show import finished, run_data, show_run
    from isingcut.report.words import healing_warnings

    files = finished(target)
    healing = [] if files.healing is None else healing_warnings(files.healing)
    return Answer(
        run_data(files),
        lambda: show_run(files, generation=generation),
        brief=str(files.product),
        warnings=[*files.warnings, *healing],
    )


@verb(*_MEASURE, group=STAGES, together=True)
def energy(progress: Any, config: ConfigFile = None, **options: Any) -> Answer:
    """Measure the Hamiltonian once; `solve` then answers every removal in seconds.

    With --remove or --budget the measurement also searches near that removal.

    Example: isingcut energy smollm2 --out my-run
    """
    from isingcut.cli.show import energy_data, show_energy
    from isingcut.report.run_files import RunFiles
    from isingcut.report.words import overlap_warnings
    from isingcut.runs import pipeline

    folder = pipeline.energy(collect(config, options), progress=progress)
    data = energy_data(folder)
    warnings = overlap_warnings(text.overlap if (text := RunFiles(folder).calibration) else {})
    return Answer(data, lambda: show_energy(data), brief=data["hamiltonian"], warnings=warnings)
