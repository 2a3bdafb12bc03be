"""Comparisons of models with the original on text and questions: `evaluation.json`,
`benchmarks.json`."""

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Annotated, Literal, Self

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
    """

    tokens: Count
    ended: bool
    repeated: Annotated[float, Field(ge=0, le=1)]


class EndingPair(Strict):
    """How the answers of both models to one prompt ended."""

    before: Ending
    after: Ending


class Endings(Strict):
    """How the greedy answers of both models ended."""

    pairs: Annotated[Sequence[EndingPair], Field(min_length=1)]

    def mean(self, side: str, key: str) -> float:
        """Return the mean of ``tokens``, ``ended`` or ``repeated`` ``before`` or ``after``."""
        return fmean(getattr(getattr(pair, side), key) for pair in self.pairs)

    def error(self, key: str) -> float | None:
        """Return the paired standard error of the change of a mean; None for a single prompt."""
        change = [getattr(p.after, key) - getattr(p.before, key) for p in self.pairs]
        return stdev(change) / len(change) ** 0.5 if len(change) > 1 else None

    @property
    def lost(self) -> float:
        """What got worse: the share of the original's ends that are lost, or the share of sequences
        that became repetitions, whichever is larger."""
        ended = [not pair.after.ended for pair in self.pairs if pair.before.ended]
        more = self.mean("after", "repeated") - self.mean("before", "repeated")
        return max(fmean(ended or [0.0]), more)


class Answer(Ending):
    """One generated answer."""

    text: str


class AnswerPair(EndingPair):
    """The greedy answers of both models to one prompt."""

    prompt: str
    before: Answer
    after: Answer


class Answers(Endings):
    """The answers of both models to fixed prompts, of at most ``limit`` tokens."""

    limit: Some
    pairs: Annotated[Sequence[AnswerPair], Field(min_length=1)]


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
