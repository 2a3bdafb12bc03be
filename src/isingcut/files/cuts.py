"""A cut checkpoint, its patch and its proof: `isingcut.json` in its folder."""

from typing import Annotated, Self

from pydantic import Field, model_validator

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


class PatchedCut(Strict):
    """The map that was folded into the block before one cut.

    Attributes:
        reads: whether it maps the layer's input; else its output, for which less memory suffices.
    """

    removed: list[Index] | None = None
    block: Index
    layer: str
    ridge: Number | None = None
    held_out_error_left: Number | None = None
    exact: bool = False
    reads: bool = True
    tokens: Count | None = None
    changed: bool = True


class TunedLayer(Strict):
    """A tuned layer next to a cut."""

    block: Index
    layer: str


class PatchTuning(Strict):
    """The result of tuning a patch: the KL before and after, or why it was not tuned.

    Attributes:
        of: number of layers that could be tuned, if memory did not suffice for all.
    """

    left_out: str = ""
    of: Count = 0
    layers: list[TunedLayer] = []
    steps: Count = 0
    predictions: Count = 0
    held_out_predictions: Count = 0
    held_out_kl: list[Number] = []


class UnpatchedCut(Strict):
    """A cut without a patch: its first and last block, and the reason."""

    removed: list[Index]
    reason: str


class CutProof(Strict):
    """The result of comparing a checkpoint with its original."""

    inputs: str
    difference: Positive
    remarks: list[str]


class FittedText(Strict):
    """The text that a patch was fitted on.

    Attributes:
        searched: samples that the energy was measured on.
        mixed: tokens of the default text, added to a text of the user's.
        unmixed: reason why none was added although an option requests it.
    """

    source: str
    samples: Count
    searched: Count
    mixed: Count = 0
    unmixed: str = ""
    tokens: Count
    requested: Count
    short: str


class PatchRecord(Strict):
    """The patched layers of a cut, the text of the fit, and the proof."""

    unpatched: list[UnpatchedCut]
    maps: str = ""
    changed: bool
    cuts: list[PatchedCut]
    tuning: PatchTuning | None = None
    proof: CutProof | None = None
    text: FittedText | None = None


class CardParts(Strict):
    """The parts of a cut checkpoint's model card.

    Attributes:
        mtp: layers for multi-token prediction in the original.
        drop_mtp: whether the cut checkpoint lacks these layers.
        sublayers: the removed sublayers in words, if the blocks are sublayers.
    """

    base_model: str | None
    name: str
    removed: Blocks
    total: Some
    how: str
    measured: str
    from_gguf: bool
    loads_with: Annotated[str, Field(pattern=r"^[A-Za-z]\w{0,99}$")]
    isingcut: str
    energy: str
    rows: list[Annotated[list[str], Field(min_length=2, max_length=2)]]
    proof: str = "text"
    patch: PatchRecord | None = None
    mtp: Count = 0
    drop_mtp: bool = False
    sublayers: str = ""


class CutRecord(Document, kind="removal"):
    """`isingcut.json` in the folder of a cut checkpoint.

    Attributes:
        layers: if the blocks are sublayers, the layers of which all were removed.
    """

    removed: Blocks
    layers: Blocks | None = None
    of: Annotated[int, Field(ge=1, le=2**20)]
    model: dict[str, Scalar | dict[str, str]] = {}
    card: CardParts | None = None
    proof: CutProof | None = None
    patch: PatchRecord | None = None

    @model_validator(mode="after")
    def _check_blocks(self) -> Self:
        if any(b >= self.of for b in self.removed):
            raise ValueError(f"a removed block is outside 0 to {self.of - 1}")
        return self
