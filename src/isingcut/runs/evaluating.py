"""Stages `evaluate` and `benchmarks`: score the original and the smaller model.

The first is on unseen text, the second on tasks, whose questions may also choose the state."""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from isingcut.console.progress import Part
from isingcut.data.calibration import build
from isingcut.data.corpora import UNLIKE
from isingcut.data.tokens import TokenSet, overlap
from isingcut.errors import InputError, ModelError
from isingcut.evaluation import benchmark
from isingcut.evaluation.quality import before_and_after, quality, quality_of
from isingcut.evaluation.questions import Prepared, prepare_task, split_names
from isingcut.evaluation.scores import score_states
from isingcut.files import cuts, evaluations, states
from isingcut.files.ownership import check_output, folder_hash, foreign_in, mark
from isingcut.files.results import fingerprint, read_document, write_document
from isingcut.files.schema import Document
from isingcut.files.writing import atomic_file, lock_place, temporary_prefix
from isingcut.formats.architectures.blocks import language_model, text_config
from isingcut.formats.gguf_files import unpack_gguf
from isingcut.formats.sources import resolve
from isingcut.healing.checks import start_of
from isingcut.ising.states import Floats, states_of
from isingcut.measure.losses import measure
from isingcut.measure.work import Work
from isingcut.models.load import LoadedModel
from isingcut.models.sharing import fits
from isingcut.options.config import RunConfig
from isingcut.report.card import add_figures, mark_harm
from isingcut.report.run_files import RunFiles
from isingcut.runs import measuring, solving
from isingcut.runs.checks import data_of, resolve_energy
from isingcut.runs.cutting import product
from isingcut.runs.folder import RunFolder
from isingcut.runs.prices import Prices
from isingcut.runs.session import Session
from isingcut.runs.stages import Estimate, Making, Stage

D = TypeVar("D", bound=Document)
Judge = Callable[[TokenSet], evaluations.MixedScores]
"""Compares the original and another model on a text."""


def _evaluate(
    session: Session, folder: RunFolder, removed: Sequence[int] | None = None
) -> Making:
    """Measure the original and the cut model on unseen text.

    Args:
        removed: the blocks of another state than the chosen one.
    """
    config = session.config
    checkpoint = product(folder, config, removed)
    file = checkpoint.with_name("evaluation.json")
    options: dict[str, Any] = {"model": folder.record(checkpoint).fingerprint}
    options |= measuring.calibration_options(folder)
    gguf = checkpoint.with_name("model.gguf")
    # The GGUF file may be of a model that was replaced.
    packed = None if folder.find_outdated(gguf) else folder.find_record(gguf)
    if packed:
        options["gguf"] = packed.fingerprint
    # A result with speed has everything that is requested.
    skip = config.skip_speed and not folder.is_made(file, options)
    if skip:
        options["skip_speed"] = True

    path = yield folder, file, options
    folder.check(checkpoint)
    splits = measuring.read_calibration(folder).splits
    tokens = splits["report"]
    session.choose_tuning(folder)
    elsewhere = _unlike(session, splits)
    further, exact = _further_scores(session, checkpoint, tokens, elsewhere)
    if packed:
        folder.check(gguf)
        try:
            blocks = packed.options.removed or []
            further["gguf"] = score_gguf(session, gguf, blocks, tokens, elsewhere)
        except ModelError as e:
            further["gguf_unread"] = str(e)
    cut = session.open_cut(checkpoint)
    scores = before_and_after(
        session.loaded,
        cut,
        tokens,
        work=session.work(),
        elsewhere=elsewhere,
        exact=exact,
        skip_speed=skip,
    ).model_copy(update=further)
    scores.before.bytes = session.identity.weight_bytes
    files = RunFiles(folder.path, checkpoint.parent)
    files.evaluation = scores
    _rewrite_card(folder, files)
    write_document(path, scores)


def _rewrite_card(folder: RunFolder, files: RunFiles) -> None:
    """Write the figures to the model card of a run's final checkpoint; what a user wrote stays."""
    card = files.product / "README.md"
    if not card.is_file():
        return
    written = add_figures(card.read_text(encoding="utf-8"), files)
    if files.evaluation:
        written = mark_harm(written, files.evaluation)
    own = foreign_in(files.product) is None
    with atomic_file(card) as temporary:
        temporary.write_text(written, encoding="utf-8")
    if own:
        # Else the card would count as the user's, which --overwrite does not replace.
        mark(files.product)
        folder.record(files.product).sha256 = folder_hash(files.product)
        folder.save()


def _price(prices: Prices) -> list[Estimate]:
    """Estimate the evaluation of the original, the exact cut and the final model."""
    samples = prices.config.report_samples
    tokens = 3 * samples * prices.config.length
    work = 4 * prices.batch * prices.logits
    return [prices.estimate(samples, tokens, reads=1, work=work)]


evaluate = Stage(
    "evaluate",
    _evaluate,
    partial(read_document, model=evaluations.EvaluationFile),
    additions=("gguf", "skip_speed"),
    price=_price,
)


def write_scores(
    config: RunConfig,
    checkpoint: Path,
    out: Path | None,
    what: str,
    score: Callable[[Path], D],
) -> tuple[D, Path]:
    """Score a checkpoint or GGUF file in any place, and write the scores to a file.

    Args:
        out: the file; by default `NAME-WHAT.json` next to the checkpoint.
        score: returns the scores of the checkpoint in a folder.

    Raises:
        ModelError: it is not a checkpoint.
        OutputExistsError: the file exists and may not be replaced.
    """
    place = Path(os.path.abspath(checkpoint))
    file = out or place.with_name(f"{place.name.removesuffix('.gguf')}-{what}.json")
    sources = [str(place), config.model, *([config.data] if config.data else [])]
    check_output(file, overwrite=config.overwrite, sources=sources)
    folder = resolve(str(place))
    with lock_place(file):
        scores = score(folder)
        write_document(file, scores, seal=True)
    return scores, file


def evaluate_checkpoint(
    config: RunConfig, checkpoint: Path, out: Path | None = None
) -> tuple[evaluations.EvaluationFile, Path]:
    """Compare a checkpoint or a GGUF file with its original, on text of the given options.

    Args:
        config: options, whose ``model`` is the original.
        out: the file for the scores, by default as `write_scores`.

    Returns:
        the scores, and the file that they were written to.

    Raises:
        InputError: they have different vocabularies.
        ModelError, OutputExistsError: as `write_scores`.
    """

    def compare(folder: Path) -> evaluations.EvaluationFile:
        session = Session(resolve_energy(config))
        cut = session.open_cut(folder)
        ours, theirs = (text_config(m.model).vocab_size for m in (session.loaded, cut))
        if ours != theirs:
            raise InputError(
                f"{checkpoint} has a vocabulary of {theirs}, {config.model} one of {ours}; give "
                "its original with --original"
            )
        # GGUF files run in llama.cpp, so the speed in transformers is not relevant.
        packed = checkpoint.suffix.lower() == ".gguf"
        scores = before_and_after(
            session.loaded,
            cut,
            measuring.build_calibration(session).splits["report"],
            work=session.work(),
            skip_speed=config.skip_speed or packed,
        )
        scores.before.bytes = session.identity.weight_bytes
        if packed:
            scores.after.bytes = checkpoint.stat().st_size
        else:
            scores.last = start_of(folder)
        return scores

    return write_scores(config, checkpoint, out, "evaluation", compare)


def _unlike(session: Session, splits: Mapping[str, TokenSet]) -> dict[str, TokenSet]:
    """Return a text outside the calibration, by name, with a quarter of the samples; or nothing."""
    loaded = session.loaded
    tokens = splits["report"]
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
    unlike = built.splits["report"]
    # The calibration may contain it, under any name; 2 % of n-grams are common by chance.
    return {} if overlap(unlike, list(splits.values())) > 0.02 else {UNLIKE: unlike}


def _further_scores(
    session: Session,
    checkpoint: Path,
    tokens: TokenSet,
    elsewhere: Mapping[str, TokenSet],
) -> tuple[dict[str, Any], dict[str, Floats]]:
    """Score the models between the original and the last.

    Returns:
        the name of the last model, and the scores; and the exact cut's KL by sample on each text
        of ``elsewhere``, if it is not the last.
    """
    model = checkpoint.with_name("model")
    record = read_document(model / "isingcut.json", cuts.CutRecord)
    patch = record.patch
    healed = checkpoint != model
    changed = patch is not None and patch.changed
    last = "healed" if healed else "patched" if changed else "cut"
    scores: dict[str, Any] = {"last": last}
    if patch is not None and patch.unpatched:
        scores["unpatched"] = patch.unpatched
    judges: dict[str, Judge] = {}
    sums: dict[TokenSet, Floats] = {}
    if last != "cut":
        state = states_of(len(session.replay), [record.removed])
        what = "perplexity and KL of the exact cut"
        for text in (tokens, *elsewhere.values()):
            exact = measure(session.replay, text, state, session.work(), what)
            sums[text] = np.stack(
                [exact.original_nll_sums, exact.nll_sums[0], exact.kl_sums[0]]
            )
        judges["cut"] = lambda text: quality_of(sums[text], text)
    if healed and changed:
        judges["patched"] = _judge(session, session.open_cut(model))
    scores |= {
        name: _score_texts(judge, tokens, elsewhere) for name, judge in judges.items()
    }
    return scores, {name: sums[text][2] for name, text in elsewhere.items() if sums}


def score_gguf(
    session: Session,
    gguf: Path,
    removed: Sequence[int],
    tokens: TokenSet,
    elsewhere: Mapping[str, TokenSet],
) -> evaluations.PackedScores:
    """Read a cut GGUF file back and score it.

    Raises:
        ModelError: transformers cannot read it, it does not fit the memory, or it computes NaN.
    """
    if not fits(gguf.with_name("model"), torch.float32):
        raise ModelError("it does not fit the host's memory together with the original")
    with tempfile.TemporaryDirectory(
        ".part", temporary_prefix(gguf), gguf.parent
    ) as aside:
        unpack_gguf(gguf, Path(aside), session.progress)
        judge = _judge(session, session.open_cut(Path(aside), removed))
        scores = _score_texts(judge, tokens, elsewhere)
    return evaluations.PackedScores(**dict(scores), bytes=gguf.stat().st_size)


def _judge(session: Session, cut: LoadedModel) -> Judge:
    """Return the function that compares the original and a cut on a text."""
    original = session.loaded.runnable
    return lambda text: quality(original, cut.runnable, text, session.work())


def _score_texts(
    judge: Judge, tokens: TokenSet, elsewhere: Mapping[str, TokenSet]
) -> evaluations.FurtherScores:
    """Score a cut on the report split, on each part of a mixture, and on further texts."""
    scores = judge(tokens)
    parts = {name: _further_part(part) for name, part in scores.parts.items()}
    return evaluations.FurtherScores(
        **dict(_further_part(scores)),
        **dict[str, Any]({"parts": parts} if parts else {}),
        elsewhere={
            name: _further_part(judge(text)) for name, text in elsewhere.items()
        },
    )


def _further_part(scores: evaluations.PairScores) -> evaluations.FurtherPart:
    return evaluations.FurtherPart(
        **scores.after.content(), kl=scores.kl, kl_se=scores.kl_se
    )


# Tasks ------------------------------------------------------------------------------------


def check_whole(session: Session, blocks: object = None) -> None:
    """Raise if a task needs the whole model in memory, but the model is streamed.

    Raises:
        InputError: a task with generated answers.
    """
    for task in prepare_tasks(session.config) if session.streaming else ():
        if task.generates:
            raise InputError(
                f"{task.name} needs the whole model, which does not fit the memory limit; raise "
                "--memory-limit, or remove it from --tasks"
            )


def prepare_tasks(config: RunConfig) -> list[Prepared]:
    """Prepare the tasks of a run."""
    names = split_names(config.tasks)
    return [prepare_task(name, data_of(config), config.questions) for name in names]


def hashes_of(config: RunConfig) -> dict[str, Any]:
    """Return a stage option with the hash of each task's questions; empty if all are of the hub."""
    names = split_names(config.tasks)
    sources = (task.source for task in prepare_tasks(config))
    pairs = zip(names, sources, strict=True)
    hashes = {name: source for name, source in pairs if source != "hub"}
    return {"files": hashes} if hashes else {}


def last_blocks(size: int, count: int) -> list[int]:
    """Return the last ``count`` blocks of a stack of ``size``."""
    return list(range(size - count, size))


def choose_by_tasks(
    session: Session, rows: Sequence[states.MeasuredState], kept: Path
) -> tuple[int, states.ByTasks]:
    """Choose the best of a few candidates by half of the questions of the run's tasks.

    Each candidate is the original with blocks skipped, so no checkpoint is written.

    Args:
        rows: the rows of `candidates.json`.
        kept: folder for journals.

    Returns:
        the index of the chosen row, and the record of the choice.
    """
    config = session.config
    model = session.loaded
    tasks = prepare_tasks(config)
    last = last_blocks(len(session.stack), len(rows[0].removed))
    order = sorted(range(len(rows)), key=lambda i: rows[i].kl)
    best = [
        i
        for place, i in enumerate(order)
        if place < benchmark.CONTENDERS or sorted(rows[i].removed) == last
    ]
    removed = [rows[i].removed for i in best]
    drawn = benchmark.draw_half({task.name: task.pool() for task in tasks}, config.seed)
    count = sum(map(len, drawn.values()))
    scores = []
    with session.progress(
        f"scoring {len(best)} candidates on {count} questions", count
    ) as bar:
        for task in tasks:
            keys = drawn[task.name]
            journal = benchmark.journal_of(kept, task, model, [*removed, *keys])
            part = Part(bar, len(keys))
            work = Work(session.batch_tokens, part, journal)
            wanted = frozenset(keys).__contains__
            scores.append(score_states(model, task, removed, work, wanted=wanted))
            part.finish(task.name)
    position, by_tasks = benchmark.choose_by_questions(removed, drawn, scores)
    return best[position], by_tasks


def _benchmarks(
    session: Session, folder: RunFolder, removed: Sequence[int] | None = None
) -> Making:
    """Score both models on the options' tasks.

    Args:
        removed: the blocks of another state than the chosen one.
    """
    config = session.config
    checkpoint = product(folder, config, removed)
    made = folder.record(checkpoint)
    ranked = folder.target(config) / "candidates.json"
    chosen = (
        folder.find_finished(ranked)
        and folder.load(ranked, solving.load_candidates).by_tasks
    )
    # Questions that were used for the choice must not be used to score it.
    but = chosen.questions if chosen else []
    options = {
        "model": made.fingerprint,
        "tasks": split_names(config.tasks),
        "questions": config.questions,
        "data": bool(config.data),
        **({"left_out": fingerprint(but)} if but else {}),
        **hashes_of(config),
    }
    work = checkpoint.with_name(".benchmarks")

    path = yield folder, checkpoint.with_name("benchmarks.json"), options
    session.choose_tuning(folder)
    files = RunFiles(folder.path, checkpoint.parent)
    files.benchmarks = _score_both(session, checkpoint, but=but, kept=work)
    _rewrite_card(folder, files)
    write_document(path, files.benchmarks)


benchmarks = Stage(
    "benchmarks",
    _benchmarks,
    partial(read_document, model=evaluations.BenchmarksFile),
    check=check_whole,
    journals=(".benchmarks/*.journal",),
)


def benchmark_checkpoint(
    config: RunConfig, checkpoint: Path, out: Path | None = None
) -> tuple[evaluations.BenchmarksFile, Path]:
    """Score a checkpoint in any folder, or a GGUF file, and its original on the options' tasks.

    Args:
        config: options, whose ``model`` is the original.
        out: the file for the scores, by default as `write_scores`.

    Returns:
        the scores, and the file that they were written to.

    Raises:
        InputError: a task with generated answers, but the model is streamed.
        ModelError, OutputExistsError: as `write_scores`.
    """
    score = partial(_score_both, Session(config))
    return write_scores(config, checkpoint, out, "benchmarks", score)


def _score_both(
    session: Session,
    checkpoint: Path,
    *,
    but: Sequence[str] = (),
    kept: Path | None = None,
) -> evaluations.BenchmarksFile:
    """Score the session's model and a checkpoint cut from it, for `benchmarks.json`.

    Args:
        but: keys of questions to leave out.
        kept: folder for journals; None keeps nothing.
    """
    check_whole(session)
    config = session.config
    work = session.work()
    cut = session.open_cut(checkpoint)
    models = {"original": session.loaded, "cut": cut}
    if not cut.streamed:
        cut.replay.attention = session.replay.attention
    tasks = prepare_tasks(config)
    rows = benchmark.benchmark(models, tasks, work, but=but, kept=kept)
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    template = session.loaded.tokenizer.chat_template
    scores = evaluations.BenchmarksFile(
        rows=rows, engine=f"lm_eval {version('lm_eval')}", seed=DEFAULT_OTHER_SEED
    )
    if template and any(task.chat for task in tasks):
        scores.template_sha = fingerprint(template)
    if but:
        scores.left_out = len(but)
    return scores
