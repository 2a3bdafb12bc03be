"""The Python door: `prune` gives a `Run`, from which the spectrum, the choice and the smaller
model are one attribute or call away.

    run = isingcut.prune("my-model", remove=8)
    run.spectrum
    run.save("smaller-model")

Everything rests on a run folder, the same one that the command line writes, so that a run
started in Python can be looked at, reported or continued in a shell, and the other way round.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
import weakref
from pathlib import Path
from typing import Any, TypedDict, Unpack

from isingcut.api_run import Run, energy_warnings
from isingcut.config import from_mapping
from isingcut.errors import InputError
from isingcut.progress import Progress, silent, terminal

__all__ = ["Options", "PoorEnergyWarning", "open_run", "prune"]


class PoorEnergyWarning(UserWarning):
    """The energy ranked measured losses poorly; the message says how poorly and what to do."""


class Options(TypedDict, total=False):
    """The options of `prune` beside the model: those of `RunConfig`, which has their meaning
    and their defaults.

    Examples:
        >>> options: isingcut.Options = {"samples": 4, "length": 16, "keep": "0,5"}
        >>> isingcut.RunConfig(model="my-model", **options).keep
        '0,5'
    """

    calibration: str
    samples: int | None
    length: int
    rank_samples: int
    report_samples: int
    seed: int
    energy: str
    also: str
    effort: str
    linear: bool
    dtype: str
    device: str
    attention: str
    batch_tokens: int | None
    stream: str
    memory_limit: str
    trust_remote_code: bool
    solver: str
    states: int
    budget: str
    diverse: int
    solve_seconds: float
    keep: str
    drop: str
    random_states: int
    choose: str
    patch: str
    heal: bool
    heal_top: int
    heal_options: str
    overwrite: bool


def prune(
    model: str | Path,
    remove: int | str | None = None,
    *,
    out: str | Path | None = None,
    progress: Progress | bool = False,
    **options: Unpack[Options],
) -> Run:
    """Measure the energy of a model's blocks, solve for the best removals, measure those, choose.

    Args:
        model: a Hugging Face folder, a hub id, a ``.gguf`` file or ``"smollm2"``.
        remove: how many blocks go (8), how many of each kind (``"attention=2,moe=3"``), or a
            range (``"4..15"``, see `Run.curve` and `Run.at`); may be left out where a ``budget``
            is given.
        out: the run folder; what is finished there is not measured again. Without one, a
            temporary folder that goes with the returned object.
        progress: True shows bars on stderr; or any `isingcut.progress.Progress`.
        options: every other option of a run (`Options`).

    Returns:
        the run; no checkpoint is written before `Run.save`.

    Raises:
        IsingcutError: bad input, in one line; nothing was written.

    Warns:
        PoorEnergyWarning: the energy ranked the measured states poorly.

    Examples:
        >>> run = isingcut.prune(
        ...     "my-model", remove=3, calibration="my-text.txt", samples=4, length=16
        ... )
        >>> len(run.chosen.removed)
        3
        >>> run.spectrum.proven
        True
        >>> run.save("smaller-model").name
        'smaller-model'
    """
    from isingcut import stages
    from isingcut.crew import expected
    from isingcut.distributed import led
    from isingcut.measuring import concrete, measure_energy
    from isingcut.pipeline import open_session
    from isingcut.removal import each_removal

    if out is None and expected():
        raise InputError("several processes need one run folder; give out=...")
    temporary = Path(tempfile.mkdtemp(prefix="isingcut-")) if out is None else None
    wanted: dict[str, Any] = {
        **options,
        "model": str(model),
        "remove": "" if remove is None else remove,
        "out": str(out if temporary is None else temporary / "run"),
    }

    def work() -> tuple[Run, list[str]]:
        config = concrete(from_mapping(wanted, "isingcut.prune").validate())
        session, folder = open_session(config, _progress(progress), need_removal=True)
        measure_energy(session, folder)
        said: list[str] = []
        for one in each_removal(config):
            stages.solve(folder, one)
            said += energy_warnings(one, stages.rank(session.at(one), folder))
        return Run(folder, config, session), said

    try:
        done = led(work)
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if done is None:
        # Another process of the launcher did the work; the folder has it.
        return open_run(wanted["out"], progress=progress)
    run, said = done
    if temporary is not None:
        weakref.finalize(run, shutil.rmtree, temporary, ignore_errors=True)
    for text in dict.fromkeys(said):
        warnings.warn(text, PoorEnergyWarning, stacklevel=2)
    return run


def open_run(
    folder: str | Path,
    remove: int | str | None = None,
    *,
    progress: Progress | bool = False,
    overwrite: bool = False,
) -> Run:
    """A finished or half-finished run folder, whether Python or the command line made it.

    Args:
        folder: the run folder.
        remove: one of its removals; by default the one it was made for.
        progress: as in `prune`.
        overwrite: outputs made with other options may be replaced.

    Raises:
        StageFileError: not a run folder, or a damaged one.

    Examples:
        >>> isingcut.open_run("my-run").blocks
        10
    """
    from isingcut.runfolder import RunFolder

    opened = RunFolder.open(Path(folder), overwrite=overwrite)
    config = opened.config.replace(overwrite=overwrite)
    if remove is not None:
        config = config.replace(remove=str(remove), budget="")
    return Run(opened, config.validate(), progress=_progress(progress))


def _progress(wanted: Progress | bool) -> Progress:
    if isinstance(wanted, bool):
        return terminal if wanted else silent
    return wanted
