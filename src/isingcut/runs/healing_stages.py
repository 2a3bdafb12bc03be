"""The stages after the cut that make it better: choose among healed candidates, heal, benchmarks.

Each writes its file of the run folder and does nothing when that file is there, made with the
same options (`RunFolder.stage`).
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isingcut.data.text_files import only_once
from isingcut.errors import InputError
from isingcut.files import fingerprint, read_json, without_header, write_json
from isingcut.healing.checks import check_training
from isingcut.healing.work_folder import held
from isingcut.inputs import user_path
from isingcut.models.processes import launched
from isingcut.options.config import RunConfig
from isingcut.options.declaration import from_yaml, options_from
from isingcut.options.healing import HealConfig
from isingcut.runs.folder import RunFolder
from isingcut.runs.measuring import splits_of, upstream
from isingcut.runs.removal import each_removal

if TYPE_CHECKING:
    from isingcut.data.healing_text import HealingText
    from isingcut.runs.session import Session

CHOICE = "healed-candidates.json"
HEALED = "healed"


def wanted(config: RunConfig) -> bool:
    """Whether a run heals at all."""
    return config.heal or config.patch != "none"


def heal_config(config: RunConfig) -> HealConfig:
    """Healing options of a run: those of `heal_options`, and what the run itself says.

    Raises:
        InputError: an option that the run sets, or one that does not exist.
    """
    values = from_yaml(HealConfig, user_path(config.heal_options)) if config.heal_options else {}
    set_by_run = {"student", "teacher", "out", "patch", "device", "trust_remote_code", "overwrite"}
    set_by_run |= {"other_teacher"}
    taken = sorted(set_by_run & values.keys())
    if taken:
        raise InputError(
            f"{config.heal_options}: {', '.join(taken)} is set by the run itself; leave it out"
        )
    base = {
        "text": config.calibration,
        "seed": config.seed,
        "dtype": config.dtype,
        **({"batch_tokens": config.batch_tokens} if config.batch_tokens else {}),
    }
    found = options_from(HealConfig, {**base, **values}, config.heal_options or "healing")
    if found.text == "self":
        raise InputError(
            "healing needs real text; name some in a file given as --heal-options (text: FILE)"
        )
    if found.text == config.calibration and only_once(found.text):
        raise InputError(
            f"healing needs more of the text than was measured on, but {found.text} is a pipe, "
            "which can be read once; write it into a file, or name another text in a file given "
            "as --heal-options (text: FILE)"
        )
    return found.replace(
        patch=config.patch,
        method=found.method if config.heal else "none",
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    ).validate()


def check(session: Session) -> None:
    """Refuse before anything is written what healing would refuse at the end."""
    config = session.config
    if not wanted(config):
        return
    check_training(heal_config(config))
    if len(each_removal(config)) > 1:
        raise InputError(
            "a run over a range of removals cuts no checkpoint, so there is none to heal; "
            "give one number with --remove"
        )
    if launched():
        raise InputError(
            "healing inside a run is done by one process; heal the cut model afterwards with: "
            "torchrun ... -m isingcut heal"
        )
    if session.streaming:
        raise InputError(
            "a model that is streamed from disk cannot be healed in the run: training needs the "
            "weights in memory; heal the cut model with `isingcut heal` on a larger machine"
        )


def text_of(session: Session, folder: RunFolder, config: HealConfig) -> HealingText:
    """Text to heal with that no split of the run holds."""
    from isingcut.data import healing_text
    from isingcut.data.calibration import Calibration
    from isingcut.healing.heal import sample_length

    own = folder.load(folder.path / "calibration.safetensors", Calibration.load)
    same = config.text == own.source and config.seed == own.meta.get("seed")
    return healing_text.build(
        config.text,
        session.loaded.tokenizer,
        samples=config.samples,
        report_samples=config.report_samples,
        length=sample_length(config, session.loaded.model),
        seed=config.seed,
        used=own if same else None,
        model=session.loaded.model,
    )


def _options(folder: RunFolder, config: HealConfig) -> dict[str, Any]:
    plain = dataclasses.asdict(config)
    for name in ("student", "teacher", "out", "device", "trust_remote_code", "overwrite"):
        del plain[name]
    return {**plain, **upstream(folder)}


def choose(session: Session, folder: RunFolder) -> dict[str, Any] | None:
    """Stage `heal-top`: heal the best candidates for a few steps; the best healed one is chosen.

    Judged by KL to the original on the ranking's own split. None without `--heal-top`.
    """
    config = session.config
    if not config.heal_top:
        return None
    healing = heal_config(config)
    target = folder.target(config.removal)
    ranked = folder.load(target / "candidates.json", lambda p: read_json(p, "candidates"))
    best = sorted(ranked["candidates"], key=lambda row: row["kl"])[: config.heal_top]
    states = [list(map(int, row["removed"])) for row in best]
    options = {**_options(folder, healing), "states": states}

    def make(path: Path) -> None:
        work = target / ".heal-top"
        text = text_of(session, folder, healing)
        with held(work, fingerprint(options)):
            rows = [
                _tried(session, folder, healing, state, text, work / "-".join(map(str, state)))
                for state in states
            ]
            for row, before in zip(rows, best, strict=True):
                row["kl_before"] = before["kl"]
            chosen = min(rows, key=lambda row: row["kl"])
            write_json(path, "healed-candidates", {"candidates": rows, "chosen": chosen})

    return folder.stage(
        "heal", target / CHOICE, options, make, lambda p: read_json(p, "healed-candidates")
    )


def _tried(
    session: Session,
    folder: RunFolder,
    healing: HealConfig,
    removed: Sequence[int],
    text: HealingText,
    work: Path,
) -> dict[str, Any]:
    """One candidate, healed for a few steps and measured; kept, so that a kill loses one."""
    from isingcut.evaluation.quality import quality
    from isingcut.healing.heal import heal_checkpoint
    from isingcut.models.cutting.checkpoint import excise
    from isingcut.models.load import load

    kept = work / "result.json"
    if not kept.exists():
        cut, out = work / "cut", work / "healed"
        if not cut.exists():
            excise(session.source, removed, cut)
        few = healing if healing.method == "none" else healing.replace(steps=healing.top_steps)
        loaded = session.loaded
        if not out.exists():
            heal_checkpoint(few, loaded, removed, cut, text, out, session.progress)
        model = load(
            out,
            **loaded.place,
            trust_remote_code=healing.trust_remote_code,
        ).model
        split = splits_of(folder)["rank"]
        found = quality(loaded.model, model, split, healing.batch_tokens)
        row = {
            "removed": list(removed),
            "kl": found["kl"],
            "kl_se": found["kl_se"],
            "perplexity": found["after"]["perplexity"],
        }
        write_json(kept, "healed-candidate", row)
    row = read_json(kept, "healed-candidate")
    return without_header(row)


def chosen_after_healing(folder: RunFolder, config: RunConfig) -> list[int] | None:
    """The blocks that the healed candidates chose, None where none were compared."""
    if not config.heal_top:
        return None
    file = folder.target(config.removal) / CHOICE
    found = folder.load(file, lambda p: read_json(p, "healed-candidates"))
    return [int(i) for i in found["chosen"]["removed"]]


def heal(session: Session, folder: RunFolder) -> Path | None:
    """Stage `heal`: `healed/`, a plain checkpoint, and `healing.json`. None without healing."""
    from isingcut.healing.heal import heal_checkpoint
    from isingcut.healing.healers import RECORD

    config = session.config
    if not wanted(config):
        return None
    healing = heal_config(config)
    target = folder.target(config.removal)
    cut = target / "model"
    excised = folder.record(cut)
    removed = list(map(int, excised["options"]["removed"]))
    options = {**_options(folder, healing), "model": excised["fingerprint"]}

    def make(path: Path) -> None:
        if (target / RECORD).exists():
            # Replaced at the end; what is no record of a healing is refused now.
            read_json(target / RECORD, "healing")
        text = text_of(session, folder, healing)
        ours = healing.replace(overwrite=True)
        heal_checkpoint(ours, session.loaded, removed, cut, text, path, session.progress)
        shutil.copyfile(path / RECORD, target / RECORD)

    return folder.stage("heal", target / HEALED, options, make, lambda path: path)


def product(folder: RunFolder, config: RunConfig) -> Path:
    """The run's final checkpoint: the healed one where the run heals, else the cut one."""
    target = folder.target(config.removal)
    return target / HEALED if wanted(config) else target / "model"


def benchmarks(
    session: Session,
    folder: RunFolder,
    tasks: Sequence[str],
    *,
    data: Path | None = None,
    questions: int | None = None,
) -> dict[str, Any]:
    """Stage `benchmarks`: `benchmarks.json`, both models on the same questions.

    Args:
        tasks: task names, see `scores.benchmark`; ``wikitext2`` is its perplexity.
        data: folder of the questions; None uses the hub.
        questions: at most so many a task.
    """
    config = session.config
    target = folder.target(config.removal)
    checkpoint = product(folder, config)
    made = folder.manifest["stages"].get(str(checkpoint.relative_to(folder.path)))
    if made is None or not checkpoint.exists():
        raise InputError(f"there is no {checkpoint}; excise (and heal) first")
    options = {
        "model": made["fingerprint"],
        "tasks": list(tasks),
        "questions": questions,
        "data": data is not None,
    }

    def make(path: Path) -> None:
        from isingcut.evaluation.scores import forget_scores
        from isingcut.models.load import load

        session.tuned(folder)
        loaded = session.loaded
        cut = load(
            checkpoint,
            **loaded.place,
            trust_remote_code=config.trust_remote_code,
        )
        work = target / ".benchmarks"
        content = bench(
            {"original": loaded, "cut": cut},
            tasks,
            data=data,
            questions=questions,
            batch_tokens=session.tuning.batch_tokens,
            kept=work,
            session=session,
        )
        write_json(path, "benchmarks", content)
        forget_scores(work, tasks)

    return folder.stage(
        "benchmarks",
        target / "benchmarks.json",
        options,
        make,
        lambda path: read_json(path, "benchmarks"),
    )


def bench(
    models: dict[str, Any],
    tasks: Sequence[str],
    *,
    data: Path | None,
    questions: int | None,
    batch_tokens: int,
    kept: Path | None,
    session: Session,
) -> dict[str, Any]:
    """The content of `benchmarks.json` for two models."""
    from importlib.metadata import version

    from isingcut.evaluation.scores import benchmark
    from isingcut.evaluation.wikitext import text_scores

    named = [t for t in tasks if t != "wikitext2"]
    rows = benchmark(
        models,
        named,
        data=data,
        questions=questions,
        batch=max(1, batch_tokens // 128),
        kept=kept,
        progress=session.progress,
    )
    content: dict[str, Any] = {"rows": rows, "engine": f"lm_eval {version('lm_eval')}"}
    if "wikitext2" in tasks:
        content["wikitext2"] = text_scores(
            models, data, questions, batch_tokens=batch_tokens, progress=session.progress
        )
    return content
