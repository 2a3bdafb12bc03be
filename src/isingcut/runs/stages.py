"""The stages that measure states and models: `rank`, `evaluate`, `benchmarks` and `baseline`.

Each writes its file of the run folder, unless that file exists with the same options
(`RunFolder.stage`). A baseline uses the samples of the energy; its choice is measured on the split
that ranks the candidates, so that both are comparable.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError

from isingcut.baselines import registry
from isingcut.console.progress import Part
from isingcut.data.calibration import build
from isingcut.data.corpora import UNLIKE
from isingcut.data.tokens import TokenSet, overlap
from isingcut.errors import InputError, ModelError
from isingcut.evaluation import benchmark, candidates
from isingcut.evaluation.quality import (
    before_and_after,
    draft_acceptance,
    open_mtp,
    perplexity,
    quality,
)
from isingcut.evaluation.questions import WIKITEXT, check_tasks, prepare_task, split_names
from isingcut.evaluation.scores import ScoredModel, Scores, score_states
from isingcut.evaluation.speed import with_memory
from isingcut.files import documents
from isingcut.files.inputs import user_path
from isingcut.files.writing import (
    fingerprint,
    read_document,
    temporary_prefix,
    write_document,
)
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem
from isingcut.ising.spectrum import Spectrum
from isingcut.ising.states import Floats, blocks_of, states_of
from isingcut.measure.ledger import Ledger
from isingcut.measure.losses import measure
from isingcut.measure.packed import changed_losses
from isingcut.measure.work import Work, forget
from isingcut.models.architectures.blocks import language_model, skip_blocks, text_config
from isingcut.models.cutting.sharing import fits
from isingcut.models.fit import count_mtp_layers
from isingcut.models.gguf_files import convert_file, unpack_gguf
from isingcut.models.load import LoadedModel
from isingcut.options.config import RunConfig
from isingcut.options.declaration import parse_yaml, shown
from isingcut.report.words import chosen_by_patch, chosen_by_tasks, join_blocks
from isingcut.runs import measuring, solving
from isingcut.runs.cutting import fit_patch, product
from isingcut.runs.folder import RunFolder
from isingcut.runs.measuring import names
from isingcut.runs.session import Session


def check_run_tasks(config: RunConfig) -> list[str]:
    """Check the tasks of a run's options before a model is loaded.

    Returns:
        their names, without duplicates.

    Raises:
        InputError, MissingExtraError: as `questions.check_tasks`, or the tasks do not fit the run.
    """
    if not config.tasks:
        return []
    if config.choose != "tasks" and len(solving.each_removal(config)) > 1:
        raise InputError("--tasks needs a checkpoint, but a range of removals cuts none; omit it")
    names = check_tasks(split_names(config.tasks), data_of(config), config.questions)
    if config.choose == "tasks" and names == [WIKITEXT]:
        raise InputError("wikitext2 has no questions; --choose tasks needs a task with questions")
    return names


def check_whole(session: Session) -> None:
    """Raise if a task needs the whole model in memory, but the model is streamed.

    Raises:
        InputError: a perplexity task, or a task with generated answers.
    """
    config = session.config
    for name in split_names(config.tasks) if config.tasks and session.streaming else ():
        if name == WIKITEXT or prepare_task(name, data_of(config), config.questions).generates:
            raise InputError(
                f"{name} needs the whole model, which does not fit the memory limit; raise "
                "--memory-limit, or remove it from --tasks"
            )


def data_of(config: RunConfig) -> Path | None:
    """Return the folder of the questions in a run's options."""
    return user_path(config.data) if config.data else None


def last_blocks(size: int, count: int) -> list[int]:
    """Return the last ``count`` blocks of a stack of ``size``."""
    return list(range(size - count, size))


def choose_by_tasks(
    session: Session, rows: Sequence[documents.MeasuredState], kept: Path
) -> tuple[int, documents.ByTasks]:
    """Choose the best of a few candidates by half of the questions of the run's tasks.

    Each candidate is the original with blocks skipped, so no checkpoint is written.

    Args:
        rows: the rows of `candidates.json`.
        kept: folder for journals.

    Returns:
        the index of the chosen row, and the record of the choice.
    """
    config = session.config
    tasks = {
        task.name: task
        for name in check_run_tasks(config)
        if name != WIKITEXT
        for task in [prepare_task(name, data_of(config), config.questions)]
    }
    pool = {name: task.pool() for name, task in tasks.items()}
    last = last_blocks(len(session.stack), len(rows[0].removed))
    best = benchmark.contenders(rows, last)
    drawn = benchmark.draw_half(pool, config.seed)
    model = ScoredModel(session.loaded, session.replay)
    # Fewer if one candidate is clearly ahead early.
    most = len(best) * sum(map(len, drawn.values()))
    with session.progress(f"scoring {len(best)} candidates on up to {most} questions", most) as bar:

        def ask(left: Sequence[Sequence[int]], name: str, keys: Sequence[str]) -> list[Scores]:
            journal = benchmark.journal_of(kept, tasks[name], model.loaded, [*left, *keys])
            part = Part(bar, len(keys) * len(left))
            work = Work(session.tuning.batch_tokens, part, journal)
            only = frozenset(keys).__contains__
            found = score_states(model, tasks[name], left, work, wanted=only)
            right, blocks = max(
                (float(s.values.mean()), join_blocks(r)) for s, r in zip(found, left, strict=True)
            )
            part.finish(f"without {blocks} {right:.0%} of {name}")
            return found

        position, found = benchmark.choose_by_questions([rows[i].removed for i in best], drawn, ask)
    return best[position], found


NEAR, ERRORS, TRIED, LESS = 0.05, 2, 3, 8
"""How near the lowest a candidate must be to be patched for the choice, as a share of its KL or in
paired standard errors; the most candidates, and how many times fewer tokens their patches take."""


def choose_by_patch(
    session: Session,
    folder: RunFolder,
    rows: Sequence[documents.MeasuredState],
    text: TokenSet,
    journal: Path,
) -> list[int]:
    """Choose among the candidates near the lowest, by their KL after a least-squares patch.

    A patch changes the KL of two near candidates by more than they differ. Each patched one gets
    its KL in its row.

    Args:
        text: what the candidates were ranked on.

    Returns:
        the indices of the near candidates, the chosen first; one if none is near the lowest.
    """
    lowest = min(row.kl for row in rows)

    def is_near(row: documents.MeasuredState) -> bool:
        return row.kl - lowest <= max(NEAR * lowest, ERRORS * (row.above_lowest_se or 0))

    near = [i for i, row in enumerate(rows) if is_near(row)]
    near = sorted(near, key=lambda i: rows[i].kl)[:TRIED]
    if len(near) == 1:
        return near
    count = max(64, session.config.patch_tokens // LESS)
    trial = session.at(session.config.replace(patch="linear", patch_tokens=count))
    work = measuring.work_of(session, journal)
    ledger = Ledger(session.replay, text, work)
    for row in (rows[i] for i in near):

        def make(removed: Sequence[int] = row.removed) -> Floats:
            new = fit_patch(trial, folder, removed)
            named = f"without {join_blocks(removed)}, patched"
            return changed_losses(
                session.replay, text, lambda name, _: new.get(name), work, named, removed
            )

        sums = ledger.once(f"{row.removed}:{count}", text.samples, 0.0, 0.0, make)
        row.patched_kl = float(sums.sum() / ledger.counts.sum())
    return sorted(near, key=lambda i: rows[i].patched_kl or 0.0)


def benchmarks(
    session: Session, folder: RunFolder, removed: Sequence[int] | None = None
) -> documents.BenchmarksFile:
    """Run stage `benchmarks`: score both models on the options' tasks, in `benchmarks.json`.

    Args:
        removed: the blocks of another state than the chosen one.
    """
    config = session.config
    checkpoint = product(folder, config, removed)
    made = folder.find_record(checkpoint)
    if made is None or not checkpoint.exists():
        raise InputError(f"{checkpoint} does not exist; run excise (and heal) first")
    ranked = folder.target(config.removal) / "candidates.json"
    chosen = folder.find_finished(ranked) and folder.load(ranked, solving.load_candidates).by_tasks
    # Questions that were used for the choice must not judge it.
    but = chosen.asked if chosen else []
    tasks = list(dict.fromkeys(split_names(config.tasks)))
    options = {
        "model": made.fingerprint,
        "tasks": tasks,
        "questions": config.questions,
        "data": bool(config.data),
        **({"left_out": fingerprint(but)} if but else {}),
    }
    work = checkpoint.with_name(".benchmarks")

    def make(path: Path) -> None:
        session.choose_tuning(folder)
        write_document(path, score_both(session, checkpoint, but=but, kept=work))

    return folder.stage(
        "benchmarks",
        checkpoint.with_name("benchmarks.json"),
        options,
        make,
        lambda path: read_document(path, documents.BenchmarksFile),
        forget=lambda: benchmark.forget_scores(work, tasks),
    )


def score_both(
    session: Session,
    checkpoint: Path,
    *,
    but: Sequence[str] = (),
    kept: Path | None = None,
) -> documents.BenchmarksFile:
    """Score the session's model and a checkpoint cut from it, for `benchmarks.json`.

    Args:
        but: keys of questions to leave out.
        kept: folder for journals; None keeps nothing.
    """
    from importlib.metadata import version

    check_whole(session)
    config = session.config
    tasks = list(dict.fromkeys(split_names(config.tasks)))
    given: dict[str, Any] = {"batch_tokens": session.tuning.batch_tokens}
    given["progress"] = session.progress
    original = ScoredModel(session.loaded, session.replay)
    loaded, streamed = session.open_cut(checkpoint)
    cut = ScoredModel.whole(loaded) if streamed is None else ScoredModel(loaded, streamed)
    if streamed is None:
        cut.replay.attention = original.replay.attention
    models = {"original": original, "cut": cut}
    rows = benchmark.benchmark(
        models,
        [t for t in tasks if t != WIKITEXT],
        data=data_of(config),
        questions=config.questions,
        but=but,
        kept=kept,
        **given,
    )
    found: dict[str, Any] = {"left_out": len(but)} if but else {}
    if WIKITEXT in tasks:
        both = {name: model.loaded for name, model in models.items()}
        found["wikitext2"] = benchmark.text_scores(both, data_of(config), config.questions, **given)
    return documents.BenchmarksFile(rows=rows, engine=f"lm_eval {version('lm_eval')}", **found)


def rank(session: Session, folder: RunFolder) -> documents.CandidatesFile:
    """Run stage `rank`: measure the spectrum's states and random ones, in `candidates.json`."""
    config = session.config
    target = folder.target(config.removal)
    spectrum = folder.load(solving.needs(folder, config, "spectrum.json", "solve"), Spectrum.load)
    others = {
        name: folder.load(measuring.other_path(folder, name), Hamiltonian.load)
        for name in names(config.also)
    }
    options = solving.solve_options(folder, config) | {
        "random_states": config.random_states,
        "choose": config.choose,
        "also": sorted(others),
    }
    if config.choose == "tasks":
        options |= {name: getattr(config, name) for name in ("tasks", "data", "questions")}
    check_run_tasks(config)
    check_whole(session)
    journal, scores = target / "candidates.journal", target / ".asked"
    patched = target / "patched.journal"

    def make(path: Path) -> None:
        split = measuring.splits_of(folder)["rank"]
        problem = solving.problem_of(folder, config)
        considered = with_found(spectrum, problem, config)
        session.choose_tuning(folder)
        found = candidates.rank(
            session.replay,
            split,
            problem,
            considered,
            remove=config.removal,
            others=others,
            random_states=config.random_states,
            seed=config.seed,
            choose=config.choose,
            work=measuring.work_of(session, journal),
        )
        if quick := one_pass(found, problem.hamiltonian.meta.get("search", {})):
            found = found.model_copy(update={"one_pass": quick})
        if config.choose == "tasks" and not folder.processes.rank:
            rows = found.candidates
            position, by_tasks = choose_by_tasks(session, rows, scores)
            why = chosen_by_tasks(by_tasks, rows[position].kl, min(row.kl for row in rows))
            chosen = documents.ChosenState(**rows[position].content(), position=position, why=why)
            found = found.model_copy(update={"by_tasks": by_tasks, "chosen": chosen})
        elif config.choose == "measured" and config.patch != "none":
            rows = found.candidates
            near = choose_by_patch(session, folder, rows, split, patched)
            if len(near) > 1:
                why = chosen_by_patch(rows, near, found.samples)
                best = rows[near[0]].content()
                found.chosen = documents.ChosenState(**best, position=near[0], why=why)
        write_document(path, found)

    file = target / "candidates.json"

    def drop() -> None:
        for file in (journal, candidates.random_journal(journal), patched):
            forget(file)
        benchmark.forget_scores(scores, split_names(config.tasks))

    return folder.stage(
        "rank", file, options, make, solving.load_candidates, together=True, forget=drop
    )


def with_found(spectrum: Spectrum, problem: Problem, config: RunConfig) -> Spectrum:
    """Return the candidates to measure: a spectrum, and a search's states for the same removal.

    For a choice by questions, the state without the last blocks is added if it is feasible: a model
    with the worst loss may score best.
    """
    searched = problem.hamiltonian.meta.get("search", {}).get("targets", {})
    mine = searched.get(config.removal, {})
    found = [row["removed"] for row in (*mine.get("finalists", []), *mine.get("one_pass", []))]
    solver = f"{spectrum.solver} and search" if found else spectrum.solver
    if config.choose == "tasks":
        last = states_of(problem.n, [last_blocks(problem.n, len(spectrum.removed(0)))])
        found += [blocks_of(state) for state in last[problem.feasible(last)]]
    if not found:
        return spectrum
    return Spectrum.from_states(
        problem,
        np.concatenate([spectrum.states, states_of(problem.n, found)]),
        # Added states do not affect the proof of the lowest.
        proven=spectrum.proven,
        solver=solver,
        seconds=spectrum.seconds,
        info=spectrum.info,
    )


def one_pass(
    ranking: documents.CandidatesFile, search: Mapping[str, Any]
) -> documents.OnePass | None:
    """Return the measured choices of one-pass methods, with the costs of the pass and the search.

    Args:
        search: the search's record in the energy's metadata; empty for other energies.
    """
    found = search.get("targets", {}).get(ranking.remove, {}).get("one_pass", [])
    rows = {tuple(row.removed): row.content() for row in ranking.candidates}
    if not found:
        return None
    return documents.OnePass(
        states=[documents.OnePassLoss(**{**rows[tuple(s["removed"])], **s}) for s in found],
        passes=search["one_pass_passes"],
        search_passes=search["passes"],
        searched_for=len(search["targets"]),
    )


def evaluate(
    session: Session, folder: RunFolder, removed: Sequence[int] | None = None
) -> documents.EvaluationFile:
    """Run stage `evaluate`: measure the original and the cut model on unseen text.

    Args:
        removed: the blocks of another state than the chosen one.
    """
    config = session.config
    if removed is None:
        solving.needs(folder, config, "model", "excise")
    checkpoint = product(folder, config, removed)
    excised = folder.record(checkpoint)
    file = checkpoint.with_name("evaluation.json")
    plain = {"model": excised.fingerprint, **measuring.calibration_options(folder)}
    gguf = checkpoint.with_name("model.gguf")
    packed = folder.find_record(gguf)
    # The GGUF file may be of a model that was replaced.
    if packed and packed.options.content().get("model") != excised.fingerprint:
        packed = None
    whole = {**plain, "gguf": packed.fingerprint} if packed else plain
    # A result without speed or GGUF may be replaced; one with speed has everything requested.
    skip = config.skip_speed and not any(folder.is_made(file, made) for made in (plain, whole))
    without_speed = {**whole, "skip_speed": True}
    completes = [{**plain, "skip_speed": True}, *([] if skip else [plain, without_speed])]

    def make(path: Path) -> None:
        folder.check(checkpoint)
        tokens = measuring.splits_of(folder)["report"]
        session.choose_tuning(folder)
        elsewhere = _unlike(session, measuring.splits_of(folder))
        further = _further_scores(session, checkpoint, tokens, elsewhere)
        if packed:
            folder.check(gguf)
            try:
                blocks = packed.options.removed or []
                further["gguf"] = score_gguf(session, gguf, blocks, tokens, elsewhere)
            except ModelError as e:
                further["gguf_unread"] = str(e)
        cut, streamed = session.open_cut(checkpoint)
        progress = session.progress
        found = before_and_after(
            session.streamed[1] if session.streaming else session.loaded,
            streamed or cut,
            tokens,
            elsewhere=elsewhere,
            batch_tokens=session.tuning.batch_tokens,
            skip_speed=skip,
            progress=progress,
        ).model_copy(update=further)
        if not session.streaming and streamed is None:
            found = _add_drafts(session, found, cut, checkpoint, tokens)
        if streamed is None and not skip:
            del cut
            if session.loaded.device.type != "cpu":
                session.leave_device()
            found = with_memory(
                found,
                {"before": session.source, "after": checkpoint},
                length=int(tokens.input_ids.shape[1]),
                trust_remote_code=config.trust_remote_code,
                progress=progress,
            )
        write_document(path, found)

    return folder.stage(
        "evaluate",
        file,
        without_speed if skip else whole,
        make,
        lambda path: read_document(path, documents.EvaluationFile),
        completes=completes,
    )


def _add_drafts(
    session: Session,
    found: documents.EvaluationFile,
    cut: LoadedModel,
    folder: Path,
    text: TokenSet,
) -> documents.EvaluationFile:
    """Measure the drafts of the MTP layers of the original, the exact cut and the last model."""
    original, size = session.loaded.model, session.tuning.batch_tokens
    of_original, of_last = open_mtp(original, session.source), open_mtp(cut.model, folder)
    if of_original is None or of_last is None:
        why = f"transformers cannot run those of {original.config.model_type}"
        return found.model_copy(update={"no_drafts": why} if count_mtp_layers(folder) else {})
    with session.progress("drafts of multi-token prediction", 1) as bar:
        scores = {
            "before": draft_acceptance(original, of_original, text, size),
            "after": draft_acceptance(cut.model, of_last, text, size),
        }
        if found.cut is not None:
            removed = read_document(folder / "isingcut.json", documents.CutRecord).removed
            with skip_blocks(original, session.stack, removed):
                scores["cut"] = draft_acceptance(original, of_original, text, size)
        bar.advance(1)
    keys = ("draft_acceptance", "draft_acceptance_se")
    return found.model_copy(
        update={
            name: getattr(found, name).model_copy(update=dict(zip(keys, values, strict=True)))
            for name, values in scores.items()
        }
    )


def evaluate_gguf(session: Session, gguf: Path) -> documents.EvaluationFile:
    """Measure a GGUF file and its original, the session's model, on text of the session's options.

    Raises:
        InputError: they have different vocabularies.
    """
    cut, streamed = session.open_cut(convert_file(gguf), [])
    ours, theirs = (text_config(m.model).vocab_size for m in (session.loaded, cut))
    if ours != theirs:
        raise InputError(
            f"{gguf} has a vocabulary of {theirs}, {session.config.model} one of {ours}; give its "
            "original with --original"
        )
    found = before_and_after(
        session.streamed[1] if session.streaming else session.loaded,
        streamed or cut,
        measuring.build_calibration(session.at(measuring.concrete(session.config))).splits[
            "report"
        ],
        batch_tokens=session.tuning.batch_tokens,
        # Its speed is that of llama.cpp.
        skip_speed=True,
        progress=session.progress,
    )
    after = found.after.model_copy(update={"bytes": gguf.stat().st_size})
    return found.model_copy(update={"after": after})


def _unlike(session: Session, splits: Mapping[str, TokenSet]) -> dict[str, TokenSet]:
    """Read a text that is not in the calibration, a quarter as many samples; by its name."""
    loaded, tokens = session.loaded, splits["report"]
    built = build(
        UNLIKE,
        loaded.tokenizer,
        samples=1,
        rank_samples=1,
        report_samples=max(4, tokens.samples // 4),
        length=int(tokens.input_ids.shape[1]),
        seed=session.config.seed,
        model=language_model(loaded.model),
    )
    found = built.splits["report"]
    # The calibration may hold it, under this name or another; 2 % of n-grams are common by chance.
    return {} if overlap(found, list(splits.values())) > 0.02 else {UNLIKE: found}


def _further_scores(
    session: Session, checkpoint: Path, tokens: TokenSet, elsewhere: Mapping[str, TokenSet]
) -> dict[str, Any]:
    """Return the name of the last model, and the scores of the models between original and last."""
    model = checkpoint.with_name("model")
    record = read_document(model / "isingcut.json", documents.CutRecord)
    patch, healed = record.patch, checkpoint != model
    changed = patch is not None and patch.changed
    last = "healed" if healed else "patched" if changed else "cut"
    found: dict[str, Any] = {"last": last}
    if patch is not None and patch.unpatched:
        found["unpatched"] = patch.unpatched
    judges: dict[str, Callable[[TokenSet], dict[str, documents.FurtherPart]]] = {}
    if last != "cut":
        judges["cut"] = partial(_score_exact_cut, session, record.removed)
    if healed and changed:
        loaded, streamed = session.open_cut(model)
        judges["patched"] = partial(_score_cut, session, streamed or loaded.model)
    return found | {name: _score_texts(judge, tokens, elsewhere) for name, judge in judges.items()}


def score_gguf(
    session: Session,
    gguf: Path,
    removed: Sequence[int],
    tokens: TokenSet,
    elsewhere: Mapping[str, TokenSet],
) -> documents.PackedScores:
    """Read a cut GGUF file back and score it.

    Raises:
        ModelError: transformers cannot read it, it does not fit the memory, or it computes NaN.
    """
    if not fits(gguf.with_name("model"), torch.float32):
        raise ModelError("it does not fit the host's memory beside the original")
    with tempfile.TemporaryDirectory(".part", temporary_prefix(gguf), gguf.parent) as aside:
        unpack_gguf(gguf, Path(aside))
        loaded, streamed = session.open_cut(Path(aside), removed)
        judge = partial(_score_cut, session, streamed or loaded.model)
        scores = dict(_score_texts(judge, tokens, elsewhere))
    return documents.PackedScores(**scores, bytes=gguf.stat().st_size)


def _score_texts(
    judge: Callable[[TokenSet], dict[str, documents.FurtherPart]],
    tokens: TokenSet,
    elsewhere: Mapping[str, TokenSet],
) -> documents.FurtherScores:
    parts = judge(tokens)
    return documents.FurtherScores(
        **dict(parts.pop("")),
        **dict[str, Any]({"parts": parts} if parts else {}),
        elsewhere={name: judge(text)[""] for name, text in elsewhere.items()},
    )


def _score_cut(session: Session, cut: Any, tokens: TokenSet) -> dict[str, documents.FurtherPart]:
    """Score a cut on a text (key "") and on each part of a mixture."""
    original = session.streamed[1] if session.streaming else session.loaded.model
    size, progress = session.tuning.batch_tokens, session.progress
    scores = quality(original, cut, tokens, size, progress=progress)
    return {
        name: documents.FurtherPart(
            **one.after.model_dump(exclude_unset=True), kl=one.kl, kl_se=one.kl_se
        )
        for name, one in {"": scores, **scores.parts}.items()
    }


def _score_exact_cut(
    session: Session, removed: Sequence[int], tokens: TokenSet
) -> dict[str, documents.FurtherPart]:
    """Score the original with its blocks skipped, as `_score_cut`."""
    measured = measure(
        session.replay,
        tokens,
        states_of(len(session.replay), [removed]),
        Work(session.tuning.batch_tokens, session.progress),
        "perplexity and KL of the exact cut",
    )
    losses = {"": measured.losses(0)}
    losses |= {k: measured.of_samples(rows).losses(0) for k, rows in tokens.rows_by_part.items()}
    return {
        name: documents.FurtherPart(**{**dict(perplexity(of["nll"], of["nll_se"])), **of})
        for name, of in losses.items()
    }


_LARGEST = 1_000_000


def baseline_part(name: str, settings: Sequence[str]) -> Any:
    """Create the baseline called ``name`` with settings as ``option=value`` texts.

    Raises:
        InputError: no such option, a value of another type than its default, or a number above a
            million.
    """
    part = registry.get(name)
    known, kinds = {f.name: f.default for f in dataclasses.fields(part)}, get_type_hints(part)
    chosen: dict[str, Any] = {}
    for setting in settings:
        option, equals, text = setting.partition("=")
        option = option.strip().replace("-", "_")
        if not equals or option not in known:
            listed = ", ".join(known) or "none"
            raise InputError(f"--set {shown(setting)}: expected OPTION=VALUE; {name} has: {listed}")
        try:
            value = parse_yaml(text)
        except ValueError as e:
            raise InputError(f"--set {shown(setting)}: cannot read the value ({e})") from e
        value = tuple(value) if isinstance(value, list) else value
        try:
            TypeAdapter(kinds[option], config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError as e:
            expected = f"expected a value like {known[option]!r}, got {shown(text)}"
            raise InputError(f"--set {shown(setting)}: {expected}") from e
        items = value if isinstance(value, tuple) else (value,)
        if any(isinstance(v, int) and abs(v) > _LARGEST for v in items):
            raise InputError(f"--set {shown(setting)}: the largest number is {_LARGEST:,}")
        chosen[option] = value
    return part(**chosen)


def compare(
    session: Session, folder: RunFolder, name: str, settings: Sequence[str] = ()
) -> documents.BaselineFile:
    """Run one baseline for the removal of the session's options: `baseline-NAME.json`.

    Baselines only support a number of blocks. For a budget or a number per kind, the baseline
    removes as many blocks as the run's chosen state, and ``violated`` lists broken constraints.

    Returns:
        The file: the removed blocks, with their losses on the ranking split, the cost in passes and
        heads (see `isingcut.baselines.base.Outcome`), and the violated constraints of the run.
    """
    config = session.config
    part = baseline_part(name, settings)
    counts = config.remove.counts
    count = counts[0] if counts else len(solving.chosen_blocks(folder, config))
    rows = solving.removal_rows(folder.run.blocks, config)
    samples = measuring.samples_of(config, config.energy)
    target = folder.target(config.removal)
    options = measuring.calibration_options(folder) | {
        "baseline": name,
        "options": repr(part),
        "remove": count,
        "rows": [row.name for row in rows],
        "samples": samples,
        "seed": config.seed,
        "dtype": str(session.loaded.dtype),
    }

    def make(path: Path) -> None:
        splits = measuring.splits_of(folder)
        searched = splits["energy"].select(range(samples))
        session.choose_tuning(folder)
        work = Work(session.tuning.batch_tokens, session.progress, journal)
        outcome = part.choose(session.replay, searched, count, work, config.seed)
        found = measure(
            session.replay,
            splits["rank"],
            states_of(len(session.replay), [outcome.removed]),
            dataclasses.replace(work, journal=None),
            "measuring the choice",
        )
        content = documents.BaselineFile(
            baseline=name,
            options=dataclasses.asdict(part),
            settings=list(settings),
            removed=list(outcome.removed),
            **found.losses(0),
            passes=outcome.passes,
            heads=outcome.heads,
            tokens_searched=searched.tokens,
            tokens_judged=int(found.counts.sum()),
            violated=[row.name for row in rows if not row.satisfied(found.states)[0]],
            info=outcome.info,
        )
        write_document(path, content)

    file = target / f"baseline-{name}.json"
    journal = file.with_name(file.name + ".journal")
    return folder.stage(
        "baseline",
        file,
        options,
        make,
        lambda path: read_document(path, documents.BaselineFile),
        together=True,
        forget=lambda: forget(journal),
    )
