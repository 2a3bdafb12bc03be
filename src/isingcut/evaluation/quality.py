"""Compare original and cut model on text that neither the energy nor the ranking used."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from isingcut.data.conversations import Messages
from isingcut.data.tokens import TokenSet
from isingcut.evaluation.failures import note_failure
from isingcut.evaluation.metrics import registry
from isingcut.evaluation.prompts import ANSWERS, compare_answers
from isingcut.evaluation.speed import SPEED_KEYS, speed
from isingcut.files.evaluations import (
    EvaluationFile,
    MixedScores,
    ModelScores,
    PartScores,
    Perplexity,
    Shown,
)
from isingcut.files.results import without_infinities
from isingcut.formats.architectures.blocks import language_model
from isingcut.formats.safetensors_files import weight_files
from isingcut.ising.states import Floats
from isingcut.measure.losses import difference, standard_error
from isingcut.measure.splitting import chunks, split_to_fit
from isingcut.measure.streams import check_finite
from isingcut.measure.work import PLAIN, Work
from isingcut.models.compute.head import split_predictions, sum_losses
from isingcut.models.device import BatchLimit
from isingcut.models.load import LoadedModel
from isingcut.models.placement import name_devices
from isingcut.models.replay import HEAD
from isingcut.models.streaming.replay import StreamedReplay

AnyModel = PreTrainedModel | StreamedReplay

# Hidden states of both models: after the blocks, before the blocks, and the current ones.
_STREAMS = 6
# Maximum loss in nats per token; the perplexity of a larger one is treated as infinite.
_MOST_NATS = 700


class OtherText(NamedTuple):
    """A text unlike the calibration; with the KL of the exact cut on it, summed by sample, if the
    last model is another."""

    tokens: TokenSet
    exact: Floats | None


def before_and_after(
    original: LoadedModel,
    cut: LoadedModel,
    tokens: TokenSet,
    *,
    work: Work = PLAIN,
    elsewhere: Mapping[str, OtherText] = MappingProxyType({}),
    decoded: int | None = 0,
    prompts: Sequence[Messages] = (),
) -> EvaluationFile:
    """Measure quality, size and speed of both models.

    For streamed models, speed and the answers are left out, because reading from disk dominates
    their speed.

    Args:
        original: the original, in memory or streamed with the same buffers as the cut.
        tokens: the report split.
        work: settings of the measurement; the journal is for the answers.
        elsewhere: further texts by name, measured one by one.
        decoded: tokens of the text that decoding is timed after; 0: as `speed`; None: skip speed
            and list its keys in ``not_measured``.
        prompts: the user's prompts.
    """
    failed = dict[str, str]()
    both = {"before": original, "after": cut}
    first = original.runnable
    second = cut.runnable
    sums = sample_sums(first, second, tokens, work)
    scores = quality_of(sums, tokens)
    nll = sums[0]
    of = {"before": np.stack([nll, nll, np.zeros_like(nll)]), "after": sums}
    metrics = {name: registry.get(name)() for name in registry.names()}
    speeds: Mapping[str, Mapping[str, Any]] = {}
    rest: dict[str, Any] = {"streamed": True}
    if not (original.streamed or cut.streamed):
        if decoded is not None:
            with work.progress("speed", 1) as bar, note_failure("speed", failed):
                plain = {name: language_model(m.model) for name, m in both.items()}
                speeds = speed(plain, tokens.select([0]), decoded)
                bar.advance(1)
        rest = {} if speeds else {"not_measured": list(SPEED_KEYS)}
        with note_failure(ANSWERS, failed):
            rest["answers"] = compare_answers(original, cut, work, prompts)
    if scores.parts:
        rest["parts"] = scores.parts
    if metrics:
        rest["metrics"] = {
            k: Shown(unit=m.unit, form=m.form) for k, m in metrics.items()
        }
    rest["elsewhere"] = {}
    for name, (text, exact) in elsewhere.items():
        with note_failure(name, failed):
            whole = quality(first, second, text, work, exact)
            rest["elsewhere"][name] = _part(text, whole)
    if failed:
        rest["failed"] = failed
    for name, side in both.items():
        figures: dict[str, Any] = {}
        for key, metric in metrics.items():
            figures[key], figures[f"{key}_se"] = metric.measure(of[name], tokens.counts)
        rest[name] = ModelScores(
            **getattr(scores, name).content(),
            **speeds.get(name, {}),
            **figures,
            parameters=sum(p.numel() for p in side.model.parameters()),
            bytes=sum(file.stat().st_size for file in weight_files(side.folder)),
            blocks=side.stack.depth,
        )
    return EvaluationFile(
        samples=tokens.samples,
        tokens=tokens.tokens,
        kl=scores.kl,
        kl_se=scores.kl_se,
        nll_change_se=scores.nll_change_se,
        device=name_devices(original),
        dtype=original.dtype_name,
        threads=torch.get_num_threads(),
        **rest,
    )


def quality(
    original: AnyModel,
    cut: AnyModel,
    tokens: TokenSet,
    work: Work = PLAIN,
    exact: Floats | None = None,
) -> MixedScores:
    """Measure NLL and perplexity of both models and KL(original || cut), per token, in nats.

    Means are over tokens, standard errors over samples (a ratio estimator, linearised; for the
    perplexity by the delta method) and None for a single sample. Streamed models share buffers, and
    each is read once per chunk of samples; both heads are in memory together.

    Args:
        exact: KL of the exact cut, summed by sample, to compare ``cut`` with.

    Raises:
        ModelError: a loss is not finite, or has no finite perplexity.
    """
    sums = sample_sums(original, cut, tokens, work)
    scores = quality_of(sums, tokens)
    if exact is not None:
        scores.kl_above_cut, error = difference(exact, sums[2], tokens.counts)
        scores.kl_above_cut_se = without_infinities(error)
    return scores


def sample_sums(
    original: AnyModel, cut: AnyModel, tokens: TokenSet, work: Work = PLAIN
) -> Floats:
    """Compute (3, m): NLL of both models and KL(original || cut) per sample, summed over tokens.

    Raises:
        ModelError: as `quality`.
    """
    sums = np.zeros((3, tokens.samples))
    compute = partial(_sums_by_sample, original, cut)
    batches = tokens.batches(work.batch_tokens)
    limit = BatchLimit(original.device)
    description = "perplexity and KL on unseen text"
    with work.progress(description, len(batches)) as bar, torch.inference_mode():
        for chunk in _chunks((original, cut), batches):
            by_batch = split_to_fit(
                limit, batches[chunk], compute, lambda a, b: np.concatenate([a, b], 1)
            )
            for batch, values in zip(batches[chunk], by_batch, strict=True):
                sums[:, batch.index.tolist()] = values
                bar.advance(1)
    most = _MOST_NATS * tokens.counts
    for model, losses in zip((original, cut, cut), sums, strict=True):
        # Comparisons with NaN are false.
        finite = np.where(losses <= most, losses, np.nan)
        check_finite(model, tokens, finite, what="the perplexity")
    return sums


def _sums_by_sample(
    original: AnyModel, cut: AnyModel, batches: Sequence[TokenSet]
) -> list[Floats]:
    """Return for each micro-batch of R samples their sums (3, R) by `sum_losses`."""
    both = [_logits(model, batches) for model in (original, cut)]
    for model in (original, cut):
        if isinstance(model, StreamedReplay):
            model.store.hold(HEAD)
    return [
        sum_losses(
            split_predictions(before, batch), split_predictions(after, batch), batch
        )
        for batch, before, after in zip(batches, *both, strict=True)
    ]


def _chunks(models: Sequence[AnyModel], batches: Sequence[TokenSet]) -> Iterator[slice]:
    """Yield chunks of micro-batches; for models in memory, one at a time."""
    for model in models:
        if isinstance(model, StreamedReplay):
            return (chunk for chunk, _ in chunks(model, batches, _STREAMS))
    return (slice(b, b + 1) for b in range(len(batches)))


def _logits(model: AnyModel, batches: Sequence[TokenSet]) -> list[Iterator[Tensor]]:
    """Return for each micro-batch an iterator over the logits (T, V) of its samples."""
    if not isinstance(model, StreamedReplay):
        return [_read_logits(model, batch) for batch in batches]
    recordings = [model.record(batch.input_ids) for batch in batches]
    streams = [recording.entered for recording in recordings]
    for i in range(len(model)):
        for b, recording in enumerate(recordings):
            streams[b] = recording.block(i, streams[b])
    return [
        map(recording.logits, stream, range(len(stream)))
        for recording, stream in zip(recordings, streams, strict=True)
    ]


def _read_logits(model: PreTrainedModel, batch: TokenSet) -> Iterator[Tensor]:
    ids = batch.input_ids.to(model.device)
    yield from language_model(model)(input_ids=ids, use_cache=False).logits


def quality_of(sums: Floats, tokens: TokenSet) -> MixedScores:
    """Compute `quality` from sums (3, m) per sample: NLL of both models and KL."""
    nll_before, nll_after, kl = (sums.sum(1) / tokens.tokens).tolist()
    errors = standard_error(sums, tokens.counts).tolist()
    change = float(standard_error(sums[1] - sums[0], tokens.counts))
    parts = {}
    for name, rows in tokens.rows_by_part.items():
        own = tokens.select(rows)
        parts[name] = _part(own, quality_of(sums[:, rows], own))
    return MixedScores(
        before=perplexity(nll_before, errors[0]),
        after=perplexity(nll_after, errors[1]),
        kl=kl,
        kl_se=without_infinities(errors[2]),
        nll_change_se=without_infinities(change),
        parts=parts,
    )


def _part(tokens: TokenSet, whole: MixedScores) -> PartScores:
    scores = whole.model_dump(exclude={"parts"})
    return PartScores(samples=tokens.samples, tokens=tokens.tokens, **scores)


def perplexity(nll: float, error: float | None) -> Perplexity:
    """Return a loss in nats per token and its perplexity, each with its standard error if known."""
    value = float(np.exp(nll))
    error = np.nan if error is None else error
    return Perplexity(
        perplexity=value,
        perplexity_se=without_infinities(value * error),
        nll=nll,
        nll_se=without_infinities(error),
    )
