"""Stage `heal-top`: a few candidates healed for some steps, and the best healed one chosen.

The lowest KL before healing need not be the lowest after. All candidates are trained on the same
text in the same order and judged on the same samples of the ranking's split, so that differences
are paired; one that is behind the best so far is dropped on the way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from isingcut.data.healing_text import HealingText
from isingcut.data.tokens import pieces
from isingcut.files.documents.scores import (
    ComparedCandidate,
    HealedCandidates,
    HealingFile,
    HealingRecipe,
)
from isingcut.files.documents.states import BaselineFile, MeasuredState
from isingcut.files.writing import fingerprint, read_document, without_infinities, write_document
from isingcut.healing import RECORD
from isingcut.healing.heal import heal_checkpoint
from isingcut.healing.job import Job, Race, beginnings, difference
from isingcut.healing.recipe import usual_recipe
from isingcut.healing.work_folder import claim_work
from isingcut.ising.states import swaps
from isingcut.models.cutting.checkpoint import excise
from isingcut.options.healing import HealConfig
from isingcut.options.spellings import parse_healing
from isingcut.runs.comparison import compare
from isingcut.runs.folder import RunFolder
from isingcut.runs.healing_options import CHOICE, heal_config
from isingcut.runs.healing_stages import text_of, training_options
from isingcut.runs.measuring import splits_of
from isingcut.runs.session import Session
from isingcut.runs.solving import load_candidates

ONE_PASS = ("block-influence", "angular-window")
"""Methods whose choices, of one pass over the text, are tried beside our candidates."""
SHARE = 1 / 3
"""Of a budget, the most that trials may take."""
# Steps below which a trial says nothing.
_FEWEST = 20
# Swaps between candidates, which are otherwise near copies of each other.
_APART = 2


def choose(session: Session, folder: RunFolder) -> HealedCandidates | None:
    """`healed-candidates.json`, made where it is not there; None without trials."""
    config = session.config
    if not config.tried:
        return None
    healing = heal_config(config)
    target = folder.target(config.removal)
    ranked = folder.record(target / "candidates.json")["fingerprint"]
    options = {**training_options(folder, healing), "ranking": ranked, "tried": config.tried}

    def make(path: Path) -> None:
        pool = _pool(session, folder, config.tried)
        with claim_work(target / ".heal-top", fingerprint(options)):
            rows = _trials(session, folder, healing, pool)
        best = min(range(len(rows)), key=lambda k: _order(rows[k]))
        counts = beginnings(splits_of(folder)["rank"]).predicted.sum(1).numpy()
        found = [ComparedCandidate(**_beside(row, rows[best], counts)) for row in rows]
        write_document(path, HealedCandidates(candidates=found, chosen=found[best]))

    return folder.stage(
        "heal", target / CHOICE, options, make, lambda p: read_document(p, HealedCandidates)
    )


def _trials(
    session: Session, folder: RunFolder, healing: HealConfig, pool: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The candidates after their training, those that were dropped on the way among them."""
    text, split = text_of(session, folder, healing), splits_of(folder)["rank"]
    few = _few(healing, text, len(pool))
    text = dataclasses.replace(text, report=split)
    rows: list[dict[str, Any]] = []
    recipe: HealingRecipe | None = None
    for one in pool:
        removed = [int(i) for i in one["removed"]]
        leader = min(rows, key=_order)["checks"] if rows else None
        tried = _tried(session, few, removed, text, Race(split, leader), folder, recipe)
        if recipe is None and "recipe" in tried:
            # The same steps on the same text for the others, whatever the clock says then.
            recipe = tried["recipe"]
            text = dataclasses.replace(text, train=pieces(text.train, recipe.length))
        seconds = tried["seconds"]
        if recipe is not None and recipe.seconds is not None:
            seconds = tried["steps"] / recipe.steps * recipe.seconds
        before = {"kl_before": one["kl"], "source": one["source"], "seconds": seconds}
        rows.append({**tried, **before})
        if recipe is not None and recipe.steps < _FEWEST and session.config.heal_top is None:
            # Too small a budget to compare anything.
            break
    return rows


def _tried(
    session: Session,
    few: HealConfig,
    removed: Sequence[int],
    text: HealingText,
    judge: Race,
    folder: RunFolder,
    recipe: HealingRecipe | None,
) -> dict[str, Any]:
    """One candidate, healed for a few steps and measured; kept, so that a kill loses one."""
    work = folder.target(session.config.removal) / ".heal-top" / "-".join(map(str, removed))
    cut, out = work / "cut", work / "healed"
    if not cut.exists():
        excise(session.source, removed, cut)
    if not out.exists():
        given = (session.loaded, tuple(removed), cut, text.train, out, few, session.progress)
        heal_checkpoint(Job(*given, judge=judge, recipe=recipe), text, out)
    found = read_document(out / RECORD, HealingFile)
    return {
        "removed": list(removed),
        **{name: getattr(found.after, name) for name in ("kl", "kl_se", "perplexity")},
        "steps": len(found.steps),
        "tokens": found.tokens_seen,
        "seconds": found.seconds,
        "checks": found.checks,
        "dropped": found.stopped and found.stopped.why,
        **({"recipe": found.recipe} if found.recipe is not None else {}),
    }


def _order(row: Mapping[str, Any]) -> tuple[bool, float]:
    """The best first; those that were dropped last."""
    return row["dropped"] is not None, row["kl"]


def _beside(
    row: Mapping[str, Any], best: Mapping[str, Any], counts: npt.NDArray[np.int64]
) -> dict[str, Any]:
    """A candidate with its difference to the best one, at the last step that both were judged."""
    theirs = {check.step: check.kl_sums for check in best["checks"]}
    found = {name: value for name, value in row.items() if name != "checks"}
    shared = [check for check in row["checks"] if check.step in theirs]
    if row is best or not shared:
        return {**found, "difference": None, "difference_se": None}
    last = shared[-1]
    mean, error = difference(theirs[last.step], last.kl_sums, counts)
    return {**found, "difference": mean, "difference_se": without_infinities(error)}


def _pool(session: Session, folder: RunFolder, count: int) -> list[dict[str, Any]]:
    """The candidates to try: the best, one of one pass, and others that are no near copies."""
    target = folder.target(session.config.removal)
    ranked = folder.load(target / "candidates.json", load_candidates)
    known = [_entry(row, "spectrum") for row in sorted(ranked.candidates, key=lambda row: row.kl)]
    # What a search began with is measured already.
    quick = ranked.one_pass
    others = [] if quick is None else [_entry(row, row.method) for row in quick.states]
    for name in ONE_PASS if count > 1 and quick is None else ():
        found = compare(session, folder, name)
        if not found.violated:
            others.append(_entry(found, name))
    others.sort(key=lambda row: float(row["kl"]))
    pool: list[dict[str, Any]] = []

    def add(rows: Sequence[dict[str, Any]], apart: int, most: int) -> None:
        for row in rows:
            far = all(swaps(row["removed"], other["removed"]) >= apart for other in pool)
            if far and len(pool) < most:
                pool.append(row)

    add(known, 1, 1)
    add(others, 1, min(2, count))
    for apart in (_APART, 1):
        add(sorted([*known, *others], key=lambda row: float(row["kl"])), apart, count)
    return pool


def _entry(row: MeasuredState | BaselineFile, source: str) -> dict[str, Any]:
    return {"removed": row.removed, "kl": row.kl, "source": source}


def _few(healing: HealConfig, text: HealingText, count: int) -> HealConfig:
    """How a candidate is trained: for its part of the budget's share."""
    if healing.method == "none":
        return healing
    tokens, seconds = parse_healing(healing.effort)
    if seconds is not None:
        return healing.replace(effort=f"{SHARE * seconds / 60 / count:.6f}min")
    if tokens is None:
        tokens = float(text.train.mask.sum())
        if healing.trainer:
            tokens = usual_recipe(healing, text.train).tokens
    return healing.replace(effort=f"{max(1, int(SHARE * tokens / count))}tokens")
