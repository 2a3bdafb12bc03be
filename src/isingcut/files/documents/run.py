"""`run.json`: options, model, blocks, stages, provenance."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from isingcut.files.documents.states import (
    Blocks,
    Count,
    Document,
    Index,
    Number,
    Positive,
    Scalar,
    Some,
    Strict,
)

_MOST_BLOCKS = 4096
"""More blocks than any model has; what is drawn of a run grows with their square."""


class ModelIdentity(Strict):
    """The identity of the model that a run is of."""

    name: str
    sha256: str
    gguf_sha256: str | None = None


class SplitSize(Strict):
    """The size of one token split."""

    samples: Count
    tokens: Count


class CalibrationText(Strict):
    """The text of a run."""

    source: str
    sha256: str
    splits: dict[str, SplitSize]
    overlap: dict[str, Positive] = Field(default_factory=dict)


class Asked(Strict):
    """How measurements were asked to be computed."""

    attention: str
    batch_tokens: Some | None


class Computed(Strict):
    """How measurements were computed on one device."""

    asked: Asked
    # Of any other name transformers would fetch code from the hub.
    attention: Literal["sdpa", "eager", "causal"] | None
    batch_tokens: Some
    threads: Annotated[int, Field(ge=1, le=4096)] | None = None


class Places(Strict):
    """Where a local model lay when it was read."""

    absolute: str
    relative: str


class WeightsRead(Strict):
    """How often a streamed model was read, and which share of that came from host memory."""

    sweeps: Positive
    from_memory: Positive


class Provenance(Strict):
    """Where the figures of a run come from."""

    isingcut: str
    python: str
    torch: str
    transformers: str
    platform: str
    cpu: str
    command_line: str
    created: str
    model: ModelIdentity
    calibration: CalibrationText | None = None
    computed: dict[str, Computed] = Field(default_factory=dict)
    reading: dict[str, WeightsRead] = Field(default_factory=dict)
    model_path: Places | None = None
    dtype: str | None = None


class Config(Strict):
    """The options of a run; `RunConfig` knows the rest."""

    __pydantic_extra__: dict[str, Scalar]
    model: str
    remove: str = ""
    energy: str
    seed: int
    budget: str = ""
    linear: bool = False
    quick: bool = False


class StageOptions(Strict):
    """What a stage was made with, as far as it is read."""

    remove: str | int | None = None
    budget: str = ""
    removed: Blocks | None = None


class StageRecord(Strict):
    """The record of one stage."""

    stage: str
    done: bool
    fingerprint: str
    options: StageOptions
    seconds: Positive | None = None
    sha256: str | None = None
    # Where memory was short: the blocks were read from disk, so many tokens computed at a time.
    streamed: bool = False
    most_tokens: Some | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.done and self.seconds is None:
            raise ValueError("a finished stage needs its seconds")
        if self.stage == "excise" and self.options.removed is None:
            raise ValueError("a cut needs the blocks that are removed")
        return self


class BlockCosts(Strict):
    """One block and its costs."""

    index: Index
    kind: str
    parameters: Count
    bytes: Count
    active_parameters: Count = 0
    kv_bytes_per_token: Count = 0
    state_bytes: Count = 0
    latency_seconds: Positive | None = None


class LegalityRow(Strict):
    """A constraint that the architecture asks for; what `constraints.LinearConstraint` takes."""

    model_config = ConfigDict(extra="forbid")

    name: str
    coefficients: list[Number]
    sense: Literal["==", "<=", ">="]
    rhs: Number
    reason: str = ""


class BlockList(Strict):
    """The blocks of the model."""

    path: str
    blocks: Annotated[list[BlockCosts], Field(min_length=1, max_length=_MOST_BLOCKS)]
    total_parameters: Count
    total_bytes: Count
    legality: list[LegalityRow]

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if [b.index for b in self.blocks] != list(range(len(self.blocks))):
            raise ValueError("the blocks are not numbered from 0 in their order")
        if any(len(row.coefficients) != len(self.blocks) for row in self.legality):
            raise ValueError(f"legality needs a coefficient for each of {len(self.blocks)} blocks")
        return self


class RunFile(Document):
    """`run.json`."""

    kind: ClassVar = "run"
    config: Config
    stages: dict[str, StageRecord]
    blocks: BlockList
    provenance: Provenance
    complete: bool = False

    @model_validator(mode="after")
    def _below(self) -> Self:
        n = len(self.blocks.blocks)
        if any(b >= n for s in self.stages.values() if s.done for b in s.options.removed or ()):
            raise ValueError(f"a stage removes a block that is not among the {n}")
        return self
