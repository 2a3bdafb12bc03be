"""A run's options, provenance, blocks and stages: `run.json`.

One more document describes a whole run: `packing.json`.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from isingcut.files.schema import (
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
"""Limit above the blocks of any model. The size of a run's plots grows with their square."""


class ModelIdentity(Strict):
    """The identity of a run's model.

    Attributes:
        parts: a hash of the weights, and of each file of config, tokenizer and chat template.
        weight_bytes: bytes of the user's weights on disk: of a GGUF file, or of safetensors files.
    """

    sha256: str
    parts: dict[str, str] = {}
    weight_bytes: Count = 0
    gguf_sha256: str | None = None
    name: str


class SplitSize(Strict):
    """The size of one token split."""

    samples: Count
    tokens: Count
    parts: dict[str, SplitSize] = {}


class CalibrationText(Strict):
    """The calibration text of a run.

    Attributes:
        overlap: share of long passages of a split that are in another split too.
        repeats: the same for runs of 8 tokens; empty if tokens are about a character each.
    """

    source: str
    sha256: str
    splits: dict[str, SplitSize]
    overlap: dict[str, Positive] = {}
    repeats: dict[str, Positive] = {}


class Computed(Strict):
    """The tokens of a micro-batch of measurements on one device: requested, and computed with."""

    requested: Some | None
    batch_tokens: Some


class Places(Strict):
    """The absolute and the relative path of a local model when it was read."""

    absolute: str
    relative: str


class Provenance(Strict):
    """The versions, the machine and the inputs that a run's results were made with."""

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
    computed: dict[str, Computed] = {}
    model_path: Places | None = None
    dtype: str | None = None


class Config(Strict):
    """The options of a run, as far as they are read here."""

    __pydantic_extra__: dict[str, Scalar]
    model: str
    remove: str = ""
    energy: str
    seed: int
    budget: str = ""
    quick: bool = False


class StageOptions(Strict):
    """The options of a stage, as far as isingcut reads them."""

    remove: str | int | None = None
    budget: str = ""
    removed: Blocks | None = None
    # Whether the user named the removed blocks.
    named: bool = False
    texts: dict[str, Any] = {}
    # The user's prompts of an evaluation, by their number.
    prompts: dict[str, Any] = {}


class StageRecord(Strict):
    """The record of one stage."""

    stage: str
    done: bool
    fingerprint: str
    options: StageOptions
    seconds: Positive | None = None
    sha256: str | None = None
    # The blocks that a ranking chose.
    chosen: Blocks | None = None
    # Whether memory was short, so that blocks were read from disk.
    streamed: bool = False

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.done and self.seconds is None:
            raise ValueError("a finished stage lacks its seconds")
        if self.stage == "cut" and self.options.removed is None:
            raise ValueError("a cut lacks its removed blocks")
        return self


class BlockCosts(Strict):
    """One removable block of the residual stream, and its costs.

    Attributes:
        index: position in the stack, from 0.
        kind: its token mixers and feed-forward, joined by ``+``: ``"attention+mlp"``,
            ``"sliding-attention+moe"``, ``"mamba2"``, ``"mlp"``, ...
        parameters: number of parameters.
        bytes: their size in their current dtype, or as stored.
        active_parameters: number of parameters used for one token (top-k of the experts).
        kv_bytes_per_token: what a token adds to the cache of transformers, in the model's dtype.
        window: tokens after which it adds `kv_bytes_past_window` only; 0 for other kinds.
        state_bytes: recurrent and convolution state per sequence, in the model's dtype.
        latency_seconds: time on one sequence, if measured.
        decode_seconds: time in a decoding step, if measured.
        path: module path of its layer in the loaded model, for example ``"model.layers.3"``.
    """

    index: Index
    kind: str
    parameters: Count
    bytes: Count
    active_parameters: Count = 0
    kv_bytes_per_token: Count = 0
    window: Count = 0
    kv_bytes_past_window: Number = 0.0
    state_bytes: Count = 0
    latency_seconds: Positive | None = None
    decode_seconds: Positive = 0.0
    path: str = ""

    @property
    def layer(self) -> int:
        """Number of its layer: its own, unless layers are split into sublayers."""
        number = self.path.rpartition(".")[2]
        return int(number) if number.isdecimal() else self.index


class LegalityRow(Strict):
    """A constraint of the architecture: the arguments of `constraints.LinearConstraint`."""

    model_config = ConfigDict(extra="forbid")

    name: str
    coefficients: list[Number]
    sense: Literal["==", "<=", ">="]
    rhs: Number
    reason: str = ""


class PackedModel(Strict):
    """The size of a whole model in a GGUF file.

    Attributes:
        type: GGUF type of the packed weights, such as "Q5_0"; "" if they are not packed.
        bytes: bytes of each block in the file.
        read: bytes of each block that are read per token.
        other: bytes outside the blocks.
        read_other: bytes outside the blocks that are read per token.
        read_before: bytes of weights that the unpacked model reads per token.
    """

    type: str
    bytes: list[Count]
    read: list[Count]
    other: Count
    read_other: Count
    read_before: Count

    def size(self, removed: Blocks) -> int:
        """Return the bytes of the file without the removed blocks."""
        return self.other + sum(
            size for i, size in enumerate(self.bytes) if i not in removed
        )


class BlockList(Strict):
    """The blocks of the model.

    Attributes:
        timed_tokens: context of the latency budget that they were timed for; 0 without one.
        decoded_tokens: context of the speed budget, likewise; None without one.
        decode_seconds: time of a decoding step of the whole model, if measured.
    """

    path: str
    blocks: Annotated[list[BlockCosts], Field(min_length=1, max_length=_MOST_BLOCKS)]
    total_parameters: Count
    total_bytes: Count
    legality: list[LegalityRow]
    packed: PackedModel | None = None
    timed_tokens: Count = 0
    decoded_tokens: Count | None = None
    decode_seconds: Positive = 0.0

    @property
    def halves(self) -> list[bool]:
        """Whether each block is a sublayer, a part of its layer."""
        layers = Counter(block.layer for block in self.blocks)
        return [layers[block.layer] > 1 for block in self.blocks]

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if [b.index for b in self.blocks] != list(range(len(self.blocks))):
            raise ValueError("the blocks are not numbered 0, 1, 2, ...")
        if any(len(row.coefficients) != len(self.blocks) for row in self.legality):
            raise ValueError(
                f"legality needs a coefficient for each of {len(self.blocks)} blocks"
            )
        return self


class PackedLosses(Strict):
    """The KL on the ranking text of a model packed as one type, whole and with removed blocks.

    Attributes:
        packed: size of the whole model in this type.
        kl: KL of the whole model, None if it was not measured.
        fits: whether the whole model meets the budget.
        removed: removed blocks of the best one-pass state that meets the budget.
        cut_kl: KL of that state, not packed.
        measured: KL of that state, patched and packed.
    """

    packed: PackedModel
    kl: Number | None = None
    kl_se: Positive | None = None
    fits: bool = False
    removed: Blocks = []
    cut_kl: Number | None = None
    measured: Number | None = None
    measured_se: Positive | None = None

    @property
    def predicted(self) -> float | None:
        """The estimated KL of the state, packed: ``kl`` plus ``cut_kl``, if both are known."""
        return None if self.kl is None or self.cut_kl is None else self.kl + self.cut_kl

    @property
    def loss(self) -> float:
        """The measured KL of the model or state that meets the budget; infinite if unknown."""
        kl = self.kl if self.fits else self.measured
        return float("inf") if kl is None else kl


class PackingFile(Document, kind="packing"):
    """`packing.json`: the GGUF types that were measured for a budget.

    Attributes:
        chosen: index of the chosen type.
    """

    budget: str
    types: Annotated[list[PackedLosses], Field(min_length=1)]
    chosen: Count

    @property
    def best(self) -> PackedLosses:
        """The chosen type."""
        return self.types[self.chosen]


class RunFile(Document, kind="run", version=2):
    """`run.json`: options, provenance, blocks, and one record per stage by its file's name."""

    config: Config
    stages: dict[str, StageRecord]
    blocks: BlockList
    provenance: Provenance
    complete: bool = False

    @model_validator(mode="after")
    def _below(self) -> Self:
        n = len(self.blocks.blocks)
        if any(
            b >= n
            for s in self.stages.values()
            if s.done
            for b in s.options.removed or ()
        ):
            raise ValueError(f"a stage removes a block outside 0 to {n - 1}")
        return self
