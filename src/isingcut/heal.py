"""Heal a cut checkpoint: patch, distil, and say what it was worth on text held out.

cut checkpoint + original -> [linear patch] -> [distillation] -> checkpoint + healing.json
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isingcut.config import HealConfig
from isingcut.errors import InputError, StageFileError
from isingcut.files import atomic_folder, fingerprint, read_json, write_json
from isingcut.healers import RECORD
from isingcut.options import options_from
from isingcut.outputs import check_output
from isingcut.progress import Progress, silent
from isingcut.provenance import versions
from isingcut.report_card import healed_card

if TYPE_CHECKING:
    from isingcut.healers.base import Job
    from isingcut.healing_text import HealingText
    from isingcut.models import LoadedModel
    from isingcut.streamed.replay import StreamedReplay
    from isingcut.tokens import TokenSet


def heal(
    config: HealConfig | None = None, /, *, progress: Progress = silent, **options: Any
) -> Path:
    """Heal a cut checkpoint with the original as the teacher.

    Args:
        config: all options; or give them by name (`student`, `teacher` and `out` at least).
        progress: where progress is shown.

    Returns:
        The healed checkpoint's folder, a plain checkpoint with `healing.json` in it.

    Raises:
        IsingcutError: bad input, in one line.
    """
    from isingcut import corpora, healing_text
    from isingcut.architectures import find_stack
    from isingcut.healers._processes import Processes
    from isingcut.healers._removed import recorded_removal, removal_by_weights
    from isingcut.model_sources import resolve
    from isingcut.models import dtype_name, load, load_streamed

    if config is not None and options:
        raise InputError("give either a HealConfig or options by name, not both")
    config = (config or options_from(HealConfig, options, "isingcut.heal")).validate()
    for name in ("student", "teacher", "out"):
        if not getattr(config, name):
            raise InputError(f"healing needs --{name}" if name != "student" else "no STUDENT given")
    corpora.check(config.text)
    student, out = Path(config.student), Path(config.out)
    known = recorded_removal(student)
    if known is None and config.stream_teacher:
        raise InputError(
            f"{student} has no record of its cut; its blocks are found by comparing weights, which "
            "needs the teacher in memory: leave --stream-teacher out"
        )
    dtype = dtype_name(config.dtype, config.device)
    if config.method != "none":
        half = Processes(config.device).of_main(dtype == "bfloat16")
        dtype = "bfloat16" if half else "float32"
    check_output(out, overwrite=config.overwrite)
    trust = config.trust_remote_code
    source = resolve(config.teacher, trust_remote_code=trust)
    replay = None
    if config.stream_teacher:
        teacher, replay = load_streamed(
            source, dtype=dtype, device=config.device, trust_remote_code=trust
        )
    else:
        teacher = load(source, dtype=dtype, device=config.device, trust_remote_code=trust)
    blocks = len(find_stack(teacher.model))
    if known is None:
        known = removal_by_weights(student, teacher, trust_remote_code=trust), blocks
    removed, of = known
    if of != blocks:
        raise InputError(
            f"{student} was cut from a model of {of} blocks, but the teacher {config.teacher} has "
            f"{blocks}; give the model it was cut from"
        )
    text = healing_text.build(
        config.text,
        teacher.tokenizer,
        samples=config.samples,
        report_samples=config.report_samples,
        length=config.length,
        seed=config.seed,
        model=teacher.model,
    )
    heal_checkpoint(config, teacher, removed, student, text, out, progress, replay)
    if config.method != "none":
        Processes(config.device).part()
    return out


def heal_checkpoint(
    config: HealConfig,
    teacher: LoadedModel,
    removed: Sequence[int],
    student: Path,
    text: HealingText,
    out: Path,
    progress: Progress = silent,
    replay: StreamedReplay | None = None,
) -> dict[str, Any]:
    """Heal one cut checkpoint, whatever made it, and write ``out`` with its `healing.json`.

    Work in progress is kept in a folder beside ``out`` and continued by the same call.

    Raises:
        OutputExistsError: ``out`` is there.
        StageFileError: the work in progress belongs to other options.
    """
    from isingcut.architectures import find_stack
    from isingcut.healers import registry
    from isingcut.healers._processes import Processes
    from isingcut.healers.base import Job

    processes = Processes(config.device) if config.method != "none" else None
    main = processes is None or processes.main
    shown = progress if main else silent
    check_output(out, overwrite=config.overwrite)
    work = out.parent / f".{out.name}.healing"
    if main:
        _claim(work, _identity(config, teacher, removed, student, text))
    if processes is not None:
        processes.wait()
    job = Job(teacher, tuple(removed), student, text.train, work, config, shown, replay)
    began = time.monotonic()
    record: dict[str, Any] = {}
    if config.patch == "linear":
        patched, kept = work / "patched", work / "patched.json"
        if main and not kept.exists():
            shutil.rmtree(patched, ignore_errors=True)
            found = registry.get("linear-patch")().heal(job, patched)
            found["scores"] = _scores(job, patched, text.report)
            kept.write_text(json.dumps(found), encoding="utf-8")
        if processes is not None:
            processes.wait()
        record["patch"] = json.loads(kept.read_text(encoding="utf-8"))
        job = dataclasses.replace(job, start=patched)
    done = work / "done"
    if config.method != "none":
        if main:
            shutil.rmtree(done, ignore_errors=True)
        record["distillation"] = registry.get("distill")().heal(job, done)
    elif main:
        shutil.rmtree(done, ignore_errors=True)
        shutil.copytree(job.start, done)
    if main:
        before = _before(job, student, text.report)
        after = _scores(job, done, text.report)
        distilled = record.pop("distillation", {})
        content = {
            "steps": distilled.pop("steps", []),
            "before": before,
            "after": after,
            **record,
            **distilled,
            "removed": list(removed),
            "of": len(find_stack(teacher.model)),
            "report_samples": text.report.samples,
            "report_tokens": text.report.tokens,
            "options": _told(config),
            "seconds": round(time.monotonic() - began, 1),
            "provenance": {**versions(), "teacher": _named(teacher), "student": _named(student)},
        }
        write_json(done / RECORD, "healing", content)
        card = done / "README.md"
        if card.is_file():
            written = card.read_text(encoding="utf-8")
            card.write_text(healed_card(written, content), encoding="utf-8")
        with atomic_folder(out, overwrite=config.overwrite) as temporary:
            temporary.rmdir()
            done.rename(temporary)
        shutil.rmtree(work)
    if processes is not None:
        processes.wait()
    return read_json(out / RECORD, "healing")


def _told(config: HealConfig) -> dict[str, Any]:
    return {
        k: v
        for k, v in dataclasses.asdict(config).items()
        if k not in ("student", "teacher", "out", "overwrite")
    }


def _named(model: LoadedModel | Path) -> dict[str, Any]:
    from isingcut.models import model_identity

    folder = model if isinstance(model, Path) else model.folder
    return {"name": folder.name, **model_identity(folder)}


def _identity(
    config: HealConfig,
    teacher: LoadedModel,
    removed: Sequence[int],
    student: Path,
    text: HealingText,
) -> str:
    """What the work in progress depends on."""
    return fingerprint(
        {
            "options": {
                k: v for k, v in _told(config).items() if k not in ("device", "save_steps")
            },
            "teacher": _named(teacher)["sha256"],
            "student": _named(student)["sha256"],
            "removed": list(removed),
            "tokens": fingerprint([text.train.input_ids.tolist(), text.report.input_ids.tolist()]),
        }
    )


def _claim(work: Path, identity: str) -> None:
    """Make the folder for work in progress, or recognise it as one's own."""
    file = work / "identity.json"
    if file.exists():
        if json.loads(file.read_text(encoding="utf-8")) != identity:
            raise StageFileError(
                f"{work} holds an unfinished healing with other options; type that command again "
                "to finish it, or delete the folder"
            )
        return
    work.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(identity), encoding="utf-8")


def _before(job: Job, student: Path, report: TokenSet) -> dict[str, Any]:
    kept = job.work / "before.json"
    if not kept.exists():
        kept.write_text(json.dumps(_scores(job, student, report)), encoding="utf-8")
    scores: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return scores


def _scores(job: Job, folder: Path, report: TokenSet) -> dict[str, Any]:
    """Perplexity and KL to the original of a checkpoint on the held-out text."""
    from isingcut.evaluate import quality
    from isingcut.models import load, load_streamed

    size = job.config.batch_tokens
    options: dict[str, Any] = {
        "dtype": str(job.teacher.dtype).removeprefix("torch."),
        "device": str(job.teacher.device),
        "trust_remote_code": job.config.trust_remote_code,
    }
    if job.replay is None:
        model = load(folder, **options).model
        found = quality(job.teacher.model, model, report, size, progress=job.progress)
    else:
        from isingcut.streamed.scores import quality_streamed

        _, cut = load_streamed(folder, buffers=job.replay.store.buffers, **options)
        found = quality_streamed(job.replay, cut, report, size, progress=job.progress)
    return {
        **found["after"],
        "kl": found["kl"],
        "kl_se": found["kl_se"],
        "original_perplexity": found["before"]["perplexity"],
    }
