"""Comparisons of models with the original on text and questions: `evaluation.json`,
`benchmarks.json`."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from isingcut.files.cuts import UnpatchedCut
from isingcut.files.schema import Count, Document, Number, Positive, Some, Strict


class Perplexity(Strict):
    """The perplexity of a model on a text."""

    perplexity: Positive
    perplexity_se: Positive | None
    nll: Number
    nll_se: Positive | None


class ModelScores(Perplexity):
    """The scores of one model of an evaluation; a streamed model has no speed."""

    prefill_tokens_per_second: Positive | None = None
    prefill_tokens_per_second_se: Positive | None = None
    decode_tokens_per_second: Positive | None = None
    decode_tokens_per_second_se: Positive | None = None
    parameters: Some
    bytes: Some
    blocks: Some


class Ending(Strict):
    """How one generated answer ended.

    Attributes:
        tokens: number of tokens without the end token.
        ended: whether an end token came before the limit.
        repeated: share of its sequences of four tokens that occurred before.
        likelihood: mean log-likelihood of its tokens and its end by the original, in nats per
            token; None in older files.
    """

    tokens: Count
    ended: bool
    repeated: Annotated[float, Field(ge=0, le=1)]
    likelihood: Number | None = None


class EndingPair(Strict):
    """How the answers of both models to one prompt ended."""

    before: Ending
    after: Ending


LEAST_LIKELIHOOD = 0.5
"""Least likelihood of an answered prompt's tokens by the original, of that of its own answer."""
MOST_REPEATED = 0.2
"""Share of repetition that an answered prompt may have in any case."""


class Endings(Strict):
    """How the greedy answers of both models ended."""

    pairs: Annotated[Sequence[EndingPair], Field(min_length=1)]

    @property
    def rated(self) -> list[Any]:
        """The pairs with likelihoods: none in older files."""
        return [pair for pair in self.pairs if pair.after.likelihood is not None]

    def answered(self, side: str) -> list[float]:
        """Return for each of the `rated` pairs 1 if the original could have given the answer.

        Such an answer ends by itself. It repeats no more than the original's answers that end: than
        their 95th percentile, or `MOST_REPEATED` if that is larger. By the original, its tokens and
        its end have on average at least `LEAST_LIKELIHOOD` of the likelihood of those of the
        original's own answer to the prompt (geometric means).

        A half, because nonsense passes a tenth: SmolLM2 without 6 of 30 blocks, patched, then
        answers 41 % of 71 prompts and the original 87; at a half 17 and 87.
        """
        own = sorted(p.before.repeated for p in self.pairs if p.before.ended) or [0.0]
        most = max(MOST_REPEATED, own[math.ceil(0.95 * len(own)) - 1])
        less = math.log(LEAST_LIKELIHOOD)
        return [
            float(
                (answer := getattr(pair, side)).ended
                and answer.repeated <= most
                and answer.likelihood >= pair.before.likelihood + less
            )
            for pair in self.rated
        ]

    def values(self, side: str, key: str) -> list[float]:
        """Return ``tokens``, ``ended``, ``repeated`` or ``answered`` ``before`` or ``after``."""
        if key == "answered":
            return self.answered(side)
        return [getattr(getattr(pair, side), key) for pair in self.pairs]

    def mean(self, side: str, key: str) -> float:
        """Return the mean of the `values`."""
        return fmean(self.values(side, key))

    def error(self, key: str) -> float | None:
        """Return the paired standard error of the change of a mean; None for a single prompt."""
        both = (self.values(side, key) for side in ("before", "after"))
        change = [after - before for before, after in zip(*both, strict=True)]
        return stdev(change) / len(change) ** 0.5 if len(change) > 1 else None

    @property
    def lost(self) -> float:
        """Share of the prompts answered by the original that the other model does not answer."""
        both = zip(self.answered("before"), self.answered("after"), strict=True)
        return fmean([not after for before, after in both if before] or [0.0])


class Answer(Ending):
    """One generated answer."""

    text: str


class AnswerPair(EndingPair):
    """The greedy answers of both models to one prompt."""

    prompt: str
    before: Answer
    after: Answer


class Answers(Endings):
    """The answers of both models to the user's prompts and then to fixed ones.

    Attributes:
        limit: most tokens of an answer.
        own: number of the user's prompts.
        chat: whether the prompts are turns of a conversation, by the model's chat template.
    """

    limit: Some
    own: Count = 0
    chat: bool = False
    pairs: Annotated[Sequence[AnswerPair], Field(min_length=1)]

    @property
    def shown(self) -> AnswerPair | None:
        """The pair to show first: the user's first prompt, else the first one that the final model
        answers, in the order of the prompts; None if it answers none."""
        if self.own:
            return self.pairs[0]
        found = zip(self.rated, self.answered("after"), strict=True)
        return next((pair for pair, answered in found if answered), None)

    @property
    def ordered(self) -> list[AnswerPair]:
        """All pairs, the one to show first before the others."""
        return sorted(self.pairs, key=lambda pair: pair is not self.shown)


class PairScores(Strict):
    """Scores of the original and of another model on the same text.

    Attributes:
        nll_change_se: paired standard error of the difference of the NLLs.
        kl_above_cut: KL minus that of the exact cut, with its paired standard error; measured on
            unrelated texts, for a model that is not the exact cut.
    """

    before: Perplexity
    after: Perplexity
    kl: Number
    kl_se: Positive | None
    nll_change_se: Positive | None = None
    kl_above_cut: Number | None = None
    kl_above_cut_se: Positive | None = None

    @property
    def harmed(self) -> bool:
        """Whether the model is worse than the exact cut, by more than two standard errors."""
        above = self.kl_above_cut
        error = self.kl_above_cut_se
        return above is not None and error is not None and above > 2 * error


class PartScores(PairScores):
    """`PairScores` on one source of a mixture."""

    samples: Some
    tokens: Some


class MixedScores(PairScores):
    """`PairScores` on the whole text, and by source if it is a mixture."""

    parts: dict[str, PartScores] = {}


class FurtherPart(Perplexity):
    """Scores of one more model, such as the exact cut, on a text or one source of a mixture."""

    kl: Number
    kl_se: Positive | None


class FurtherScores(FurtherPart):
    """`FurtherPart` on the whole text, and by source if it is a mixture."""

    parts: dict[str, FurtherPart] = {}
    elsewhere: dict[str, FurtherPart] = {}


class PackedScores(FurtherScores):
    """`FurtherScores` of the cut GGUF file, unpacked to bfloat16."""

    bytes: Some


class Shown(Strict):
    """How tables show the figures of a metric: their unit and format specification."""

    unit: str
    form: str


class EvaluationFile(MixedScores, Document, kind="evaluation"):
    """`evaluation.json`.

    Attributes:
        last: name of the final model, whose scores are in ``after``; None for a GGUF file that no
            run cut.
        cut, patched: scores of the exact cut and of the patched model, if these are not the last.
        failed: reasons why parts, such as the answers or `model.gguf`, were not measured.
        elsewhere: scores on unrelated texts, which no choice or fit used.
        not_measured: keys of speeds that were not measured.
        metrics: further figures of ``before`` and ``after``, by their keys there.
        streamed: whether a model was read from disk block by block, so that its speed is unknown.
    """

    last: Literal["cut", "patched", "healed"] | None = None
    unpatched: list[UnpatchedCut] = []
    cut: FurtherScores | None = None
    patched: FurtherScores | None = None
    gguf: PackedScores | None = None
    failed: dict[str, str] = {}
    samples: Some
    tokens: Some
    before: ModelScores
    after: ModelScores
    elsewhere: dict[str, PartScores] = {}
    answers: Answers | None = None
    device: str
    dtype: str
    threads: Some | None = None
    not_measured: list[str] = []
    metrics: dict[str, Shown] = {}
    streamed: bool = False


class PairedScores(Strict):
    """Scores of two models on the same questions.

    Attributes:
        original, cut: mean scores.
        difference: cut minus original, with the ends of its 95 % interval.
        n: number of questions.
        p_value: two-sided p-value of the test ``mcnemar`` or ``bootstrap``.
        more_than_noise: whether the difference is significant at the 5 % level, for this comparison
            alone.
    """

    original: Number
    original_se: Positive | None
    cut: Number
    cut_se: Positive | None
    difference: Number
    difference_low: Number
    difference_high: Number
    n: Count
    p_value: Number
    test: str = ""
    more_than_noise: bool


class Percent(Strict):
    """A figure in percent, with the ends of its 95 % interval; None for an end without a bound."""

    percent: Number
    low: Number | None
    high: Number | None


class Flips(Strict):
    """How the answers of a model differ from the original's, question by question.

    Attributes:
        changed: questions with another answer: another picked choice or another extracted text.
        right_to_wrong, wrong_to_right: questions that only the original, or only the model, has
            right.
        kept: score above chance, of the original's; None if the original's is not above chance.
        choice_kl: mean KL of the model's distribution over the choices to the original's, in nats
            per question; None without choices.
    """

    changed: Percent
    right_to_wrong: Percent
    wrong_to_right: Percent
    kept: Percent | None
    choice_kl: Number | None


class TaskRow(PairedScores):
    """The scores of both models on one benchmark task; flips if each answer is right or wrong.

    Attributes:
        questions_sha: fingerprint of the scored questions, in order; empty in older files.
        endings: how each generated answer ended, in the order of the questions.
    """

    task: str
    questions_sha: str = ""
    metric: str
    shots: Count
    flips: Flips | None = None
    endings: list[EndingPair] = []


class BenchmarksFile(Document, kind="benchmarks"):
    """`benchmarks.json`.

    Attributes:
        engine: package that made prompts and scores, with its version.
        seed: seed of the examples in prompts.
        template_sha: fingerprint of the chat template, if a task used it.
        left_out: number of questions that had been used for the choice.
        failed: reasons why tasks have no row.
    """

    rows: list[TaskRow]
    engine: str
    seed: Count | None = None
    template_sha: str = ""
    left_out: Count = 0
    failed: dict[str, str] = {}

    @property
    def tasks(self) -> list[str]:
        """The tasks that are in the file, with a row or the reason why they have none."""
        return [*(row.task for row in self.rows), *self.failed]

    def add(self, earlier: Self) -> None:
        """Add the other tasks of an earlier file, before its own."""
        own = {*self.tasks}
        self.rows = [row for row in earlier.rows if row.task not in own] + self.rows
        failed = {k: v for k, v in earlier.failed.items() if k not in own} | self.failed
        if failed:
            self.failed = failed
        if template := self.template_sha or earlier.template_sha:
            self.template_sha = template

    @property
    def endings(self) -> list[EndingPair]:
        """How the generated answers to all tasks ended."""
        return [pair for row in self.rows for pair in row.endings]
