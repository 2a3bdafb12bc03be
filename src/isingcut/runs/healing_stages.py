"""The stages that train: choose among healed candidates, heal.

Each writes its file of the run folder and does nothing when that file is there, made with the
same options (`RunFolder.stage`).
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isingcut.data import healing_text
from isingcut.data.calibration import Calibration
from isingcut.data.healing_text import HealingText
from isingcut.evaluation.quality import quality
from isingcut.files.writing import fingerprint, read_json, without_header, write_json
from isingcut.healing.heal import heal_checkpoint, sample_length
from isingcut.healing.healers import RECORD
from isingcut.healing.work_folder import held
from isingcut.models.cutting.checkpoint import excise
from isingcut.models.load import load
from isingcut.options.healing import HealConfig
from isingcut.runs.folder import RunFolder
from isingcut.runs.healing_options import CHOICE, HEALED, distil_config, heal_config
from isingcut.runs.measuring import splits_of, upstream
from isingcut.runs.session import Session


def text_of(session: Session, folder: RunFolder, config: HealConfig) -> HealingText:
    """Text to heal with that no split of the run holds."""
    own = folder.load(folder.path / "calibration.safetensors", Calibration.load)
    return healing_text.build(
        config.text,
        session.loaded.tokenizer,
        samples=config.samples,
        report_samples=config.report_samples,
        length=sample_length(config, session.loaded.model),
        seed=config.seed,
        used=own,
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


def heal(session: Session, folder: RunFolder) -> Path | None:
    """Stage `heal`: `healed/`, distilled from `model/`, and `healing.json`. None without it."""
    config = session.config
    if not config.heal:
        return None
    healing = distil_config(config)
    target = folder.target(config.removal)
    start = target / "model"
    made = folder.record(start)
    removed = list(map(int, made["options"]["removed"]))
    options = {**_options(folder, healing), "model": made["fingerprint"]}

    def make(path: Path) -> None:
        if (target / RECORD).exists():
            # Replaced at the end; what is no record of a healing is refused now.
            read_json(target / RECORD, "healing")
        text = text_of(session, folder, healing)
        ours = healing.replace(overwrite=True)
        heal_checkpoint(ours, session.loaded, removed, start, text, path, session.progress)
        shutil.copyfile(path / RECORD, target / RECORD)

    return folder.stage("heal", target / HEALED, options, make, lambda path: path)
