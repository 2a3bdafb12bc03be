"""The stages that measure states and models: `rank`, `evaluate`, `benchmarks` and `baseline`.

Each writes its file of the run folder and does nothing when that file is there, made with the
same options (`RunFolder.stage`). A baseline sees the samples that built the energy; its choice is
measured on the split that ranks the candidates, so that both compare as they stand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from isingcut.baselines import registry
from isingcut.console.progress import Part
from isingcut.data.calibration import build
from isingcut.data.corpora import UNLIKE
from isingcut.data.mixture import places_in
from isingcut.data.tokens import TokenSet
from isingcut.errors import InputError
from isingcut.evaluation import candidates
from isingcut.evaluation.benchmark import (
    benchmark,
    choose_by_questions,
    contenders,
    draw_half,
    forget_scores,
    journal_of,
    text_scores,
)
from isingcut.evaluation.quality import (
    before_and_after,
    perplexity,
    quality,
)
from isingcut.evaluation.questions import WIKITEXT, check_tasks, prepare_task, split_names
from isingcut.evaluation.scores import ScoredModel, Scores, score_states
from isingcut.evaluation.speed import with_memory
from isingcut.files import documents
from isingcut.files.inputs import user_path
from isingcut.files.writing import fingerprint, read_document, write_document
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem
from isingcut.ising.spectrum import Spectrum
from isingcut.ising.states import blocks_of, states_of
from isingcut.measure.losses import measure
from isingcut.measure.work import Work, forget
from isingcut.models.architectures.blocks import text_model
from isingcut.options.config import RunConfig
from isingcut.options.declaration import parse_yaml, shown
from isingcut.report.words import chosen_by_tasks, listed
from isingcut.runs import measuring, solving
from isingcut.runs.cutting import product
from isingcut.runs.folder import RunFolder
from isingcut.runs.measuring import names
from isingcut.runs.session import Session


def check_asked(config: RunConfig) -> list[str]:
    """Refuse tasks of a run's options that cannot be asked, before a model is loaded.

    Returns:
        their names, each once.

    Raises:
        InputError, MissingExtraError: as `questions.check_tasks`, or there is nothing to choose by,
            or to score.
    """
    if not config.tasks:
        return []
    if config.choose != "tasks" and len(solving.each_removal(config)) > 1:
        raise InputError("--tasks scores a checkpoint, and a range cuts none; leave it out")
    names = check_tasks(split_names(config.tasks), data_of(config), config.questions)
    if config.choose == "tasks" and names == [WIKITEXT]:
        raise InputError("wikitext2 is a text; to --choose by --tasks takes one with questions")
    return names


def check_whole(session: Session) -> None:
    """Refuse tasks of a session's options that take the whole model where it is streamed.

    Raises:
        InputError: a text to read, or a task whose answers are written.
    """
    config = session.config
    for name in split_names(config.tasks) if config.tasks and session.streaming else ():
        if name == WIKITEXT or prepare_task(name, data_of(config), config.questions).generates:
            raise InputError(
                f"{name} takes the whole model, which does not fit the memory allowed; raise "
                "--memory-limit, or leave it out of --tasks"
            )


def data_of(config: RunConfig) -> Path | None:
    """The folder of the questions that a run's options name."""
    return user_path(config.data) if config.data else None


def last_blocks(size: int, count: int) -> list[int]:
    """So many at the end of a stack of ``size``."""
    return list(range(size - count, size))


def choose_by_tasks(
    session: Session, rows: Sequence[documents.MeasuredState], kept: Path
) -> tuple[int, documents.ByTasks]:
    """The best of a few candidates on half of the questions of the run's tasks.

    Each is the original with its blocks skipped: no checkpoint is written.

    Args:
        rows: of `candidates.json`.
        kept: folder of journals.

    Returns:
        its position in ``rows``, and how it was chosen.
    """
    config = session.config
    tasks = {
        task.name: task
        for name in check_asked(config)
        if name != WIKITEXT
        for task in [prepare_task(name, data_of(config), config.questions)]
    }
    pool = {name: task.pool() for name, task in tasks.items()}
    last = last_blocks(len(session.stack), len(rows[0].removed))
    best = contenders(rows, last)
    drawn = draw_half(pool, config.seed)
    model = ScoredModel(session.loaded, session.replay)
    # Fewer where one is ahead early.
    most = len(best) * sum(map(len, drawn.values()))
    with session.progress(f"asking {len(best)} candidates at most {most} questions", most) as bar:

        def ask(left: Sequence[Sequence[int]], name: str, keys: Sequence[str]) -> list[Scores]:
            journal = journal_of(kept, tasks[name], model.loaded, [*left, *keys])
            part = Part(bar, len(keys) * len(left))
            work = Work(session.tuning.batch_tokens, part, journal)
            only = frozenset(keys).__contains__
            found = score_states(model, tasks[name], left, work, wanted=only)
            right, blocks = max(
                (float(s.values.mean()), listed(r)) for s, r in zip(found, left, strict=True)
            )
            part.finish(f"without {blocks} {right:.0%} of {name}")
            return found

        position, found = choose_by_questions([rows[i].removed for i in best], drawn, ask)
    return best[position], found


def benchmarks(
    session: Session, folder: RunFolder, removed: Sequence[int] | None = None
) -> documents.BenchmarksFile:
    """Stage `benchmarks`: `benchmarks.json`, both models on the questions of the options' tasks.

    Args:
        removed: the cut model is the one without these blocks, instead of the chosen one.
    """
    config = session.config
    checkpoint = product(folder, config, removed)
    made = folder.recorded(checkpoint)
    if made is None or not checkpoint.exists():
        raise InputError(f"there is no {checkpoint}; excise (and heal) first")
    ranked = folder.target(config.removal) / "candidates.json"
    chosen = folder.finished(ranked) and folder.load(ranked, solving.load_candidates).by_tasks
    # Questions that chose a run's state may not judge it.
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
        session.tuned(folder)
        write_document(path, score_both(session, checkpoint, but=but, kept=work))

    return folder.stage(
        "benchmarks",
        checkpoint.with_name("benchmarks.json"),
        options,
        make,
        lambda path: read_document(path, documents.BenchmarksFile),
        forget=lambda: forget_scores(work, tasks),
    )


def score_both(
    session: Session,
    checkpoint: Path,
    *,
    but: Sequence[str] = (),
    kept: Path | None = None,
) -> documents.BenchmarksFile:
    """What `benchmarks.json` says: the session's model and a checkpoint cut from it.

    Args:
        but: questions to leave out, by their keys.
        kept: folder of journals; None keeps nothing.
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
    rows = benchmark(
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
        found["wikitext2"] = text_scores(both, data_of(config), config.questions, **given)
    return documents.BenchmarksFile(rows=rows, engine=f"lm_eval {version('lm_eval')}", **found)


def rank(session: Session, folder: RunFolder) -> documents.CandidatesFile:
    """Stage `rank`: `candidates.json`, the spectrum's states beside random ones, measured."""
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
    check_asked(config)
    check_whole(session)
    journal, scores = target / "candidates.journal", target / ".asked"

    def make(path: Path) -> None:
        split = measuring.splits_of(folder)["rank"]
        problem = solving.problem_of(folder, config)
        considered = with_found(spectrum, problem, config)
        with session.computing(folder):
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
        write_document(path, found)

    file = target / "candidates.json"

    def drop() -> None:
        forget(journal)
        forget(candidates.random_journal(journal))
        forget_scores(scores, split_names(config.tasks))

    return folder.stage(
        "rank", file, options, make, solving.load_candidates, together=True, forget=drop
    )


def with_found(spectrum: Spectrum, problem: Problem, config: RunConfig) -> Spectrum:
    """The candidates to measure: a spectrum, and what a search found for the same removal.

    To choose by questions, the state without the last blocks is one too where it is allowed: what
    writes worst may answer best.
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
        # The lowest stay the lowest, whatever else is measured beside them.
        proven=spectrum.proven,
        solver=solver,
        seconds=spectrum.seconds,
        info=spectrum.info,
    )


def one_pass(
    ranking: documents.CandidatesFile, search: Mapping[str, Any]
) -> documents.OnePass | None:
    """What one pass chooses as the ranking measured it, with its price and the search's.

    Args:
        search: of the energy's metadata; empty where it is not a search's.
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
    """Stage `evaluate`: `evaluation.json`, the original and the cut model on unseen text.

    Args:
        removed: the cut model is the one without these blocks, instead of the chosen one.
    """
    config = session.config
    if removed is None:
        solving.needs(folder, config, "model", "excise")
    checkpoint = product(folder, config, removed)
    excised = folder.record(checkpoint)
    file = checkpoint.with_name("evaluation.json")
    whole = {"model": excised.fingerprint, **measuring.upstream(folder)}
    without_speed = {**whole, "skip_speed": True}
    # What lacks speed may be made anew; what has it already holds all that was asked for.
    skip = config.skip_speed and not folder.is_made(file, whole)

    def make(path: Path) -> None:
        folder.check(checkpoint)
        tokens = measuring.splits_of(folder)["report"]
        session.tuned(folder)
        elsewhere = _unlike(session, tokens)
        beside = _beside(session, checkpoint, tokens, elsewhere)
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
        ).model_copy(update=beside)
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
        completes=None if skip else without_speed,
    )


def _unlike(session: Session, tokens: TokenSet) -> dict[str, TokenSet]:
    """A quarter as many samples of a text that is no part of the calibration, by its name."""
    config, loaded = session.config, session.loaded
    if UNLIKE in places_in(config.calibration):
        return {}
    built = build(
        UNLIKE,
        loaded.tokenizer,
        samples=1,
        rank_samples=1,
        report_samples=max(4, tokens.samples // 4),
        length=int(tokens.input_ids.shape[1]),
        seed=config.seed,
        model=text_model(loaded.model),
    )
    return {UNLIKE: built.splits["report"]}


def _beside(
    session: Session, checkpoint: Path, tokens: TokenSet, elsewhere: Mapping[str, TokenSet]
) -> dict[str, Any]:
    """What an evaluation says besides: what the last model is, and the models on the way to it."""
    model = checkpoint.with_name("model")
    record = read_document(model / "isingcut.json", documents.CutRecord)
    patch, healed = record.patch, checkpoint != model
    changed = patch is not None and patch.changed
    last = "healed" if healed else "patched" if changed else "cut"
    found: dict[str, Any] = {"last": last}
    if patch is not None and patch.unpatched:
        found["unpatched"] = patch.unpatched
    if last != "cut":
        exact = partial(_exact_cut, session, record.removed)
        found["cut"] = _with_elsewhere(exact, tokens, elsewhere)
    if healed and changed:
        original = session.streamed[1] if session.streaming else session.loaded.model
        loaded, streamed = session.open_cut(model)
        size = session.tuning.batch_tokens
        patched = streamed or loaded.model
        progress = session.progress

        def judged(text: TokenSet) -> documents.FurtherScores:
            scores = quality(original, patched, text, size, progress=progress)
            figures, *parts = (
                {**dict(one.after), "kl": one.kl, "kl_se": one.kl_se}
                for one in (scores, *scores.parts.values())
            )
            return _by_part(figures, dict(zip(scores.parts, parts, strict=True)))

        found["patched"] = _with_elsewhere(judged, tokens, elsewhere)
    return found


def _with_elsewhere(
    judge: Callable[[TokenSet], documents.FurtherScores],
    tokens: TokenSet,
    elsewhere: Mapping[str, TokenSet],
) -> documents.FurtherScores:
    """What ``judge`` says of a model on the report split, and on each of the other texts."""
    figures = set(documents.FurtherPart.model_fields)
    texts = {name: judge(text).model_dump(include=figures) for name, text in elsewhere.items()}
    further = {name: documents.FurtherPart(**scores) for name, scores in texts.items()}
    return judge(tokens).model_copy(update={"elsewhere": further})


def _by_part(figures: Mapping[str, Any], parts: Mapping[str, Any]) -> documents.FurtherScores:
    mixed = {name: documents.FurtherPart(**part) for name, part in parts.items()}
    given: dict[str, Any] = {"parts": mixed} if mixed else {}
    return documents.FurtherScores(**figures, **given)


def _exact_cut(
    session: Session, removed: Sequence[int], tokens: TokenSet
) -> documents.FurtherScores:
    """The scores of the exact cut: of the original with its blocks skipped."""
    measured = measure(
        session.replay,
        tokens,
        states_of(len(session.replay), [removed]),
        Work(session.tuning.batch_tokens, session.progress),
        "perplexity and KL of the exact cut",
    )
    parts = {
        name: _with_perplexity(measured.of_samples(rows).losses(0))
        for name, rows in tokens.rows_by_part.items()
    }
    return _by_part(_with_perplexity(measured.losses(0)), parts)


def _with_perplexity(losses: dict[str, Any]) -> dict[str, Any]:
    return {**dict(perplexity(losses["nll"], losses["nll_se"])), **losses}


_LARGEST = 1_000_000


def baseline_part(name: str, settings: Sequence[str]) -> Any:
    """The baseline called ``name`` with settings as ``option=value`` texts.

    Raises:
        InputError: no such option, a value of another type than its default's, or a number
            above a million.
    """
    part = registry.get(name)
    known = {f.name: f.default for f in dataclasses.fields(part)}
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
            raise InputError(f"--set {shown(setting)} is not a readable value ({e})") from e
        if isinstance(value, list):
            value = tuple(value)
        # Only a number may stand where the default is left to the method.
        expected = int if known[option] is None else type(known[option])
        items = value if isinstance(value, tuple) and expected is tuple else ()
        if type(value) is not expected or any(type(v) is not int for v in items):
            raise InputError(
                f"--set {shown(setting)}: expected a value like {known[option]!r}, "
                f"got {shown(text)}"
            )
        if any(isinstance(v, int) and abs(v) > _LARGEST for v in (value, *items)):
            raise InputError(f"--set {shown(setting)}: numbers end at {_LARGEST:,}")
        chosen[option] = value
    return part(**chosen)


def compare(
    session: Session, folder: RunFolder, name: str, settings: Sequence[str] = ()
) -> documents.BaselineFile:
    """Run one baseline for the removal of the session's options: `baseline-NAME.json`.

    A method knows numbers of blocks only: where the removal is a budget or a number per kind, it
    removes as many as the run's chosen state, and ``violated`` says what it breaks.

    Returns:
        The file: what is removed, with its losses on the ranking split, the price in passes and
        heads (see `isingcut.baselines.base.Outcome`), and the constraints of the run that the
        method does not know and breaks.
    """
    config = session.config
    part = baseline_part(name, settings)
    counts = config.remove.counts
    count = counts[0] if counts else len(solving.chosen_blocks(folder, config))
    rows = solving.removal_rows(folder.run.blocks, config)
    samples = measuring.samples_of(config, config.energy)
    target = folder.target(config.removal)
    options = measuring.upstream(folder) | {
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
        with session.computing(folder):
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
