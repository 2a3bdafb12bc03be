"""Stage `evaluate`: score the original and the smaller model on unseen text."""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from isingcut.console.printing import say
from isingcut.data.calibration import Calibration, build
from isingcut.data.conversations import Messages
from isingcut.data.corpora import UNLIKE
from isingcut.data.generation import prompt_ids
from isingcut.data.tokens import TokenSet, overlap
from isingcut.errors import InputError, ModelError
from isingcut.evaluation.failures import note_failure
from isingcut.evaluation.prompts import ANSWERS, PROMPTS, check_prompts
from isingcut.evaluation.quality import (
    OtherText,
    before_and_after,
    quality,
    quality_of,
)
from isingcut.files import cuts, evaluations
from isingcut.files.ownership import MARKER, check_output, marker_with
from isingcut.files.results import read_document, write_document
from isingcut.files.schema import Document
from isingcut.files.store import Store
from isingcut.files.writing import atomic_file, lock_place, temporary_prefix
from isingcut.formats.architectures.blocks import text_config
from isingcut.formats.architectures.removed import Removed
from isingcut.formats.gguf_files import unpack_gguf
from isingcut.formats.sources import find_gguf, resolve
from isingcut.healing.checks import start_of
from isingcut.ising.states import Floats, states_of
from isingcut.measure.losses import measure
from isingcut.models.load import LoadedModel
from isingcut.models.sharing import fits
from isingcut.options.judge import JudgeOptions
from isingcut.report.card import add_figures, mark_first
from isingcut.report.run_files import RunFiles
from isingcut.runs import measuring
from isingcut.runs.checks import prompts_of, resolve_energy
from isingcut.runs.context import Context
from isingcut.runs.cutting import product
from isingcut.runs.prices import Prices
from isingcut.runs.stages import Estimate, Inputs, Planned, Runner, stage

D = TypeVar("D", bound=Document)
# Bytes of weights per second that transformers unpacks from a GGUF file and writes.
_UNPACKED = 2e7
Judge = Callable[[TokenSet], evaluations.MixedScores]
"""Compares the original and another model on a text."""


def _price(prices: Prices) -> list[Estimate]:
    """Estimate the evaluation of the original, the exact cut, the final model and its GGUF file."""
    samples = prices.config.report_samples
    packed = find_gguf(prices.config.model) is not None
    tokens = (3 + 2 * packed) * samples * prices.config.length
    work = 4 * prices.batch * prices.logits
    line = prices.estimate(samples, tokens, reads=1 + packed, work=work)
    if not prices.streamed:
        line.seconds += (1 + prices.left) * prices.answers
    line.seconds += packed * prices.left * prices.weights / _UNPACKED
    return [line]


def check_template(context: Context, config: JudgeOptions, blocks: object) -> None:
    """Say before a run that its evaluation will have no answers, if that is known.

    Raises:
        IsingcutError: the user's prompts cannot be answered, as `prompts.check_prompts`.
    """
    if config.prompts:
        _own_prompts(context, config)
    failed = dict[str, str]()
    with note_failure(ANSWERS, failed):
        prompt_ids(context.loaded.tokenizer, PROMPTS[0])
    for part, reason in failed.items():
        say(f"isingcut: warning: {part} will not be measured: {reason}")


def _own_prompts(context: Context, config: JudgeOptions) -> list[Messages]:
    """Return the user's prompts, after all checks."""
    prompts = prompts_of(config)
    if context.loaded.streamed:
        raise InputError(
            "--prompts needs the whole model, which does not fit the memory limit; raise "
            "--memory-limit, or omit it"
        )
    check_prompts(context.loaded, prompts)
    return prompts


def _plan(runner: Runner, config: Any, removed: Sequence[int] | None = None) -> Planned:
    """Plan the evaluation of the final checkpoint.

    Args:
        removed: the blocks of another state than the chosen one.
    """
    folder = runner.folder
    checkpoint = product(folder, config, removed)
    folder.record(checkpoint)
    file = checkpoint.with_name("evaluation.json")
    made = folder.find_record(file)
    prompts = made.options.prompts if made else {}
    if config.prompts:
        # Numbered, so that further prompts replace nothing.
        own = _own_prompts(runner.context, config)
        prompts = {str(n): prompt for n, prompt in enumerate(own, 1)}
    gguf = checkpoint.with_name("model.gguf")
    # The GGUF file may be of a model that was replaced.
    packed = None if folder.find_outdated(gguf) else folder.find_record(gguf)
    speed = config.budget.part("speed")
    return Planned(
        file,
        {
            "prompts": prompts,
            "gguf": packed and packed.fingerprint,
            "decoded": speed.context if speed else 0,
            "packed": gguf if packed else None,
        },
    )


@stage(
    "evaluate",
    partial(read_document, model=evaluations.EvaluationFile),
    plan=_plan,
    check=check_template,
    price=_price,
)
def evaluate(context: Context, inputs: Inputs, options: Any, out: Path) -> None:
    """Measure the original and the cut model on unseen text."""
    checkpoint = inputs.find("product")
    splits = inputs.read("calibration", Calibration.load).splits
    tokens = splits["report"]
    elsewhere = dict[str, TokenSet]()
    failed = dict[str, str]()
    with note_failure(UNLIKE, failed):
        elsewhere = _unlike(context, options.seed, splits)
    removed, further, others = _further_scores(context, checkpoint, tokens, elsewhere)
    if gguf := options.packed:
        inputs.folder.check(gguf)
        with note_failure(gguf.name, failed):
            further["gguf"] = score_gguf(context, gguf, removed, tokens, elsewhere)
    scores = before_and_after(
        context.loaded,
        context.open_cut(checkpoint),
        tokens,
        work=context.work(inputs.place / "evaluation.journal"),
        elsewhere=others,
        decoded=options.decoded,
        prompts=[options.prompts[key] for key in sorted(options.prompts, key=int)],
    ).model_copy(update=further)
    if failed:
        scores.failed = failed | scores.failed
    scores.before.bytes = context.identity.weight_bytes
    write_document(out, scores)


def rewrite_card(folder: Store, target: Path) -> None:
    """Write the figures to the model card of a run's final checkpoint; what a user wrote stays."""
    files = RunFiles(folder, target)
    card = files.product / "README.md"
    if not card.is_file():
        return
    written = add_figures(card.read_text(encoding="utf-8"), files)
    if files.evaluation:
        written = mark_first(written, files)
    with atomic_file(card) as temporary:
        temporary.write_text(written, encoding="utf-8")
        # Else the card would count as the user's, which --overwrite does not replace.
        if marker := marker_with(files.product, card.name, temporary):
            with atomic_file(files.product / MARKER) as other:
                other.write_text(marker, encoding="utf-8")


def write_scores(
    config: Any,
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
    sources = [str(place), config.model, *filter(None, [config.data, config.prompts])]
    check_output(file, overwrite=config.overwrite, sources=sources)
    folder = resolve(str(place))
    with lock_place(file):
        scores = score(folder)
        write_document(file, scores, seal=True)
    return scores, file


def evaluate_checkpoint(
    config: Any, checkpoint: Path, out: Path | None = None
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
        context = Context(config)
        prompts = _own_prompts(context, config) if config.prompts else []
        cut = context.open_cut(folder)
        ours, theirs = (text_config(m.model).vocab_size for m in (context.loaded, cut))
        if ours != theirs:
            raise InputError(
                f"{checkpoint} has a vocabulary of {theirs}, {config.model} one of {ours}; give "
                "its original with --original"
            )
        # GGUF files run in llama.cpp, so the speed in transformers is not relevant.
        packed = checkpoint.suffix.lower() == ".gguf"
        scores = before_and_after(
            context.loaded,
            cut,
            measuring.build_calibration(context, resolve_energy(config)).splits[
                "report"
            ],
            work=context.work(),
            decoded=None if packed else 0,
            prompts=prompts,
        )
        scores.before.bytes = context.identity.weight_bytes
        if packed:
            scores.after.bytes = checkpoint.stat().st_size
        else:
            scores.last = start_of(folder)
        return scores

    return write_scores(config, checkpoint, out, "evaluation", compare)


def _unlike(
    context: Context, seed: int, splits: Mapping[str, TokenSet]
) -> dict[str, TokenSet]:
    """Return a text outside the calibration, by name, with a quarter of the samples; or nothing."""
    loaded = context.loaded
    tokens = splits["report"]
    length = int(tokens.input_ids.shape[1])
    built = build(
        UNLIKE,
        loaded.sampler(length, seed),
        samples=1,
        rank_samples=1,
        report_samples=max(4, tokens.samples // 4),
    )
    unlike = built.splits["report"]
    # The calibration may contain it, under any name; 2 % of n-grams are common by chance.
    return {} if overlap(unlike, list(splits.values())) > 0.02 else {UNLIKE: unlike}


def _further_scores(
    context: Context,
    checkpoint: Path,
    tokens: TokenSet,
    elsewhere: Mapping[str, TokenSet],
) -> tuple[Removed, dict[str, Any], dict[str, OtherText]]:
    """Score the models between the original and the last.

    Returns:
        the state; the name of the last model, and the scores; and the texts of
        ``elsewhere`` with the exact cut's KL.
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
        state = states_of(len(context.replay), [record.removed])
        what = "perplexity and KL of the exact cut"
        for text in (tokens, *elsewhere.values()):
            exact = measure(context.replay, text, state, context.work(), what)
            sums[text] = np.stack(
                [exact.original_nll_sums, exact.nll_sums[0], exact.kl_sums[0]]
            )
        judges["cut"] = lambda text: quality_of(sums[text], text)
    if healed and changed:
        judges["patched"] = _judge(context, context.open_cut(model))
    scores |= {
        name: _score_texts(judge, tokens, elsewhere) for name, judge in judges.items()
    }
    texts = {
        name: OtherText(text, sums[text][2] if sums else None)
        for name, text in elsewhere.items()
    }
    return context.stack.remove(record.removed), scores, texts


def score_gguf(
    context: Context,
    gguf: Path,
    removed: Removed,
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
        unpack_gguf(gguf, Path(aside), context.progress)
        judge = _judge(context, context.open_cut(Path(aside), removed))
        scores = _score_texts(judge, tokens, elsewhere)
    return evaluations.PackedScores(**dict(scores), bytes=gguf.stat().st_size)


def _judge(context: Context, cut: LoadedModel) -> Judge:
    """Return the function that compares the original and a cut on a text."""
    original = context.loaded.runnable
    return lambda text: quality(original, cut.runnable, text, context.work())


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
