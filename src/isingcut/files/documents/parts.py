"""What several documents hold alike: numbers, lists of blocks, losses."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

# A number whose square and sums are finite too: a report scales, adds and draws them.
Number = Annotated[float, Field(ge=-1e30, le=1e30)]
Positive = Annotated[float, Field(ge=0, le=1e30)]
Count = Annotated[int, Field(ge=0, le=10**18)]
Some = Annotated[int, Field(ge=1, le=10**18)]
Scalar = str | int | float | bool | None


def _distinct(blocks: list[int]) -> list[int]:
    if len(set(blocks)) < len(blocks):
        raise ValueError("a block is named twice")
    return blocks


Index = Annotated[int, Field(ge=0, le=2**31)]
Blocks = Annotated[list[Index], Field(max_length=2**20), AfterValidator(_distinct)]


class Strict(BaseModel):
    """An object inside a document: strict types, finite numbers, unknown keys let through."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class MeasuredLoss(Strict):
    """KL and NLL in nats per token, with standard errors over samples."""

    kl: Number
    kl_se: Positive | None
    nll: Number
    nll_se: Positive | None


class Perplexity(Strict):
    """A model on some text."""

    perplexity: Positive
    perplexity_se: Positive | None
    nll: Number
    nll_se: Positive | None


class PatchedCut(Strict):
    """What was folded into the block before one cut; older files do not say whether it changed."""

    removed: list[Index] | None = None
    block: Index
    layer: str
    changed: bool = True
    held_out_error_left: Number | None = None
    tokens: Count | None = None


class TunedLayer(Strict):
    """A layer beside a cut."""

    block: Index
    layer: str


class PatchTuning(Strict):
    """What tuning a patch came to, KL before and after each reading; or why there was none."""

    left_out: str = ""
    layers: list[TunedLayer] = Field(default_factory=list)
    steps: Count = 0
    predictions: Count = 0
    held_out_predictions: Count = 0
    held_out_kl: list[Number] = Field(default_factory=list)


class UnpatchedCut(Strict):
    """A cut without a patch: its first and last block, and why."""

    removed: list[Index]
    reason: str


class CutProof(Strict):
    """What the comparison of a checkpoint with its original showed."""

    inputs: str
    difference: Positive
    remarks: list[str]
