"""Heal a cut checkpoint: patch, distil, and measure the gain on unseen text.

cut checkpoint + original -> [linear patch] -> [distillation] -> checkpoint + healing.json
"""

import contextlib
import dataclasses
import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isingcut.console.progress import Progress, as_progress, duration, silent
from isingcut.data import healing_text
from isingcut.data.calibration import Calibration
from isingcut.data.healing_text import HealingText
from isingcut.data.mixture import places_in, shares_text, without_folders
from isingcut.data.tokens import TokenSet
from isingcut.errors import InputError, VerificationError
from isingcut.evaluation.quality import quality_of, sample_sums
from isingcut.files.evaluations import PairScores
from isingcut.files.healings import (
    HealedPart,
    HealedScores,
    HealingFile,
    HealOptions,
    PatchScores,
)
from isingcut.files.inputs import user_path
from isingcut.files.ownership import refuse_changed
from isingcut.files.provenance import versions
from isingcut.files.results import fingerprint, without_infinities, write_document
from isingcut.files.writing import atomic_folder, lock_place
from isingcut.formats.architectures.blocks import text_config
from isingcut.formats.cutting.checkpoint import remove_paths
from isingcut.formats.sources import (
    check_unchanged,
    model_identity,
    resolve,
    weights_stamp,
)
from isingcut.healing import RECORD
from isingcut.healing.checks import (
    card_parts_of,
    check_inputs,
    find_run,
    is_finished,
    read_removal,
    request_of,
    start_of,
)
from isingcut.healing.job import (
    LEAST_STEPS,
    SHORT,
    Domains,
    Job,
    check_training,
    trainer_settings,
)
from isingcut.healing.removed import check_pair, removal_by_weights
from isingcut.healing.repairs import registry
from isingcut.healing.repairs.base import CANNOT, patch_checkpoint, record_unpatched
from isingcut.healing.work_folder import (
    BEFORE,
    DONE,
    PATCH,
    PATCHED,
    check_places,
    claim_work,
    describe_options,
    keep_result,
    work_of,
)
from isingcut.measure.losses import difference
from isingcut.measure.work import Work
from isingcut.memory import convert_memory_errors
from isingcut.models.device import dtype_name
from isingcut.models.load import LoadedModel, load
from isingcut.models.sharing import open_cut
from isingcut.options.declaration import options_from
from isingcut.options.heal import LENGTH, HealConfig
from isingcut.processes import ANY_TIME, Processes, is_launched
from isingcut.report.card import healed_card


@convert_memory_errors()
def heal(
    config: HealConfig | None = None,
    /,
    *,
    progress: Progress | bool | None = None,
    sources: Sequence[str | os.PathLike[str]] = (),
    **options: Any,
) -> Path:
    """Heal a cut checkpoint with the original as the teacher.

    Args:
        config: all options; or give them by name (`student` and `out` at least).
        progress: as in `isingcut.run`.
        sources: further input files of this call, which the output never replaces.

    Returns:
        The healed checkpoint's folder, a plain checkpoint with `healing.json` in it.

    Raises:
        IsingcutError: bad input; the message is one line.
        BusyError: another process writes to the output.
    """
    if config is not None and (options or not isinstance(config, HealConfig)):
        raise InputError(
            "give either a HealConfig or options by name (student=...), not both"
        )
    shown = as_progress(progress)
    config = config or options_from(HealConfig, options, "isingcut.healing.heal")
    config = check_inputs(config, sources)
    student = user_path(config.student)
    out = user_path(config.out)
    if is_finished(config):
        return out
    known = read_removal(student)
    check_training(config, student)
    processes = _processes(config)
    trust = config.trust_remote_code
    with contextlib.nullcontext() if processes.rank else lock_place(out):
        source = resolve(config.teacher, trust_remote_code=trust, progress=shown)
        check_pair(config, student, known, source)
        refuse_changed(student)
        dtype = processes.decide(lambda: dtype_name(config.dtype, config.device))
        teacher = load(
            source,
            dtype=dtype,
            device=config.device,
            trust_remote_code=trust,
            split=known is not None and known.layers is not None,
        )
        blocks = known.removed if known else removal_by_weights(student, teacher)
        used = _calibration_of(student)
        own = None
        if used is not None and shares_text(used.source, config.text):
            # The run's patch was fitted on what follows its calibration in the shared text.
            most = config.report_samples * sample_length(config, teacher.model)
            own = used.splits["report"].first(most)
        text = build_text(config, teacher, used, own, shown)
        job = Job(
            teacher,
            teacher.stack.remove(blocks),
            student,
            text.train,
            out,
            config,
            shown,
            processes=processes,
        )
        heal_checkpoint(job, text, out, sources=sources)
    if processes.size > 1:
        torch.distributed.destroy_process_group()
    return out


CHAT_SAMPLES = 64
"""Samples of a text with ``"chat"`` that the teacher writes, unless the options say how many."""


def _calibration_of(student: Path) -> Calibration | None:
    """Return the calibration of the run whose folder has the checkpoint; None outside a run."""
    store = find_run(student)
    if store is None:
        return None
    own = Calibration.load(store.path / "calibration.safetensors")
    # The text may have changed since: `overlap` counts what is trained on and reported.
    return dataclasses.replace(own, meta={**own.meta, "texts": {}})


def _processes(config: HealConfig) -> Processes:
    """Join the processes that train together; they wait while rank 0 patches."""
    if config.method == "none":
        return Processes.join()
    from accelerate import PartialState

    # Created first, so that the Trainer uses this process group and the device option.
    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    # NCCL's own ten minutes end while rank 0 patches or saves a large model.
    waits = {"timeout": ANY_TIME} if is_launched() else {}
    PartialState(cpu=config.device == "cpu" or not gpu, **waits)
    return Processes.join()


def build_text(
    config: HealConfig,
    teacher: LoadedModel,
    used: Calibration | None = None,
    own: TokenSet | None = None,
    progress: Progress = silent,
) -> HealingText:
    """Read the text to train on, and the unseen text to report on.

    Args:
        used: a calibration whose text is left out.
        own: samples of it to report on, instead of further text.
        progress: shows how the teacher writes the text ``"chat"``.
    """
    length = sample_length(config, teacher.model)
    wanted = config.training.tokens
    tokens = int(wanted) if wanted else length * (config.samples or CHAT_SAMPLES)
    tokens += 0 if own else length * config.report_samples
    # What the calibration has is written again, and left out.
    splits = used.splits.values() if used else ()
    tokens += sum(int(split.mask.sum()) for split in splits)
    return healing_text.build(
        config.text,
        teacher.sampler(
            length, config.seed, tokens=tokens, used=used, progress=progress
        ),
        samples=config.samples,
        report_samples=config.report_samples,
        own=own,
    )


def sample_length(config: HealConfig, model: Any) -> int:
    """Return the tokens per sample: the requested number, but at most the model's positions."""
    longest = getattr(text_config(model), "max_position_embeddings", None)
    length = config.length or LENGTH
    return min(length, int(longest or length))


def identity_of(job: Job, text: HealingText) -> str:
    """Return the identity of a healing: a fingerprint of everything that its work depends on."""
    settings = trainer_settings(job.config)
    # How often to save may change.
    settings.pop("save_steps", None)
    folders = (job.teacher.folder, job.start)
    return fingerprint(
        {
            "options": {**describe_options(job.config), "trainer": settings},
            "models": [model_identity(folder)["sha256"] for folder in folders],
            "removed": job.removed.blocks,
            "tokens": [
                [t.input_ids.tolist(), t.counted is not None and t.counted.tolist()]
                for t in (text.train, text.report)
            ],
            "dtype": str(job.teacher.dtype),
        }
    )


def heal_checkpoint(
    job: Job,
    text: HealingText,
    out: Path,
    *,
    sources: Sequence[str | os.PathLike[str]] = (),
) -> None:
    """Heal a cut checkpoint made by any tool, and write ``out`` with its `healing.json`.

    Work in progress is kept in a folder next to ``out``, from which the same call resumes. The
    caller must lock ``out``.

    Args:
        job: the healing; its text, work folder and judge are replaced.
        sources: further inputs that ``out`` must not be, contain or lie in.

    Raises:
        OutputExistsError: ``out`` exists.
        ModelError: the weights of a model changed meanwhile.
        StageFileError: the work in progress belongs to other options.
    """
    config = job.config
    processes = job.processes
    student = job.start
    work = work_of(out)
    models = (student, job.teacher.folder)
    stamps = [weights_stamp(folder) for folder in models]
    names = filter(None, (config.teacher, *places_in(config.text)))
    sources = [*models, *map(user_path, names), *sources]
    check_places(config, out, sources)
    parts = card_parts_of(student)
    identity = identity_of(job, text)
    shown = silent if processes.rank else job.progress
    judge = Domains(text.report)
    job = dataclasses.replace(
        job, tokens=text.train, work=work, progress=shown, judge=judge
    )
    # Every process checks the places before rank 0 writes there.
    processes.wait()
    with claim_work(work, identity) if job.leads else contextlib.nullcontext():
        processes.wait()
        done, record = _train(job, text)
        if record is not None:
            for folder, stamp in zip(models, stamps, strict=True):
                check_unchanged(folder, stamp)
            # Without folders, because the checkpoint may be shared.
            record = HealingFile(**without_folders(record.content()))
            write_document(done / RECORD, record)
            remove_paths(done)
            card = done / "README.md"
            if card.is_file():
                written = card.read_text(encoding="utf-8")
                card.write_text(healed_card(parts, written, record), encoding="utf-8")
            with atomic_folder(
                out, overwrite=config.overwrite, sources=sources
            ) as temporary:
                temporary.rmdir()
                done.rename(temporary)
    processes.wait()


def _train(job: Job, text: HealingText) -> tuple[Path, HealingFile | None]:
    """Patch and distil into the work folder.

    Returns:
        the healed checkpoint, and its `healing.json` in the process of rank 0.
    """
    config = job.config
    student = job.start
    main = job.leads
    start = start_of(student)
    patches = config.patch != "none" and start == "cut"
    began = time.monotonic() - text.seconds
    record: dict[str, Any] = {}
    file = job.work / BEFORE.file
    known = file.exists()
    if main:
        record["before"] = keep_result(
            file, HealedScores, lambda: _scores(job, student, text.report)
        )
    judging = time.monotonic() - began - text.seconds
    if main and not known:
        _check_train(job, text, judging, patches=patches)
    if patches:
        patched = job.work / PATCHED.file

        def make() -> PatchScores:
            shutil.rmtree(patched, ignore_errors=True)
            try:
                scores = PatchScores(**patch_checkpoint(job, patched).content())
            except (*CANNOT, VerificationError) as e:
                shutil.rmtree(patched, ignore_errors=True)
                if config.patch is not None:
                    raise
                return PatchScores(**record_unpatched(job.removed.blocks, e).content())
            scores.scores = _scores(job, patched, text.report)
            return scores

        if main:
            scores = keep_result(job.work / PATCH.file, PatchScores, make)
            record |= (
                {"patch": scores} if scores.cuts else {"unpatched": scores.unpatched}
            )
        job.processes.wait()
        if patched.is_dir():
            job = dataclasses.replace(job, start=patched)
    done = job.work / DONE.file
    if main:
        shutil.rmtree(done, ignore_errors=True)
    if config.method != "none":
        # Imported here because it needs optional packages.
        from isingcut.healing.training.train import distill

        # Include the time of the evaluation after the training, which equals the first one's.
        spent = time.monotonic() - began + judging
        record |= distill(dataclasses.replace(job, spent=spent), done)
    elif main:
        shutil.copytree(job.start, done)
    if not main:
        return done, None
    stack = job.teacher.stack
    models = {"teacher": job.teacher.folder, "student": student}
    named = {
        k: {"name": folder.name, **model_identity(folder)}
        for k, folder in models.items()
    }
    patch = config.repair if "patch" in record else "none"
    return done, HealingFile(
        **{"steps": [], **record},
        after=_pair(record["before"], _scores(job, done, text.report), text.report),
        start=start,
        removed=list(job.removed.blocks),
        layers=list(job.removed.layers) if stack.split else None,
        of=len(stack),
        length=sample_length(config, job.teacher.model),
        report_samples=text.report.samples,
        report_tokens=text.report.tokens,
        overlap={"report": text.overlap},
        options=HealOptions(**describe_options(config) | {"patch": patch}),
        seconds=round(time.monotonic() - began, 1),
        provenance={
            **versions(),
            **named,
            "request": request_of(config, student, job.teacher.folder),
        },
    )


def _check_train(job: Job, text: HealingText, judging: float, *, patches: bool) -> None:
    """Raise if the time is too short for a useful training.

    Args:
        judging: seconds of an evaluation, which is a forward pass of each of two models.

    Raises:
        InputError: the time is too short; the message has an approximate time that is enough.
    """
    seconds = job.config.training.seconds
    if seconds is None or job.config.method == "none":
        return
    token = judging / (2 * int(text.report.mask.sum()))
    passes = patches * registry.get(job.config.repair).passes
    read = passes * min(job.config.patch_tokens, int(job.tokens.mask.sum()))
    # A step: the student forward and backward, the teacher forward.
    read += 4 * LEAST_STEPS * SHORT
    # Evaluated before and after training, and after a patch.
    total = text.seconds + (2 + patches) * judging + token * read
    if seconds < total:
        raise InputError(
            f"--train {job.config.train} is too short: the text, the evaluations, the patch and "
            f"{LEAST_STEPS} steps of training take about {duration(total)} here; give --train "
            f"{math.ceil(total / 60 + 0.5)}min or more, or fewer --report-samples"
        )


def _scores(job: Job, folder: Path, report: TokenSet) -> HealedScores:
    """Measure a checkpoint's perplexity, and its KL to the original, on the unseen text."""
    cut = open_cut(job.teacher, job.removed, folder)
    work = Work(job.config.batch_tokens, job.progress)
    sums = sample_sums(job.teacher.model, cut.runnable, report, work)
    quality = quality_of(sums, report)
    _, nll, kl = sums.tolist()
    scores = HealedScores(**_figures(quality), nll_sums=nll, kl_sums=kl)
    if quality.parts:
        scores.parts = {
            name: HealedPart(**_figures(part)) for name, part in quality.parts.items()
        }
    return scores


def _pair(before: HealedScores, after: HealedScores, report: TokenSet) -> HealedScores:
    """Add the errors of the changes from ``before``, paired by sample, to ``after``."""
    texts: list[tuple[Any, HealedPart]] = [(slice(None), after)]
    texts += [(rows, after.parts[name]) for name, rows in report.rows_by_part.items()]
    for rows, scores in texts:
        for key in ("kl", "nll"):
            first, last = (
                np.array(getattr(m, f"{key}_sums"))[rows] for m in (before, after)
            )
            _, error = difference(first, last, report.counts[rows])
            setattr(scores, f"{key}_change_se", without_infinities(error))
    return after


def _figures(quality: PairScores) -> dict[str, Any]:
    return {
        **dict(quality.after),
        "kl": quality.kl,
        "kl_se": quality.kl_se,
        "original_perplexity": quality.before.perplexity,
    }
