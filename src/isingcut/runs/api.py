"""The Python door: `prune` gives a `Run`, from which the spectrum, the choice and the smaller
model are one attribute or call away.

    run = isingcut.prune("my-model", remove=8)
    run.spectrum
    run.save("smaller-model")

Everything rests on a run folder, the same one that the command line writes, so that a run
started in Python can be looked at, reported or continued in a shell, and the other way round.
"""

from __future__ import annotations

import contextlib
import tempfile
import warnings
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from isingcut.data import held
from isingcut.errors import InputError
from isingcut.inputs import user_path
from isingcut.models import handed_over
from isingcut.models.processes import Processes
from isingcut.options.config import RunConfig
from isingcut.options.declaration import options_from
from isingcut.progress import Progress, silent, terminal
from isingcut.runs.api_run import Run, energy_warnings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Options", "PoorEnergyWarning", "open_run", "prune"]


class PoorEnergyWarning(UserWarning):
    """The energy ranked measured losses poorly; the message says how poorly and what to do."""


class Options(TypedDict, total=False):
    """The options of `prune` beside the model: those of `RunConfig`, which has their meaning
    and their defaults; `calibration` may be a list of texts too.

    Examples:
        >>> options: isingcut.Options = {"samples": 4, "length": 16, "keep": "0,5"}
        >>> isingcut.RunConfig(model="my-model", **options).keep
        '0,5'
    """

    calibration: str | list[str]
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
    skip_speed: bool
    overwrite: bool


def prune(
    model: str | Path | PreTrainedModel,
    remove: int | str | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    out: str | Path | None = None,
    progress: Progress | bool = False,
    **options: Unpack[Options],
) -> Run:
    """Measure the energy of a model's blocks, solve for the best removals, measure those, choose.

    Args:
        model: a Hugging Face folder, a hub id, a ``.gguf`` file, ``"smollm2"``, or a
            loaded transformers model, which is saved into a temporary folder that goes with the
            returned object.
        remove: how many blocks go (8), how many of each kind (``"attention=2,moe=3"``), or a
            range (``"4..15"``, see `Run.curve` and `Run.at`); may be left out where a ``budget``
            is given.
        tokenizer: the one of a loaded model.
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
    from isingcut.runs import stages
    from isingcut.runs.joining import part
    from isingcut.runs.measuring import concrete, measure_energy
    from isingcut.runs.pipeline import open_session
    from isingcut.runs.removal import each_removal

    loaded = not isinstance(model, str | Path)
    processes = Processes.join()
    if processes.size > 1 and (loaded or out is None):
        raise InputError("several processes need one model on disk and one run folder: name both")
    if tokenizer is not None and not loaded:
        raise InputError("tokenizer belongs to a loaded model; a folder or hub id has its own")
    # What the run needs beside its folder; it goes with the returned object.
    kept = contextlib.ExitStack()

    def wanted() -> RunConfig:
        text = options.get("calibration")
        given: dict[str, Any] = {**options, "remove": "" if remove is None else remove}
        given["model"] = str(model) if isinstance(model, str | Path) else type(model).__name__
        given["out"] = str(out or Path(kept.enter_context(_temporary())) / "run")
        if text is not None and not isinstance(text, str):
            given["calibration"] = kept.enter_context(held.texts(text))
        config = options_from(RunConfig, given, "isingcut.prune").validate()
        if not isinstance(model, str | Path):
            # Last, as saving a large one takes long.
            config = config.replace(model=kept.enter_context(handed_over.model(model, tokenizer)))
        return concrete(config)

    def work() -> tuple[Run, list[str]]:
        config = wanted()
        session, folder = open_session(config, _progress(progress), processes, need_removal=True)
        measure_energy(session, folder)
        said: list[str] = []
        for one in each_removal(config):
            stages.solve(folder, one)
            said += energy_warnings(one, stages.rank(session.at(one), folder))
        part(session, folder)
        return Run(folder, config, session), said

    try:
        run, said = work()
    except BaseException:
        kept.close()
        raise
    weakref.finalize(run, kept.close)
    if processes.rank:
        return run
    for text in dict.fromkeys(said):
        warnings.warn(text, PoorEnergyWarning, stacklevel=2)
    return run


def open_run(
    folder: str | Path,
    remove: int | str | None = None,
    *,
    model: str | Path | None = None,
    progress: Progress | bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Run:
    """A finished or half-finished run folder, whether Python or the command line made it.

    Args:
        folder: the run folder.
        remove: one of its removals; by default the one it was made for.
        model: where its model is now; by default where it was, seen from here, as an absolute
            path, or from the run folder.
        progress: as in `prune`.
        overwrite: outputs made with other options may be replaced.
        trust_remote_code: allow the model's own code to run; no run folder remembers it.

    Raises:
        StageFileError: not a run folder, or a damaged one.

    Examples:
        >>> isingcut.open_run("my-run").blocks
        10
    """
    from isingcut.runs.folder import RunFolder

    opened = RunFolder.open(user_path(folder), overwrite=overwrite)
    config = opened.config.replace(overwrite=overwrite, trust_remote_code=trust_remote_code)
    if model is not None:
        config = config.replace(model=str(model))
    if remove is not None:
        config = config.replace(remove=str(remove), budget="")
    return Run(opened, config.validate(), progress=_progress(progress))


def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="isingcut-", ignore_cleanup_errors=True)


def _progress(wanted: Progress | bool) -> Progress:
    if isinstance(wanted, bool):
        return terminal if wanted else silent
    return wanted
