"""The training of a cut model: `healing.json`, and the files of an unfinished healing."""

from typing import Any, Literal

from isingcut.files.cuts import PatchedCut, PatchTuning, UnpatchedCut
from isingcut.files.evaluations import FurtherPart
from isingcut.files.schema import (
    Blocks,
    Count,
    Document,
    Number,
    Positive,
    Scalar,
    Some,
    Strict,
)


class HealedPart(FurtherPart):
    """The cut model's scores on unseen text, or one source of it, before or after healing.

    Attributes:
        kl_change_se, nll_change_se: paired standard errors of the changes by the healing.
    """

    original_perplexity: Positive
    kl_change_se: Positive | None = None
    nll_change_se: Positive | None = None


class HealedScores(HealedPart, Document, kind="healing-before"):
    """`HealedPart` on the whole text, and by source if it is a mixture.

    Attributes:
        kl_sums, nll_sums: losses of each sample, summed over its predictions.
    """

    parts: dict[str, HealedPart] = {}
    kl_sums: list[Number] = []
    nll_sums: list[Number] = []


class PatchScores(Document, kind="healing-patched"):
    """The scores after the linear patch alone; none if nothing could be patched."""

    scores: HealedScores | None = None
    changed: bool = True
    cuts: list[PatchedCut] = []
    unpatched: list[UnpatchedCut] = []
    tuning: PatchTuning | None = None


class Step(Strict):
    """A point of the training curve."""

    step: Count
    tokens: Count
    loss: Number


class HealingRecipe(Document, kind="healing-recipe"):
    """The settings of a training, from its options or from a budget of tokens or time.

    Attributes:
        steps: maximum number of optimiser steps, also the length of the learning-rate schedule; 0
            if the time is too short.
        batch: sequences per step, over all processes.
        length: tokens of the longest sequence.
        learning_rate: the highest learning rate.
        tokens: approximate tokens of all steps.
        seconds: time for all steps, at whose end the training ends; None without a budget in time.
        epochs: number of passes over the text.
    """

    steps: Count
    batch: Some
    length: Some
    learning_rate: Positive
    tokens: Count
    seconds: Positive | None
    epochs: Positive


class HealingCheck(Strict):
    """The KL to the original, summed over each unseen sample, at one step of a training."""

    step: Count
    kl_sums: list[Number]


class HealingStop(Strict):
    """The reason why a training ended early, and the step of the kept weights."""

    why: str
    kept: Count


class HealOptions(Strict):
    """The options of a healing."""

    __pydantic_extra__: dict[str, Scalar]
    patch: str
    method: str
    effort: str = ""
    length: Count | None = None


class HealingFile(Document, kind="healing"):
    """`healing.json`; ``layers`` as in `CutRecord`."""

    steps: list[Step]
    before: HealedScores
    after: HealedScores
    patch: PatchScores | None = None
    unpatched: list[UnpatchedCut] = []
    start: Literal["cut", "patched", "healed"] = "cut"
    tokens_seen: Count = 0
    recipe: HealingRecipe | None = None
    checks: list[HealingCheck] = []
    stopped: HealingStop | None = None
    removed: Blocks
    layers: Blocks | None = None
    of: Some
    length: Some | None = None
    report_samples: Count = 0
    report_tokens: Count
    provenance: dict[str, Any] = {}
    seconds: Positive = 0.0
    overlap: dict[str, Positive] = {}
    options: HealOptions


class HealingWork(Document, kind="healing-work"):
    """`identity.json` of an unfinished healing: fingerprint of all that its work depends on."""

    work: str


class HealingCurve(Document, kind="healing-curve"):
    """The training curve up to a saved state, and the plan of the other steps.

    Attributes:
        left: number of steps that follow.
        position: place in the learning-rate schedule; the number of steps unless there is a time.
        seconds: time of the training so far.
    """

    steps: list[Step]
    checks: list[HealingCheck]
    trained_parameters: Count
    left: Count
    position: Positive
    seconds: Positive


class HealingMemory(Document, kind="healing-memory"):
    """The memory plan of a training.

    Attributes:
        most: maximum tokens of a micro-batch, padding included; a single sample may have more.
        recompute: whether activations are recomputed in the backward pass.
    """

    most: Some
    recompute: bool
