"""The Python door: `prune` and `open_run` give a `Run`.

    run = isingcut.prune("my-model", remove=8)
    run.spectrum
    run.save("smaller-model")

Everything rests on a run folder, the same one that the command line writes, so that a run
started in Python can be looked at, reported or continued in a shell, and the other way round.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isingcut.console.progress import Progress, as_progress
from isingcut.data import held
from isingcut.errors import InputError
from isingcut.files.inputs import user_path
from isingcut.files.writing import temporary_folder
from isingcut.memory import convert_memory_errors
from isingcut.models import handed_over
from isingcut.models.processes import Processes
from isingcut.report.words import ranking_warnings
from isingcut.runs import pipeline
from isingcut.runs.api_run import Run
from isingcut.runs.folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["PoorEnergyWarning", "open_run", "prune"]


class PoorEnergyWarning(UserWarning):
    """The energy ranked measured losses poorly; the message says how poorly and what to do."""


@convert_memory_errors()
def prune(
    model: str | Path | PreTrainedModel,
    remove: int | str | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    out: str | Path | None = None,
    progress: Progress | bool = False,
    **options: Any,
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
        progress: True shows bars on stderr; or any `isingcut.console.progress.Progress`.
        options: every other field of `RunConfig`; ``calibration`` may be a list of texts too.

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
    shown = as_progress(progress)
    loaded = None if isinstance(model, str | Path) else model
    processes = Processes.join()
    if processes.size > 1 and (loaded is not None or out is None):
        raise InputError("several processes need one model on disk and one run folder: name both")
    if tokenizer is not None and loaded is None:
        raise InputError("tokenizer belongs to a loaded model; a folder or hub id has its own")
    # What the run needs beside its folder goes with the returned object.
    with contextlib.ExitStack() as kept:
        if not isinstance(options.get("calibration", ""), str):
            options["calibration"] = kept.enter_context(held.texts(options["calibration"]))
        if out is None:
            out = kept.enter_context(temporary_folder()) / "run"
        named = model if loaded is None else type(loaded).__name__
        asked = {"model": named, "remove": "" if remove is None else remove, "out": out, **options}
        config = pipeline.checked(None, asked, "isingcut.prune")
        if loaded is not None:
            # Last, as saving a large one takes long.
            config = config.replace(model=kept.enter_context(handed_over.model(loaded, tokenizer)))
        opened = pipeline.open_session(config, shown, processes, need_removal=True)
        with opened as (session, folder):
            rankings = pipeline.measure_and_rank(session, folder)
        run = Run(folder, config, lambda: session)
        weakref.finalize(run, kept.pop_all().close)
    if processes.rank:
        return run
    said = [text for found in rankings for text in ranking_warnings(config.energy, found)]
    for text in dict.fromkeys(said):
        warnings.warn(text, PoorEnergyWarning, stacklevel=3)
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
    shown = as_progress(progress)
    found = RunFolder.open(user_path(folder), overwrite=overwrite)
    changed: dict[str, Any] = {"overwrite": overwrite, "trust_remote_code": trust_remote_code}
    if model is not None:
        changed["model"] = model
    if remove is not None:
        changed |= {"remove": remove, "budget": ""}
    config = found.config.replace(**changed).validate()
    return Run(found, config, lambda: pipeline.session_of(found, config, shown))
