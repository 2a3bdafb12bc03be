"""Heal a cut checkpoint: patch, distil, and say what it was worth on text held out.

cut checkpoint + original -> [linear patch] -> [distillation] -> checkpoint + healing.json
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from isingcut.console.progress import Progress, as_progress, silent
from isingcut.data import corpora, healing_text
from isingcut.data.healing_text import HealingText
from isingcut.errors import InputError, ModelError
from isingcut.files.documents.scores import HealingFile
from isingcut.files.inputs import user_path
from isingcut.files.locks import locked
from isingcut.files.outputs import refuse_changed
from isingcut.files.provenance import versions
from isingcut.files.writing import atomic_folder, read_document, write_json
from isingcut.healing.checks import check_places, check_training, sources_of
from isingcut.healing.figures import scores
from isingcut.healing.healers import RECORD, registry
from isingcut.healing.job import Job
from isingcut.healing.judging import Domains, Judge
from isingcut.healing.patching import patch, start_of
from isingcut.healing.removed import Removal, check_pair, recorded_removal, removal_by_weights
from isingcut.healing.work_folder import (
    forget_all,
    forget_training,
    held,
    identities,
    kept,
    told,
    work_of,
)
from isingcut.memory import convert_memory_errors
from isingcut.models.architectures import find_stack, text_config
from isingcut.models.device import dtype_name
from isingcut.models.load import LoadedModel, load
from isingcut.models.processes import ALONE, Processes
from isingcut.models.sources import check_unchanged, model_identity, resolve, weights_stamp
from isingcut.models.streaming.replay import StreamedReplay, load_streamed
from isingcut.options.declaration import options_from
from isingcut.options.healing import LENGTH, HealConfig
from isingcut.report.card import healed_card, kept_parts


@convert_memory_errors()
def heal(
    config: HealConfig | None = None,
    /,
    *,
    progress: Progress = silent,
    sources: Sequence[str | os.PathLike[str]] = (),
    **options: Any,
) -> Path:
    """Heal a cut checkpoint with the original as the teacher.

    Args:
        config: all options; or give them by name (`student`, `teacher` and `out` at least).
        progress: where progress is shown.
        sources: further files that were read for this call; the output never replaces one.

    Returns:
        The healed checkpoint's folder, a plain checkpoint with `healing.json` in it.

    Raises:
        IsingcutError: bad input, in one line.
        BusyError: another process writes there.
    """
    if config is not None and (options or not isinstance(config, HealConfig)):
        raise InputError("give either a HealConfig or options by name (student=...), not both")
    progress = as_progress(progress)
    config = (config or options_from(HealConfig, options, "isingcut.healing.heal")).validate()
    for name in ("student", "teacher", "out"):
        if not getattr(config, name):
            raise InputError(f"healing needs --{name}" if name != "student" else "no STUDENT given")
    corpora.check(config.text)
    student, out = user_path(config.student), user_path(config.out)
    known = recorded_removal(student)
    sources = [*sources_of(config), *sources]
    check_places(config, out, sources)
    if known is None and config.stream_teacher:
        raise InputError(
            f"{student} has no record of its cut; its blocks are found by comparing weights, which "
            "needs the teacher in memory: leave --stream-teacher out"
        )
    start = start_of(student)
    if start != "cut" and (config.method == "none" or config.patch in ("linear", "tuned")):
        raise InputError(
            f"{student} is {start} already, and a patch is fitted to the exact cut; leave --patch "
            "out and name a --method, or give the exact cut (isingcut excise --patch none)"
        )
    if config.method == "none" and config.patch is None:
        # It is all there is to do, so that it must be possible.
        config = config.replace(patch="tuned")
    check_training(config, student)
    processes = _processes(config)
    with contextlib.nullcontext() if processes.rank else locked(out):
        _heal_on_disk(config, known, sources, progress, processes)
    if processes.size > 1:
        torch.distributed.destroy_process_group()
    return out


def _heal_on_disk(
    config: HealConfig,
    known: Removal | None,
    sources: Sequence[str | os.PathLike[str]],
    progress: Progress,
    processes: Processes,
) -> None:
    """Load what the options name, and heal.

    Args:
        known: the removal, where the student has a record of it.
    """
    student, out = user_path(config.student), user_path(config.out)
    trust = config.trust_remote_code
    source = resolve(config.teacher, trust_remote_code=trust)
    sources = [*sources, source]
    check_places(config, out, sources)
    check_pair(config, student, known, source)
    refuse_changed(student)
    stamps = [(folder, weights_stamp(folder)) for folder in (source, student)]
    dtype = processes.decide(lambda: dtype_name(config.dtype, config.device))
    replay = None
    if config.stream_teacher:
        teacher, replay = load_streamed(
            source, dtype=dtype, device=config.device, trust_remote_code=trust
        )
    else:
        teacher = load(source, dtype=dtype, device=config.device, trust_remote_code=trust)
    if known is None:
        found = removal_by_weights(student, teacher, trust_remote_code=trust)
        known = Removal(found, len(find_stack(teacher.model)))
    text = healing_text.build(
        config.text,
        teacher.tokenizer,
        samples=config.samples,
        report_samples=config.report_samples,
        length=sample_length(config, teacher.model),
        seed=config.seed,
        model=teacher.model,
    )

    def check_weights() -> None:
        for folder, stamp in stamps:
            check_unchanged(folder, stamp)

    parts = (known.removed, student, text, out, progress, replay)
    heal_checkpoint(
        config,
        teacher,
        *parts,
        processes=processes,
        sources=sources,
        check_weights=check_weights,
    )


def _processes(config: HealConfig) -> Processes:
    """All that train together, or wait for the first to patch."""
    if config.method == "none":
        return Processes.join()
    from accelerate import PartialState

    # First, so that the Trainer finds the group of its choice and the state of the option.
    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    PartialState(cpu=config.device == "cpu" or not gpu)
    return Processes.join()


def sample_length(config: HealConfig, model: Any) -> int:
    """Tokens of a sample: as many as were asked for, or as the model has positions."""
    longest = getattr(text_config(model), "max_position_embeddings", None)
    length = config.length or LENGTH
    return min(length, int(longest or length))


def heal_checkpoint(
    config: HealConfig,
    teacher: LoadedModel,
    removed: Sequence[int],
    student: Path,
    text: HealingText,
    out: Path,
    progress: Progress = silent,
    replay: StreamedReplay | None = None,
    *,
    judge: Judge | None = None,
    processes: Processes = ALONE,
    sources: Sequence[str | os.PathLike[str]] = (),
    check_weights: Callable[[], None] = lambda: None,
) -> HealingFile:
    """Heal one cut checkpoint, whatever made it, and write ``out`` with its `healing.json`.

    Work in progress is kept in a folder beside ``out`` and continued by the same call. The caller
    sees to it that no other process writes there.

    Args:
        judge: looks at the training; without one it ends where a domain of the text gets worse.
        processes: that train together.
        sources: what ``out`` must not be, contain or lie in.
        check_weights: refuses weights that were changed since they were loaded.

    Raises:
        OutputExistsError: ``out`` is there.
        StageFileError: the work in progress belongs to other options.
    """
    sources = [student, teacher.folder, *sources]
    check_places(config, out, sources)
    parts = kept_parts(student)
    work = work_of(out)
    identity, training = identities(config, teacher, removed, student, text)
    job = Job(
        teacher,
        tuple(removed),
        student,
        text.train,
        work,
        config,
        silent if processes.rank else progress,
        replay,
        processes,
        judge or Domains(text.report),
        training,
    )
    # Every process has looked at the places before rank 0 writes there.
    processes.wait()
    with held(work, identity, training) if job.leads else contextlib.nullcontext():
        processes.wait()
        done, content = _healed(job, text)
        if job.leads:
            try:
                check_weights()
            except ModelError:
                forget_all(work)
                raise
            write_json(done / RECORD, "healing", content)
            card, record = done / "README.md", read_document(done / RECORD, HealingFile)
            if card.is_file():
                written = card.read_text(encoding="utf-8")
                card.write_text(healed_card(parts, written, record), encoding="utf-8")
            with atomic_folder(out, overwrite=config.overwrite, sources=sources) as temporary:
                temporary.rmdir()
                done.rename(temporary)
    processes.wait()
    return read_document(out / RECORD, HealingFile)


def _healed(job: Job, text: HealingText) -> tuple[Path, dict[str, Any]]:
    """Patch and distil into the work folder.

    Returns:
        the healed checkpoint, and what `healing.json` says; empty but in the process of rank 0.
    """
    config, work, student, main = job.config, job.work, job.start, job.leads
    began = time.monotonic()
    record: dict[str, Any] = {}
    before = kept(work / "before.json", lambda: scores(job, student, text.report)) if main else {}
    start = start_of(student)
    if config.patch in ("linear", "tuned") or (config.patch is None and start == "cut"):
        patched = work / "patched"

        def make() -> dict[str, Any]:
            found = patch(job, patched)
            figures = {"scores": scores(job, patched, text.report)} if found["cuts"] else {}
            return {**found, **figures}

        if main:
            found = kept(work / "patched.json", make)
            record = {"patch": found} if found["cuts"] else {"unpatched": found["unpatched"]}
        job.processes.wait()
        if patched.is_dir():
            job = dataclasses.replace(job, start=patched)
    done = work / "done"
    if main:
        shutil.rmtree(done, ignore_errors=True)
    try:
        if config.method != "none":
            record["distillation"] = registry.get("distill")().heal(job, done)
        elif main:
            shutil.copytree(job.start, done)
        after = scores(job, done, text.report) if main else {}
    except ModelError:
        # It would fail the same way from its last state; another learning rate may not.
        if main:
            forget_training(work)
        raise
    if not main:
        return done, {}
    distilled = record.pop("distillation", {})
    return done, {
        "steps": distilled.pop("steps", []),
        "before": before,
        "after": after,
        **record,
        **distilled,
        "start": start,
        "removed": list(job.removed),
        "of": len(find_stack(job.teacher.model)),
        "length": sample_length(config, job.teacher.model),
        "report_samples": text.report.samples,
        "report_tokens": text.report.tokens,
        "overlap": {"report": text.overlap},
        "options": {
            **told(config),
            "patch": (config.patch or "linear") if "patch" in record else "none",
        },
        "seconds": round(time.monotonic() - began, 1),
        "provenance": {
            **versions(),
            "teacher": _named(job.teacher.folder),
            "student": _named(student),
        },
    }


def _named(folder: Path) -> dict[str, Any]:
    return {"name": folder.name, **model_identity(folder)}
